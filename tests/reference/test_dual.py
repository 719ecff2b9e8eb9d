"""The two ways to set variance_coef: dual ascent, and the closed form of the Fenchel dual."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tolerance import U

from r2vpo_kernels import (
    RatioStats,
    VarianceConstraint,
    fenchel_coef,
    ops,
    r2vpo_loss_from_logps,
    reference,
)


def stats(weight, d_sum, d_sq_sum):
    return RatioStats(*(torch.tensor(x, dtype=torch.float32) for x in (weight, d_sum, d_sq_sum)))


def test_the_step_is_the_equation():
    constraint = VarianceConstraint(0.1, coef=1.0, lr=2.0)
    constraint.step(stats([2.0, 2.0], [0.2, 0.0], [0.4, 0.8]))
    # Past twice the target what exceeds it does not count.
    assert constraint.coef.item() == pytest.approx(math.exp(2.0))
    constraint.step(stats([2.0, 2.0], [0.2, 0.0], [0.2, 0.1]))
    assert constraint.coef.item() == pytest.approx(math.exp(2.0 + 2.0 * (0.075 / 0.1 - 1)))
    about_means = VarianceConstraint(0.2, center="group", coef=1.0, lr=2.0)
    about_means.step(stats([1.0, 3.0], [0.2, 0.0], [0.4, 0.6]))
    pooled = (1 * (0.4 - 0.04) + 3 * 0.2) / 4
    assert about_means.coef.item() == pytest.approx(math.exp(2.0 * (pooled / 0.2 - 1)))


@pytest.mark.parametrize("target", [0.1, 0.02], ids=["near", "past twice"])
@pytest.mark.parametrize("about_means", [False, True])
@pytest.mark.parametrize("groups", [1, 7, 2000])
def test_the_kernels_step_is_the_references(kernels, device, groups, about_means, target):
    g = torch.Generator().manual_seed(groups)
    weight = torch.randint(0, 4, (groups,), generator=g).float()
    d_sum, d_sq_sum = weight * (torch.rand(2, groups, generator=g) * 0.1 + 0.05)
    settings = about_means, target, 0.3, 1e-3, 10.0
    exact = RatioStats(*(x.double() for x in (weight, d_sum, d_sq_sum)))
    expected = reference.dual_step(torch.tensor(0.7).double(), exact, *settings)
    coef = torch.tensor(0.7, device=device)
    moments = (x.to(device) for x in (weight, d_sum, d_sq_sum))
    ops.dual_step(coef, *moments, *settings, kernels)
    # All in float64, and rounded once.
    assert coef.double().item() == pytest.approx(expected.item(), rel=U)


def test_the_bounds_hold():
    constraint = VarianceConstraint(0.1, coef=1.0, lr=100.0, min_coef=0.5, max_coef=3.0)
    constraint.step(stats([1.0], [0.0], [9.0]))
    assert constraint.coef == 3.0
    constraint.step(stats([1.0], [0.0], [0.0]))
    assert constraint.coef == 0.5


@pytest.mark.parametrize("bad", [stats([0.0], [0.0], [0.0]), stats([1.0], [0.0], [math.nan])])
def test_statistics_that_say_nothing_move_nothing(bad):
    constraint = VarianceConstraint(0.1, coef=1.0)
    constraint.step(bad)
    assert constraint.coef == 1.0


def test_a_target_that_float32_rounds_to_zero():
    constraint = VarianceConstraint(1e-50, coef=1.0)
    constraint.step(stats([1.0], [0.0], [0.0]))
    assert constraint.coef.isfinite()


def test_state_dict_round_trip():
    constraint = VarianceConstraint(0.1, coef=1.0)
    coef, saved = constraint.coef, constraint.state_dict()
    constraint.step(stats([1.0], [0.0], [9.0]))
    assert constraint.coef != 1.0 and saved["coef"] == 1.0
    constraint.load_state_dict(saved)
    # The same tensor: whoever passes it as variance_coef has it already.
    assert constraint.coef is coef and coef == 1.0
    assert coef is not saved["coef"]
    with pytest.raises(ValueError, match="state_dict"):
        constraint.load_state_dict({"lambda": 1.0})


@pytest.mark.parametrize("bound", [0.001, 0.01, 0.1, 0.3, 0.7, 3.3])
@pytest.mark.parametrize("spread", [0.0, 9.0])
def test_what_was_saved_at_a_bound_is_taken_back(bound, spread, tmp_path):
    """float32 is above some of these bounds, and below others."""
    low, high = (bound, 100.0) if spread == 0.0 else (1e-3, bound)

    def constraint():
        return VarianceConstraint(0.1, coef=bound, lr=1.0, min_coef=low, max_coef=high)

    saved = constraint()
    saved.step(stats([1.0], [0.0], [spread]))
    torch.save(saved.state_dict(), tmp_path / "state")
    loaded = constraint()
    loaded.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(loaded.coef, saved.coef)


def test_a_step_between_forward_and_backward_changes_no_gradient():
    """λ moves in place; the loss computed before keeps the λ it was computed with."""
    gradients = []
    for steps in (0, 1):
        constraint = VarianceConstraint(0.01, coef=1.0)
        logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        out = r2vpo_loss_from_logps(
            logps, logps.detach() - 0.3, torch.ones(1), variance_coef=constraint.coef
        )
        for _ in range(steps):
            constraint.step(out.stats)
        out.loss.backward()
        gradients.append(logps.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_the_tensor_is_the_same_one_after_a_step():
    constraint = VarianceConstraint(0.1)
    coef = constraint.coef
    constraint.step(stats([1.0], [0.0], [9.0]))
    assert constraint.coef is coef and coef != 0.5


@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.04, 0.3]))
def test_the_closed_form_solves_the_constrained_problem(seed, target):
    """At λ* the maximiser of Σw(A·ρ) - λΣw(ρ-1)² lies on the ball Σw(ρ-1)²/Σw = target (Eq. 18)."""
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(20, generator=g, dtype=torch.float64)
    weight = torch.rand(20, generator=g, dtype=torch.float64)
    coef = fenchel_coef(advantages, target, weight=weight)
    d = advantages / (2 * coef)
    assert ((weight * d**2).sum() / weight.sum()).item() == pytest.approx(target)

    ids = torch.randint(0, 4, (20,), generator=g)
    coef = fenchel_coef(
        advantages, target, weight=weight, center="group", group_ids=ids, num_groups=5
    )
    variance = 0.0
    for group in range(5):
        at = ids == group
        if at.any():
            d, w = advantages[at] / (2 * coef), weight[at]
            mean = (w * d).sum() / w.sum()
            variance += (w * (d - mean) ** 2).sum()
    assert (variance / weight.sum()).item() == pytest.approx(target)


def test_masked_advantages_do_not_count():
    advantages = torch.tensor([1.0, 3.0, math.nan])
    weight = torch.tensor([1.0, 1.0, 0.0])
    assert fenchel_coef(advantages, 0.25, weight=weight).item() == pytest.approx(math.sqrt(5))
    one_group = fenchel_coef(advantages, 0.25, weight=weight, center="group")
    assert one_group.item() == pytest.approx(1.0)
    assert fenchel_coef(advantages, 0.25, weight=torch.zeros(3)) == 0


def test_all_reduce_sums_over_ranks(tmp_path):
    """One process, world size one: the sum is itself, and a new object."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        before = stats([1.0, 2.0], [0.1, 0.2], [0.3, 0.4])
        after = before.all_reduce()
        for name in ("weight", "d_sum", "d_sq_sum"):
            assert torch.equal(getattr(before, name), getattr(after, name))
    finally:
        dist.destroy_process_group()
