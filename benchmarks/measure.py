"""Times, peak memory, the copy to compare with, a record of where they were taken, and what the
benchmarks share besides: options, tables, bars.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# Buffers that are walked in turn are together this many times the last-level cache.
PAST_THE_CACHE = 2.5
FEWEST_BUFFERS = 3
# Small buffers are many: a round times so many at the most, the next round those after them.
MOST_STEPS = 16
# What the device is kept busy with while the host issues a step, in cycles: about 10 ms.
HEAD_START = 20_000_000

Row = dict[str, Any]


class Stopwatch:
    """The time between marks: of the host on a CPU, of the device on a GPU.

    On a GPU the device sleeps while the host issues the work that is timed, so that its time does
    not hold the host's; what the host took is `host`, in milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self.host = 0.0

    def start(self) -> None:
        self.marks = []
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(HEAD_START)
        self._host_start = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        """Milliseconds between one mark and the next."""
        self.host = (time.perf_counter() - self._host_start) * 1e3
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.on_gpu:
            return [(b - a) * 1e3 for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of some samples."""

    median: float
    iqr: float

    @staticmethod
    def of(samples: list[float]) -> Spread:
        if len(samples) == 1:
            return Spread(samples[0], 0.0)
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(statistics.median(samples), high - low)


def timed(steps: list[list[float]]) -> Row:
    """Columns of a row from the laps of some steps: forward, and backward where there is one."""
    parts = {"both": [sum(laps) for laps in steps]}
    parts |= dict(zip(("forward", "backward"), map(list, zip(*steps, strict=True)), strict=False))
    row: Row = {"status": "timed", "samples": len(steps)}
    for name, samples in parts.items():
        spread = Spread.of(samples)
        row |= {f"{name}_ms": spread.median, f"{name}_iqr_ms": spread.iqr}
    return row


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=64 * 2**20)


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo: got no MemAvailable")


def how_many_buffers(size: int, scratch: int, device: torch.device) -> int:
    """How many buffers of `size` bytes to walk, one more and `scratch` fitting beside them.

    0 where the memory does not hold even the fewest.
    """
    wanted = int(PAST_THE_CACHE * last_level_cache(device) / size) + 1
    fit = (free_memory(device) - scratch) // size - 1
    count = min(max(wanted, FEWEST_BUFFERS), fit)
    return count if count >= FEWEST_BUFFERS else 0


def peak_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that `function` needed at its peak above what was there; None where nobody counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        # What the allocator kept back would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    result = function()
    del result
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: got no {key}")


def copy_times(buffers: list[Tensor], rounds: int) -> tuple[Spread, Spread]:
    """Milliseconds of `dst.copy_(src)` between buffers that exist, and of `src.clone()`.

    The buffers hold the same numbers, before and after.
    """
    watch = Stopwatch(buffers[0].device)
    copies, clones = [], []
    count = len(buffers)
    steps = min(count, MOST_STEPS)
    # The first of each warms up.
    for i in range(1 + rounds * max(1, steps // 2)):
        # Both ends were touched longest ago.
        source, target = buffers[2 * i % count], buffers[(2 * i + 1) % count]
        watch.start()
        target.copy_(source)
        watch.mark()
        copies += watch.laps()
    for i in range(1 + rounds * steps):
        watch.start()
        fresh = buffers[i % count].clone()
        watch.mark()
        clones += watch.laps()
        del fresh
    return Spread.of(copies[1:]), Spread.of(clones[1:])


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Machine, versions and commit; `commit` for a copy of the tree that git does not know."""
    on_gpu = device.type == "cuda"
    known = _git("rev-parse", "HEAD")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit or known or "unknown",
        "dirty": str(bool(_git("status", "--porcelain"))) if known and not commit else "unknown",
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "threads": str(torch.get_num_threads()),
        "cache_bytes": str(last_level_cache(device)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "" if on_gpu else "",
        "triton": version_of("triton"),
        "liger_kernel": version_of("liger-kernel"),
        "trl": version_of("trl"),
    }


def add_options(parser: argparse.ArgumentParser, names: Collection[str], rounds: int) -> None:
    """The options of every benchmark, but for its shapes and dtypes."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="of timing (default: %(default)s)")
    add("--contenders", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="of torch on a CPU (default: torch's own)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "out", help="default: %(default)s")
    add("--commit", help="what to record where git does not know")


def begin(options: argparse.Namespace) -> dict[str, str]:
    """The environment that results are recorded with; --threads and --out are as asked for."""
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = environment(torch.device(options.device), options.commit)
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value))
    return machine


def write_csv(path: Path, columns: list[str], rows: list[Row], machine: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *machine], restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()}
            writer.writerow(shown | machine)


def report(
    path: Path,
    cells: Iterable[list[Row]],
    columns: list[str],
    machine: dict[str, str],
    show: Callable[[list[Row]], None],
    plot: Callable[[Path, list[Row], dict[str, str]], None],
    legend: str,
    ours: Sequence[str],
) -> int:
    """Print and record each cell as it comes, and plot them all: the exit status.

    path: of the results, without a suffix. ours: contenders none of which may be wrong or fail.
    """
    rows: list[Row] = []
    for found in cells:
        show(found)
        rows += found
        # After each: a run that is cut short keeps what it has.
        write_csv(path.with_suffix(".csv"), columns, rows, machine)
    print(legend)
    try:
        plot(path.with_suffix(".png"), rows, machine)
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"written: {path.parent}")
    bad = ("wrong", "failed")
    return int(any(r["status"].startswith(bad) and r["contender"] in ours for r in rows))


TIMES = f"{'forward ms':>16}{'backward ms':>16}{'both ms':>18}"


def times_text(row: Row) -> str:
    """What stands below TIMES."""

    def spread(name: str) -> str:
        if f"{name}_ms" not in row:
            return ""
        return f"{_digits(row[f'{name}_ms'], 4)} ±{_digits(row[f'{name}_iqr_ms'], 2)}"

    return f"{spread('forward'):>16}{spread('backward'):>16}{spread('both'):>18}"


def _digits(value: float, number: int) -> str:
    return f"{value:.0f}" if value >= 10**number else f"{value:.{number}g}"


def draw_bars(panel: Any, values: dict[str, tuple[float, float]], line: float, label: str) -> None:
    """A bar for each {name: (value, its interquartile range)}, from the top; a line to compare."""
    names = list(reversed(values))
    width = [values[name][0] for name in names]
    spread = [values[name][1] / 2 for name in names]
    bars = panel.barh(names, width, xerr=spread, color="C0", ecolor="0.3", height=0.7)
    panel.bar_label(bars, labels=[f" {_digits(w, 3)}" for w in width], fontsize="small")
    panel.axvline(line, color="C1", linestyle="--", label=f"{label}: {_digits(line, 3)}")
    panel.set_xscale("log")
    panel.set_xlim(min([line, *width]) / 1.5, max([line, *width]) * 2)
    panel.legend(fontsize="small")
