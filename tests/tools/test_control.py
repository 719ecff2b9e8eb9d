"""The control example trains on what it says: environments, advantages, reuse, methods, report."""

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("envpool")
pytest.importorskip("gymnasium")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import continuous_control as control
from continuous_control import ENVIRONMENTS, METHODS, Batch, Method, Rollouts, Run
from control_tasks import EPISODE, TASKS, Pool, make_environments

from r2vpo_kernels import fenchel_coef

VALUES = {method: {"lr": 1e-3, "epsilon": 0.2} for method in [*METHODS, "fenchel-one"]}
RUN = Run("ball_in_cup-catch", "dual-one", 1, "behaviour", 0, lr=1e-3, epsilon=0.2, updates=3)
GAMMA, DECAY = control.GAMMA, control.GAMMA * control.GAE_LAMBDA


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(control, "HORIZON", 16)
    monkeypatch.setattr(control, "EPOCHS", 1)
    monkeypatch.setattr(control, "RECORDS", 3)


@pytest.mark.parametrize("task", TASKS)
def test_observations_are_flat(task):
    environments = Pool(TASKS[task].pool, num_envs=3, seed=0)
    observations, _ = environments.reset()
    parts, _ = Pool(TASKS[task].pool, num_envs=3, seed=0).pool.reset()
    parts = [part.reshape(3, -1) for part in parts.values()]
    assert observations.shape == environments.observation_space.shape
    assert np.array_equal(observations, np.concatenate(parts, axis=1))


def test_the_last_observation_comes_before_the_reset():
    """An episode has 1000 steps; its last observation follows from the one before it."""
    environments = Pool("PendulumSwingup-v1", num_envs=2, seed=0)
    before, _ = environments.reset()
    actions, seen = np.ones((2, 1)), [before]
    for step in range(1, EPISODE + 3):
        observations, rewards, terminated, truncated, _ = environments.step(actions)
        seen.append(observations)
        assert not terminated.any()
        assert truncated.tolist() == [step == EPISODE] * 2
        if step == EPISODE + 1:
            assert (rewards == 0).all()
    # cos θ, sin θ, velocity: a step of 0.02 s turns the pendulum by what the velocity says.
    angle = [np.arctan2(x[:, 1], x[:, 0]) for x in seen]
    turned = [np.abs((b - a + np.pi) % (2 * np.pi) - np.pi) for a, b in pairwise(angle)]
    speed = [np.abs(x[:, 2]) for x in seen[1:]]
    gap = [np.abs(t - 0.02 * v).max() for t, v in zip(turned, speed, strict=True)]
    assert gap[EPISODE - 1] < 0.02 < gap[EPISODE]


def test_gains_scale_the_controls():
    """Half the gain under full controls is full gain under half of them, and they come last."""
    pools = [make_environments("cheetah-run", 2, 0, GAMMA) for _ in range(3)]
    for pool, (gain, control_) in zip(pools, [(1.0, 0.5), (0.5, 1.0), (0.5, 7.0)], strict=True):
        pool.reset()
        pool.unwrapped.gains[:] = gain
        pool.last, *_ = pool.step(np.full((2, 6), control_))
    assert np.array_equal(pools[0].last, pools[1].last)
    assert np.array_equal(pools[0].last, pools[2].last)  # clipped before


def test_changing_dynamics(monkeypatch):
    gains = []
    monkeypatch.setattr(control.Sampler, "set_gains", lambda _, g: gains.append(g))
    control.train(replace(RUN, task="cheetah-run-changing", updates=8))
    assert gains == [g for g in TASKS["cheetah-run-changing"].gains for _ in range(2)]


def rollouts_of(rewards, terminated, ended, **others) -> Rollouts:
    shape = torch.Size(rewards.shape)
    default = {"observations": torch.zeros(shape[0] + 1, shape[1], 5)}
    default |= {"actions": torch.zeros(*shape, 2), "logps": torch.zeros(shape)}
    default |= {"valid": torch.ones(shape, dtype=torch.bool)}
    return Rollouts(rewards=rewards, terminated=terminated, ended=ended, **(default | others))


def test_advantages_by_hand():
    """One environment runs on, one is cut short by the time limit, one terminates, at step 1."""
    rewards = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    values = torch.tensor([[10.0] * 3, [20.0] * 3, [30.0] * 3, [40.0] * 3])
    ended = torch.tensor([[False] * 3, [False, True, True], [False] * 3])
    terminated = torch.tensor([[False] * 3, [False, False, True], [False] * 3])
    got = control.advantages_of(rollouts_of(rewards, terminated, ended), values)
    first, second, third = 1 + GAMMA * 20 - 10, 2 + GAMMA * 30 - 20, 4 + GAMMA * 40 - 30
    runs_on = [first + DECAY * (second + DECAY * third), second + DECAY * third, third]
    cut_short = [first + DECAY * second, second, third]
    terminates = [first + DECAY * (2 - 20), 2 - 20, third]
    expected = torch.tensor([runs_on, cut_short, terminates]).T
    torch.testing.assert_close(got, expected)


def test_steps_that_reset_are_left_out():
    sampler, agent = control.Sampler(RUN), control.Agent(8, 2)
    for _ in range(math.ceil((EPISODE + 1) / control.HORIZON)):
        rollouts = sampler.rollouts(agent)
    reset = ~rollouts.valid
    last = (EPISODE - 1) % control.HORIZON
    assert reset.nonzero()[:, 0].tolist() == [last + 1] * ENVIRONMENTS
    assert rollouts.ended[last].all() and not rollouts.terminated.any()
    assert len(sampler.returns) == ENVIRONMENTS
    batch = control.batch_of([rollouts], agent, weighted=False)
    assert len(batch.advantages) == control.HORIZON * ENVIRONMENTS - ENVIRONMENTS
    torch.testing.assert_close(batch.old_logps, agent.logps(batch.observations, batch.actions))


def test_reused_rollouts():
    """Ages count from the latest; weights turn the ratio to the sampler into one to the start."""
    agent = control.Agent(5, 2)
    kept = []
    for logp in (-8.0, -1.0):
        no = torch.zeros(4, ENVIRONMENTS, dtype=torch.bool)
        actions = torch.randn(4, ENVIRONMENTS, 2)
        logps = torch.full((4, ENVIRONMENTS), logp)
        rewards = torch.zeros(4, ENVIRONMENTS)
        kept.append(rollouts_of(rewards, no, no, actions=actions, logps=logps))
    plain, weighted = (control.batch_of(kept, agent, weighted=x) for x in (False, True))
    assert plain.group_ids.unique().tolist() == list(range(2 * ENVIRONMENTS))
    age = plain.group_ids // ENVIRONMENTS
    assert torch.equal(plain.old_logps, torch.tensor([-8.0, -1.0])[age])
    assert (plain.importance_weights == 1).all()
    now = agent.logps(plain.observations, plain.actions).detach()
    torch.testing.assert_close(weighted.old_logps, now)
    ratio = (now - plain.old_logps).exp()
    assert (ratio > control.MAX_WEIGHT).any()
    torch.testing.assert_close(weighted.importance_weights, ratio.clamp(max=control.MAX_WEIGHT))


@pytest.mark.parametrize("correction", control.CORRECTIONS)
def test_old_rollouts_have_left_the_policy(correction, monkeypatch):
    """Ratios to the sampler show it, told apart by age; weights make up for it, at a price."""
    monkeypatch.setattr(control, "EPOCHS", 10)
    row = control.train(replace(RUN, reuse=2, correction=correction))[-1]
    assert row["moment_age0"] > 0
    assert "moment_age2" not in row
    # Each age has half of the steps.
    assert (row["cut_age0"] + row["cut_age1"]) / 2 == pytest.approx(row["cut"], rel=0.05)
    assert row["cut"] > 0
    assert row["ess_age0"] == 1.0
    if correction == "behaviour":
        assert row["moment_age1"] > 1.5 * row["moment_age0"]
        assert row["cut_age1"] > 1.5 * row["cut_age0"]
        assert row["ess_age1"] == 1.0
    else:
        assert row["moment_age1"] < 1.5 * row["moment_age0"]
        assert 0 < row["ess_age1"] < 1.0


def test_minibatches_grow_with_reuse(monkeypatch):
    sizes = []

    def loss(self, logps, batch, num_groups):
        sizes.append(len(logps))
        return real_loss(self, logps, batch, num_groups)

    real_loss = Method.loss
    monkeypatch.setattr(Method, "loss", loss)
    control.train(replace(RUN, reuse=2))
    one = control.HORIZON * ENVIRONMENTS // control.MINIBATCHES
    assert sizes == [one] * control.MINIBATCHES + [2 * one] * 2 * control.MINIBATCHES


@pytest.mark.parametrize("weight", [1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.7, 1.1, 1.4])
@pytest.mark.parametrize("method", [*METHODS, "fenchel-one"])
def test_the_gradient_of_each_method(method, ratio, weight):
    """Of four steps in one group, with normalised advantages of 1 and -1, and equal ratios."""
    batch = Batch(
        observations=torch.zeros(4, 3),
        actions=torch.zeros(4, 2),
        old_logps=torch.full((4,), -1.0),
        importance_weights=torch.full((4,), weight),
        advantages=torch.tensor([5.0, 5.0, 1.0, 1.0]),
        values=torch.zeros(4),
        group_ids=torch.zeros(4, dtype=torch.int64),
    )
    logps = torch.full((4,), math.log(ratio) - 1, requires_grad=True)
    Method(replace(RUN, method=method)).loss(logps, batch, 1).loss.backward()
    advantages = [weight, weight, -weight, -weight]
    for got, advantage in zip((4 * logps.grad).tolist(), advantages, strict=True):
        free = -ratio * advantage
        if method == "ppo-clip":
            expected = 0.0 if (ratio > 1.2 if advantage > 0 else ratio < 0.8) else free
        else:
            coef = {"none": 0.0, "fenchel": 2.5 * weight}.get(method.split("-")[0], 2.5)
            center = ratio if method.endswith("group") else 1.0
            expected = free + 2 * coef * ratio * (ratio - center)
        assert got == pytest.approx(expected, abs=1e-5)


def test_fenchel_about_one_is_fixed_where_advantages_are_normalised():
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    normalised = (x - x.mean()) / x.std(correction=0)
    assert fenchel_coef(normalised, RUN.epsilon**2).item() == pytest.approx(1 / (2 * RUN.epsilon))


def test_value_loss_is_clipped():
    values = torch.tensor([0.1, 3.0, -3.0], requires_grad=True)
    zeros = torch.zeros(3)
    batch = Batch(zeros, zeros, zeros, zeros, torch.tensor([1.0, 1.0, 1.0]), zeros, zeros)
    loss = control.value_loss(values, batch)
    # Targets are 1. At 3 the free error is larger than the clipped one, and so at -3.
    assert loss.item() == pytest.approx((0.9**2 + 2**2 + 4**2) / 6)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 2.0, -4.0]) / 3)
    within = torch.tensor([0.9], requires_grad=True)
    one = Batch(*(x[:1] for x in vars(batch).values()))
    control.value_loss(within, one).backward()
    assert within.grad.item() == 0.0  # 0.2 is as far as it may go


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method(method):
    rows = control.train(replace(RUN, method=method))
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all(row["ratio_var"] > 0 for row in rows)
    first, last = rows[0]["coef"], rows[-1]["coef"]
    assert math.isnan(last) == (method == "ppo-clip")
    assert (abs(last - first) > 0) == method.startswith(("dual", "fenchel"))


def test_runs_repeat(tmp_path):
    path = tmp_path / "results.csv"
    runs = [RUN, replace(RUN, method="fenchel-one", reuse=2, correction="weighted")]
    control.FILES.write(path, {run: control.train(run) for run in runs})
    assert list(control.FILES.read(path)) == runs
    again = control.FILES.read(path)[RUN]
    for row, kept in zip(control.train(RUN), again, strict=True):
        assert kept["ratio_var"] == pytest.approx(row["ratio_var"], rel=1e-3)  # four digits


def test_what_is_chosen():
    """One pair for each method, of the best mean over tasks and seeds, whatever a task's scale."""
    best = {m: control.tried(m)[index % len(control.tried(m))] for index, m in enumerate(METHODS)}
    sweep = {}
    for run in control.sweep_runs():
        at_best = {"lr": run.lr, "epsilon": run.epsilon} == best[run.method]
        task = control.SWEEP_TASKS.index(run.task)
        sweep[run] = [
            # Worse by less, on a task whose returns are larger; nobody scores; better.
            [{"return": 800.0 if at_best else 900.0}],
            [{"return": 0.0}],
            [{"return": 150.0 if at_best else 100.0}, {"return": math.nan}],
        ][task]
    assert control.chosen(sweep) == best | {"fenchel-one": best["fixed-one"]}
    assert len(set(map(str, best.values()))) > 3


def test_neighbours():
    """The main runs but for ε, which has the value before and the value after the chosen one."""
    runs = control.neighbour_runs(VALUES)
    assert {run.epsilon for run in runs} == {0.1, 0.5}
    main = control.main_runs(VALUES)
    assert {replace(run, epsilon=0.2) for run in runs} < set(main)
    edges = VALUES | {"fixed-one": {"lr": 1e-3, "epsilon": control.EPSILONS[-1]}}
    assert {run.epsilon for run in control.neighbour_runs(edges, ["fixed-one"])} == {0.5, 2.0}


def test_no_run_twice():
    parts = (
        control.sweep_runs(),
        control.main_runs(VALUES),
        control.reuse_runs(VALUES),
        control.neighbour_runs(VALUES),
        control.baseline_runs(VALUES),
    )
    runs = [run for part in parts for run in part]
    assert len(runs) == len(set(runs))
    seeds = [{run.seed for run in part} for part in parts]
    assert not seeds[0] & set().union(*seeds[1:])


def test_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rliable")
    import control_report as report

    monkeypatch.setattr(report, "REPETITIONS", 50)

    def rows_of(run: Run) -> list[dict[str, float]]:
        value = 300.0 + 100 * (run.method == "dual-one") + run.seed
        row = dict.fromkeys(control.MEASURED, 0.04) | {"return": value}
        return [row | {"update": run.updates * part // 3} for part in (1, 2, 3)]

    tasks, methods = ("cheetah-run", "reacher-hard"), ("ppo-clip", "dual-one")
    lists = {
        "results": control.main_runs(VALUES, tasks, methods, range(2)),
        "reuse": control.reuse_runs(VALUES, tasks[:1], (2,), methods, range(2)),
        "neighbours": control.neighbour_runs(VALUES, methods),
        "baseline": control.baseline_runs(VALUES),
        "sweep": control.sweep_runs(),
    }
    for name, runs in lists.items():
        control.FILES.write(tmp_path / f"{name}.csv", {run: rows_of(run) for run in runs})
    monkeypatch.setattr(sys, "argv", ["control_report.py", "--runs", str(tmp_path)])
    report.main()
    printed = capsys.readouterr().out
    assert "| dual-one | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] |" in printed
    assert "probability of beating ppo-clip of behaviour, 1, by reuse" in printed
    assert "| ppo-clip |  | 0.500 [" in printed
    # The main runs are those with one batch, and the neighbours of others.
    assert "| dual-one | **0.1** | 0.402 [0.401, 0.403] |" in printed
    assert "| dual-one | 0.2 | 0.401 [0.401, 0.401] |" in printed
    assert "| dual-one | 0.0003 | **1.00** | 1.00 | 1.00 | 1.00 |" in printed
    assert "| ppo-clip | 0.001 | 0.80 | 0.80 | 0.80 | 0.80 |" in printed
    assert "aggregated over cheetah-run, reacher-hard\n" in printed
    assert "|  | behaviour, 1 | behaviour, 2 | weighted, 2 |" in printed
    assert "| reacher-hard | 0.301 [0.301, 0.301] | 0.301 [0.301, 0.301] |" in printed
    assert "| finger-turn_hard | 0.301 [0.301, 0.301] | 0.301 [0.301, 0.301] |" in printed
    assert "| ppo-clip | 0.300 [0.300, 0.301] | 0.300 [0.300, 0.301] |" in printed
    for name in ("returns", "variance", "reuse"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    control.FILES.write(tmp_path / "sweep.csv", {run: rows_of(run) for run in lists["sweep"][:-1]})
    report.main()
    assert "the sweep's scores" not in capsys.readouterr().out
    twice = [run for one in lists["results"] for run in (one, replace(one, lr=1.0))]
    control.FILES.write(tmp_path / "results.csv", {run: rows_of(run) for run in twice})
    with pytest.raises(SystemExit, match="has 2 runs of"):
        report.main()
