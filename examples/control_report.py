"""Tables and figures of what continuous_control.py has run so far.

    python examples/control_report.py [--runs control] [--out control]

Returns are those of dm_control over 1000, the highest possible, in the episodes of training, with
the policy's noise; "final" is their mean over the last tenth of training. Over tasks they are
aggregated as rliable does: the interquartile mean of all runs, and the probability that a run is
better than one of ppo-clip on the same task, both with 95 % bootstrap intervals, stratified by
task; tasks on which no method ends above LEARNED are left out, as there is nothing to compare. Of a
single task, means over seeds with the bootstrap intervals of study_figures.py, which five seeds
make too narrow, and which of three are the range of the values.

Writes a figure for each question into --out, and prints tables in Markdown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from continuous_control import (
    BATCH,
    CORRECTIONS,
    EPSILONS,
    FILES,
    METHODS,
    NEIGHBOUR_METHODS,
    RATES,
    RECORDS,
    REUSE_METHODS,
    RIVAL,
    Run,
    chosen,
    mean_return,
    sweep_runs,
    sweep_scores,
)
from control_tasks import EPISODE, TASKS
from matplotlib.axes import Axes
from rliable import library, metrics
from study_figures import Interval, curve, grid, line_of, print_table, save
from study_runs import Row, Runs, check_unique, having, report_folders

REPETITIONS = 2000
LEARNED = 0.1
HAVE_COEF = METHODS[2:]
HOLD_A_TARGET = ("dual-one", "dual-group", "fenchel-group")


def final_return(rows: list[Row]) -> float:
    """The mean of the last tenth of training, of the highest possible."""
    return mean_return(rows[-(RECORDS // 10) :])


MEASURES = {"final": final_return, "mean over training": mean_return}


def scores(runs: Runs, method: str, tasks: Sequence[str], measure: str) -> np.ndarray:
    """(seeds, tasks): the seeds that all of the tasks have."""
    of_tasks = [
        {run.seed: MEASURES[measure](rows) for run, rows in of_task.items()}
        for of_task in (having(runs, method=method, task=task) for task in tasks)
    ]
    seeds = sorted(set.intersection(*(set(x) for x in of_tasks)))
    return np.array([[x[seed] for x in of_tasks] for seed in seeds]).reshape(-1, len(tasks))


def aggregate(
    found: dict[str, np.ndarray], rivals: Sequence[np.ndarray | None]
) -> dict[str, list[str]]:
    """method → its interquartile mean, and its probability of improvement over each rival."""
    np.random.seed(0)  # what rliable draws by
    estimates = [
        library.get_interval_estimates(
            found, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=REPETITIONS
        )
    ]
    for rival in rivals:
        pairs = {m: (x, rival) for m, x in found.items() if rival is not None and x is not rival}
        estimates.append(
            library.get_interval_estimates(
                pairs, metrics.probability_of_improvement, reps=REPETITIONS
            )
        )

    def text(points: dict[str, Any], intervals: dict[str, Any], method: str) -> str:
        if method not in points:
            return ""
        point, (low, high) = np.ravel(points[method])[0], np.ravel(intervals[method])
        return f"{point:.3f} [{low:.3f}, {high:.3f}]"

    return {m: [text(*estimate, m) for estimate in estimates] for m in found}


def print_aggregates(
    columns: dict[str, tuple[Runs, Sequence[str]]],
    methods: Sequence[str],
    suffix: str,
    fresh: str | None = None,
) -> None:
    """A column for each group of runs, aggregated over its tasks, against the rival in the same
    column, and against the one in the column `fresh`.
    """
    titles = ["interquartile mean", f"probability of beating {RIVAL}"]
    titles += [f"probability of beating {RIVAL} of {fresh}"] if fresh else []
    missing = [""] * len(titles)
    for measure in MEASURES:
        found = {
            name: {m: x for m in methods if len(x := scores(runs, m, tasks, measure))}
            for name, (runs, tasks) in columns.items()
        }
        of_fresh = [found.get(fresh, {}).get(RIVAL)] if fresh else []
        cells = [aggregate(x, [x.get(RIVAL), *of_fresh]) for x in found.values()]
        for index, title in enumerate(titles):
            lines = [
                [method, *(of_group.get(method, missing)[index] for of_group in cells)]
                for method in methods
            ]
            print_table(f"{measure} return: {title}{suffix}", ["", *columns], lines)


def print_kinds(runs: Runs) -> None:
    learned = [
        task
        for task in TASKS
        if any(interval(runs, "final", task=task, method=m).mean > LEARNED for m in METHODS)
    ]
    kinds = {"all": learned}
    for kind in dict.fromkeys(TASKS[task].kind for task in learned):
        kinds[kind] = [task for task in learned if TASKS[task].kind == kind]
    columns = {f"{kind} ({len(tasks)})": (runs, tasks) for kind, tasks in kinds.items()}
    print(f"\naggregated over {', '.join(learned)}")
    print_aggregates(columns, METHODS, "")


def interval(runs: Runs, measure: str, **fixed: Any) -> Interval:
    return Interval.of(MEASURES[measure](rows) for rows in having(runs, **fixed).values())


def column_mean(runs: Runs, name: str, **fixed: Any) -> Interval:
    """Of a column of the records, over training; "v / target" too."""

    def values(rows: list[Row], epsilon: float) -> list[float]:
        scale = epsilon**2 if name == "v / target" else 1.0
        known = [row["ratio_var" if name == "v / target" else name] for row in rows]
        return [value / scale for value in known if not math.isnan(value)]

    means = [values(rows, run.epsilon) for run, rows in having(runs, **fixed).items()]
    return Interval.of(sum(x) / len(x) for x in means if x)


def print_tasks(runs: Runs) -> None:
    tasks = [task for task in TASKS if having(runs, task=task)]
    tables = [("final return", METHODS, lambda **f: interval(runs, "final", **f))]
    tables += [
        (title, methods, lambda name=name, **f: column_mean(runs, name, **f))
        for title, methods, name in (
            ("λ", HAVE_COEF, "coef"),
            ("E[(ρ - c)²]", METHODS, "ratio_var"),
            ("E[(ρ - c)²] over its target ε²", HOLD_A_TARGET, "v / target"),
            ("share of steps past PPO's clip", METHODS, "cut"),
        )
    ]
    for title, methods, of_cell in tables:
        lines = [[m, *(of_cell(method=m, task=t).text(3) for t in tasks)] for m in methods]
        print_table(title, ["", *tasks], lines)


def besides(results: Runs, runs: Runs) -> Runs:
    """The runs, and the main runs of the same methods, tasks, seeds and length."""

    def cell(run: Run) -> tuple[str, str, int, int]:
        return run.method, run.task, run.seed, run.updates

    # Without weights they are the same.
    fenchel = {
        replace(run, method="fenchel-one"): rows
        for run, rows in having(results, method="fixed-one").items()
    }
    cells = set(map(cell, runs))
    return {run: rows for run, rows in (results | fenchel).items() if cell(run) in cells} | runs


def print_reuse(runs: Runs) -> None:
    tasks = [task for task in TASKS if having(runs, task=task)]
    settings = sorted({(run.correction, run.reuse) for run in runs})
    columns = {
        f"{correction}, {reuse}": having(runs, correction=correction, reuse=reuse)
        for correction, reuse in settings
    }
    aggregated = {name: (of_setting, tasks) for name, of_setting in columns.items()}
    print_aggregates(aggregated, REUSE_METHODS, ", by reuse", fresh=f"{CORRECTIONS[0]}, 1")
    for task in tasks:
        lines = [
            [
                method,
                *(interval(x, "final", task=task, method=method).text(3) for x in columns.values()),
            ]
            for method in REUSE_METHODS
        ]
        print_table(f"{task}: final return, by reuse", ["", *columns], lines)
    largest = max(reuse for _, reuse in settings)
    for name, title in (
        ("moment", "E[(ρ - 1)²]"),
        ("cut", "share of steps past PPO's clip"),
        ("ess", "weights' effective share"),
    ):
        lines = []
        for task, method, correction in itertools.product(tasks, REUSE_METHODS, CORRECTIONS):
            fixed = {"task": task, "method": method, "correction": correction, "reuse": largest}
            cells = [column_mean(runs, f"{name}_age{age}", **fixed) for age in range(largest)]
            if any(cell.known for cell in cells):
                lines.append([task, method, correction, *(f"{cell.mean:.3g}" for cell in cells)])
        ages = [f"age {age}" for age in range(largest)]
        print_table(f"{title} by age, reuse {largest}", ["", "", "", *ages], lines)


def print_neighbours(runs: Runs, values: dict[str, dict[str, float]]) -> None:
    tasks = [task for task in TASKS if having(runs, task=task)]
    for measure in MEASURES:
        lines = []
        for method in NEIGHBOUR_METHODS:
            for epsilon in sorted({run.epsilon for run in having(runs, method=method)}):
                fixed = {"method": method, "epsilon": epsilon}
                text = f"{epsilon:g}"
                text = f"**{text}**" if epsilon == values[method]["epsilon"] else text
                cells = [interval(runs, measure, task=task, **fixed) for task in tasks]
                lines.append([method, text, *(cell.text(3) for cell in cells)])
        print_table(f"{measure} return, by ε", ["", "ε", *tasks], lines)


def print_baseline(baseline: Runs) -> None:
    rates = sorted({run.lr for run in baseline})
    lines = [
        [task, *(interval(baseline, "final", task=task, lr=lr).text(3) for lr in rates)]
        for task in TASKS
        if having(baseline, task=task)
    ]
    steps = max(run.updates for run in baseline) * BATCH
    columns = ["", *(f"lr {lr:g}" for lr in rates)]
    print_table(f"{RIVAL}, {steps / 1e6:.1f} million steps, final return", columns, lines)


def print_sweep(sweep: Runs) -> None:
    """The score of all that was tried: in bold what was chosen."""
    best, found = chosen(sweep), sweep_scores(sweep)

    def cell(method: str, lr: float, epsilon: float) -> str:
        if (method, lr, epsilon) not in found:
            return ""
        text = f"{found[method, lr, epsilon]:.2f}"
        return f"**{text}**" if best[method] == {"lr": lr, "epsilon": epsilon} else text

    lines = [
        [method, f"{lr:g}", *(cell(method, lr, epsilon) for epsilon in EPSILONS)]
        for method, lr in itertools.product(METHODS, RATES)
    ]
    print_table("the sweep's scores", ["", "lr", *(f"ε = {e:g}" for e in EPSILONS)], lines)


COLUMNS = 4  # of panels, at most
VARIANCE_TASKS = ("cheetah-run", "ball_in_cup-catch", "reacher-hard", "cheetah-run-changing")
# How a column of the records is called, its scale, and the methods that have it.
PANELS = {
    "return": ("return / 1000", "linear", METHODS),
    "ratio_var": ("E[(ρ - c)²]", "log", METHODS),
    "v / target": ("E[(ρ - c)²] / ε²", "log", HOLD_A_TARGET),
    "coef": ("λ", "log", HAVE_COEF),
    "cut": ("share of steps past PPO's clip", "linear", METHODS),
}


def over_training(axis: Axes, runs: Runs, name: str, line: dict[str, Any], **fixed: Any) -> None:
    """A column of the records against environment steps."""
    found = having(runs, **fixed)
    points = []
    for records in zip(*found.values(), strict=True):
        values = []
        for run, row in zip(found, records, strict=True):
            scale = {"v / target": run.epsilon**2, "return": EPISODE}.get(name, 1.0)
            values.append(row["ratio_var" if name == "v / target" else name] / scale)
        points.append((records[0]["update"] * BATCH / 1000, Interval.of(values)))
    curve(axis, points, line)


def draw_training(runs: Runs, names: Sequence[str], tasks: Sequence[str], path: Path) -> None:
    """Columns of the records over training: a panel for each, and for each task that was run."""
    panels = [(name, task) for name in names for task in tasks if having(runs, task=task)]
    columns = min(COLUMNS, len(panels) // len(names))
    figure, axes = grid(math.ceil(len(panels) / columns), columns)
    for index, (axis, panel) in enumerate(itertools.zip_longest(itertools.chain(*axes), panels)):
        if panel is None:
            axis.remove()
            continue
        name, task = panel
        label, scale, methods = PANELS[name]
        for method in methods:
            over_training(axis, runs, name, line_of(method), method=method, task=task)
        if name == "v / target":
            axis.axhline(1.0, color="black", linestyle=":")
        axis.set(title=task, xlabel="thousand environment steps", yscale=scale)
        if index % columns == 0:
            axis.set_ylabel(label)
    save(figure, path)


def draw_reuse(runs: Runs, path: Path) -> None:
    """Final return against reuse: a row of panels for each correction, a column for each task."""
    tasks = [task for task in TASKS if having(runs, task=task)]
    reuses = sorted({run.reuse for run in runs})
    figure, axes = grid(len(CORRECTIONS), len(tasks))
    for row, correction in zip(axes, CORRECTIONS, strict=True):
        for axis, task in zip(row, tasks, strict=True):
            for method in REUSE_METHODS:
                points = []
                for reuse in reuses:
                    # Without old data there is nothing to correct: one run serves both.
                    of_reuse = correction if reuse > 1 else CORRECTIONS[0]
                    fixed = {"task": task, "method": method, "correction": of_reuse}
                    points.append((reuse, interval(runs, "final", reuse=reuse, **fixed)))
                curve(axis, points, line_of(method) | {"marker": "."})
            axis.set(title=f"{task}, {correction}", xticks=reuses, xlabel="batches per update")
        row[0].set_ylabel("final return / 1000")
    save(figure, path)


def main() -> None:
    folder, out = report_folders(__doc__.partition("\n")[0], "control")
    files = {}
    for name in ("results", "reuse", "neighbours", "baseline"):
        path = folder / f"{name}.csv"
        files[name] = FILES.read(path)
        if name in ("results", "reuse"):
            check_unique(path, files[name])
    results, reuse, neighbours, baseline = files.values()
    sweep = FILES.read(folder / "sweep.csv")
    if results:
        print_kinds(results)
        print_tasks(results)
        draw_training(results, ["return"], [*TASKS], out / "returns.png")
        names = ["ratio_var", "v / target", "coef", "cut"]
        draw_training(results, names, VARIANCE_TASKS, out / "variance.png")
    if baseline:
        print_baseline(baseline)
    if reuse:
        reuse = besides(results, reuse)
        print_reuse(reuse)
        draw_reuse(reuse, out / "reuse.png")
    if sweep.keys() >= set(sweep_runs()):
        print_sweep(sweep)
        if neighbours:
            print_neighbours(besides(results, neighbours), chosen(sweep))


if __name__ == "__main__":
    main()
