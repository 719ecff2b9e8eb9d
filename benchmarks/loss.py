"""Time the loss from logits and its gradient, contenders side by side.

    python benchmarks/loss.py                    # the short grid: 256 tokens, two vocabularies
    python benchmarks/loss.py --full             # four vocabularies, several numbers of tokens
    python benchmarks/loss.py --n 512 --v 128256 --contenders eager torch.compile
    python benchmarks/loss.py --n 256 --v 151936 --policy-loss ratio clip cispo

The last prints R²VPO, PPO's clip and CISPO in one table: on the same kernels, in five lines of
eager torch, and by torch.compile of these. The ratio is clipped to 1 ± 0.2, without a penalty.

Each contender must agree with the float64 truth at the shape in question before it is timed.
Logits come from a stand-in for the model that hands out buffers in turn, together larger than the
cache, and drops the gradient. Writes loss.csv and loss.png into --out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# From the checkout, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from contenders import (  # noqa: E402
    POLICY_LOSSES,
    SCRATCH,
    Contender,
    Function,
    Sizes,
    Task,
    contenders,
)
from measure import (  # noqa: E402
    MOST_STEPS,
    TIMES,
    Row,
    Spread,
    Stopwatch,
    add_options,
    begin,
    copy_times,
    draw_bars,
    free_memory,
    how_many_buffers,
    peak_memory,
    report,
    timed,
    times_text,
)
from parity import Exact, check, find_exact, make_task  # noqa: E402
from routes import StandIn  # noqa: E402

SHORT = {"n": [256], "v": [32000, 151936]}
FULL = {"v": [32000, 128256, 151936, 262144]}
FULL_N = {"cpu": [256, 1024], "cuda": [1024, 8192, 16384]}
WARM_UPS = 2
NAME_WIDTH = 27

COLUMNS = [
    "n", "v", "dtype", "contender", "status", "budget_used", "rms_over_eager",
    "forward_ms", "forward_iqr_ms", "backward_ms", "backward_iqr_ms", "both_ms", "both_iqr_ms",
    "host_ms", "peak_bytes", "bytes_forward", "bytes_backward", "gb_per_s", "share_of_copy",
    "samples", "buffers",
]  # fmt: skip


def step(
    contender: Contender, function: Function, buffer: Tensor, task: Task, watch: Stopwatch
) -> tuple[Tensor, Tensor | None]:
    """One forward and backward under the watch: (value, gradient)."""
    if contender.forward_only:
        with torch.no_grad():
            watch.start()
            value = function(buffer, task)
            watch.mark()
        return value, None
    gradients: list[Tensor] = []
    anchor = torch.zeros((), device=buffer.device, requires_grad=True)
    logits = StandIn.apply(anchor, [buffer], gradients)
    watch.start()
    value = function(logits, task)
    watch.mark()
    value.backward()
    watch.mark()
    return value.detach(), gradients[0]


def measure(
    contender: Contender,
    pristine: Tensor,
    buffers: list[Tensor],
    task: Task,
    exact: Exact,
    rounds: int,
) -> Row:
    """Parity, then peak memory, then times: a row without what the copy gives."""
    watch = Stopwatch(pristine.device)
    function = contender.make()

    def refill(these: list[Tensor]) -> None:
        if contender.overwrites:
            for buffer in these:
                buffer.copy_(pristine)

    value, gradient = step(contender, function, buffers[0], task, watch)
    parity = check(contender, exact, value, gradient)
    row = {"budget_used": parity.used, "rms_over_eager": parity.against_eager}
    del value, gradient
    refill(buffers)
    if parity.faults:
        return row | {"status": "wrong: " + "; ".join(parity.faults)}
    row["peak_bytes"] = peak_memory(
        lambda: step(contender, function, buffers[0], task, watch), pristine.device
    )
    refill(buffers)
    for i in range(WARM_UPS):
        step(contender, function, buffers[i], task, watch)

    steps, host = [], []
    for n in range(rounds):
        first = n * MOST_STEPS % len(buffers)
        turn = buffers[first:] + buffers[:first]
        # All of them: when the first is timed it has left the cache again.
        refill(turn)
        for buffer in turn[:MOST_STEPS]:
            results = step(contender, function, buffer, task, watch)
            steps.append(watch.laps())
            host.append(watch.host)
            del results
    refill(buffers)
    row |= timed(steps)
    if pristine.is_cuda:
        row["host_ms"] = Spread.of(host).median
    return row


def sequences_of(n: int) -> int:
    """How many sequences of equal length, of 2 at least, n tokens are."""
    return next(b for b in (8, 4, 2, 1) if n % b == 0 and n // b >= 2)


def cell(
    n: int, v: int, dtype: torch.dtype, device: torch.device, entrants: list[Contender], rounds: int
) -> list[Row]:
    """All entrants at one shape."""
    # Code compiled for the shapes before is in no one's way.
    torch._dynamo.reset()
    base = {"n": n, "v": v, "dtype": str(dtype).removeprefix("torch.")}
    size = n * v * dtype.itemsize
    least = min((c.scratch for c in entrants), default=0)
    count = max(how_many_buffers(size, scratch * n * v, device) for scratch in (SCRATCH, least))
    if count == 0:
        return [base | {"contender": c.name, "status": "no: too little memory"} for c in entrants]
    sequences = sequences_of(n)
    pristine = torch.empty(sequences, n // sequences, v, dtype=dtype, device=device)
    pristine.normal_(0, 3, generator=torch.Generator(device).manual_seed(0))
    buffers = [pristine.clone() for _ in range(count)]

    copy, clone = copy_times(buffers, rounds)
    per_ms = 2 * size / copy.median
    rows: list[Row] = []
    for name, spread in (("copy", copy), ("clone", clone)):
        rows.append(
            base
            | {
                "contender": name, "status": "timed", "both_ms": spread.median,
                "both_iqr_ms": spread.iqr, "bytes_forward": 2 * size,
                "gb_per_s": 2 * size / spread.median / 1e6,
                "share_of_copy": copy.median / spread.median, "buffers": count,
            }
        )  # fmt: skip

    # One truth for each objective.
    prepared: dict[tuple[float, bool, str], tuple[Task, Exact]] = {}
    for contender in entrants:
        row = base | {"contender": contender.name, "buffers": count}
        why_not = contender.why_not(pristine)
        if why_not is None and free_memory(device) < contender.scratch * n * v:
            why_not = "too little memory"
        if why_not is not None:
            rows.append(row | {"status": f"no: {why_not}"})
            continue
        kind = contender.variance_coef, contender.skips_last, contender.policy_loss
        if kind not in prepared:
            task = make_task(
                pristine,
                contender.variance_coef,
                contender.skips_last,
                policy_loss=contender.policy_loss,
            )
            prepared[kind] = task, find_exact(pristine, task)
        task, exact = prepared[kind]
        started = time.perf_counter()
        try:
            row |= measure(contender, pristine, buffers, task, exact, rounds)
        except torch.OutOfMemoryError:
            row["status"] = "no: out of memory"
        except Exception as error:
            row["status"] = f"failed: {type(error).__name__}: {error}"
            print(f"{contender.name}: {error}", file=sys.stderr)
        scored = task.labels.numel()
        sizes = Sizes(scored, n - scored, v, dtype.itemsize)
        row["bytes_forward"], row["bytes_backward"] = contender.bytes_moved(sizes)
        if row["status"] == "timed":
            rate = (row["bytes_forward"] + row["bytes_backward"]) / row["both_ms"]
            row |= {"gb_per_s": rate / 1e6, "share_of_copy": rate / per_ms}
        if row["status"] != "timed":
            # What an exception left behind, in memory or in a buffer.
            for buffer in buffers:
                buffer.copy_(pristine)
        print(
            f"  {contender.name}: {row['status'].partition(':')[0]}, "
            f"{time.perf_counter() - started:.0f} s",
            file=sys.stderr,
        )
        rows.append(row)
    return rows


def show(rows: list[Row]) -> None:
    """A table of one cell."""
    first = rows[0]
    print(f"\n{first['n']} tokens, vocabulary {first['v']}, {first['dtype']}")
    print(
        f"{'':{NAME_WIDTH}}{TIMES}{'peak MB':>9}{'B/logit':>8}{'GB/s':>8}{'copy':>6}  "
        f"{'budget':>6} {'eager':>5}"
    )

    for row in rows:
        if row["status"] != "timed":
            print(f"{row['contender']:{NAME_WIDTH}}  {row['status']}")
            continue
        count = row["n"] * row["v"]
        peak = row.get("peak_bytes")
        traffic = (row["bytes_forward"] + row.get("bytes_backward", 0)) / count
        parity = ""
        if "budget_used" in row:
            parity = f"{row['budget_used']:6.2f} {row['rms_over_eager']:5.2f}"
        print(
            f"{row['contender']:{NAME_WIDTH}}{times_text(row)}"
            f"{'' if peak is None else f'{peak / 1e6:.0f}':>9}{traffic:8.3g}"
            f"{row['gb_per_s']:8.3g}{row['share_of_copy']:6.2f}  {parity}"
        )


LEGEND = """
ms: median ± interquartile range. peak: memory above what was there before. B/logit, GB/s: by
formula. copy: that rate over the rate of `dst.copy_(src)`. budget: the largest share of the error
budget used. eager: RMS error of the gradient (or log-probs) over that of plain torch."""


def plot(path: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """A panel for each shape: milliseconds, forward and backward, against one copy."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r["status"] == "timed"]
    cells = list(dict.fromkeys((r["n"], r["v"]) for r in shown))
    if not cells:
        return
    names = {r["contender"] for r in shown if r["contender"] != "copy"}
    figure = Figure(figsize=(8, 0.8 + len(cells) * (0.8 + 0.28 * len(names))), layout="constrained")
    panels = figure.subplots(len(cells), squeeze=False)[:, 0]
    for (n, v), panel in zip(cells, panels, strict=True):
        copy, *rest = (r for r in shown if (r["n"], r["v"]) == (n, v))
        times = {r["contender"]: (r["both_ms"], r["both_iqr_ms"]) for r in rest}
        draw_bars(panel, times, copy["both_ms"], "one copy of the logits")
        panel.set_title(f"{n} tokens, vocabulary {v}, {copy['dtype']}")
    panels[-1].set_xlabel(
        f"ms, forward and backward (log-probs: forward alone)\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a contender of ours was wrong or failed."""
    everyone = {c.name: c for c in contenders()}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--n", type=int, nargs="+", help="tokens, at least 2 (default: 256)")
    add("--v", type=int, nargs="+", help="vocabularies (default: 32000 151936)")
    add("--full", action="store_true", help="the large grid, for what --n and --v leave open")
    add(
        "--policy-loss", nargs="+", choices=POLICY_LOSSES, default=["ratio"],
        help="whose contenders, unless --contenders names them (default: ratio, which is R²VPO)",
    )  # fmt: skip
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add_options(parser, everyone, rounds=5)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    grid = {"n": FULL_N[device.type]} | FULL if options.full else SHORT
    ns, vs = options.n or grid["n"], options.v or grid["v"]
    if min(ns) < 2:
        parser.error("--n: at least 2")
    asked_for = [c.name for c in everyone.values() if c.policy_loss in options.policy_loss]
    entrants = [everyone[name] for name in options.contenders or asked_for]

    machine = begin(options)
    cells = (
        cell(n, v, getattr(torch, options.dtype), device, entrants, options.rounds)
        for v in vs
        for n in ns
    )
    mine = [c.name for c in everyone.values() if c.ours]
    return report(options.out / "loss", cells, COLUMNS, machine, show, plot, LEGEND, mine)


if __name__ == "__main__":
    sys.exit(main())
