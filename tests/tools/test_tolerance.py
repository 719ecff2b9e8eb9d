"""The checker itself: it accepts the float32 result and rejects wrong gradients."""

import pytest
import torch
from support.harness import check_gradient, truth_of
from support.strategies import DTYPES, sampling_mask_of

import r2vpo_kernels


def setup(dtype, kind="none"):
    torch.manual_seed(1)
    logits = (3 * torch.randn(4, 6, 80)).to(dtype)
    labels = torch.randint(0, 80, (4, 6))
    old_logps = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    keywords = {"old_logps": old_logps + 0.3, "advantages": torch.randn(4), "entropy_coef": 0.1}
    sets = sampling_mask_of(kind, labels, 80, torch.Generator().manual_seed(0))
    if sets is not None:
        keywords["sampling_mask"] = sets
        logps = r2vpo_kernels.token_logps(logits, labels, sampling_mask=sets, backend="eager")
        keywords["old_logps"] = logps + 0.3
    leaf = logits.clone().requires_grad_()
    r2vpo_kernels.r2vpo_loss(leaf, labels, backend="eager", **keywords).loss.backward()
    return leaf.grad, truth_of(logits, labels, keywords, "eager")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "small"])
def test_the_right_gradient_passes(dtype, kind):
    gradient, truth = setup(dtype, kind)
    assert check_gradient(gradient, truth, "eager") > 0.01, "the bound says nothing"


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


# 1e-6 is less than the half precisions resolve.
RESOLVED = [(m, d) for m in MUTANTS for d in DTYPES if "constant" not in m or d == torch.float32]


@pytest.mark.parametrize("kind", ["none", "small"])
@pytest.mark.parametrize("mutant, dtype", RESOLVED)
def test_a_wrong_gradient_fails(mutant, dtype, kind):
    gradient, truth = setup(dtype, kind)
    wrong = MUTANTS[mutant](gradient.double())
    with pytest.raises(AssertionError, match="error budget"):
        # In float64, so that a mutant is not rounded away; held to the dtype's rounding.
        check_gradient(wrong, truth, "eager", dtype=dtype)


def test_the_smallest_number_outside_of_a_support_fails():
    gradient, truth = setup(torch.float32, "small")
    outside = truth.outside.nonzero()[0].tolist()
    gradient.view(-1, 80)[outside[0], outside[1]] = 1e-45
    with pytest.raises(AssertionError, match="not 0 outside of the support"):
        check_gradient(gradient, truth, "eager")


@pytest.mark.slow_in_interpreter
def test_a_pooled_sample_errs_at_most_twice_as_much_as_eager(kernels):
    """The second yardstick: RMS over a pooled, seeded sample, against eager in the same dtype."""
    squares = {"eager": 0.0, kernels: 0.0}
    for seed in range(6):
        torch.manual_seed(seed)
        logits = 3 * torch.randn(3, 5, 200)
        labels = torch.randint(0, 200, (3, 5))
        old_logps = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0] + 0.2
        keywords = {"old_logps": old_logps, "advantages": torch.randn(3)}
        exact = truth_of(logits, labels, keywords, kernels).gradient.reshape(logits.shape)
        for backend in squares:
            leaf = logits.clone().requires_grad_()
            r2vpo_kernels.r2vpo_loss(leaf, labels, backend=backend, **keywords).loss.backward()
            squares[backend] += (leaf.grad - exact).square().sum().item()
    assert squares[kernels] <= 2**2 * squares["eager"]
