"""The error budget of DERIVATION.md, Eq. 19 to 26, and the checker that holds results to it.

Truth is the specification in float64 on the same (rounded) inputs; each bound is derived per
element, nothing is tuned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r2vpo_kernels import reference
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective

U = 2.0**-24


@dataclass
class Truth:
    """Float64 results, each with its bound for float32 arithmetic before output rounding."""

    loss: Tensor
    loss_bound: Tensor
    logps: Tensor
    logps_bound: Tensor
    entropy: Tensor
    entropy_bound: Tensor
    dlogps: Tensor
    dlogps_bound: Tensor
    gradient: Tensor
    gradient_bound: Tensor
    stats: tuple[Tensor, ...]
    stats_bound: tuple[Tensor, ...]


def _weighted_mean(batch: Batch, x: Tensor) -> Tensor:
    return batch.groups.spread(batch.groups.mean(x, batch.token_weight))


def find_truth(
    logits: Tensor,
    batch: Batch,
    objective: Objective,
    upstream: Tensor,
    with_entropy: bool,
    rounds_x: bool,
) -> Truth:
    """`logits` (B, T, V) float64, `upstream` (N,): the gradient that reaches each token's loss.

    rounds_x: x = z / temperature is rounded, and not only its distance from the maximum.
    """
    logits = logits.detach().requires_grad_()
    labels, temperature = batch.labels, objective.temperature
    logps, entropy = reference.token_logps(logits, labels, temperature, with_entropy)
    logps.retain_grad()
    terms = reference.token_terms(logps, entropy, batch, objective)
    (upstream * terms.loss).sum().backward()
    g = logps.grad
    d = terms.ratio_minus_one.detach()
    ratio = d + 1.0
    valid = batch.valid

    # Eq. 19: the log-probs. -inf counts for nothing: its exponential is exactly 0.
    vocabulary = logits.shape[-1]
    x = logits.detach().reshape(-1, vocabulary)
    x = torch.where(valid[:, None], x, 0.0) / temperature[:, None]
    largest = torch.where(x.isfinite(), x.abs(), 0.0).amax(-1)
    log_p = torch.log_softmax(x, -1)
    finite_log_p = torch.where(log_p.isfinite(), log_p, 0.0)
    p = log_p.exp()

    def log_p_error(size: Tensor, largest: Tensor) -> Tensor:
        largest = largest if rounds_x else torch.minimum(largest, size / 2)
        return 4 * U * (1 + largest + size + math.log(vocabulary))

    each = log_p_error(finite_log_p.abs(), largest[:, None])
    values = logps.detach()
    size = torch.where(values.isfinite(), values.abs(), 0.0)
    dlogp = log_p_error(size, largest)
    zero = torch.zeros_like(dlogp)

    # Eq. 20: the log-ratio; on-policy it is 0 without an error.
    def difference_error(other):
        if other is None:
            return zero
        # A difference from an infinity is clamped, or 0 from the same one: exact.
        return dlogp + U * (size + torch.where(other.isfinite(), other.abs(), 0.0))

    ddelta = difference_error(objective.old_logps)
    if objective.ratio_level == "sequence":
        ddelta = batch.sequences.mean(ddelta, valid.double())
        ddelta = batch.sequences.spread(ddelta) + 4 * U * terms.log_ratio.detach().abs()

    # Eq. 21, 23, 25 and 26: dL/dlogp.
    center = objective.center
    dcenter = dkappa = kappa = zero
    if center is None:
        center = _weighted_mean(batch, d)
        dcenter = _weighted_mean(batch, 2 * ratio * ddelta + 8 * U * (ratio + 1))
        coef = objective.variance_coef
        kappa = _weighted_mean(batch, coef * (d - center))
        dkappa = _weighted_mean(batch, coef * (2 * ratio * ddelta + 8 * U * (ratio + 1) + dcenter))
    coef, advantages, w = objective.variance_coef, objective.advantages.abs(), batch.weight
    w = w * upstream.abs()
    gap = (d - center).abs()
    slope = w * ratio * (advantages + 2 * coef * (ratio + gap) + 2 * kappa.abs())
    g_bound = slope * (2 * ddelta + 8 * U)
    # d and c - 1 are each rounded before their difference.
    dgap = dcenter + 8 * U * center.abs()
    g_bound = g_bound + w * ratio * (2 * coef * dgap + 2 * dkappa)
    raw = values - (values if objective.old_logps is None else objective.old_logps)
    at_edge = (raw.abs() - objective.log_ratio_clamp).abs() <= ddelta
    g_bound = torch.where(at_edge, g_bound + slope, g_bound)
    if objective.ratio_level == "sequence":
        total = batch.sequences.mean(g_bound, valid.double())
        g_bound = batch.sequences.spread(total) + 8 * U * g.abs()
    value_bound = w * ratio * (advantages + 2 * coef * gap) * (2 * ddelta + 8 * U)
    value_bound = value_bound + w * coef * gap * (2 * dgap + 8 * U * gap)
    if objective.ref_logps is not None:
        beta = objective.kl_coef.abs() * w
        dq = difference_error(objective.ref_logps)
        q = (objective.ref_logps - values).clamp(
            -objective.log_ratio_clamp, objective.log_ratio_clamp
        )
        at_edge = (q.abs() - objective.log_ratio_clamp).abs() <= dq
        if objective.kl_estimator == "k1":
            slope_bound, slope, value = 8 * U + zero, 1 + zero, dq
        elif objective.kl_estimator == "k2":
            slope_bound, slope, value = (
                dq + 8 * U * q.abs(),
                q.abs(),
                q.abs() * (dq + 8 * U * q.abs()),
            )
        else:
            slope = q.expm1().abs()
            slope_bound = 2 * q.exp() * dq + 8 * U * slope
            value = slope * (dq + 8 * U) + q.exp() * dq + 8 * U * q.abs()
        g_bound = g_bound + beta * (slope_bound + torch.where(at_edge, slope, 0.0))
        value_bound = value_bound + beta * value

    # Eq. 22 and 24: entropy, and the gradient of the logits.
    onehot = torch.zeros_like(p).scatter_(-1, labels.clamp(0, vocabulary - 1)[:, None], 1.0)
    gradient_bound = g_bound[:, None] * (onehot - p).abs() + g.abs()[:, None] * p * each
    entropy_value = entropy_bound = zero
    if entropy is not None:
        entropy_value = entropy.detach()
        pull = (finite_log_p + entropy_value[:, None]).abs()
        entropy_bound = (p * (1 + pull) * each).sum(-1)
        eta = (objective.entropy_coef.abs() * w)[:, None]
        gradient_bound = gradient_bound + eta * p * (
            pull * (each + 8 * U) + each + entropy_bound[:, None]
        )
        value_bound = value_bound + eta[:, 0] * (entropy_bound + 8 * U * entropy_value.abs())
    gradient_bound = gradient_bound / temperature[:, None]

    a = batch.token_weight
    moments = [a, a * d, a * d**2]
    derror = 2 * ratio * ddelta + 8 * U * d.abs()
    moment_bounds = [8 * U * a, a * derror, a * (2 * d.abs() * derror + derror**2 + 8 * U * d**2)]
    loss_terms = (upstream * terms.loss).detach()
    keep = torch.where(valid[:, None], 1.0, 0.0)
    return Truth(
        loss_terms,
        value_bound + 8 * U * loss_terms.abs(),
        values,
        dlogp * valid,
        entropy_value,
        entropy_bound * valid,
        g,
        g_bound * valid,
        logits.grad.reshape(-1, vocabulary),
        gradient_bound * keep,
        tuple(batch.groups.sum(m) for m in moments),
        tuple(batch.groups.sum(m) for m in moment_bounds),
    )


def output_rounding(truth: Tensor, bound: Tensor, dtype: torch.dtype, ulps: float) -> Tensor:
    """`ulps` units in the last place of the output, at most, and half its smallest number."""
    info = torch.finfo(dtype)
    smallest = info.tiny if dtype == torch.float32 else info.smallest_normal * info.eps
    return ulps * info.eps * (truth.abs() + bound) + smallest


def worst(actual: Tensor, truth: Tensor, bound: Tensor) -> float:
    """The largest |actual - truth| / bound: 1 uses the budget up; inf for a NaN out of place."""
    actual, truth = actual.double().reshape(-1), truth.reshape(-1)
    bound = bound.reshape(-1)
    if actual.numel() == 0:
        return 0.0
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    ratio = (actual - truth).abs() / bound
    ratio = torch.where(same, 0.0, torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf))
    return ratio.max().item()


def assert_within(
    name: str,
    actual: Tensor,
    truth: Tensor,
    bound: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    ulps: float = 0.5,
) -> float:
    """Hold each element to its bound plus the output's rounding; the worst share used."""
    used = worst(actual, truth, bound + output_rounding(truth, bound, dtype, ulps))
    assert used <= 1.0, f"{name}: {used:.3g} times the error budget"
    return used


def assert_no_lean(
    name: str, actual: Tensor, truth: Tensor, bound: Tensor, rounding: Tensor, truncates: bool
) -> None:
    """All errors together may not lean along the truth, as those of a slightly scaled one do.

    The projection Σ error·truth is at most Σ bound·|truth|, plus what rounding adds: independent
    errors of at most `rounding` each, six standard deviations of their sum; all of it where the
    output is truncated rather than rounded.
    """
    actual, truth = actual.double().reshape(-1), truth.reshape(-1)
    bound, rounding = bound.reshape(-1), rounding.reshape(-1)
    lean = ((actual - truth) * truth).sum().abs()
    if truncates:
        allowed = ((bound + rounding) * truth.abs()).sum()
    else:
        spread = (rounding * truth).square().sum().sqrt() / 3**0.5
        allowed = (bound * truth.abs()).sum() + 6 * spread
    assert lean <= allowed, f"{name}: leans by {(lean / allowed).item():.3g} times the error budget"
