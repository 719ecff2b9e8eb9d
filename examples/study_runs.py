"""What the studies share: the methods they compare, and runs that are kept as they finish."""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_tiny import show_progress

from r2vpo_kernels import RatioStats, VarianceConstraint, fenchel_coef

Row = dict[str, float]
Runs = dict[Any, list[Row]]
Train = Callable[[Any], list[Row]]


def pooled(stats: RatioStats, center: str) -> Tensor:
    """E[(ρ - c)²] over all groups."""
    v = stats.second_moment if center == "one" else stats.variance
    return (stats.weight * v).sum() / stats.weight.sum()


class AdditiveDual(VarianceConstraint):
    """λ ← clip(λ + lr·(v - target)): the other form of the dual's step, for comparison."""

    @torch.no_grad()
    def step(self, stats: RatioStats) -> None:
        self.coef.add_(self.lr * (pooled(stats, self.center) - self.target))
        self.coef.clamp_(0.0, self.max_coef)


class Objective:
    """What a method, "dual-group" say, and its ε make of the loss.

    `coef` is the mean λ of the last batch, NaN where there is none.
    """

    def __init__(self, method: str, epsilon: float, dual_lr: float) -> None:
        self.kind, _, center = method.partition("-")
        self.center = "group" if center == "group" else "one"
        self.epsilon = epsilon
        self.coef = torch.tensor(math.nan)
        dual = AdditiveDual if self.kind == "additive" else VarianceConstraint
        self.dual = dual(epsilon**2, center=self.center, coef=self._fixed(), lr=dual_lr)

    def keywords(self, advantages: Tensor, group_ids: Tensor, num_groups: int) -> dict[str, Any]:
        """For the loss; the advantages are times the importance weights, if there are any."""
        if self.kind in ("ppo", "clip"):
            high = self.epsilon if self.kind == "ppo" else 1.4 * self.epsilon
            # No ratio is below 0.
            return {"policy_loss": "clip", "clip_range": (min(self.epsilon, 1.0), high)}
        coef = self._coef(advantages, group_ids, num_groups)
        self.coef = coef.mean()
        return {"variance_coef": coef, "center": self.center}

    def step(self, stats: RatioStats) -> None:
        """After each optimizer step's loss."""
        if self.kind in ("dual", "additive"):
            self.dual.step(stats)

    def _fixed(self) -> float:
        return 1 / (2 * self.epsilon)

    def _coef(self, advantages: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
        if self.kind == "none":
            return torch.tensor(0.0)
        if self.kind == "fixed":
            return torch.tensor(self._fixed())
        if self.kind == "spo":
            return advantages.abs() * self._fixed()
        if self.kind == "fenchel":
            return fenchel_coef(
                advantages, self.epsilon**2, center=self.center,
                group_ids=group_ids, num_groups=num_groups,
            )  # fmt: skip
        return self.dual.coef.clone()


def trained(train: Train, run: Any) -> tuple[Any, list[Row]]:
    return run, train(run)


@dataclass(frozen=True)
class RunFiles:
    """CSVs of runs: a run is a dataclass of str, int and float, with its number of `updates`.

    A run's rows have the measured columns, "update" the first of them, and end at the last update.
    """

    run: type
    measured: list[str]

    @property
    def _run_columns(self) -> list[str]:
        return [field.name for field in fields(self.run)]

    def read(self, path: Path) -> Runs:
        """The runs of a file that stand there in full, each with its rows."""
        kinds = {"str": str, "int": int, "float": float}
        columns = {field.name: kinds[field.type] for field in fields(self.run)}
        runs: Runs = defaultdict(list)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # The last one may have been cut short.
        for line in csv.DictReader(line for line in lines if line.endswith("\n")):
            run = self.run(**{name: kind(line[name]) for name, kind in columns.items()})
            runs[run].append({n: float(line.get(n) or math.nan) for n in self.measured})
        return {run: rows for run, rows in runs.items() if rows[-1]["update"] == run.updates}

    def _lines(self, run: Any, rows: list[Row]) -> list[str]:
        lines = []
        for row in rows:
            values = (row.get(name, math.nan) for name in self.measured[1:])
            measured = ("" if math.isnan(value) else f"{value:.4g}" for value in values)
            lines.append(",".join([*map(str, astuple(run)), f"{row['update']:.0f}", *measured]))
        return lines

    def write(self, path: Path, runs: Runs) -> None:
        """A file of these runs alone."""
        lines = [",".join([*self._run_columns, *self.measured])]
        for run, rows in runs.items():
            lines += self._lines(run, rows)
        unfinished = path.with_suffix(".part")
        unfinished.write_text("\n".join(lines) + "\n")
        unfinished.replace(path)

    def finish(
        self,
        name: str,
        runs: Iterable[Any],
        path: Path,
        train: Train,
        workers: int,
    ) -> None:
        """Train those of the runs that do not stand in the file yet, and append them to it."""
        done = self.read(path)
        todo = [run for run in runs if run not in done]
        if not todo:
            return
        self.write(path, done)
        start = time.perf_counter()
        with (
            open(path, "a", buffering=1) as file,
            multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool,
        ):
            finished = pool.imap_unordered(partial(trained, train), todo)
            for count, (run, rows) in enumerate(finished, start=1):
                file.write("\n".join(self._lines(run, rows)) + "\n")
                left = (time.perf_counter() - start) / count * (len(todo) - count) / 60
                text = f"{run.task} {run.method}, {left:.0f} min left"
                show_progress(name, count, len(todo), text)


def having(runs: Runs, **fixed: Any) -> Runs:
    """The runs with these fields, each equal to the value or, of a tuple, to one of them."""

    def fits(run: Any, name: str, value: Any) -> bool:
        return getattr(run, name) in (value if isinstance(value, tuple) else (value,))

    return {r: rows for r, rows in runs.items() if all(fits(r, *item) for item in fixed.items())}


def check_unique(path: Path, runs: Runs) -> None:
    """By two sweeps, or forms of a study, the same cell may have been run with different values."""
    cells = Counter(replace(run, lr=0.0, epsilon=0.0, updates=0) for run in runs)
    for cell, count in cells.items():
        if count > 1:
            raise SystemExit(f"{path} has {count} runs of {cell}: use another folder for each")


def study_options(description: str, cost: str, default: str) -> tuple[bool, Path, int]:
    """Of a study's command line: the full form or not, the folder to write, and the processes."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--full", action="store_true", help=cost)
    add("--out", type=Path, help=f"folder (default: {default}, with --full {default}/full)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args()
    # The two forms may choose other values for the same cell: they do not share a folder.
    out = args.out or Path(default, "full" if args.full else "")
    out.mkdir(parents=True, exist_ok=True)
    return args.full, out, args.workers


def report_folders(description: str, default: str) -> tuple[Path, Path]:
    """Where a report finds the runs, and the folder that it writes, from its command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, default=Path(default), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder to write, by default that of the runs")
    args = parser.parse_args()
    out = args.out or args.runs
    out.mkdir(parents=True, exist_ok=True)
    return args.runs, out
