"""The checker itself: it accepts the float32 result and rejects wrong gradients."""

import pytest
import torch
from harness import truth_of
from tolerance import assert_within, output_rounding, worst

import r2vpo_kernels


def setup(dtype):
    torch.manual_seed(1)
    logits = (3 * torch.randn(4, 6, 80)).to(dtype)
    labels = torch.randint(0, 80, (4, 6))
    old_logps = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    keywords = {"old_logps": old_logps + 0.3, "advantages": torch.randn(4), "entropy_coef": 0.1}
    leaf = logits.clone().requires_grad_()
    r2vpo_kernels.r2vpo_loss(leaf, labels, backend="eager", **keywords).loss.backward()
    return leaf.grad, truth_of(logits, labels, keywords)


def test_the_right_gradient_passes():
    gradient, truth = setup(torch.float32)
    used = assert_within("gradient", gradient, truth.gradient, truth.gradient_bound)
    assert used > 0.001, "the bound is too wide to say anything"


MUTANTS = {
    "zeroed": lambda g: torch.zeros_like(g),
    "sign flipped": lambda g: -g,
    "scaled by 1.001": lambda g: 1.001 * g,
    "scaled by 0.999": lambda g: 0.999 * g,
    "one row lost": lambda g: torch.cat([torch.zeros_like(g[:1]), g[1:]]),
    "rows swapped": lambda g: g.flip(0),
    "shifted by a column": lambda g: g.roll(1, -1),
    "a constant added": lambda g: g + 1e-6,
    "one NaN": lambda g: torch.where(torch.arange(g.numel()).reshape(g.shape) == 7, torch.nan, g),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_float32_gradient_fails(mutant):
    gradient, truth = setup(torch.float32)
    with pytest.raises(AssertionError, match="error budget"):
        assert_within("gradient", MUTANTS[mutant](gradient), truth.gradient, truth.gradient_bound)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m not in ("a constant added",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_half_precision_gradient_fails(mutant, dtype):
    """Rounding hides a factor of 1.001 in one element, but not that all lean one way."""
    gradient, truth = setup(dtype)
    wrong = MUTANTS[mutant](gradient.double())
    exact = truth.gradient.reshape(wrong.shape)
    rounding = output_rounding(truth.gradient, truth.gradient_bound, dtype, 0.5)
    elementwise = worst(wrong, truth.gradient, truth.gradient_bound + rounding) > 1
    lean = ((wrong - exact) * exact).sum().abs() / exact.square().sum()
    # Rounding errors are independent, at most `rounding` each: six standard deviations of their
    # sum.
    spread = (rounding.reshape(exact.shape) * exact).square().sum().sqrt() / 3**0.5
    systematic = (truth.gradient_bound.reshape(exact.shape) * exact.abs()).sum()
    leans = lean > (6 * spread + systematic) / exact.square().sum()
    assert elementwise or leans or lean.isnan()


def test_a_pooled_sample_errs_at_most_twice_as_much_as_eager():
    """The second yardstick: RMS over a pooled, seeded sample, against eager in the same dtype."""
    squares = {"eager": 0.0, "triton": 0.0}
    for seed in range(6):
        torch.manual_seed(seed)
        logits = 3 * torch.randn(3, 5, 200)
        labels = torch.randint(0, 200, (3, 5))
        old_logps = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0] + 0.2
        keywords = {"old_logps": old_logps, "advantages": torch.randn(3)}
        exact = truth_of(logits, labels, keywords).gradient.reshape(logits.shape)
        for backend in squares:
            leaf = logits.clone().requires_grad_()
            r2vpo_kernels.r2vpo_loss(leaf, labels, backend=backend, **keywords).loss.backward()
            squares[backend] += (leaf.grad - exact).square().sum().item()
    assert squares["triton"] <= 2**2 * squares["eager"]
