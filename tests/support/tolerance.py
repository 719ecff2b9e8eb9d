"""The error budget of docs/derivation (Eq. 19 to 26, 29, 31), and what holds results to it.

Truth is the specification in float64 on the same (rounded) inputs; each bound is derived per
element, nothing is tuned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r2vpo_kernels import reference
from r2vpo_kernels.reference import Tokens, TokenTerms

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
    outside: Tensor  # (N, V): where the gradient must be 0 exactly


def _weighted_mean(tokens: Tokens, x: Tensor) -> Tensor:
    return tokens.groups.spread(tokens.groups.mean(x, tokens.token_weight))


def clip_sides(
    tokens: Tokens, terms: TokenTerms, ratio: Tensor, relative: Tensor, derror: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the clip of Eq. 5 surely binds, and where ρ is too near to a kink to say its side."""
    binds = terms.clipped_low | terms.clipped_high
    if tokens.policy_loss == "ratio":
        return binds, binds
    d, gain = terms.ratio_minus_one.detach(), tokens.advantages
    # The bounds too are rounded.
    low = (d + tokens.clip_low).abs() <= derror + 2 * U * tokens.clip_low
    high = (d - tokens.clip_high).abs() <= derror + 2 * U * tokens.clip_high
    if tokens.policy_loss == "clip":
        dual = (ratio - tokens.dual_clip).abs() <= ratio * relative
        low, high = low & (gain < 0), (high & (gain > 0)) | (dual & (gain < 0))
    at_kink = low | high
    return binds & ~at_kink, at_kink


def find_truth(
    logits: Tensor,
    tokens: Tokens,
    upstream: Tensor,
    with_entropy: bool,
    rounds_x: bool,
    logits_error: Tensor | None = None,
    sharded: bool = False,
) -> Truth:
    """`logits` (B, T, V) float64, `upstream` (N,): the gradient that reaches each token's loss.

    rounds_x: x = z / temperature is rounded, and not only its distance from the maximum.
    logits_error: (N, V), how far off the logits were that were computed with (Eq. 29).
    sharded: the vocabulary was shared out over ranks (Eq. 31).
    """
    logits = logits.detach().requires_grad_()
    labels, temperature = tokens.labels, tokens.temperature
    logps, entropy = reference.token_logps(
        logits, labels, temperature, with_entropy, tokens.support
    )
    logps.retain_grad()
    terms = reference.token_terms(logps, entropy, tokens)
    (upstream * terms.loss).sum().backward()
    g = logps.grad
    d = terms.ratio_minus_one.detach()
    ratio = d + 1.0
    valid = tokens.valid

    # Eq. 19: the log-probs. -inf counts for nothing: its exponential is exactly 0.
    vocabulary = logits.shape[-1]
    x = logits.detach().reshape(-1, vocabulary)
    x = torch.where(valid[:, None], x, 0.0) / temperature[:, None]
    words = torch.ones_like(x, dtype=torch.bool)
    if tokens.support is not None:
        words = tokens.support.words(vocabulary)
        x = torch.where(words, x, -torch.inf)
    log_words = words.sum(-1).double().log()
    largest = torch.where(x.isfinite(), x.abs(), 0.0).amax(-1)
    log_p = torch.log_softmax(x, -1)
    finite_log_p = torch.where(log_p.isfinite(), log_p, 0.0)
    p = log_p.exp()

    def log_p_error(size: Tensor, largest: Tensor, log_words: Tensor) -> Tensor:
        largest = largest if rounds_x else torch.minimum(largest, size / 2)
        return (5 if sharded else 4) * U * (1 + largest + size + log_words)

    each = log_p_error(finite_log_p.abs(), largest[:, None], log_words[:, None])
    values = logps.detach()
    size = torch.where(values.isfinite(), values.abs(), 0.0)
    dlogp = log_p_error(size, largest, log_words)
    zero = torch.zeros_like(dlogp)
    if logits_error is not None:
        dx = torch.where(words & valid[:, None], logits_error / temperature[:, None], 0.0)
        dlse = (2 * dx.amax(-1)).exp() * (p * dx).sum(-1)
        each = each + dx + dlse[:, None]
        each = torch.expm1(2 * each) / 2
        dlogp = dlogp + dx.gather(-1, labels.clamp(0, vocabulary - 1)[:, None])[:, 0] + dlse

    # Eq. 20: the log-ratio; on-policy it is 0 without an error.
    def difference_error(other):
        if other is None:
            return zero
        # A difference from an infinity is clamped, or 0 from the same one: exact.
        return dlogp + U * (size + torch.where(other.isfinite(), other.abs(), 0.0))

    ddelta = difference_error(tokens.old_logps)
    if tokens.ratio_level == "sequence":
        ddelta = tokens.sequences.mean(ddelta, valid.double())
        ddelta = tokens.sequences.spread(ddelta) + 4 * U * terms.log_ratio.detach().abs()

    # Eq. 21, 23, 25 and 26: dL/dlogp.
    center = tokens.center
    dcenter = dkappa = kappa = zero
    if center is None:
        center = _weighted_mean(tokens, d)
        dratio = 2 * ratio * ddelta + 8 * U * (ratio + 1)
        dcenter = _weighted_mean(tokens, dratio)
        coef = tokens.variance_coef
        kappa = _weighted_mean(tokens, upstream * coef * (d - center))
        dkappa = _weighted_mean(tokens, upstream.abs() * coef * (dratio + dcenter))
    coef, advantages, w = tokens.variance_coef, tokens.advantages.abs(), tokens.weight
    # The upstream gradients are inside κ, and not in front of it.
    by_kappa, dby_kappa = 2 * w * ratio * kappa.abs(), 2 * w * ratio * dkappa
    w = w * upstream.abs()
    gap = (d - center).abs()
    relative = 2 * ddelta + 8 * U  # of ρ
    derror = 2 * ratio * ddelta + 8 * U * d.abs()
    held, at_kink = clip_sides(tokens, terms, ratio, relative, derror)
    own_bound = zero
    if tokens.policy_loss == "cispo":
        factor = 1.0 + d.clamp(-tokens.clip_low, tokens.clip_high)
        dfactor = torch.where(held, 8 * U * factor, ratio * relative)
        own_bound = w * advantages * dfactor
        dpolicy = advantages * (dfactor * (size + dlogp) + factor * (dlogp + 8 * U * size))
        by_ratio = jump = zero
    else:
        # P is continuous at a kink, where it is off by no more than ρ; its slope jumps there.
        dpolicy = torch.where(
            held, 8 * U * terms.policy.detach().abs(), advantages * ratio * relative
        )
        by_ratio = torch.where(held, 0.0, ratio)
        jump = torch.where(at_kink, w * ratio * advantages, 0.0)
    slope = w * (by_ratio * advantages + ratio * 2 * coef * (ratio + gap)) + by_kappa
    g_bound = slope * relative + jump
    # d and c - 1 are each rounded before their difference.
    dgap = dcenter + 8 * U * center.abs()
    g_bound = g_bound + w * ratio * 2 * coef * dgap + dby_kappa
    value_bound = w * (dpolicy + ratio * 2 * coef * gap * relative)
    value_bound = value_bound + w * coef * gap * (2 * dgap + 8 * U * gap)
    value_bound = value_bound + w * coef * (2 * ratio * ddelta + dgap) ** 2
    if tokens.ref_logps is not None:
        beta = tokens.kl_coef.abs() * w
        dq = difference_error(tokens.ref_logps)
        q = (tokens.ref_logps - values).clamp(-tokens.log_ratio_clamp, tokens.log_ratio_clamp)
        at_edge = (q.abs() - tokens.log_ratio_clamp).abs() <= dq
        if tokens.kl_estimator == "k1":
            dkl_slope, kl_slope, dkl = 8 * U + zero, 1 + zero, dq
        elif tokens.kl_estimator == "k2":
            dkl_slope, kl_slope = dq + 8 * U * q.abs(), q.abs()
            dkl = q.abs() * (dq + 8 * U * q.abs()) + dq**2
        else:
            kl_slope = q.expm1().abs()
            dkl_slope = 2 * q.exp() * dq + 8 * U * kl_slope
            dkl = kl_slope * (dq + 8 * U) + q.exp() * dq + 8 * U * q.abs()
        dkl_slope = dkl_slope + torch.where(at_edge, kl_slope, 0.0)
        if tokens.kl_unbiased:
            # A product with ρ each, and the value is the slope in the log-ratio too.
            kl = terms.kl.detach().abs()
            dkl = ratio * dkl * (1 + relative) + kl * relative
            dkl_slope = ratio * (dkl_slope * (1 + relative) + kl_slope * relative)
            slope = slope + beta * kl
            g_bound = g_bound + beta * dkl
        own_bound = own_bound + beta * dkl_slope
        value_bound = value_bound + beta * dkl
    raw = values - (values if tokens.old_logps is None else tokens.old_logps)
    if tokens.ratio_level == "sequence":
        raw = tokens.sequences.spread(tokens.sequences.mean(raw, valid.double()))
    at_edge = (raw.abs() - tokens.log_ratio_clamp).abs() <= ddelta
    g_bound = torch.where(at_edge, g_bound + slope, g_bound)
    if tokens.ratio_level == "sequence":
        total = tokens.sequences.mean(g_bound, valid.double())
        g_bound = tokens.sequences.spread(total) + 8 * U * g.abs()
    g_bound = g_bound + own_bound

    # Eq. 22 and 24: entropy, and the gradient of the logits.
    onehot = torch.zeros_like(p).scatter_(-1, labels.clamp(0, vocabulary - 1)[:, None], 1.0)
    g_size = (g.abs() + g_bound)[:, None]
    gradient_bound = g_bound[:, None] * (onehot - p).abs() + g_size * p * each
    entropy_value = entropy_bound = zero
    if entropy is not None:
        entropy_value = entropy.detach()
        pull = (finite_log_p + entropy_value[:, None]).abs()
        entropy_bound = (p * (1 + pull) * each).sum(-1)
        eta = (tokens.entropy_coef.abs() * w)[:, None]
        gradient_bound = gradient_bound + eta * p * (
            pull * (each + 8 * U) + (each + entropy_bound[:, None]) * (1 + each)
        )
        value_bound = value_bound + eta[:, 0] * (entropy_bound + 8 * U * entropy_value.abs())
    gradient_bound = gradient_bound / temperature[:, None]

    a = tokens.token_weight
    moments = [a, a * d, a * d**2]
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
        tuple(tokens.groups.sum(m) for m in moments),
        tuple(tokens.groups.sum(m) for m in moment_bounds),
        ~words,
    )


@dataclass
class Linear:
    """A head in float64, and what is known of a computation with it."""

    hidden: Tensor  # (N, H), 0 where masked
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype  # of the products
    logits_dtype: torch.dtype | None = None  # None: the same
    # Adapters, weight + lora_b @ lora_a with their scaling in lora_a, and their products' dtype.
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_dtype: torch.dtype | None = None

    @staticmethod
    def _rounding(dtype: torch.dtype | None) -> tuple[float, float]:
        """(the relative error of rounding to a dtype, its smallest number)"""
        info = torch.finfo(dtype)
        return info.eps / 2, info.smallest_normal * info.eps

    def logits(self) -> Tensor:
        weight = self.weight
        if self.lora_a is not None:
            weight = weight + self.lora_b @ self.lora_a
        return reference.linear_logits(
            self.hidden, weight, self.bias, self.softcap, self.logit_scale
        )

    def _lora_hidden(self) -> tuple[Tensor, Tensor]:
        """(h', δh')"""
        v, _ = self._rounding(self.lora_dtype)
        low = self.hidden @ self.lora_a.t()
        size = self.hidden.abs() @ self.lora_a.abs().t()
        width = self.hidden.shape[1]
        return low, v * low.abs() + (1 + v) ** 2 * (v + (width + 2) * U) * size

    def _uncapped_error(self) -> tuple[Tensor, Tensor]:
        """(z', δz')"""
        z = reference.linear_logits(self.hidden, self.weight, self.bias, None, self.logit_scale)
        size = self.hidden.abs() @ self.weight.abs().t()
        if self.bias is not None:
            size = size + self.bias.abs()
        scale, width = abs(self.logit_scale), self.hidden.shape[1]
        v, _ = self._rounding(self.logits_dtype or self.dtype)
        error = v * z.abs() + (1 + v) * (width + 3) * U * scale * size
        if self.lora_a is None:
            return z, error
        low, dlow = self._lora_hidden()
        z = z + self.logit_scale * low @ self.lora_b.t()
        dlow = dlow + (low.shape[1] + 3) * U * (low.abs() + dlow)
        error = error + scale * dlow @ self.lora_b.abs().t()
        return z, v * z.abs() + (1 + v) * error

    def logits_error(self) -> Tensor:
        _, error = self._uncapped_error()
        if self.softcap is None:
            return error
        v, _ = self._rounding(self.logits_dtype or self.dtype)
        return error + (v + 4 * U) * self.logits().abs()

    def gradients(
        self,
        dlogits: Tensor,
        bound: Tensor,
        outside: Tensor,
        truncates: bool,
        sharded: bool = False,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (truth, bound before output rounding)} of what there is (Eq. 29)."""
        v, tiny = self._rounding(self.logits_dtype or self.dtype)
        # A 0 is not rounded, and adding it rounds nothing.
        tiny = torch.where(outside, 0.0, tiny)
        words = (~outside).sum(-1, keepdim=True)
        bound = bound + (2 if truncates else 1) * v * (dlogits.abs() + bound) + tiny
        if self.softcap is not None:
            z, error = self._uncapped_error()
            t = torch.tanh(z / self.softcap)
            slope, error = 1 - t * t, error / self.softcap
            slope_bound = 2 * t.abs() * slope * error + error**2 + 4 * U + v * slope
            size = dlogits.abs() + bound
            bound = slope * bound + size * slope_bound
            bound = bound + v * size * (slope + slope_bound) + tiny
            dlogits = dlogits * slope
        v, tiny = self._rounding(self.dtype)
        if self.logits_dtype not in (None, self.dtype):
            bound = bound + v * (dlogits.abs() + bound) + torch.where(outside, 0.0, tiny)
        scale, tokens = abs(self.logit_scale), dlogits.shape[0]
        size = dlogits.abs() + bound
        over_v = bound + (words + 2) * U * size
        over_n = bound + ((tokens + 2) * U + v) * size
        # Each rank's part of dL/dhidden is rounded before they are added (Eq. 31).
        of_hidden = over_v + (v * size if sharded else 0)
        found = {
            "hidden": (
                self.logit_scale * dlogits @ self.weight, scale * of_hidden @ self.weight.abs()
            ),
            "weight": (
                self.logit_scale * dlogits.t() @ self.hidden, scale * over_n.t() @ self.hidden.abs()
            ),
            "bias": (self.logit_scale * dlogits.sum(0), scale * over_n.sum(0)),
        }  # fmt: skip
        if self.lora_a is None:
            return found
        r, _ = self._rounding(self.lora_dtype)
        low, dlow = self._lora_hidden()
        rank = low.shape[1]
        g = self.logit_scale * dlogits @ self.lora_b
        g_bound = scale * over_v @ self.lora_b.abs()
        g_bound = g_bound + r * (g.abs() + g_bound)
        g_size = g.abs() + g_bound
        of_a = g_bound + ((tokens + 2) * U + 2 * r) * g_size
        found["lora_a"] = g.t() @ self.hidden, of_a.t() @ self.hidden.abs()
        of_b = (bound + ((tokens + 2) * U + r) * size).t() @ (low.abs() + dlow) + size.t() @ dlow
        found["lora_b"] = self.logit_scale * dlogits.t() @ low, scale * of_b
        # To the part of the weight, which is rounded, comes that of the adapters.
        exact, bound = found["hidden"]
        bound = bound + v * (exact.abs() + bound)
        bound = bound + (g_bound + (2 * r + (rank + 2) * U) * g_size) @ self.lora_a.abs()
        found["hidden"] = exact + g @ self.lora_a, bound
        return found


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
