"""Time the loss from hidden states under a sampling mask, and both gradients, side by side.

    python benchmarks/sparse_head.py             # 1024 tokens, vocabulary 151936, width 1024
    python benchmarks/sparse_head.py --sizes drawn 20 --dtype bfloat16 float32
    python benchmarks/sparse_head.py --crossing --n 256     # where DENSE_SPEED should be

As linear.py, whose checks, rounds and three products these are: the truth is that of the kept
logits. Writes sparse_head.csv and sparse_head.png into --out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import linear  # first: it finds the package, installed or not

import torch  # isort: skip
import torch.nn.functional as F
from contenders import Task, plain_logps, plain_loss, plain_objective
from linear import SAMPLED_WORDS, SHORT, VARIANCE_COEF, Contender
from measure import Row, add_options, begin, report
from parity import make_task
from torch import Tensor

from r2vpo_kernels import SamplingMask, linear_r2vpo_loss
from r2vpo_kernels.backends import registry
from r2vpo_kernels.sources import sparse

# As measured in rollouts: nearly half of the sets are of one word, the median is 2,
# the mean 8, the 99th percentile 82. The others have 2 words, and more as a log-normal number is.
DRAWN = "drawn"
SINGLE, LOG_MEDIAN, LOG_DEVIATION = 0.47, 1.7, 1.3
SIZES = [DRAWN, "64", "512"]
SPARSE, DENSE = "sparse head", "dense route"
# With so small a DENSE_SPEED any set is left to the sparse head; 0 would say that there is none.
TINY = 1e-9
# Once in a step of the sparse head each; what else it takes is the rest.
KERNELS = "prepare", "head_logits", "one_pass", "head_dhidden", "head_dweight", "finish"
# Tokens that the truth takes at a time.
PART = 64
COLUMNS = ["sizes", "pairs", *linear.COLUMNS, "over_dense", "kernels"]


@dataclass(frozen=True)
class MaskedTask(Task):
    """What comes with hidden states of N tokens that have M kept words, a pair each."""

    mask: SamplingMask
    tokens: Tensor  # (M,)
    words: Tensor  # (M,)
    label_pairs: Tensor  # (N,)


# Who computes it.


def ours(backend: str) -> list[Contender]:
    def route(name: str, dense_speed: float) -> Contender:
        def loss(hidden: Tensor, weight: Tensor, task: MaskedTask) -> Tensor:
            # Each batch has sets of its own, which nobody has yet put in the order of words.
            mask = SamplingMask.of(*task.mask.tensors(), task.mask.missing_label)
            with patch.object(sparse, "DENSE_SPEED", {"elsewhere": dense_speed}):
                return linear_r2vpo_loss(
                    hidden, weight, task.labels, task.old_logps, task.advantages,
                    variance_coef=task.variance_coef, sampling_mask=mask, backend=backend,
                ).loss  # fmt: skip

        return Contender(f"{backend} {name}", lambda: loss, why_not=why_not, ours=True)

    why_not = linear.ours(backend)[0].why_not
    return [route(SPARSE, TINY), route(DENSE, math.inf)]


def eager_masking(hidden: Tensor, weight: Tensor, task: MaskedTask) -> Tensor:
    z = F.linear(hidden, weight)
    outside = torch.ones_like(z, dtype=torch.bool)
    outside.flatten(0, 1)[task.tokens, task.words] = False
    return plain_loss(z.masked_fill(outside, -torch.inf), task)


def gather(hidden: Tensor, weight: Tensor, task: MaskedTask) -> Tensor:
    """In float32: the sums of index_add, which autograd makes of index_select, would be halves."""
    of_tokens = hidden.flatten(0, 1).float().index_select(0, task.tokens)
    z = (of_tokens * weight.float().index_select(0, task.words)).sum(-1)
    zeros = z.new_zeros(len(task.mask))
    top = zeros.scatter_reduce(0, task.tokens, z.detach(), "amax", include_self=False)
    total = zeros.index_add(0, task.tokens, (z - top[task.tokens]).exp())
    logps = z[task.label_pairs] - top - total.log()
    return plain_objective(logps.view_as(task.labels), task)


def contenders() -> list[Contender]:
    """All of them, whether or not they can run here."""

    def all_rows(row: Row) -> float:
        # Two gathered rows of each pair, their product and the gradients of all three; the head
        # and its gradient in float32.
        return 4 * row["h"] * (6 * row["pairs"] + 3 * row["v"])

    return [
        *(contender for backend in registry.TABLE for contender in ours(backend)),
        Contender("eager masking", lambda: eager_masking, needs=linear.all_logits),
        Contender("gather and index_add", lambda: gather, needs=all_rows),
    ]


# What is drawn.


def sizes_of(kind: str, n: int, v: int) -> Tensor:
    """(n,): how many words each set has. Those drawn are quantiles, so that few are like many."""
    if kind != DRAWN:
        return torch.full((n,), min(int(kind), v))
    normal = statistics.NormalDist(LOG_MEDIAN, LOG_DEVIATION)
    shares = [((i + 0.5) / n - SINGLE) / (1 - SINGLE) for i in range(n)]
    sizes = [1 if u <= 0 else 2 + int(math.exp(normal.inv_cdf(u))) for u in shares]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return torch.tensor(sizes)[order].clamp(max=v)


def draw_sets(kind: str, n: int, v: int, device: torch.device) -> SamplingMask:
    """A word from each of so many equal parts of the vocabulary as the set has words."""
    sizes = sizes_of(kind, n, v)
    token = torch.arange(n).repeat_interleave(sizes)
    place, size = torch.arange(len(token)) - (sizes.cumsum(0) - sizes)[token], sizes[token]
    first, past = place * v // size, (place + 1) * v // size
    share = torch.rand(len(token), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    words = first + (share * (past - first)).long()
    return SamplingMask.from_counts(words.to(device), sizes.to(device))


# Of some tokens: which they are; their hidden states (T, H); the words (U,) that are in any of
# their sets; which of these are in each (T, U).
Part = tuple[slice, Tensor, Tensor, Tensor]


def parts_of(hidden: Tensor, mask: SamplingMask) -> Iterator[Part]:
    """Few tokens at a time have few words: products of these take the place of dense ones."""
    for first in range(0, len(hidden), PART):
        rows = slice(first, min(first + PART, len(hidden)))
        sets, x = mask[rows], hidden[rows]
        words, column = sets.token_ids.long().unique(return_inverse=True)
        inside = torch.zeros(len(x), len(words), dtype=torch.bool, device=x.device)
        inside[sets.token_of(), column] = True
        yield rows, x, words, inside


def kept_logits(x: Tensor, head: Tensor, inside: Tensor) -> Tensor:
    return F.linear(x, head).masked_fill(~inside, -torch.inf)


@torch.no_grad()
def make_batch(hidden: Tensor, weight: Tensor, mask: SamplingMask) -> MaskedTask:
    """As parity.make_task, of the kept logits."""
    labels, old_logps = [], []
    for rows, x, words, inside in parts_of(hidden.flatten(0, 1), mask):
        z = kept_logits(x, weight[words], inside)
        task = make_task(z[None], VARIANCE_COEF, False, seed=rows.start)
        labels.append(words[task.labels[0]])
        old_logps.append(task.old_logps[0])
    generator = torch.Generator(hidden.device).manual_seed(0)
    advantages = torch.randn(len(hidden), generator=generator, device=hidden.device)
    tokens, words = mask.token_of(), mask.token_ids.long()
    label_pairs = (words == torch.cat(labels)[tokens]).nonzero()[:, 0]
    given = (torch.cat(x).view(hidden.shape[:2]) for x in (labels, old_logps))
    return MaskedTask(*given, advantages, VARIANCE_COEF, mask, tokens, words, label_pairs)


# Right first.


class Truth(linear.Truth):
    """Of the kept logits. It has the gradients of all hidden states; rows of the head whose words
    are in no set are apart too: their gradient is 0, for plain torch as well.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, task: MaskedTask) -> None:
        self.hidden, self.weight = hidden.detach().flatten(0, 1), weight.detach()
        self.task, self.labels = task, task.labels.flatten()
        self.tokens = torch.arange(len(self.labels), device=hidden.device)
        kept = torch.zeros(len(weight), dtype=torch.bool, device=hidden.device)
        of_labels = kept.clone()
        kept[task.words] = of_labels[self.labels] = True
        groups = {
            "dweight of labels": of_labels,
            "dweight of other kept words": kept & ~of_labels,
            "dweight of words in no set": ~kept,
        }
        self.words = {}
        for name, members in groups.items():
            found = members.nonzero()[:, 0]
            if len(found):
                self.words[name] = found[:: -(-len(found) // (SAMPLED_WORDS // 2))]

        logps, plain, dhidden, dlogits = [], [], [], []
        for rows, x, words, inside in parts_of(self.hidden, task.mask):
            labels = torch.searchsorted(words, self.labels[rows])
            head = self.weight[words]
            plain.append(plain_logps(kept_logits(x, head, inside), labels))
            logp = kept_logits(x.double(), head.double(), inside).log_softmax(-1)
            dz = F.one_hot(labels, len(words)) - logp.exp()
            logps.append(logp.gather(-1, labels[:, None])[:, 0])
            dhidden.append(dz @ head.double())
            dlogits.append(self._sampled(dz, words))
        self.logps, self.plain_logps = torch.cat(logps), torch.cat(plain)
        self.dhidden, self.dlogits = torch.cat(dhidden), self._joined(dlogits)
        self.known = {}

    def _sampled(self, dz: Tensor, words: Tensor) -> dict[str, Tensor]:
        """The columns of the sampled words, zeros where none is of one."""
        place = words.new_full((len(self.weight),), len(words))
        place[words] = torch.arange(len(words), device=words.device)
        padded = F.pad(dz, (0, 1))
        return {name: padded[:, place[sample]] for name, sample in self.words.items()}

    def _joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in self.words}

    def _plain_gradients(self, slope: Tensor) -> dict[str, Tensor]:
        dhidden, dlogits = [], []
        for rows, x, words, inside in parts_of(self.hidden, self.task.mask):
            labels, head = torch.searchsorted(words, self.labels[rows]), self.weight[words]
            z = kept_logits(x, head, inside).requires_grad_()
            (dz,) = torch.autograd.grad(plain_logps(z, labels), z, slope[rows])
            dhidden.append(dz @ head)
            dlogits.append(self._sampled(dz, words))
        return {"dhidden": torch.cat(dhidden)} | {
            name: dz.t() @ self.hidden for name, dz in self._joined(dlogits).items()
        }


# Then time.


def kernel_times(
    backend: str, hidden: Tensor, weight: Tensor, task: MaskedTask, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each kernel of a step of the sparse head, and of the rest."""
    samples: dict[str, list[float]] = defaultdict(list)

    def clocked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = now()
            result = work(*arguments)
            samples[name].append(now() - started)
            return result

        return call

    def now() -> float:
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    function, kernels = ours(backend)[0].make(), registry.load(backend)
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(patch.object(kernels, name, clocked(name, getattr(kernels, name))))
        step = clocked("all", lambda: function(hidden, weight, task).backward())
        for _ in range(1 + rounds):
            step()
            hidden.grad = weight.grad = None
    # The first warms up.
    medians = {name: statistics.median(samples[name][1:]) for name in KERNELS}
    return medians | {"rest": statistics.median(samples["all"][1:]) - sum(medians.values())}


def cell(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    kind: str,
    device: torch.device,
    entrants: Sequence[Contender],
    rounds: int,
) -> list[Row]:
    """All entrants at one shape (n, v, h), with sets of some sizes."""
    mask = draw_sets(kind, *shape[:2], device)
    sizes = mask.offsets.diff().double()
    median, most = sizes.quantile(sizes.new_tensor([0.5, 0.99])).tolist()
    base = {"sizes": kind, "pairs": len(mask.token_ids)}
    print(
        f"\nsets: {kind}: mean {sizes.mean():.3g}, median {median:.3g}, 99th percentile {most:.3g},"
        f" largest {sizes.max():.0f}, {(sizes == 1).double().mean():.0%} of one word"
    )
    hidden, weight = linear.inputs(shape, dtype, device)
    task = make_batch(hidden, weight, mask)
    truth = Truth(hidden, weight, task)
    # Whoever comes after a call that returned memory to the system pays for it, and on a CPU more
    # than for all the work of the sparse head: not the first step after another's is timed.
    rows = linear.compare(base, hidden, weight, task, truth, entrants, rounds, warm_ups=1)
    timed = {row["contender"]: row for row in rows if row["status"] == "timed"}
    for name, row in timed.items():
        backend, _, route = name.partition(" ")
        if route == SPARSE:
            times = kernel_times(backend, hidden, weight, task, rounds)
            row["kernels"] = ", ".join(f"{kernel} {ms:.3g}" for kernel, ms in times.items())
            dense = timed.get(f"{backend} {DENSE}")
            if dense is not None:
                row["over_dense"] = row["both_ms"] / dense["both_ms"]
    return rows


def show(rows: list[Row]) -> None:
    linear.show(rows)
    for row in rows:
        if "kernels" in row:
            print(f"{row['contender']}, ms: {row['kernels']}")


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Where a ratio that rises with the size reaches 1: a straight line between logarithms."""
    for (low, under), (high, over) in itertools.pairwise(sorted(points)):
        if under < 1 <= over:
            return low * (high / low) ** (math.log(under) / math.log(under / over))
    return None


def show_crossings(rows: list[Row]) -> None:
    """Where sets are so large that the dense route costs no more, of each shape and backend."""
    found: dict[tuple[Any, ...], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if "over_dense" in row:
            cell = row["n"], row["v"], row["h"], row["dtype"], row["contender"]
            found[cell].append((row["pairs"] // row["n"], row["over_dense"]))
    for (n, v, h, dtype, name), points in found.items():
        size = crossing(points)
        answer = "no crossing" if size is None else f"1 at {size:.0f}, DENSE_SPEED {v / size:.0f}"
        seen = ", ".join(f"{size}: {ratio:.2g}" for size, ratio in points)
        print(f"{n} x {v} x {h}, {dtype}, {name} over dense route by size: {seen}; {answer}")


LEGEND = """
ms: median ± interquartile range. peak: memory above the inputs, less the size of the gradients.
products: time over that of the three products over the whole vocabulary, which are of float32
matrices where the dense route multiplies in float32. ours: over the best of ours. limit: the
largest share of the allowed error used. eager: the largest RMS error over that of plain torch, of
dhidden and of rows of dweight. Kernels are timed in steps of their own, after the rounds; the rest
holds the order by word, allocations and autograd."""


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a contender of ours was wrong or failed."""
    everyone = {c.name: c for c in contenders()}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--n", type=int, nargs="+", default=SHORT["n"], help="tokens, at least 2 (default: 1024)")
    add("--v", type=int, nargs="+", default=SHORT["v"], help="vocabularies (default: 151936)")
    add("--h", type=int, nargs="+", default=SHORT["h"], help="widths (default: 1024)")
    kinds = ("bfloat16", "float32")
    add("--dtype", nargs="+", choices=kinds, default=kinds[:1], help="default: bfloat16")
    add("--sizes", nargs="+", default=SIZES, help=f"words a set, or {DRAWN} (default: {SIZES})")
    add(
        "--crossing", action="store_true",
        help="sets of V/512 to V/8 words, ours alone: where both routes cost the same",
    )  # fmt: skip
    add_options(parser, everyone, rounds=3)
    options = parser.parse_args(argv)
    if min(options.n) < 2:
        parser.error("--n: at least 2")
    if not all(size == DRAWN or (size.isdecimal() and int(size)) for size in options.sizes):
        parser.error(f"--sizes: {DRAWN}, or integers of at least 1")
    entrants = [everyone[name] for name in options.contenders or everyone]
    if options.crossing:
        entrants = [c for c in entrants if c.ours]

    device, machine = torch.device(options.device), begin(options)
    rows: list[Row] = []

    def cells() -> Iterator[list[Row]]:
        for *shape, dtype in itertools.product(options.n, options.v, options.h, options.dtype):
            sizes = options.sizes
            if options.crossing:
                sizes = [str(max(1, shape[1] // 2**k)) for k in range(9, 2, -1)]
            for kind in sizes:
                found = cell(
                    tuple(shape), getattr(torch, dtype), kind, device, entrants, options.rounds
                )
                rows.extend(found)
                yield found

    mine = [c.name for c in everyone.values() if c.ours]
    path = options.out / "sparse_head"
    code = report(path, cells(), COLUMNS, machine, show, linear.plot, LEGEND, mine)
    if options.crossing:
        show_crossings(rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
