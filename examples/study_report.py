"""Tables and figures of what study_staleness.py has run so far.

    python examples/study_report.py [--runs study] [--out study]

Means over seeds with 95 % bootstrap intervals: of the seeds, resampled with replacement, the 2.5th
and 97.5th percentile of the mean. With five seeds such an interval is rough, and rather too narrow.
Differences are taken seed by seed: all methods start from the same policy of a seed.

Writes summary.csv and a figure for each question into --out, and prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_staleness import (
    ADDITIVE_LRS,
    DUAL_LR,
    DUAL_LRS,
    EPSILON,
    EPSILONS,
    GROUP,
    METHODS,
    PROMPTS,
    RATES,
    SWEEP_AGES,
    TASKS,
    Row,
    Run,
    chosen,
    mean_success,
    read_runs,
    tried,
)

RESAMPLES = 10_000
# The success that "rollouts needed" counts to.
ENOUGH = {"sort": 0.6, "rare": 0.6}
COLORS = dict(zip(METHODS, ("black", "gray", "tab:red", "tab:purple"), strict=False))
COLORS |= {
    f"{kind}-{center}": color
    for kind, color in (("fixed", "tab:blue"), ("dual", "tab:green"), ("fenchel", "tab:orange"))
    for center in ("one", "group")
}

Runs = dict[Run, list[Row]]
Measure = Callable[[Run, list[Row]], float]


def rollouts(run: Run, update: float) -> float:
    """Consumed by the end of an update."""
    return math.ceil(update / run.reuse) * PROMPTS * GROUP


def final_success(run: Run, rows: list[Row]) -> float:
    """The mean of the last three records."""
    return sum(row["success"] for row in rows[-3:]) / 3


def rollouts_needed(run: Run, rows: list[Row]) -> float:
    """Until success first reaches ENOUGH, linear between records; all of them where it does not."""
    enough = ENOUGH[run.task]
    for before, after in itertools.pairwise(rows):
        if after["success"] >= enough:
            share = (enough - before["success"]) / (after["success"] - before["success"])
            start, end = (rollouts(run, row["update"]) for row in (before, after))
            return start + max(share, 0.0) * (end - start)
    return rollouts(run, run.updates)


def mean_of(name: str) -> Measure:
    def measure(run: Run, rows: list[Row]) -> float:
        return sum(row[name] for row in rows[1:]) / (len(rows) - 1)

    return measure


MEASURES: dict[str, Measure] = {
    "final success": final_success,
    "mean success": lambda run, rows: mean_success(rows),
    "rollouts needed": rollouts_needed,
    **{name: mean_of(name) for name in ("ratio_var", "coef", "cut", "grad_norm", "entropy")},
}


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        x = torch.tensor(values, dtype=torch.float64)
        draws = torch.Generator().manual_seed(0)
        picks = torch.randint(len(x), (RESAMPLES, len(x)), generator=draws)
        low, high = x[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=x.dtype))
        return Interval(x.mean().item(), low.item(), high.item(), len(x))

    def text(self, digits: int) -> str:
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def by_seed(runs: Runs, measure: Measure, **fixed) -> dict[int, float]:
    """seed → the measure, of the runs that have these fields."""
    return {
        run.seed: measure(run, rows)
        for run, rows in runs.items()
        if all(getattr(run, name) == value for name, value in fixed.items())
    }


def settings(runs: Runs) -> list[tuple[int, int]]:
    """(age, reuse), those of reuse 1 first."""
    return sorted({(run.age, run.reuse) for run in runs}, key=lambda s: (s[1], s[0]))


def interval(runs: Runs, measure: Measure, **fixed) -> Interval | None:
    values = by_seed(runs, measure, **fixed)
    return Interval.of(list(values.values())) if values else None


def against_clip(runs: Runs, measure: Measure, method: str, **fixed) -> Interval | None:
    ours = by_seed(runs, measure, method=method, **fixed)
    clip = by_seed(runs, measure, method="ppo-clip", **fixed)
    differences = [ours[seed] - clip[seed] for seed in ours if seed in clip]
    return Interval.of(differences) if differences else None


def print_table(title: str, columns: list[str], lines: Iterable[list[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def print_results(runs: Runs) -> None:
    names = [f"age {age}" if reuse == 1 else f"reuse {reuse}" for age, reuse in settings(runs)]
    tables = (("final success", interval, 2), ("final success", against_clip, 2),
              ("mean success", against_clip, 2), ("rollouts needed", interval, 0))  # fmt: skip
    for task in TASKS:
        for name, statistic, digits in tables:
            lines = []
            for method in METHODS:
                cells = [
                    statistic(runs, MEASURES[name], method=method, task=task, age=age, reuse=reuse)
                    for age, reuse in settings(runs)
                ]
                lines.append([method, *("" if c is None else c.text(digits) for c in cells)])
            title = f"{task}: {name}" + (" less ppo-clip's" if statistic is against_clip else "")
            print_table(title, ["", *names], lines)


def print_sweep(sweep: Runs) -> None:
    """Mean success of all that was tried; what was chosen in bold."""
    values = chosen(sweep)
    panels = [(task, lr, age) for task in TASKS for lr in RATES[task] for age in SWEEP_AGES]
    lines = []
    for method in METHODS:
        for epsilon in dict.fromkeys(v["epsilon"] for v in tried("sort", method)):
            line = [method, "" if method == "none" else f"{epsilon:g}"]
            for task, lr, age in panels:
                fixed = {"task": task, "method": method, "age": age, "lr": lr, "epsilon": epsilon}
                cell = interval(sweep, MEASURES["mean success"], dual_lr=DUAL_LR, **fixed)
                text = "" if cell is None else f"{cell.mean:.3f}"
                held = values[task, method] == {"lr": lr, "epsilon": epsilon}
                line.append(f"**{text}**" if held else text)
            lines.append(line)
    columns = [f"{task}, lr {lr:g}, age {age}" for task, lr, age in panels]
    print_table("the sweep: mean success", ["", "ε", *columns], lines)

    forms = [("dual-one", lr) for lr in sorted([DUAL_LR, *DUAL_LRS])]
    forms += [("additive-one", lr) for lr in ADDITIVE_LRS]
    panels = list(itertools.product(TASKS, EPSILONS[:2], SWEEP_AGES))
    lines = []
    for method, dual_lr in forms:
        line = [method, f"{dual_lr:g}"]
        for task, epsilon, age in panels:
            fixed = {"task": task, "age": age, "epsilon": epsilon, "method": method}
            fixed |= {"lr": values[task, "dual-one"]["lr"], "dual_lr": dual_lr}
            cells = [
                interval(sweep, MEASURES[name], **fixed)
                for name in ("mean success", "ratio_var", "coef")
            ]
            digits = zip(cells, (3, 3, 2), strict=True)
            line.append(" / ".join(f"{c.mean:.{n}f}" for c, n in digits if c is not None))
        lines.append(line)
    columns = [f"{task}, target {e**2:g}, age {age}" for task, e, age in panels]
    print_table("the dual's steps: mean success / v / λ", ["", "lr", *columns], lines)


def line_of(method: str) -> dict[str, str]:
    style = "--" if method.endswith("-group") or method == "clip-higher" else "-"
    return {"color": COLORS[method], "linestyle": style}


def curve(axis: Axes, method: str, points: list[tuple[float, Interval]], marker: str = "") -> None:
    """Means joined up, in the band of their intervals; nothing where there are none."""
    if not points:
        return
    x = [x for x, _ in points]
    axis.plot(x, [y.mean for _, y in points], label=method, marker=marker, **line_of(method))
    low, high = [y.low for _, y in points], [y.high for _, y in points]
    axis.fill_between(x, low, high, color=COLORS[method], alpha=0.08, linewidth=0)


def over_training(axis: Axes, runs: Runs, name: str, method: str, **fixed) -> None:
    """A column of the records against the rollouts consumed, of runs without reuse."""
    points = []
    for index, row in enumerate(next(iter(runs.values()))):
        y = interval(runs, lambda _, rows, i=index: rows[i][name], method=method, reuse=1, **fixed)
        if y is not None and not math.isnan(y.mean):
            points.append((row["update"] * PROMPTS * GROUP, y))
    curve(axis, method, points)


def over_settings(axis: Axes, runs: Runs, name: str, task: str, vary: str) -> None:
    """A measure against the age, or against the reuse at age 0."""
    values = sorted({getattr(run, vary) for run in runs if vary == "reuse" or run.reuse == 1})
    held = {"reuse": 1} if vary == "age" else {"age": 0}
    for method in METHODS:
        fixed = dict(task=task, method=method, **held)
        points = [(v, interval(runs, MEASURES[name], **{vary: v}, **fixed)) for v in values]
        points = [(v, y) for v, y in points if y is not None and not math.isnan(y.mean)]
        curve(axis, method, points, marker="o")
    axis.set(xticks=values, xlabel=AXES[vary])


AXES = {
    "age": "age of the rollouts, policy updates",
    "reuse": "updates that each batch of rollouts serves",
    "success": "success on held-out prompts, sampled",
    "final success": "success at the end",
    "rollouts needed": "rollouts until success is enough",
    "ratio_var": "E[(ρ - c)²]",
    "coef": "λ",
    "cut": "share of tokens past PPO's clip",
    "grad_norm": "gradient norm, before clipping it to 1",
    "entropy": "entropy, nats per token",
}


def grid(rows: int, columns: int, height: float = 3.2) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(1 + 3.4 * columns, 0.6 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def save(figure: Figure, axes: list[list[Axes]], path: Path) -> None:
    for axis in (axis for row in axes for axis in row):
        axis.grid(alpha=0.3)
    handles = {}
    for axis in (axis for row in axes for axis in row):
        handles |= {label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=80)


def draw_training(runs: Runs, names: Sequence[str], path: Path, logarithmic: bool = False) -> None:
    """The columns of the records over training, a panel for each task and age."""
    ages = sorted({run.age for run in runs})
    panels = [(task, name) for task in TASKS for name in names]
    figure, axes = grid(len(panels), len(ages))
    for row, (task, name) in zip(axes, panels, strict=True):
        for axis, age in zip(row, ages, strict=True):
            for method in METHODS:
                over_training(axis, runs, name, method, task=task, age=age)
            if name == "ratio_var":
                axis.axhline(EPSILON**2, color="black", linestyle=":", label="target")
            if logarithmic:
                axis.set_yscale("log")
            axis.set(title=f"{task}, age {age}", xlabel="rollouts")
        row[0].set_ylabel(AXES[name])
    save(figure, axes, path)


def draw_settings(runs: Runs, names: Sequence[str], vary: str, path: Path) -> None:
    """Measures against the age or the reuse, a panel for each task and measure."""
    figure, axes = grid(len(TASKS), len(names))
    for row, task in zip(axes, TASKS, strict=True):
        for axis, name in zip(row, names, strict=True):
            over_settings(axis, runs, name, task, vary)
            axis.set(title=task, ylabel=AXES[name])
            if name == "rollouts needed":
                axis.set_ylabel(f"rollouts until success is {ENOUGH[task]:g}")
    save(figure, axes, path)


def draw_strengths(sweep: Runs, path: Path) -> None:
    """The sweep: mean success against ε, each at the better learning rate there."""
    figure, axes = grid(len(TASKS), len(SWEEP_AGES))
    for row, task in zip(axes, TASKS, strict=True):
        for axis, age in zip(row, SWEEP_AGES, strict=True):
            for method in METHODS:
                points = []
                for epsilon in dict.fromkeys(v["epsilon"] for v in tried(task, method)):
                    fixed = {"task": task, "method": method, "age": age, "epsilon": epsilon}
                    fixed |= {"dual_lr": DUAL_LR}
                    of_rates = [
                        interval(sweep, MEASURES["mean success"], lr=lr, **fixed)
                        for lr in RATES[task]
                    ]
                    found = [y for y in of_rates if y is not None]
                    points += [(epsilon, max(found, key=lambda y: y.mean))] if found else []
                curve(axis, method, points, marker="o")
            axis.set(title=f"{task}, age {age}", xlabel="ε", xscale="log", ylabel="mean success")
    save(figure, axes, path)


def write_summary(runs: Runs, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["task", "method", "age", "reuse", "measure", "mean", "low", "high", "seeds"]
        )
        for task in TASKS:
            for method in METHODS:
                for age, reuse in settings(runs):
                    fixed = {"task": task, "method": method, "age": age, "reuse": reuse}
                    for name, measure in MEASURES.items():
                        y = interval(runs, measure, **fixed)
                        if y is not None and not math.isnan(y.mean):
                            numbers = (f"{x:.4g}" for x in (y.mean, y.low, y.high))
                            writer.writerow([*fixed.values(), name, *numbers, y.seeds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("study"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder to write, by default that of the runs")
    args = parser.parse_args()
    out = args.out or args.runs
    out.mkdir(parents=True, exist_ok=True)

    runs, sweep = (read_runs(args.runs / name) for name in ("results.csv", "sweep.csv"))
    print_results(runs)
    write_summary(runs, out / "summary.csv")
    draw_training(runs, ["success"], out / "success.png")
    draw_training(runs, ["ratio_var", "coef"], out / "constraint.png", logarithmic=True)
    draw_settings(runs, ["final success", "rollouts needed"], "age", out / "age.png")
    draw_settings(runs, ["cut", "grad_norm", "entropy"], "age", out / "clipped.png")
    if any(run.reuse > 1 for run in runs):
        draw_settings(runs, ["final success", "rollouts needed"], "reuse", out / "reuse.png")
    if sweep:
        print_sweep(sweep)
        draw_strengths(sweep, out / "strength.png")


if __name__ == "__main__":
    main()
