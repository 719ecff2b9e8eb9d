"""The specification against an independent oracle and the hand-derived gradients, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from support.harness import OBJECTIVE_DEFAULTS
from support.oracle import loss_and_stats
from support.strategies import IGNORE, cases
from torch import Tensor

from r2vpo_kernels import (
    SamplingMask,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    reference,
    token_logps,
)
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective
from r2vpo_kernels.reference import Tokens

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def for_the_oracle(case, labels: Tensor, keywords: dict):
    """The drawn keywords, per token, as the oracle reads them."""
    n, rows = case.tokens, range(case.batch)
    sequences = [list(range(b * case.length, (b + 1) * case.length)) for b in rows]

    def per_token(name, default):
        value = keywords.get(name, default)
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.dim() == 0:
            return [float(value)] * n
        if value.numel() == n and value.shape == labels.shape:
            return value.double().reshape(-1)
        return value.double().repeat_interleave(case.length)

    if "group_size" in keywords:
        group = [b // keywords["group_size"] for b in rows]
    else:
        group = keywords.get("group_ids", torch.zeros(case.batch, dtype=torch.long)).tolist()
    mask = keywords.get("mask")
    center = keywords["center"]
    k = {
        name: keywords.get(name, default)
        for name, default in {
            "reduction": None, "normalizer": None, "ratio_level": None, "kl_coef": 0.0,
            "kl_estimator": "k3", "kl_unbiased": False, "entropy_coef": 0.0,
            "log_ratio_clamp": 20.0, "policy_loss": "ratio", "clip_range": None, "dual_clip": None,
        }.items()
    }  # fmt: skip
    k |= {
        "mask": [True] * n if mask is None else [bool(m) for m in mask.reshape(-1)],
        "old_logps": per_token("old_logps", None),
        "advantages": per_token("advantages", 0.0),
        "importance_weights": per_token("importance_weights", 1.0),
        "variance_coef": per_token("variance_coef", 0.5),
        "temperature": per_token("temperature", 1.0),
        "ref_logps": per_token("ref_logps", None),
        "center": center if isinstance(center, str) else "given",
        "means": center.double() if isinstance(center, Tensor) else [1.0] * 9,
        "group": [group[b] for b in rows for _ in range(case.length)],
        "words": words_of(labels, keywords.get("sampling_mask")),
    }
    return sequences, k


def words_of(labels: Tensor, mask: SamplingMask | None) -> list[list[int] | None]:
    """Those that each token was sampled from; None is all."""
    if mask is None:
        return [None] * labels.numel()
    ids, offsets = mask.token_ids.tolist(), mask.offsets.tolist()
    sets = [ids[begin:end] for begin, end in itertools.pairwise(offsets)]
    # No set is empty that has its label; one without it is the full vocabulary.
    return [x if y in x else None for x, y in zip(sets, labels.reshape(-1).tolist(), strict=True)]


@settings(max_examples=100)
@given(cases(dtype=torch.float32, vocabulary=7))
def test_the_specification_is_what_the_oracle_says(case):
    logits, labels, keywords = case.tensors(torch.device("cpu"))
    logits = logits.double().requires_grad_()
    out = r2vpo_loss(logits, labels, backend="eager", **keywords)
    upstream = torch.linspace(1.0, 2.0, out.loss.numel()).double().reshape(out.loss.shape)
    (gradient,) = torch.autograd.grad(out.loss, logits, upstream)

    sequences, k = for_the_oracle(case, labels, keywords)
    flat = logits.detach().reshape(-1, case.vocabulary).requires_grad_()
    loss, stats = loss_and_stats(flat, labels.reshape(-1).tolist(), sequences, k)
    loss = torch.stack(loss).reshape(out.loss.shape) if k["reduction"] == "none" else loss
    loss = torch.as_tensor(loss, dtype=torch.float64)
    torch.testing.assert_close(out.loss, loss, **CLOSE)
    if loss.requires_grad:
        (expected,) = torch.autograd.grad(loss, flat, upstream)
        torch.testing.assert_close(gradient.reshape(expected.shape), expected, **CLOSE)
    else:
        assert not gradient.any()
    for group, moments in stats.items():
        ours = [x[group].item() for x in (out.stats.weight, out.stats.d_sum, out.stats.d_sq_sum)]
        assert ours == pytest.approx(moments, rel=1e-9, abs=1e-11)


def by_hand(logits: Tensor, tokens: Tokens, with_entropy: bool) -> Tensor:
    """dL/dlogits by docs/derivation: Eq. 7 to 9 and 11."""
    logp, entropy = reference.token_logps(
        logits, tokens.labels, tokens.temperature, with_entropy, tokens.support
    )
    raw = torch.zeros_like(logp) if tokens.old_logps is None else logp - tokens.old_logps
    if tokens.ratio_level == "sequence":
        lengths = tokens.sequences.sum(tokens.valid.double()).clamp(min=1)
        raw = (tokens.sequences.sum(raw) / lengths)[tokens.sequences.index]
    clamp = tokens.log_ratio_clamp
    ratio = raw.clamp(-clamp, clamp).exp()
    w, coef = tokens.weight, tokens.variance_coef

    def group_mean(x):
        total = tokens.groups.sum(w)
        return (tokens.groups.sum(w * x) / torch.where(total == 0, 1, total))[tokens.groups.index]

    center, kappa = tokens.center, 0.0
    if center is None:
        center = group_mean(ratio - 1)
        kappa = group_mean(coef * (ratio - 1 - center))
    gain = tokens.advantages
    own = torch.zeros_like(gain)
    if tokens.policy_loss == "clip":
        is_up = (ratio > 1 + tokens.clip_high) & (gain > 0)
        is_down = (ratio < 1 - tokens.clip_low) & (gain < 0)
        gain = torch.where(is_up | is_down | ((ratio > tokens.dual_clip) & (gain < 0)), 0.0, gain)
    if tokens.policy_loss == "cispo":
        own = -gain * torch.clamp(ratio, 1 - tokens.clip_low, 1 + tokens.clip_high)
        gain = own.new_zeros(())
    slope = w * ratio * (-gain + 2 * coef * (ratio - 1 - center) - 2 * kappa)
    if tokens.ref_logps is not None:
        q = (tokens.ref_logps - logp).clamp(-clamp, clamp)
        kl = {"k1": -q, "k2": q**2 / 2, "k3": q.expm1() - q}[tokens.kl_estimator]
        dkl = {"k1": torch.ones_like(q), "k2": -q, "k3": -q.expm1()}[tokens.kl_estimator]
        dkl = torch.where((tokens.ref_logps - logp).abs() > clamp, 0.0, dkl)
        if tokens.kl_unbiased:
            slope = slope + w * tokens.kl_coef * ratio * kl
            dkl = ratio * dkl
        own = own + tokens.kl_coef * dkl
    slope = torch.where(raw.abs() > clamp, 0.0, slope)
    if tokens.ratio_level == "sequence":
        slope = (tokens.sequences.sum(slope) / lengths)[tokens.sequences.index]
    slope = slope + w * own

    x = logits.reshape(-1, logits.shape[-1]) / tokens.temperature[:, None]
    if tokens.support is not None:
        x = x.masked_fill(~tokens.support.words(x.shape[-1]), -torch.inf)
    log_p = torch.log_softmax(x, -1)
    p = log_p.exp()
    onehot = torch.nn.functional.one_hot(tokens.labels.clamp(min=0), p.shape[-1])
    dx = slope[:, None] * (onehot - p)
    if entropy is not None:
        pull = torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
        dx = dx + (w * tokens.entropy_coef)[:, None] * pull
    dx = dx / tokens.temperature[:, None]
    return torch.where(tokens.valid[:, None], dx, 0.0).reshape(logits.shape)


@settings(max_examples=150)
@given(cases(dtype=torch.float32, packed=False, layout="plain"))
def test_the_gradients_derived_by_hand_are_those_of_autograd(case):
    logits, labels, keywords = case.tensors(torch.device("cpu"))
    logits = logits.double().requires_grad_()
    keywords["log_ratio_clamp"] = 0.5
    out = r2vpo_loss(logits, labels, backend="eager", **keywords)
    (gradient,) = torch.autograd.grad(out.loss.sum(), logits)

    given_ = OBJECTIVE_DEFAULTS | keywords
    geometry = ("mask", "group_ids", "num_groups", "group_size", "reduction", "sampling_mask")
    geometry = {name: given_.pop(name) for name in geometry if name in given_}
    batch = Batch.build(
        labels.shape, logits.device, labels=labels, center=keywords["center"], **geometry
    )
    objective = Objective.build(batch, logits.device, **given_)
    tokens = Tokens.of(batch, objective, logits, logits.shape[-1])
    expected = by_hand(logits.detach(), tokens, case.entropy)
    torch.testing.assert_close(gradient, expected, **CLOSE)


@given(cases(dtype=torch.float32))
def test_the_entry_from_logps_gives_the_same_loss(case):
    logits, labels, keywords = case.tensors(torch.device("cpu"))
    logits = logits.double()
    out = r2vpo_loss(logits, labels, backend="eager", return_entropy=True, **keywords)
    temperature, sampling_mask = keywords.pop("temperature"), keywords.pop("sampling_mask", None)
    if isinstance(temperature, Tensor) and temperature.shape != labels.shape:
        temperature = temperature.repeat_interleave(case.length).reshape(labels.shape)
    logps, entropy = token_logps(
        logits, labels, temperature=temperature, sampling_mask=sampling_mask, return_entropy=True,
        backend="eager",
    )  # fmt: skip
    valid = labels != IGNORE
    if keywords["mask"] is not None:
        valid &= keywords["mask"] != 0
    keywords["mask"] = valid
    same = r2vpo_loss_from_logps(logps, entropy=entropy, **keywords)
    assert torch.equal(same.loss, out.loss)
    assert torch.equal(same.stats.d_sq_sum, out.stats.d_sq_sum)
