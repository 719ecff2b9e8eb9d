"""What the reports of the studies share: intervals over seeds, tables in Markdown, and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESAMPLES = 10_000
COLORS = {"ppo-clip": "black", "clip-higher": "gray", "ppo-tuned": "tab:brown"}
COLORS |= {"none": "tab:red", "spo": "tab:purple"}
COLORS |= {
    f"{kind}-{center}": color
    for kind, color in (("fixed", "tab:blue"), ("dual", "tab:green"), ("fenchel", "tab:orange"))
    for center in ("one", "group")
}


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Iterable[float]) -> Interval:
        """Of no values, or some that are not finite, the mean is what it is, the rest NaN."""
        x = torch.tensor([*values], dtype=torch.float64)
        if len(x) == 0 or not x.isfinite().all():
            return Interval(x.mean().item(), math.nan, math.nan, tuple(x.tolist()))
        draws = torch.Generator().manual_seed(0)
        picks = torch.randint(len(x), (RESAMPLES, len(x)), generator=draws)
        ends = torch.tensor([0.025, 0.975], dtype=x.dtype)
        low, high = x[picks].mean(1).quantile(ends).tolist()
        return Interval(x.mean().item(), low, high, tuple(x.tolist()))

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)

    def text(self, digits: int) -> str:
        if self.known:
            return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        reached = sum(map(math.isfinite, self.values))
        return f"{reached} of {len(self.values)} reach it" if self.values else ""


def print_table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def line_of(method: str) -> dict[str, Any]:
    style = "--" if method.endswith("-group") or method == "clip-higher" else "-"
    return {"color": COLORS[method], "linestyle": style, "label": method}


def curve(axis: Axes, points: list[tuple[float, Interval]], line: dict[str, Any]) -> None:
    """The means that are known, joined up, in the band of their intervals."""
    points = [(x, y) for x, y in points if y.known]
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, [i.mean for i in y], **line)
        low, high = [i.low for i in y], [i.high for i in y]
        axis.fill_between(x, low, high, color=line["color"], alpha=0.08, linewidth=0)


def grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(1 + 3.2 * columns, 0.6 + 2.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def save(figure: Figure, path: Path) -> None:
    handles = {}
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        handles |= {label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=80)
