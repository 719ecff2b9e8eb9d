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


@triton.jit
def kl_value(logp, ref_logp, clamp, KL: tl.constexpr):
    """Eq. 6: an estimate of KL(new ‖ ref)."""
    q = clamped(difference(ref_logp, logp), clamp)
    if KL == 1:
        value = -q
    elif KL == 2:
        value = 0.5 * q * q
    else:
        value = expm1(q) - q
    return value


@triton.jit
def kl_slope(logp, ref_logp, clamp, KL: tl.constexpr):
    """Eq. 6: its derivative in logp."""
    q = difference(ref_logp, logp)
    if KL == 1:
        slope = 1.0
    elif KL == 2:
        slope = -q
    else:
        slope = -expm1(q)
    return tl.where(tl.abs(q) > clamp, 0.0, slope)
