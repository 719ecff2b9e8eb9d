"""prime-rl: its contract, what a custom loss is given."""

import dataclasses
import json
import math

import pytest
import torch
from support.trainers import CLIP, assert_same, case, formula

from r2vpo_kernels import RatioStats


@dataclasses.dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@pytest.fixture
def load(stand_in):
    """A fresh process's loss."""

    def load(inputs=LossInputs):
        loss = {"LossInputs": inputs, "LossOutputs": LossOutputs}
        return stand_in("prime_rl", prime_rl__trainer__rl__loss=loss).r2vpo_loss_fn

    return load


@pytest.fixture
def prime_rl(load):
    return load()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_prime_rl(prime_rl, level, weighted):
    """One call a sample; the sum over samples, divided outside, is the packed batch's loss. Packed
    beside distillation, RL samples come with reference log-probs of zero."""
    logps, old, advantages, mask, _ = case(4, 7, seed=2)
    weights = 0.5 + torch.rand(4, 7, dtype=torch.float64)
    losses = []
    for i in range(4):
        ref = None if i % 2 else torch.zeros(7, dtype=torch.float64)
        given = LossInputs(logps[i], old[i], ref, advantages[i], mask[i])
        if weighted:
            given.loss_weights = weights[i]
        out = prime_rl(given, variance_coef=1.5, ratio_level=level)
        assert out.loss.dim() == 0 and all(x.dim() == 0 for x in out.metrics.values())
        assert all(x.isfinite() for x in out.metrics.values())
        assert not any(name.startswith("kl/ref") for name in out.metrics)
        losses.append(out.loss)
    terms = formula(logps, old, advantages, mask, coef=1.5, level=level)
    assert_same(sum(losses), (terms * weights if weighted else terms).sum(), logps)


def test_prime_rl_clips(prime_rl):
    logps, old, advantages, mask, _ = (x[0] for x in case(4, 7, seed=2))
    out = prime_rl(LossInputs(logps, old, None, advantages, mask), **CLIP)
    terms = formula(logps, old, advantages, mask, coef=0.0, clip=CLIP["clip_range"])
    assert_same(out.loss, terms.sum(), logps)
    assert out.metrics["clip/low"] + out.metrics["clip/high"] > 0


def test_prime_rl_dual(load, tmp_path):
    """Two optimizer steps of three samples each; then the run resumes."""
    logps, old, advantages, mask, _ = case(6, 7, seed=2)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    file = tmp_path / "lambda.json"
    dual = {"variance_target": 0.2, "variance_coef": 0.8, "variance_coef_file": str(file)}

    def step(loss_fn, rows, coef):
        for i in rows:
            out = loss_fn(LossInputs(logps[i], old[i], None, advantages[i], mask[i]), **dual)
            assert out.metrics["variance_coef"].item() == pytest.approx(coef, rel=1e-6)
            expected = formula(logps, old, advantages, mask, coef=coef)[i].sum()
            torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
        optimizer.step()
        d = torch.where(mask, logps - old, 0.0)[list(rows)].expm1()
        v = (d.square().sum() / mask[list(rows)].sum()).item()
        assert 0.05 < abs(v / 0.2 - 1) < 0.9
        return coef * math.exp(0.1 * min(v / 0.2 - 1, 1))

    loss_fn = load()
    coef = step(loss_fn, range(3), 0.8)
    coef = step(loss_fn, range(3, 6), coef)
    assert json.loads(file.read_text())["variance_coef"] == pytest.approx(coef, rel=1e-6)
    step(load(), range(3), coef)


def test_prime_rl_waits_for_no_rank_without_a_dual(prime_rl, monkeypatch):
    """A rank may have no RL token in a step; its loss is not called then."""
    summed = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(RatioStats, "all_reduce", lambda self, group: summed.append(group) or self)
    logps, old, advantages, mask, _ = (x[0] for x in case())
    given = LossInputs(logps, old, None, advantages, mask)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    prime_rl(given, variance_coef=1.0)
    optimizer.step()
    assert summed == []
    assert prime_rl(given, variance_coef=1.0).metrics["step/ratio_var"] > 0
    prime_rl(given, variance_target=0.1)
    optimizer.step()
    assert summed == [None]


def test_prime_rl_bad_input(prime_rl):
    logps, old, advantages, mask, ref = (x[0] for x in case())
    with pytest.raises(ValueError, match="inference_logprobs: got None"):
        prime_rl(LossInputs(logps, None, None, advantages, mask))
    good = LossInputs(logps, old, ref, advantages, mask)
    with pytest.raises(ValueError, match="center: got 'group'"):
        prime_rl(good, center="group")
    with pytest.raises(TypeError, match="variance_coeff: got an unknown keyword"):
        prime_rl(good, variance_coeff=1.0)
    for name, value in {"kl_coef": 0.1, "kl_estimator": "k2", "kl_unbiased": True}.items():
        with pytest.raises(ValueError, match=f"{name}: got .* expected it unset: prime-rl"):
            prime_rl(good, **{name: value})
    with pytest.raises(ValueError, match="clip_range: got None, expected ε"):
        prime_rl(good, policy_loss="clip")
    with pytest.raises(ValueError, match="variance_target: got -1"):
        prime_rl(good, variance_target=-1.0)


def test_prime_rl_names_what_it_lacks(load):
    lacking = dataclasses.make_dataclass("LossInputs", ["trainer_logprobs", "advantages"])
    message = r"prime-rl: got version 0.8.0, .* LossInputs without inference_logprobs; .* tested"
    with pytest.raises(ImportError, match=message):
        load(lacking)
