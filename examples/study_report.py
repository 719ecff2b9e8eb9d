"""Tables and figures of what study_staleness.py has run so far.

    python examples/study_report.py [--runs study] [--out study]

Means over seeds, with 95 % bootstrap intervals: of the seeds, resampled with replacement, the 2.5th
and 97.5th percentile of the mean. With five seeds such an interval is too narrow: for normal data
it holds the mean 84 times in a hundred. Differences are taken seed by seed, which draws prompts,
samples and minibatches; the policy that all start from is the same.

Writes summary.csv and a figure for each question into --out, and prints tables in Markdown.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from study_figures import Interval, curve, grid, line_of, print_table, save
from study_runs import Row, Runs, check_unique, having, report_folders
from study_staleness import (
    ADDITIVE_LRS,
    DUAL_LR,
    DUAL_LRS,
    EPSILONS,
    FILES,
    GROUP,
    METHODS,
    PROMPTS,
    RATES,
    SETTINGS,
    SWEEP_AGES,
    SWEPT,
    TASKS,
    Run,
    chosen,
    mean_success,
    tried,
)

# The success that "rollouts needed" counts to.
ENOUGH = 0.25
OLD = (2, 3, 5)
HOLD_A_TARGET = ("dual-one", "dual-group", "fenchel-one", "fenchel-group")

Measure = Callable[[Run, list[Row]], float]


def final_success(run: Run, rows: list[Row]) -> float:
    """The mean of the last three records."""
    return sum(row["success"] for row in rows[-3:]) / 3


def rollouts_needed(run: Run, rows: list[Row]) -> float:
    """Until success first reaches ENOUGH, linear between records; infinite where it does not."""
    consumed = [math.ceil(row["update"] / run.reuse) * PROMPTS * GROUP for row in rows]
    reached = [row["success"] >= ENOUGH for row in rows]
    if not any(reached):
        return math.inf
    end = reached.index(True)
    if end == 0:
        return 0.0
    below, above = rows[end - 1]["success"], rows[end]["success"]
    share = (ENOUGH - below) / (above - below)
    return consumed[end - 1] + share * (consumed[end] - consumed[end - 1])


def mean_of(name: str) -> Measure:
    def measure(run: Run, rows: list[Row]) -> float:
        return sum(row[name] for row in rows[1:]) / (len(rows) - 1)

    return measure


MEASURES: dict[str, Measure] = {
    "final success": final_success,
    "mean success": lambda run, rows: mean_success(rows),
    "rollouts needed": rollouts_needed,
    **{name: mean_of(name) for name in ("ratio_var", "coef", "cut", "grad_norm", "entropy")},
    # Where a method aims at a variance.
    "ratio_var / target": lambda run, rows: mean_of("ratio_var")(run, rows) / run.epsilon**2,
}


def by_seed(runs: Runs, name: str, **fixed: Any) -> dict[int, float]:
    """seed → a measure of the runs with these fields, its mean over what a tuple allows."""
    found: dict[int, list[float]] = defaultdict(list)
    for run, rows in having(runs, **fixed).items():
        found[run.seed].append(MEASURES[name](run, rows))
    return {seed: sum(values) / len(values) for seed, values in found.items()}


def interval(runs: Runs, name: str, **fixed: Any) -> Interval:
    return Interval.of(by_seed(runs, name, **fixed).values())


def difference(runs: Runs, name: str, fixed: dict[str, Any], other: dict[str, Any]) -> Interval:
    """Of a measure, less that of the runs which differ by `other`, seed by seed."""
    ours, theirs = by_seed(runs, name, **fixed), by_seed(runs, name, **(fixed | other))
    return Interval.of(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def print_results(runs: Runs) -> None:
    settings = [s for s in SETTINGS if s in {(run.age, run.reuse) for run in runs}]
    names = [f"age {age}" if reuse == 1 else f"reuse {reuse}" for age, reuse in settings]
    clip, fresh = {"method": "ppo-clip"}, {"age": 0, "reuse": 1}
    tables = (
        ("final success", None, ""),
        ("final success", clip, " less ppo-clip's"),
        ("final success", fresh, " less its own at age 0, reuse 1"),
        ("final success", clip | fresh, " less ppo-clip's at age 0, reuse 1"),
        ("mean success", clip, " less ppo-clip's"),
        ("rollouts needed", None, f" to a success of {ENOUGH:g}"),
        ("cut", None, ""),
    )
    for task in TASKS:
        for name, other, against in tables:
            lines = []
            for method in METHODS:
                line = [method]
                for age, reuse in settings:
                    fixed = {"method": method, "task": task, "age": age, "reuse": reuse}
                    cell = interval(runs, name, **fixed)
                    if other is not None:
                        cell = difference(runs, name, fixed, other)
                    line.append(cell.text(0 if name == "rollouts needed" else 3))
                lines.append(line)
            print_table(f"{task}: {name}{against}", ["", *names], lines)
    for rival in ("ppo-clip", "ppo-tuned"):
        lines = []
        for method in METHODS:
            fixed = {"method": method, "age": OLD, "reuse": 1}
            line = [method]
            for task, name in itertools.product(TASKS, ("final success", "mean success")):
                other = {"method": rival}
                line.append(difference(runs, name, fixed | {"task": task}, other).text(3))
            lines.append(line)
        columns = [f"{task}: {name}" for task in TASKS for name in ("final", "mean")]
        ages = ", ".join(map(str, OLD))
        print_table(f"success at ages {ages} together, less {rival}'s", ["", *columns], lines)
    lines = []
    for method in HOLD_A_TARGET:
        line = [method]
        for task, (age, reuse) in itertools.product(TASKS, settings):
            fixed = {"method": method, "task": task, "age": age, "reuse": reuse}
            line.append(interval(runs, "ratio_var / target", **fixed).text(2))
        lines.append(line)
    columns = [f"{task}, {name}" for task in TASKS for name in names]
    print_table("mean variance over its target", ["", *columns], lines)


def print_sweep(sweep: Runs) -> None:
    """Mean success of all that was tried, what was chosen in bold; and the dual's steps."""
    values = chosen(sweep)
    panels = [(task, lr, age) for task in TASKS for lr in RATES[task] for age in SWEEP_AGES]
    lines = []
    for method in SWEPT:
        for epsilon in dict.fromkeys(v["epsilon"] for v in tried("sort", method)):
            line = [method, "" if method == "none" else f"{epsilon:g}"]
            for task, lr, age in panels:
                fixed = {"task": task, "method": method, "age": age, "lr": lr, "epsilon": epsilon}
                text = f"{interval(sweep, 'mean success', dual_lr=DUAL_LR, **fixed).mean:.3f}"
                users = (method, "ppo-tuned") if method == "ppo-clip" else (method,)
                best = (values[task, user] == {"lr": lr, "epsilon": epsilon} for user in users)
                line.append(f"**{text}**" if any(best) else text)
            lines.append(line)
    columns = [f"{task}, lr {lr:g}, age {age}" for task, lr, age in panels]
    print_table("the sweep: mean success", ["", "ε", *columns], lines)

    settings = list(itertools.product(TASKS, EPSILONS[:2], SWEEP_AGES))
    lines = []
    for method, dual_lr in DUAL_FORMS:
        line = [method, f"{dual_lr:g}"]
        for task, epsilon, age in settings:
            fixed = {"task": task, "age": age, "epsilon": epsilon, "method": method}
            fixed |= {"lr": values[task, "dual-one"]["lr"], "dual_lr": dual_lr}
            measured = (("mean success", 3), ("ratio_var / target", 1), ("coef", 2))
            cells = (f"{interval(sweep, name, **fixed).mean:.{n}f}" for name, n in measured)
            line.append(" / ".join(cells))
        lines.append(line)
    columns = [f"{task}, target {e**2:g}, age {age}" for task, e, age in settings]
    title = "the dual's steps: mean success / variance over target / λ"
    print_table(title, ["", "lr", *columns], lines)


DUAL_FORMS = [("dual-one", lr) for lr in sorted([DUAL_LR, *DUAL_LRS])]
DUAL_FORMS += [("additive-one", lr) for lr in ADDITIVE_LRS]


def over_training(axis: Axes, runs: Runs, name: str, line: dict[str, Any], **fixed: Any) -> None:
    """A column of the records against the rollouts consumed; "v / target" too."""
    found = having(runs, **fixed)
    points = []
    for records in zip(*found.values(), strict=True):
        values = [
            row["ratio_var"] / run.epsilon**2 if name == "v / target" else row[name]
            for run, row in zip(found, records, strict=True)
        ]
        batches = math.ceil(records[0]["update"] / next(iter(found)).reuse)
        points.append((batches * PROMPTS * GROUP, Interval.of(values)))
    curve(axis, points, line)


AXES = {
    "age": "age of the rollouts, policy updates",
    "reuse": "updates that each batch of rollouts serves",
    "success": "success on held-out prompts, sampled",
    "final success": "success at the end",
    "rollouts needed": f"rollouts until success is {ENOUGH:g}",
    "v / target": "E[(ρ - c)²] / target",
    "coef": "λ",
    "cut": "share of tokens past PPO's clip",
    "grad_norm": "gradient norm, before clipping it to 1",
    "entropy": "entropy, nats per token",
}


def draw_training(
    runs: Runs, names: Sequence[str], vary: str, path: Path, methods: Sequence[str] = METHODS
) -> None:
    """Columns of the records over training, a panel for each task, column, and age or reuse."""
    held = ("reuse", 1) if vary == "age" else ("age", 0)
    values = sorted({getattr(run, vary) for run in runs if getattr(run, held[0]) == held[1]})
    panels = list(itertools.product(TASKS, names))
    figure, axes = grid(len(panels), len(values))
    for row, (task, name) in zip(axes, panels, strict=True):
        for axis, value in zip(row, values, strict=True):
            fixed = {"task": task, vary: value, held[0]: held[1]}
            for method in methods:
                over_training(axis, runs, name, line_of(method), method=method, **fixed)
            if name == "v / target":
                axis.axhline(1.0, color="black", linestyle=":", label="target")
            if name != "success":
                axis.set_yscale("log")
            axis.set(title=f"{task}, {vary} {value}", xlabel="rollouts")
        row[0].set_ylabel(AXES[name])
    save(figure, path)


def draw_settings(runs: Runs, names: Sequence[str], vary: str, path: Path) -> None:
    """Measures against the age, or the reuse at age 0; a panel for each task and measure."""
    held = {"reuse": 1} if vary == "age" else {"age": 0}
    figure, axes = grid(len(TASKS), len(names))
    for row, task in zip(axes, TASKS, strict=True):
        for axis, name in zip(row, names, strict=True):
            for method in METHODS:
                values = sorted({getattr(run, vary) for run in runs})
                fixed = held | {"task": task, "method": method}
                points = [(v, interval(runs, name, **(fixed | {vary: v}))) for v in values]
                curve(axis, points, line_of(method) | {"marker": "."})
            if name == "grad_norm":
                axis.set_yscale("log")
            axis.set(title=task, xticks=values, xlabel=AXES[vary], ylabel=AXES[name])
    save(figure, path)


def draw_strengths(sweep: Runs, path: Path) -> None:
    """The sweep: mean success against ε, each at the better learning rate there."""
    figure, axes = grid(len(TASKS), len(SWEEP_AGES))
    for row, task in zip(axes, TASKS, strict=True):
        for axis, age in zip(row, SWEEP_AGES, strict=True):
            for method in SWEPT:
                points = []
                for epsilon in dict.fromkeys(v["epsilon"] for v in tried(task, method)):
                    fixed = {"task": task, "method": method, "age": age, "epsilon": epsilon}
                    of_rates = [
                        interval(sweep, "mean success", lr=lr, dual_lr=DUAL_LR, **fixed)
                        for lr in RATES[task]
                    ]
                    points.append((epsilon, max(of_rates, key=lambda y: y.mean)))
                curve(axis, points, line_of(method) | {"marker": "."})
            title = f"{task}, age {age}"
            axis.set(title=title, xlabel="ε", xscale="log", ylabel="success, mean over training")
    save(figure, path)


def draw_dual(sweep: Runs, path: Path) -> None:
    """The dual's steps in the sweep: success, variance and λ over training, on the oldest data."""
    values, age, epsilon = chosen(sweep), SWEEP_AGES[-1], EPSILONS[0]
    names = ("success", "v / target", "coef")
    figure, axes = grid(len(TASKS), len(names))
    for row, task in zip(axes, TASKS, strict=True):
        for axis, name in zip(row, names, strict=True):
            for index, (method, dual_lr) in enumerate(DUAL_FORMS):
                fixed = {"task": task, "method": method, "dual_lr": dual_lr, "epsilon": epsilon}
                form = "in log λ" if method == "dual-one" else "additive"
                line = {"color": f"C{index}", "label": f"{form}, lr {dual_lr:g}"}
                lr = values[task, "dual-one"]["lr"]
                over_training(axis, sweep, name, line, age=age, lr=lr, **fixed)
            if name != "success":
                axis.set_yscale("log")
            title = f"{task}, age {age}, target {epsilon**2:g}"
            axis.set(title=title, xlabel="rollouts", ylabel=AXES[name])
    save(figure, path)


def write_summary(runs: Runs, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        ends = ["mean", "low", "high", "seeds"]
        writer.writerow(["task", "method", "age", "reuse", "measure", *ends])
        for task, method, (age, reuse) in itertools.product(TASKS, METHODS, SETTINGS):
            fixed = {"task": task, "method": method, "age": age, "reuse": reuse}
            for name in MEASURES:
                if name != "ratio_var / target" or method in HOLD_A_TARGET:
                    y = interval(runs, name, **fixed)
                    if y.known:
                        numbers = (f"{x:.4g}" for x in (y.mean, y.low, y.high))
                        writer.writerow([*fixed.values(), name, *numbers, len(y.values)])


def main() -> None:
    folder, out = report_folders(__doc__.partition("\n")[0], "study")
    runs, sweep = (FILES.read(folder / name) for name in ("results.csv", "sweep.csv"))
    check_unique(folder / "results.csv", runs)
    if runs:
        print_results(runs)
        write_summary(runs, out / "summary.csv")
        draw_training(runs, ["success"], "age", out / "success.png")
        aiming = [m for m in METHODS if m in HOLD_A_TARGET]
        draw_training(runs, ["v / target", "coef"], "age", out / "constraint.png", aiming)
        draw_settings(runs, ["final success", "rollouts needed"], "age", out / "age.png")
        draw_settings(runs, ["cut", "grad_norm", "entropy"], "age", out / "clipped.png")
        if any(run.reuse > 1 for run in runs):
            draw_training(runs, ["success"], "reuse", out / "reuse.png")
    if chosen(sweep).keys() == set(itertools.product(TASKS, METHODS)):
        print_sweep(sweep)
        draw_strengths(sweep, out / "strength.png")
        draw_dual(sweep, out / "dual.png")


if __name__ == "__main__":
    main()
