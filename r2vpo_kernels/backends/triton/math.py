"""The equations of docs/derivation that several kernels share."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

POLICY_LOSSES = {"ratio": 0, "clip": 1, "cispo": 2}
KL_ESTIMATORS = {None: 0, "k1": 1, "k2": 2, "k3": 3}


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamped(x, bound):
    # Comparisons, because tl.minimum and tl.maximum lose a NaN.
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def difference(a, b):
    # Eq. 2: equal log-probs differ by 0, two infinities too.
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def expm1(x):
    # Eq. 13. libdevice's expm1 is missing in the interpreter. Near 0 the Taylor series to x^10,
    # whose remainder at 0.5 is under 3e-11 of the value; elsewhere exp - 1, where exp's error grows
    # 2.6-fold at most.
    series = 1.0 + x * (1.0 / 10.0)
    series = 1.0 + x * (1.0 / 9.0) * series
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


# The terms of a token have the names of csrc/token.h: a new one is a function each here, there and
# in reference.py.


class Ratio(NamedTuple):
    """Eq. 2: δ, d = ρ - 1, ρ, and where the clamp binds."""

    delta: Any
    d: Any
    ratio: Any
    clamped: Any


class Term(NamedTuple):
    """A term of Eq. 5 and its derivatives: in the log-ratio δ, and in logp besides.

    A sequence's tokens may share the log-ratio. A derivative that a kind of term does not have is
    0: until Triton 3.7 a function could not return None.
    """

    value: Any
    ratio_slope: Any
    logp_slope: Any


class Policy(NamedTuple):
    """P of Eq. 5 likewise, and where its clip binds, below and above."""

    value: Any
    ratio_slope: Any
    logp_slope: Any
    low: Any
    high: Any


@triton.jit
def ratio_of(raw, clamp):
    # A NaN is not past the bound, and stays.
    delta = clamped(raw, clamp)
    return Ratio(delta, expm1(delta), tl.exp(delta), tl.abs(raw) > clamp)


@triton.jit
def policy_term(advantage, logp, r, clip_low, clip_high, dual_clip, POLICY: tl.constexpr):
    """Eq. 5, P. What is NaN is not past a bound, and stays."""
    low = False
    high = False
    factor = r.ratio
    if POLICY > 0:
        low = r.d < -clip_low
        high = r.d > clip_high
        highest = 1.0 + clip_high
        if POLICY == 1:
            # Only where it lowers the gain.
            gains = advantage > 0
            loses = advantage < 0
            low = loses & low
            high = tl.where(gains, high, loses & (r.ratio > dual_clip))
            highest = tl.where(gains, highest, dual_clip)
        factor = tl.where(high, highest, tl.where(low, 1.0 - clip_low, factor))
    value = -advantage * factor
    if POLICY == 2:
        # The factor is a constant.
        term = Policy(value * logp, 0.0, value, low, high)
    else:
        term = Policy(value, tl.where(r.clamped | low | high, 0.0, value), 0.0, low, high)
    return term


@triton.jit
def penalty_term(variance_coef, center, r):
    """Eq. 5, λ·(ρ - c)², for a centre of 1 + center."""
    gap = r.d - center
    slope = 2.0 * variance_coef * gap * r.ratio
    return Term(variance_coef * (gap * gap), tl.where(r.clamped, 0.0, slope), 0.0)


@triton.jit
def center_slope(r, kappa):
    """Eq. 9: what the centre, which depends on logp too, takes off the slope."""
    return tl.where(r.clamped, 0.0, 2.0 * r.ratio * kappa)


@triton.jit
def kl_term(logp, ref_logp, clamp, r, KL: tl.constexpr, UNBIASED: tl.constexpr):
    """Eq. 6: an estimate of KL(new ‖ ref), times m of Eq. 5."""
    if KL == 0:
        term = Term(0.0, 0.0, 0.0)
    else:
        raw = difference(ref_logp, logp)
        gap = clamped(raw, clamp)
        if KL == 1:
            value = -gap
            slope = 1.0
        elif KL == 2:
            value = 0.5 * (gap * gap)
            slope = -gap
        else:
            minus_one = expm1(gap)
            value = minus_one - gap
            slope = -minus_one
        slope = tl.where(tl.abs(raw) > clamp, 0.0, slope)
        if UNBIASED:
            value = r.ratio * value
            term = Term(value, tl.where(r.clamped, 0.0, value), r.ratio * slope)
        else:
            term = Term(value, 0.0, slope)
    return term


@triton.jit
def loss_value(weight, policy, penalty, kl_coef, kl, entropy_coef, entropy):
    """Eq. 5: the token's loss."""
    return weight * (policy.value + penalty.value + kl_coef * kl.value - entropy_coef * entropy)


@triton.jit
def ratio_slope(policy, penalty, kl_coef, kl, weight):
    """Eq. 7, in the log-ratio; `weight` is w times what reaches the token's loss."""
    return weight * (policy.ratio_slope + penalty.ratio_slope + kl_coef * kl.ratio_slope)


@triton.jit
def logp_slope(policy, kl_coef, kl, weight):
    """Eq. 7, in logp besides."""
    return weight * (policy.logp_slope + kl_coef * kl.logp_slope)


@triton.jit
def entropy_slope(entropy_coef, weight):
    """dL/dH."""
    return -weight * entropy_coef
