"""The equations of docs/derivation that several kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

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
# in reference.py. A term is its value and its derivative in logp, which is 0 where the clamp binds.


@triton.jit
def ratio_of(raw, clamp):
    """Eq. 2: δ, d = ρ - 1, ρ, and where the clamp binds. A NaN is not past the bound, and stays."""
    delta = clamped(raw, clamp)
    return delta, expm1(delta), tl.exp(delta), tl.abs(raw) > clamp


@triton.jit
def policy_term(advantage, ratio, is_clamped):
    """Eq. 5, P: here the ratio alone counts."""
    value = -advantage * ratio
    return value, tl.where(is_clamped, 0.0, value)


@triton.jit
def penalty_term(variance_coef, center, d, ratio, is_clamped):
    """Eq. 5, λ·(ρ - c)², for a centre of 1 + center."""
    gap = d - center
    slope = 2.0 * variance_coef * gap * ratio
    return variance_coef * (gap * gap), tl.where(is_clamped, 0.0, slope)


@triton.jit
def center_slope(ratio, is_clamped, kappa):
    """Eq. 9: what the centre, which depends on logp too, takes off the slope."""
    return tl.where(is_clamped, 0.0, 2.0 * ratio * kappa)


@triton.jit
def kl_term(logp, ref_logp, clamp, KL: tl.constexpr):
    """Eq. 6: an estimate of KL(new ‖ ref)."""
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
    return value, tl.where(tl.abs(raw) > clamp, 0.0, slope)


@triton.jit
def loss_value(weight, policy, penalty, kl_coef, kl, entropy_coef, entropy):
    """Eq. 5: the token's loss."""
    return weight * (policy + penalty + kl_coef * kl - entropy_coef * entropy)


@triton.jit
def ratio_slope(policy_slope, penalty_slope, weight):
    """Eq. 7, the ratio's part of dL/dlogp; `weight` is w times what reaches the token's loss."""
    return weight * (policy_slope + penalty_slope)


@triton.jit
def kl_slope(kl_coef, slope, weight):
    """Eq. 7, the KL term's part."""
    return weight * (kl_coef * slope)


@triton.jit
def entropy_slope(entropy_coef, weight):
    """dL/dH."""
    return -weight * entropy_coef
