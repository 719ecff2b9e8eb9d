"""What an optimizer step is to the adapters: one window of statistics, one move of λ."""

import gc
import json
import math
import warnings

import pytest
import torch
from support.ranks import run_on
from support.trainers import case
from torch.optim.optimizer import _global_optimizer_post_hooks

from r2vpo_kernels import RatioStats, VarianceConstraint, r2vpo_loss_from_logps
from r2vpo_kernels.integrations.steps import STEPS_WATCHED, OptimizerSteps, variance_constraint

TARGET, LR = 0.05, 0.1
ADVICE = "Set the_option=1."


def dual(**options):
    return VarianceConstraint(TARGET, lr=LR, **options)


def stats_of(*deltas):
    """Σw, Σd, Σd² of tokens with these ρ - 1."""
    d = torch.tensor(deltas)
    return RatioStats(*(x.sum()[None] for x in (torch.ones_like(d), d, d**2)))


def moved(coef, *deltas):
    """λ after one step whose tokens had these ρ - 1 (Eq. 16)."""
    v = sum(d**2 for d in deltas) / len(deltas)
    return coef * math.exp(LR * min(v / TARGET - 1, 1))


def optimizer(kind=torch.optim.SGD, **options):
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    return kind([parameter], lr=0.1, **options)


def coef_of(steps):
    return steps.constraint.coef.item()


def test_an_optimizer_step_moves_it_once_by_all_micro_batches():
    steps, policy = OptimizerSteps(dual()), optimizer()
    for deltas in ((0.1, -0.3), (0.2,), (0.0, 0.4, 0.1)):
        steps.follow(stats_of(*deltas))
        assert coef_of(steps) == 0.5
    policy.step()
    once = moved(0.5, 0.1, -0.3, 0.2, 0.0, 0.4, 0.1)
    assert coef_of(steps) == pytest.approx(once, rel=1e-6)
    # Of the next step nothing is left over.
    steps.follow(stats_of(0.01))
    policy.step()
    assert coef_of(steps) == pytest.approx(moved(once, 0.01), rel=1e-6)


def test_metrics_are_of_the_whole_step():
    steps, policy = OptimizerSteps(dual()), optimizer()
    steps.follow(stats_of(0.1, -0.3))
    start = {name: x.item() for name, x in steps.metrics().items()}
    assert start == {
        "variance_coef": 0.5, "step/ratio_mean": 1, "step/ratio_var": 0, "step/ratio_ess": 1,
    }  # fmt: skip
    steps.follow(stats_of(0.5))
    policy.step()
    steps.follow(stats_of(7.0))
    d = torch.tensor([0.1, -0.3, 0.5])
    got = {name: x.item() for name, x in steps.metrics().items()}
    assert got["step/ratio_mean"] == pytest.approx(1 + d.mean().item(), rel=1e-6)
    variance = d.var(unbiased=False).item()
    assert got["step/ratio_var"] == pytest.approx(variance, rel=1e-6)
    mean = 1 + d.mean().item()
    assert got["step/ratio_ess"] == pytest.approx(mean**2 / (mean**2 + variance), rel=1e-6)
    assert got["variance_coef"] == coef_of(steps) != 0.5


def test_steps_of_other_optimizers_are_ignored():
    """A policy may have two (Muon and AdamW), and a critic steps before the policy's losses."""
    steps = OptimizerSteps(dual())
    critic, muon, adam = optimizer(), optimizer(), optimizer(torch.optim.AdamW)
    for value in (0.1, 0.2):
        before = coef_of(steps)
        critic.step()
        steps.follow(stats_of(value))
        muon.step()
        adam.step()
        assert coef_of(steps) == pytest.approx(moved(before, value), rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_waits_for_the_next(fused):
    """GradScaler does not call a plain optimizer then, and calls a fused one all the same."""
    steps, policy = OptimizerSteps(dual()), optimizer(fused=fused)
    (parameter,) = policy.param_groups[0]["params"]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # makes its scale

    def step(gradient):
        parameter.grad = torch.full((2,), gradient) * scaler.get_scale()
        scaler.step(policy)
        scaler.update()

    steps.follow(stats_of(0.6))
    step(1.0)
    parameter.data.zero_()
    steps.constraint.coef.fill_(0.5)
    logged = steps.metrics()
    steps.follow(stats_of(0.1))
    step(math.inf)
    torch.testing.assert_close(steps.metrics(), logged, rtol=0, atol=0)
    assert (parameter == 0).all() and coef_of(steps) == 0.5
    steps.follow(stats_of(0.3))
    step(1.0)
    assert (parameter != 0).all()
    assert coef_of(steps) == pytest.approx(moved(0.5, 0.1, 0.3), rel=1e-6)
    steps.follow(stats_of(0.1))
    step(1.0)
    assert coef_of(steps) == pytest.approx(moved(moved(0.5, 0.1, 0.3), 0.1), rel=1e-6)
    # Another optimizer's step changes nothing, nor what is logged.
    before = steps.metrics()
    step(1.0)
    torch.testing.assert_close(steps.metrics(), before, rtol=0, atol=0)
    assert before["step/ratio_mean"].item() == pytest.approx(1.1, rel=1e-6)


def test_a_loss_keeps_its_coefficient():
    """λ moves between a loss and its backward where a trainer's step comes between."""
    steps, policy = OptimizerSteps(dual()), optimizer()
    logps, old, advantages, mask, _ = case()
    call = {"mask": mask, "variance_coef": steps.constraint.coef}
    out = r2vpo_loss_from_logps(logps, old, advantages, **call)
    (expected,) = torch.autograd.grad(
        r2vpo_loss_from_logps(logps, old, advantages, **call | {"variance_coef": 0.5}).loss, logps
    )
    steps.follow(out.stats)
    policy.step()
    assert coef_of(steps) != 0.5
    assert torch.equal(torch.autograd.grad(out.loss, logps)[0], expected)


def test_batches_keep_their_groups_apart():
    steps, policy = OptimizerSteps(dual(center="group")), optimizer()
    # One group in each batch, which spreads by 0.1 about its own mean.
    for batch, mean in ((3, 0.0), (4, 1.0)):
        steps.follow(stats_of(mean - 0.1, mean + 0.1), batch)
    policy.step()
    assert coef_of(steps) == pytest.approx(moved(0.5, 0.1), rel=1e-5)


def watched(advice, ratios):
    steps, policy = OptimizerSteps(None, advice=advice), optimizer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for d in ratios:
            steps.follow(stats_of(d, 0.0))
            policy.step()
    return [str(w.message) for w in caught]


def test_ratios_that_stay_at_one_are_said_once():
    (message,) = watched(ADVICE, [0.0] * (2 * STEPS_WATCHED))
    assert "every importance ratio was exactly 1" in message and message.endswith(ADVICE)
    assert watched(None, [0.0] * (2 * STEPS_WATCHED)) == []
    assert watched(ADVICE, [0.0] * (STEPS_WATCHED - 1)) == []
    for moves in range(STEPS_WATCHED):
        ratios = [0.0] * (2 * STEPS_WATCHED)
        ratios[moves] = 1e-6
        assert watched(ADVICE, ratios) == []


def test_a_file_keeps_it_for_the_next_run(tmp_path):
    file = tmp_path / "run" / "lambda.json"
    steps, policy = OptimizerSteps(dual(), file=file), optimizer()
    assert not file.exists()
    for value in (0.1, 0.4):
        steps.follow(stats_of(value))
        policy.step()
        assert json.loads(file.read_text()) == {"variance_coef": coef_of(steps)}
    assert list(file.parent.iterdir()) == [file]
    assert coef_of(OptimizerSteps(dual(), file=file)) == coef_of(steps) != 0.5
    with pytest.warns(UserWarning, match=r"other\.json does not exist: λ starts anew at 0\.5"):
        OptimizerSteps(dual()).restore(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"coef: got .*, expected a finite number from 5\.0"):
        OptimizerSteps(dual(min_coef=5.0, coef=5.0), file=file)


def test_the_hook_ends_with_its_trainer():
    gc.collect()
    hooks = len(_global_optimizer_post_hooks)
    steps, policy = OptimizerSteps(dual()), optimizer()
    constraint = steps.constraint
    steps.follow(stats_of(0.3))
    del steps
    gc.collect()
    policy.step()
    assert constraint.coef == 0.5
    assert len(_global_optimizer_post_hooks) == hooks


def on_two_ranks(rank, folder):
    """Unlike micro-batches, in number and size; λ is that of all tokens, and the same on both."""
    file = folder / "lambda.json"
    steps, policy = OptimizerSteps(dual(), file=file), optimizer()
    for deltas in ((0.1, -0.3), (0.2,)) if rank == 0 else ((0.4,),):
        steps.follow(stats_of(*deltas))
    policy.step()
    assert coef_of(steps) == pytest.approx(moved(0.5, 0.1, -0.3, 0.2, 0.4), rel=1e-6)
    got = steps.metrics()["step/ratio_mean"].item()
    assert got == pytest.approx(1 + 0.4 / 4, rel=1e-6)
    torch.distributed.barrier()
    assert json.loads(file.read_text()) == {"variance_coef": coef_of(steps)}
    # Of a group of one rank the other is not asked.
    groups = [torch.distributed.new_group([0]), torch.distributed.new_group([1])]
    steps = OptimizerSteps(dual(), group=lambda: groups[rank])
    if rank == 1:
        steps.follow(stats_of(0.2))
        policy.step()
        assert coef_of(steps) == pytest.approx(moved(0.5, 0.2), rel=1e-6)


def test_two_ranks(tmp_path):
    run_on(2, tmp_path, on_two_ranks, tmp_path)


def test_the_duals_options_are_named():
    good = {
        "variance_target": 0.02, "variance_coef": None, "variance_coef_lr": 0.1,
        "variance_coef_min": 1e-3, "variance_coef_max": 100.0,
    }  # fmt: skip
    assert variance_constraint(**good).coef == 0.5
    without = good | {"variance_target": None}
    assert variance_constraint(**without) is None
    for name, value in (
        ("variance_coef_lr", 0.2), ("variance_coef_min", 0.0), ("variance_coef_max", 9.0),
        ("variance_coef_file", "lambda.json"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got .*: without variance_target nothing"):
            variance_constraint(**without | {name: value})
    for change, message in (
        ({"variance_target": 0.0}, "variance_target: got 0.0, expected a number above 0"),
        ({"variance_target": "0.1"}, "variance_target: got str, expected a number"),
        ({"variance_coef_min": 0.0}, "variance_coef_min: got 0.0, expected a number above 0"),
        ({"variance_coef_max": 1e-4}, "variance_coef_max: got 0.0001, expected a finite number"),
        ({"variance_coef_lr": -1.0}, "variance_coef_lr: got -1.0, expected a finite number"),
        ({"variance_coef": 0.0}, "variance_coef: got 0.0, expected a finite number from 0.001"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            variance_constraint(**good | change)
        with pytest.raises((ValueError, TypeError), match="r2vpo_" + message):
            variance_constraint(**good | change, prefix="r2vpo_")
