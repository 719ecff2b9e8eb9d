"""Logits whose vocabulary is shared out over the ranks of a process group, in rank order.

Each rank's kernels read its own shard. What they found there goes through one MAX and one SUM over
the ranks (Eq. 30), after which every rank holds the log-probs of the whole vocabulary and, its
loss being the same as everyone's, needs nobody for the gradient of its shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from . import ops

LN_2 = math.log(2.0)
# What labels are not checked against before the shards meet.
UNKNOWN_VOCABULARY = 2**62
ALIKE = (
    "labels",
    "0 <= label < the vocabulary's size, the same, or masked, on all ranks of tp_group",
)


def _ranks(group: str) -> dist.ProcessGroup:
    """Ops take a group by its name."""
    return _resolve_process_group(group)  # type: ignore[arg-type]


@torch.library.custom_op("r2vpo_kernels::shard_layout", mutates_args=())
def _layout(
    anything: Tensor, kind: str, names: str, lengths: list[int], shapes: list[int], error: str,
    group: str,
) -> Tensor:  # fmt: skip
    """On the CPU: where this rank's shard begins, the whole vocabulary, the size of each shard.

    `shapes` has those of `names` one after another, each as long as `lengths` says, then the size.
    What this rank came with, or what it raised, goes to all: where one of them raised or came with
    something else, all others raise, for they would wait for it for ever in what follows.
    """
    ranks = _ranks(group)
    *rest, size = shapes
    described = kind.splitlines()
    for name, length in zip(names.split(), lengths, strict=True):
        described.append(f"{name} {tuple(rest[:length])}")
        rest = rest[length:]
    came: list[Any] = [None] * ranks.size()
    dist.all_gather_object(came, (error, described, size), group=ranks)
    if not error:
        for rank, (theirs, got, _) in enumerate(came):
            if theirs:
                raise ValueError(f"tp_group: rank {rank} raised: {theirs}")
            pairs = zip_longest(got, came[0][1], fillvalue="nothing")
            for one, other in pairs:
                if one != other:
                    raise ValueError(
                        f"tp_group: got {one} on rank {rank}, expected {other}, that of rank 0"
                    )
    sizes = [size for *_, size in came]
    return torch.tensor([sum(sizes[: ranks.rank()]), sum(sizes), *sizes])


@_layout.register_fake
def _(anything, kind, names, lengths, shapes, error, group):
    return anything.new_empty(2 + _ranks(group).size(), dtype=torch.int64, device="cpu")


@torch.library.custom_op("r2vpo_kernels::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, getattr(dist.ReduceOp, op), group=_ranks(group))
    return total


@_all_reduce.register_fake
def _(x, op, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Whole(torch.autograd.Function):
    """All ranks' shards along `dim`. Every rank has the same loss: each keeps its own gradient."""

    @staticmethod
    def forward(ctx, shard, dim, begin, sizes, group):
        ctx.place = dim, begin, shard.shape[dim]
        ranks = _ranks(group)
        # A collective takes equal shapes.
        shape = list(shard.shape)
        shape[dim] = max(sizes)
        padded = shard.new_zeros(shape)
        padded.narrow(dim, 0, shard.shape[dim]).copy_(shard)
        shards = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shards, padded, group=ranks)
        kept = [x.narrow(dim, 0, size) for x, size in zip(shards, sizes, strict=True)]
        return torch.cat(kept, dim)

    @staticmethod
    def backward(ctx, grad):
        ops.refuse_double_backward("shards have", "all of the vocabulary")
        return grad.narrow(*ctx.place), None, None, None, None


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary, `size` words of `whole` from `begin` on."""

    size: int
    begin: Tensor  # 0-dim
    whole: Tensor  # 0-dim
    layout: Tensor  # of `_layout`
    group: str

    def _here(self, labels: Tensor) -> Tensor:
        return (labels >= self.begin) & (labels < self.begin + self.size)

    def local(self, labels: Tensor) -> Tensor:
        """Labels as the kernels take them: those of another shard match no column."""
        elsewhere = torch.where(labels < 0, labels, self.size)
        return torch.where(self._here(labels), labels - self.begin, elsewhere)

    def combine(
        self,
        labels: Tensor,
        temperature: Tensor,
        logps: Tensor,
        top: Tensor,
        log_total: Tensor,
        entropy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eq. 30: of the whole vocabulary what `logps_forward` found in this shard."""
        scored, here = labels >= 0, self._here(labels)
        whole_top = _all_reduce(top, "MAX", self.group)
        # From here on in float64, that nothing but the shards' own rounding counts.
        moved = (top.double() - whole_top) / (LN_2 * temperature.double())
        log_part = log_total + moved
        part = log_part.exp2()
        # The label's distance from the maximum; in a shard of -inf alone it would be a NaN.
        at_label = torch.where(log_total == -torch.inf, -torch.inf, logps / LN_2 + log_part)
        rows = [part, torch.where(here, at_label, 0.0), here.double(), scored.double()]
        if entropy.numel():
            # Eq. 12, for a shard without weight.
            mean = torch.where(part == 0, 0.0, log_part - entropy / LN_2)
            rows.append(part * mean)
        total, at_label, owners, readers, *mean = _all_reduce(
            torch.stack(rows), "SUM", self.group
        ).unbind()
        log_total = total.log2()
        logps = torch.where(scored, (at_label - log_total) * LN_2, 0.0).float()
        if entropy.numel():
            entropy = torch.where(scored, (log_total - mean[0] / total) * LN_2, 0.0).float()
        logps = ops.check(logps, self._alike(labels, owners, readers), labels, *ALIKE)
        return logps, whole_top, log_total.float(), entropy

    def _alike(self, labels: Tensor, owners: Tensor, readers: Tensor) -> Tensor:
        """Where one rank has the label and all score the token, or none does."""
        ranks = self.layout.shape[0] - 2
        return torch.where(labels >= 0, (owners == 1) & (readers == ranks), readers == 0)

    def checked(self, labels: Tensor) -> Tensor:
        """`labels`, out of the vocabulary where they are not alike on all ranks."""
        rows = torch.stack([self._here(labels), labels >= 0]).double()
        alike = self._alike(labels, *_all_reduce(rows, "SUM", self.group).unbind())
        return torch.where(alike, ops.check(labels, alike, labels, *ALIKE), self.whole)

    def gather(self, shard: Tensor, dim: int) -> Tensor:
        """The whole of what is sharded along `dim`, differentiable in this rank's shard."""
        begin, _, *sizes = self.layout.tolist()
        return _Whole.apply(shard, dim, begin, sizes, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return _all_reduce(wide, "SUM", self.group).to(x.dtype)


def agree(
    tp_group: Any, options: dict[str, Any], prepare: Callable[[], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """What `prepare` returns, a source of logits first: with a group, that of a shard.

    Every rank of the group comes here. What `prepare` raises on one of them, and a difference in
    `options` (of tensors: dtype and shape), is an error on all.
    """
    if tp_group is None:
        return prepare()
    if not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group: got {type(tp_group).__name__}, expected a torch.distributed.ProcessGroup "
            "that this process is in, or None"
        )
    world, ranks, group = dist.get_world_size(), tp_group.size(), tp_group.group_name
    if world % ranks:
        raise ValueError(f"tp_group: got {ranks} ranks, expected a divisor of all {world}")
    anything = torch.empty(0)  # an op is found by its tensors
    try:
        source, *made = prepare()
    except (TypeError, ValueError) as error:
        _layout(anything, "", "", [], [0], str(error), group)
        raise
    kind = [source.kind]
    shapes: dict[str, torch.Size] = {}
    for name, value in options.items():
        if isinstance(value, Tensor):
            kind.append(f"{name} {value.dtype}")
            shapes[name] = value.shape
        elif not (isinstance(value, float) and torch.compiler.is_compiling()):
            # A number that a compilation must not depend on is not compared there.
            kind.append(f"{name} {value}")
    lengths = [len(shape) for shape in shapes.values()]
    flat = [n for shape in shapes.values() for n in shape]
    layout = _layout(
        anything, "\n".join(kind), " ".join(shapes), lengths, [*flat, source.vocabulary], "", group
    )
    # Pageable memory is staged before the call returns; a blocking copy would wait for a GPU.
    begin, whole = layout[:2].to(source.like.device, non_blocking=True).unbind()
    shard = VocabularyShard(source.vocabulary, begin, whole, layout, group)
    return replace(source, shard=shard), *made
