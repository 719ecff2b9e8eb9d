"""The staleness study measures what it says: ages, methods, resuming, and what the report makes of
runs."""

import csv
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r2vpo_kernels import RatioStats, r2vpo_loss_from_logps

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import study_report as report
import study_staleness as study
from study_figures import Interval
from study_runs import AdditiveDual
from study_staleness import GROUP, METHODS, PROMPTS, TASKS, Method, Run

RUN = Run("sort", "dual-group", age=0, reuse=1, seed=0, lr=1e-3, updates=study.RECORD_EVERY)


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch):
    for name, task in study.TASKS.items():
        monkeypatch.setitem(study.TASKS, name, replace(task, warm_up=0.0))


@pytest.mark.parametrize(("age", "reuse"), [(0, 1), (2, 1), (0, 2), (1, 3)])
def test_which_rollouts_an_update_takes(age, reuse, monkeypatch, tmp_path):
    """At age k those sampled k batches before, with reuse r each r times."""
    sampled, taken = [], []

    def numbered(rewards):
        sampled.append(len(sampled))
        return torch.full_like(rewards, float(len(sampled) - 1))

    def loss(self, logits, labels, old_logps, advantages):
        taken.append((advantages.unique().item(), len(sampled)))
        return real_loss(self, logits, labels, old_logps, advantages)

    real_loss = Method.loss
    monkeypatch.setattr(study, "group_advantages", numbered)
    monkeypatch.setattr(Method, "loss", loss)
    study.train(replace(RUN, age=age, reuse=reuse), tmp_path)
    batches = [u // reuse for u in range(RUN.updates) for _ in range(study.MINIBATCHES)]
    assert taken == [(batch, batch + age + 1) for batch in batches]


def test_old_rollouts_have_left_the_policy(tmp_path):
    fresh, old = (study.train(replace(RUN, age=age), tmp_path)[-1] for age in (0, 2))
    assert 0 < fresh["ratio_var"] < old["ratio_var"]


def loss_of(
    method: str, ratio: float, advantage: float, epsilon: float = study.EPSILON
) -> tuple[float, float]:
    """(the gradient in the log-prob, λ) of a group of equal tokens, of two words."""
    run = replace(RUN, method=method, epsilon=epsilon)
    p = 0.3
    logits = torch.tensor([math.log(p), math.log(1 - p)]).repeat(GROUP, 1, 1).requires_grad_()
    labels = torch.zeros(GROUP, 1, dtype=torch.int64)
    old = torch.full((GROUP, 1), math.log(p / ratio))
    taught = Method(run)
    taught.loss(logits, labels, old, torch.full((GROUP,), advantage)).loss.backward()
    # dlogp/dz_y = 1 - p
    return logits.grad[..., 0].sum().item() / (1 - p), taught.coef.item()


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("ratio", [0.7, 0.9, 1.1, 1.25, 1.4])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_each_method(method, ratio, advantage):
    got, coef = loss_of(method, ratio, advantage)
    free = -ratio * advantage
    if method in ("ppo-clip", "clip-higher", "ppo-tuned"):
        high = 1.28 if method == "clip-higher" else 1.2
        cut = ratio > high if advantage > 0 else ratio < 0.8
        assert math.isnan(coef)
        assert got == pytest.approx(0.0 if cut else free, abs=1e-6)
        return
    # Of equal advantages the deviation within the group is 0.
    of_fenchel = 0.0 if method == "fenchel-group" else abs(advantage) / 0.4
    expected = {"none": 0.0, "spo": abs(advantage) / 0.4, "fenchel": of_fenchel}
    expected = expected.get(method.split("-")[0], 2.5)
    assert coef == pytest.approx(expected)
    # Of equal ratios the group's mean is each of them.
    center = ratio if method.endswith("group") else 1.0
    assert got == pytest.approx(free + 2 * expected * ratio * (ratio - center), abs=1e-5)


def test_a_clip_of_more_than_one_has_no_lower_edge():
    assert loss_of("ppo-tuned", 0.01, -1.0, epsilon=5.0)[0] == pytest.approx(0.01, rel=1e-5)
    assert loss_of("ppo-tuned", 7.0, 1.0, epsilon=5.0)[0] == 0.0
    assert loss_of("clip-higher", 7.0, 1.0, epsilon=5.0)[0] == pytest.approx(-7.0, rel=1e-5)


def test_would_clip():
    ratio = torch.tensor([[1.19, 1.21, 0.79], [0.81, 0.79, 1.21], [2.0, 0.1, 1.0]])
    advantages = torch.tensor([0.5, -2.0, 0.0])
    old_logps = torch.full((3, 3), -1.0)
    logps = ratio.log() - 1
    cut = study.would_clip(
        r2vpo_loss_from_logps(logps, old_logps, advantages), old_logps, advantages
    )
    assert cut.tolist() == [[False, True, False], [False, True, False], [False] * 3]
    # The metrics say the same of the clip itself.
    clipped = r2vpo_loss_from_logps(
        logps, old_logps, advantages, policy_loss="clip", clip_range=study.EPSILON
    ).metrics()
    assert clipped["clip/low"] + clipped["clip/high"] == cut.float().mean()


def test_additive_dual():
    dual = AdditiveDual(0.04, coef=2.0, lr=0.5)
    dual.step(RatioStats(torch.ones(1), torch.zeros(1), torch.tensor([1.0])))
    assert dual.coef.item() == pytest.approx(2.0 + 0.5 * 0.96)


@pytest.mark.slow
def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    runs = [RUN, replace(RUN, method="ppo-clip", age=1)]
    study.finish("test", runs[:1], path, workers=1)
    before = path.read_text()
    study.finish("test", runs, path, workers=1)
    after = path.read_text()
    assert after.startswith(before)
    assert list(study.FILES.read(path)) == runs
    monkeypatch.setattr(study, "starting_policy", None)  # nothing is trained
    study.finish("test", runs, path, workers=1)
    assert path.read_text() == after


@pytest.mark.slow
def test_a_run_cut_short_is_run_again(tmp_path):
    path = tmp_path / "results.csv"
    study.finish("test", [RUN], path, workers=1)
    whole = path.read_text()
    for end in (0, 40, whole.index("\n") + 1, len(whole) - 2, whole.rindex(",", 0, -20)):
        path.write_text(whole[:end])
        assert study.FILES.read(path) == {}
    study.finish("test", [RUN], path, workers=1)
    assert path.read_text() == whole


def test_what_is_chosen():
    """The best mean over ages and seeds; another ε only where the method may have one."""
    sweep = {run: [{"update": 0, "success": 0.1}] for run in study.sweep_runs()}
    for run in sweep:
        if (run.lr, run.epsilon) == (study.RATES[run.task][1], 1.0):
            sweep[run] = [{"update": 0, "success": 0.5}]
        if run.lr == study.RATES[run.task][0] and run.age == 5:
            sweep[run] = [{"update": 0, "success": 0.7 if run.epsilon == 0.2 else 0.2}]
    chosen = study.chosen(sweep)
    assert set(chosen) == {(task, method) for task in TASKS for method in METHODS}
    for (task, method), values in chosen.items():
        held = method in ("ppo-clip", "clip-higher", "none")
        low, high = study.RATES[task]
        assert values == ({"lr": low, "epsilon": 0.2} if held else {"lr": high, "epsilon": 1.0})
    # Other steps of the dual do not take part.
    extra = {run: [{"update": 0, "success": 1.0}] for run in study.dual_runs(sweep)}
    assert not extra.keys() & sweep.keys()
    assert study.chosen(sweep | extra) == chosen


def test_rollouts_needed(monkeypatch):
    monkeypatch.setattr(report, "ENOUGH", 0.6)
    batch = PROMPTS * GROUP
    rows = [{"update": u, "success": s} for u, s in [(0, 0.1), (5, 0.4), (10, 0.8), (15, 0.5)]]
    run = replace(RUN, updates=15)
    assert report.rollouts_needed(run, rows) == pytest.approx(7.5 * batch)
    assert report.rollouts_needed(replace(run, reuse=5), rows) == pytest.approx(1.5 * batch)
    # Never, whatever that cost; and at once.
    assert report.rollouts_needed(replace(run, reuse=5), rows[:2]) == math.inf
    assert report.rollouts_needed(run, rows[2:]) == 0.0


def test_interval():
    y = Interval.of([0.0, 1.0])
    assert (y.mean, y.low, y.high) == (0.5, 0.0, 1.0)
    many = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = Interval.of(many.tolist())
    # The standard error of a percentile of 10 000 draws is 0.03 of that of the mean.
    error = many.std(correction=0).item() / 20
    assert y.high - y.mean == pytest.approx(1.96 * error, abs=4 * 0.03 * error)
    assert Interval.of([1.0, math.inf]).text(1) == "1 of 2 reach it"
    assert Interval.of([]).text(1) == ""


def test_several_ages_together(monkeypatch):
    runs = {}
    for method, shift in (("ppo-clip", 0.0), ("dual-one", 0.1)):
        for seed, age in itertools.product((0, 1), (0, 2, 5)):
            rows = [{"success": 0.01 * age + 0.3 * seed + shift * (age > 0)}] * 3
            runs[replace(RUN, method=method, seed=seed, age=age)] = rows
    assert report.by_seed(runs, "final success", method="dual-one", age=(2, 5)) == pytest.approx(
        {0: 0.135, 1: 0.435}
    )
    fixed = {"method": "dual-one", "age": (2, 5)}
    gap = report.difference(runs, "final success", fixed, {"method": "ppo-clip"})
    assert gap.values == pytest.approx([0.1, 0.1])
    gap = report.difference(runs, "final success", fixed, {"age": 0})
    assert gap.values == pytest.approx([0.135, 0.135])


def rows_of(success: float, updates: int) -> list[dict[str, float]]:
    """A run's records where nothing but success matters."""
    measured = dict.fromkeys(study.MEASURED, 0.5) | {"success": success}
    return [{"update": u, "success": success} if u == 0 else measured | {"update": u}
            for u in range(0, updates + 1, study.RECORD_EVERY)]  # fmt: skip


@pytest.mark.slow
def test_report(tmp_path, monkeypatch, capsys):
    """Differences are those of a seed; every question has a figure; nothing need be finished."""
    runs = {}
    for method, shift in (("ppo-clip", 0.0), ("dual-one", 0.1)):
        for seed, (age, reuse) in itertools.product((0, 1), ((0, 1), (3, 1), (0, 2))):
            run = Run("sort", method, age, reuse, seed, lr=1e-3)
            runs[run] = rows_of(0.3 * seed + shift, run.updates)
    sweep = {run: rows_of(run.lr, run.updates) for run in study.sweep_runs()}
    sweep |= {run: rows_of(run.lr, run.updates) for run in study.dual_runs(sweep)}
    monkeypatch.setattr(sys, "argv", ["study_report.py", "--runs", str(tmp_path)])
    study.FILES.write(tmp_path / "sweep.csv", dict(itertools.islice(sweep.items(), 5)))
    report.main()
    assert capsys.readouterr().out == ""
    study.FILES.write(tmp_path / "sweep.csv", sweep)
    study.FILES.write(tmp_path / "results.csv", runs)
    report.main()
    printed = capsys.readouterr().out
    assert "| dual-one | 0.100 [0.100, 0.100] | 0.100 [0.100, 0.100] |" in printed
    assert "| ppo-clip | 1 of 2 reach it | 1 of 2 reach it |" in printed
    assert "the dual's steps" in printed
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    final = [r for r in rows if r["method"] == "ppo-clip" and r["measure"] == "final success"]
    assert [(r["age"], r["mean"], r["seeds"]) for r in final] == [
        ("0", "0.15", "2"), ("3", "0.15", "2"), ("0", "0.15", "2"),
    ]  # fmt: skip
    for name in ("success", "constraint", "age", "clipped", "reuse", "strength", "dual"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    study.FILES.write(tmp_path / "results.csv", runs | {replace(run, lr=1.0): runs[run]})
    with pytest.raises(SystemExit, match="has 2 runs of"):
        report.main()
