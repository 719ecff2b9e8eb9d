"""prime-rl: its contract, what a custom loss is given."""

import dataclasses

import pytest
import torch
from support.trainers import CLIP, assert_same, case, formula


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
def prime_rl(stand_in):
    loss = {"LossInputs": LossInputs, "LossOutputs": LossOutputs}
    return stand_in("prime_rl", prime_rl__trainer__rl__loss=loss).r2vpo_loss_fn


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_prime_rl(prime_rl, level, weighted):
    """One call a sample; the sum over samples, divided outside, is the packed batch's loss."""
    logps, old, advantages, mask, ref = case(4, 7, seed=2)
    weights = 0.5 + torch.rand(4, 7, dtype=torch.float64)
    losses = []
    for i in range(4):
        given = LossInputs(logps[i], old[i], ref[i], advantages[i], mask[i])
        if weighted:
            given.loss_weights = weights[i]
        out = prime_rl(given, variance_coef=1.5, ratio_level=level, kl_coef=0.1, kl_estimator="k2")
        assert out.loss.dim() == 0 and all(x.dim() == 0 for x in out.metrics.values())
        assert all(x.isfinite() for x in out.metrics.values())
        losses.append(out.loss)
    r = torch.where(mask, logps, 0.0) - torch.where(mask, ref, 0.0)
    terms = formula(logps, old, advantages, mask, coef=1.5, level=level) + 0.1 * r**2 / 2
    assert_same(sum(losses), (terms * weights if weighted else terms).sum(), logps)


def test_prime_rl_clips_and_weights_the_kl(prime_rl):
    logps, old, advantages, mask, ref = (x[0] for x in case(4, 7, seed=2))
    given = LossInputs(logps, old, ref, advantages, mask)
    out = prime_rl(given, **CLIP, kl_coef=0.1, kl_estimator="k2", kl_unbiased=True)
    r, delta = (torch.where(mask, logps - x, 0.0) for x in (ref, old))
    terms = formula(logps, old, advantages, mask, coef=0.0, clip=CLIP["clip_range"])
    assert_same(out.loss, (terms + 0.1 * delta.exp() * r**2 / 2).sum(), logps)
    assert out.metrics["clip/low"] + out.metrics["clip/high"] > 0


def test_prime_rl_bad_input(prime_rl):
    logps, old, advantages, mask, _ = (x[0] for x in case())
    with pytest.raises(ValueError, match="inference_logprobs: got None"):
        prime_rl(LossInputs(logps, None, None, advantages, mask))
    good = LossInputs(logps, old, None, advantages, mask)
    with pytest.raises(ValueError, match="center: got 'group'"):
        prime_rl(good, center="group")
    with pytest.raises(TypeError, match="variance_coeff: got an unknown keyword"):
        prime_rl(good, variance_coeff=1.0)
    for options in ({"kl_coef": 0.1}, {"kl_unbiased": True}):
        with pytest.raises(ValueError, match="ref_logps: got None"):
            prime_rl(good, **options)
    with pytest.raises(ValueError, match="clip_range: got None, expected ε"):
        prime_rl(good, policy_loss="clip")
