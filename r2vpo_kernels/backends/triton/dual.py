"""The Triton kernel `dual_step`: λ moved once, by the ratio's statistics."""

import triton.language as tl

from . import launch


@launch.Kernel
def dual_step_kernel(
    coef, weight, d_sum, d_sq_sum, groups: tl.int64,
    target: tl.float64, lr: tl.float64, min_coef: tl.float64, max_coef: tl.float64,
    ABOUT_MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 16, by one program."""
    total = tl.zeros([BLOCK], tl.float64)
    spread = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, groups, BLOCK):
        group = begin + tl.arange(0, BLOCK)
        inside = group < groups
        weight_g = tl.load(weight + group, mask=inside, other=0.0).to(tl.float64)
        squares = tl.load(d_sq_sum + group, mask=inside, other=0.0).to(tl.float64)
        if ABOUT_MEANS:
            d_g = tl.load(d_sum + group, mask=inside, other=0.0).to(tl.float64)
            centered = squares - d_g * d_g / tl.where(weight_g == 0, 1.0, weight_g)
            # A NaN is not below 0, and stays.
            squares = tl.where(centered < 0, 0.0, centered)
        total += weight_g
        spread += squares
    pooled = tl.sum(spread, 0) / tl.sum(total, 0)
    excess = pooled / target - 1.0
    step = tl.where(excess < 1.0, excess, 1.0) * lr
    old = tl.load(coef)
    moved = old.to(tl.float64) * tl.exp(step)
    moved = tl.where(moved < min_coef, min_coef, moved)
    moved = tl.where(moved > max_coef, max_coef, moved)
    # Statistics without tokens or not finite leave λ where it is.
    finite = tl.abs(excess) < float("inf")
    tl.store(coef, tl.where(finite, moved.to(tl.float32), old))


def dual_step(coef, weight, d_sum, d_sq_sum, about_means, target, lr, min_coef, max_coef) -> None:
    """Move the 0-dim coef once, by statistics of groups (Eq. 10)."""
    dual_step_kernel(
        1, (coef, weight, d_sum, d_sq_sum), (weight.numel(), target, lr, min_coef, max_coef),
        ABOUT_MEANS=about_means, BLOCK=launch.LANES,
    )  # fmt: skip
