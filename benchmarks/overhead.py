"""Launches, bytes and host time of a call, by route, beside five lines of eager torch.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --contenders "one pass" group

A call is forward, backward and metrics, with a mask and groups; the eager loss has none of these.
V is 64, so that the time is the host's: on a GPU it is what the host takes to issue the call. A
round times each contender once, in an order of its own, so that all see the same states of the
machine. First come counts, held to their budgets; no time is held to one. Writes overhead.csv into
--out.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
# From the checkout, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from contenders import (  # noqa: E402
    Bytes,
    Sizes,
    Task,
    general_bytes,
    one_pass_bytes,
    plain_bytes,
    plain_loss,
    plain_objective,
)
from from_tests import count_launches  # noqa: E402
from measure import Row, Spread, add_options, begin, write_csv  # noqa: E402
from routes import ROUTES, Inputs, Route, Source, draw  # noqa: E402

from r2vpo_kernels.backends import calls, registry  # noqa: E402

BATCH, LENGTH, VOCABULARY, WIDTH = 4, 256, 64, 64
SHOWN = ("one pass", "group", "sequence", "none", "from log-probs", "linear")
FIVE_LINES = "five lines from "
WARM_UPS = 10
COLUMNS = [
    "contender", "backend", "launches", "most_launches", "kernels", "torch_ops", "logits_bytes",
    "workspace_bytes", "host_us", "host_iqr_us", "over_eager", "samples",
]  # fmt: skip


def linear_bytes(sizes: Sizes) -> tuple[int, int]:
    """A product writes the logits, a kernel reads and overwrites them, two products read those."""
    return 5 * sizes.read, 0


def no_bytes(sizes: Sizes) -> tuple[int, int]:
    return 0, 0


# By formula, of logits and their gradient alone (docs/derivation, Eq. 15).
LOGITS_BYTES: dict[str, Bytes] = {
    "one pass": one_pass_bytes,
    "from log-probs": no_bytes,
    "linear": linear_bytes,
}
EAGER_BYTES: dict[Source, Bytes] = {"logits": plain_bytes, "log-probs": no_bytes}


def eager_step(source: Source, inputs: Inputs) -> None:
    """Five lines and their backward: no mask, no groups, no metrics."""
    for leaf in inputs.leaves:
        leaf.grad = None
    task = Task(inputs.labels, inputs.old_logps, inputs.advantages, 0.5)
    if source == "log-probs":
        loss = plain_objective(inputs.logps, task)
    elif source == "logits":
        loss = plain_loss(inputs.logits, task)
    else:
        loss = plain_loss(F.linear(inputs.hidden, inputs.head), task)
    loss.backward()


def counted(step: Callable[[], Any]) -> Row:
    # The first call of all may compile.
    step()
    counts = count_launches(step)
    ops = Counter({name: n for name, n in counts.items() if "." in name})
    return {
        "launches": counts.total(),
        "kernels": " ".join(f"{k}*{n}" if n > 1 else k for k, n in (counts - ops).items()),
        "torch_ops": ops.total(),
    }


def entries(
    backends: Sequence[str], names: Sequence[str], inputs: Inputs, sizes: Sizes
) -> list[tuple[Row, Callable[[], Any]]]:
    """Rows with their counts, and the steps that are to be timed."""
    found: list[tuple[Row, Callable[[], Any]]] = []
    sources = dict.fromkeys(ROUTES[name].source for name in names)
    for source in sources:
        step = functools.partial(eager_step, source, inputs)
        row = {"contender": FIVE_LINES + source, "backend": "eager"} | counted(step)
        if source in EAGER_BYTES:
            row["logits_bytes"] = sum(EAGER_BYTES[source](sizes))
        found.append((row, step))
    for backend in backends:
        for name in names:
            route: Route = ROUTES[name]
            step = functools.partial(route.step, inputs, backend)
            row = {"contender": name, "backend": backend} | counted(step)
            row["logits_bytes"] = sum(LOGITS_BYTES.get(name, general_bytes)(sizes))
            row["workspace_bytes"] = 4 * calls.workspace_size(inputs.labels.numel(), BATCH)
            if route.most_launches is not None:
                row["most_launches"] = route.most_launches
            found.append((row, step))
    return found


def time_all(found: list[tuple[Row, Callable[[], Any]]], rounds: int, device: torch.device) -> None:
    """Host times, one round after another, into the rows."""
    samples: list[list[float]] = [[] for _ in found]
    # Whoever comes after a call that returned memory to the system pays for it: no order is fixed.
    order, shuffle = list(range(len(found))), random.Random(0).shuffle
    for _ in range(WARM_UPS + rounds):
        shuffle(order)
        for n in order:
            _, step = found[n]
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            samples[n].append((time.perf_counter() - started) * 1e6)
    eager: dict[str, list[float]] = {}
    for (row, _), times in zip(found, samples, strict=True):
        del times[:WARM_UPS]
        spread = Spread.of(times)
        row |= {"host_us": spread.median, "host_iqr_us": spread.iqr, "samples": rounds}
        if row["backend"] == "eager":
            eager[row["contender"].removeprefix(FIVE_LINES)] = times
        else:
            of_same_source = eager[ROUTES[row["contender"]].source]
            ratios = [a / b for a, b in zip(times, of_same_source, strict=True)]
            row["over_eager"] = Spread.of(ratios).median


def show_counts(rows: list[Row]) -> None:
    print(f"\n{'':32}{'launches':>9}{'at most':>8}{'torch':>6}{'logits':>10}{'workspace':>10}")
    for row in rows:
        name = f"{row['backend']} {row['contender']}"
        print(
            f"{name:32}{row['launches']:9}{row.get('most_launches', ''):>8}{row['torch_ops']:6}"
            f"{row.get('logits_bytes', ''):>10}{row.get('workspace_bytes', ''):>10}"
            f"  {row['kernels']}"
        )
    print(
        "launches: kernels and torch ops. torch: those that are torch ops, the gradient of the loss"
        "\nthat backward() makes among them. logits, workspace: bytes, by formula."
    )


def show_times(rows: list[Row]) -> None:
    print(f"\n{'':32}{'host us':>9}{'iqr':>7}{'eager':>7}")
    for row in rows:
        name = f"{row['backend']} {row['contender']}"
        over = f"{row['over_eager']:7.2f}" if "over_eager" in row else ""
        print(f"{name:32}{row['host_us']:9.0f}{row['host_iqr_us']:7.0f}{over}")
    print("eager: time over that of the five lines from the same source, median of the rounds.")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a route launches more than its budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, list(ROUTES), rounds=200)
    kinds = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=kinds, default="bfloat16")
    parser.add_argument("--backend", nargs="+", choices=list(registry.TABLE), help="default: all")
    options = parser.parse_args(argv)
    # Threads that wait for each other would be timed too.
    options.threads = options.threads or 1
    machine = begin(options)

    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    inputs = draw(BATCH, LENGTH, VOCABULARY, dtype, options.device, WIDTH)
    scored = int(inputs.mask.sum())
    sizes = Sizes(scored, BATCH * LENGTH - scored, VOCABULARY, dtype.itemsize)
    backends = []
    for backend in options.backend or registry.TABLE:
        reason = registry.why_not(backend, inputs.logits)
        if reason is None:
            backends.append(backend)
        else:
            print(f"{backend}: {reason}")
    found = entries(backends, options.contenders or SHOWN, inputs, sizes)
    rows = [row for row, _ in found]
    path = options.out / "overhead.csv"
    show_counts(rows)
    write_csv(path, COLUMNS, rows, machine)
    time_all(found, options.rounds, device)
    show_times(rows)
    write_csv(path, COLUMNS, rows, machine)
    print(f"written: {path}")
    over = [row for row in rows if row["launches"] > row.get("most_launches", row["launches"])]
    for row in over:
        print(f"over its budget of launches: {row['backend']} {row['contender']}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
