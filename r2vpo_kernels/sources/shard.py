"""Logits whose vocabulary is shared out over the ranks of a process group, in rank order.

Each rank's kernels read its own shard. What they found there goes through one MAX and one SUM over
the ranks (Eq. 30), after which every rank holds the log-probs of the whole vocabulary and, its
loss being the same as everyone's, needs nobody for the gradient of its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, reference
from ..backends import registry
from ..backends.calls import SHARD_FAULT
from ..batch import Batch
from ..checks import NAMESPACE, check, may_synchronise
from ..objective import Objective
from ..sampling import SamplingMask
from .autograd import refuse_double_backward

if TYPE_CHECKING:
    from typing_extensions import Self

ALIKE = (
    "labels",
    "0 <= label < the vocabulary's size, the same, or masked, on all ranks of tp_group",
)


def _ranks(group: str) -> dist.ProcessGroup:
    """Ops take a group by its name."""
    # A torch without torch.distributed has no such module.
    from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
        _resolve_process_group,
    )

    return _resolve_process_group(group)  # type: ignore[arg-type]


@torch.library.custom_op(f"{NAMESPACE}::shard_layout", mutates_args=())
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
    if not error and not any(sizes):
        raise ValueError("tp_group: got no word on any rank, expected a vocabulary of at least 1")
    return torch.tensor([sum(sizes[: ranks.rank()]), sum(sizes), *sizes])


@_layout.register_fake
def _(anything, kind, names, lengths, shapes, error, group):
    return anything.new_empty(2 + _ranks(group).size(), dtype=torch.int64, device="cpu")


@torch.library.custom_op(f"{NAMESPACE}::all_reduce", mutates_args=())
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
        refuse_double_backward("shards have", "all of the vocabulary")
        return grad.narrow(*ctx.place), None, None, None, None


def _check_parts(
    workspace: Tensor, logps: Tensor, top: Tensor, log_total: Tensor, entropy: Tensor,
    whole_top: Tensor, words: int, with_entropy: bool, backend: str,
) -> None:  # fmt: skip
    ops.check_backend(backend, logps)
    ops.check_saved(
        logps.numel(), logps.device, with_entropy, workspace=workspace, logps=logps, top=top,
        log_total=log_total, entropy=entropy, whole_top=whole_top,
    )  # fmt: skip


def _empty_parts(logps: Tensor, with_entropy: bool) -> Tensor:
    return logps.new_empty(4 + with_entropy, logps.numel(), dtype=torch.float64)


@ops.register(
    "shard_parts",
    f"({ops.SAVED}, Tensor whole_top, SymInt words, bool with_entropy, str backend) -> Tensor",
    fake=lambda workspace, logps, *rest: _empty_parts(logps, rest[-2]),
    check=_check_parts,
)
def _shard_parts(
    workspace: Tensor, logps: Tensor, top: Tensor, log_total: Tensor, entropy: Tensor,
    whole_top: Tensor, words: int, with_entropy: bool, backend: str,
) -> Tensor:  # fmt: skip
    """Eq. 30: (4 or 5, N) in float64, what the SUM over the ranks is taken of."""
    parts = _empty_parts(logps, with_entropy)
    registry.load(backend).shard_parts(
        ops.row_tokens(workspace, logps.numel()), words, logps, top, log_total,
        entropy if with_entropy else None, whole_top, parts,
    )  # fmt: skip
    return parts


def _check_combine(
    workspace: Tensor, parts: Tensor, labels: Tensor, ranks: int, with_entropy: bool, backend: str
) -> None:
    ops.check_backend(backend, workspace)
    ops.check_saved(labels.numel(), parts.device, with_entropy, workspace=workspace)
    shape = (4 + with_entropy, labels.numel())
    ops.check_is("parts", parts, torch.float64, workspace.device, shape)


def _empty_combined(
    workspace: Tensor, parts: Tensor, labels: Tensor, ranks: int, with_entropy: bool, backend: str
) -> tuple[Tensor, ...]:
    logps = workspace.new_empty(labels.shape)
    return logps, torch.empty_like(logps), ops.empty_entropy(logps, with_entropy)


@ops.register(
    "shard_combine",
    """(Tensor workspace, Tensor parts, Tensor labels, SymInt ranks, bool with_entropy,
    str backend) -> (Tensor, Tensor, Tensor)""",
    fake=_empty_combined,
    check=_check_combine,
)
def _shard_combine(
    workspace: Tensor, parts: Tensor, labels: Tensor, ranks: int, with_entropy: bool, backend: str
) -> Any:
    """Eq. 30: (logps, log2 total, entropy) of the whole vocabulary, from the ranks' sum."""
    results = _empty_combined(workspace, parts, labels, ranks, with_entropy, backend)
    logps, log_total, entropy = results
    tokens = ops.row_tokens(workspace, labels.numel())
    wanted = entropy if with_entropy else None
    registry.load(backend).shard_combine(tokens, parts, ranks, logps, log_total, wanted)
    if may_synchronise(workspace) and workspace[SHARD_FAULT].view(torch.int32).item():
        alike = _alike(tokens.labels >= 0, parts[2], parts[3], ranks)
        check(logps.reshape(-1), alike, labels.reshape(-1), *ALIKE)
    return results


def _alike(scored: Tensor, owners: Tensor, readers: Tensor, ranks: int) -> Tensor:
    """Where one rank has the label and all score the token, or none does."""
    return torch.where(scored, (owners == 1) & (readers == ranks), readers == 0)


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary."""

    layout: Tensor  # of `shard_layout`
    words: int  # perhaps none
    group: str

    @property
    def ranks(self) -> int:
        return self.layout.shape[0] - 2

    def combine(self, forward: tuple[Tensor, ...], call: ops.Call) -> tuple[Tensor, ...]:
        """Eq. 30: of the whole vocabulary what `logps_forward` found in this shard's words."""
        workspace, _, top, *_ = forward
        labels, options = call.batch.labels, (call.with_entropy, call.backend)
        whole_top = _all_reduce(top, "MAX", self.group)
        parts = _shard_parts(*forward, whole_top, self.words, *options)
        parts = _all_reduce(parts, "SUM", self.group)
        logps, log_total, entropy = _shard_combine(workspace, parts, labels, self.ranks, *options)
        return workspace, logps, whole_top, log_total, entropy

    def checked(self, labels: Tensor) -> Tensor:
        """`labels`, out of the vocabulary where they are not alike on all ranks."""
        begin, whole = self.layout[0], self.layout[1]
        scored, here = labels >= 0, (labels >= begin) & (labels < begin + self.words)
        rows = torch.stack([here, scored]).double()
        owners, readers = _all_reduce(rows, "SUM", self.group).unbind()
        alike = _alike(scored, owners, readers, self.ranks)
        return torch.where(alike, check(labels, alike, labels, *ALIKE), whole)

    def gather(self, shard: Tensor, dim: int) -> Tensor:
        """The whole of what is sharded along `dim`, differentiable in this rank's shard."""
        begin, _, *sizes = self.layout.tolist()
        return _Whole.apply(shard, dim, begin, sizes, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return _all_reduce(wide, "SUM", self.group).to(x.dtype)


def reference_tokens(
    batch: Batch, objective: Objective, like: Tensor, words: int, shard: VocabularyShard | None
) -> reference.Tokens:
    """Of logits of so many words, all or those of a shard, whose labels `checked` knows."""
    if shard is None:
        return reference.Tokens.of(batch, objective, like, words)
    whole = int(shard.layout[1])
    return reference.Tokens.of(batch, objective, like, ops.UNKNOWN_VOCABULARY, whole)


class _Source(Protocol):
    """A source of logits that can be a shard's."""

    @property
    def compatibility_key(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def like(self) -> Tensor: ...
    def of_shard(self, shard: VocabularyShard) -> Self: ...


Source = TypeVar("Source", bound=_Source)


def exchange_shard_layout(
    tp_group: Any, ask: Callable[[], tuple[Source, Batch, Objective]], with_entropy: bool
) -> tuple[Source, Batch, Objective]:
    """What `ask` returns, its source that of a shard.

    Every rank of the group comes here. What is raised on one of them, and a difference in what was
    asked (of tensors: dtype and shape), is an error on all.
    """
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
        source, batch, objective = ask()
        if may_synchronise(source.like):
            # A kernel that raised later would leave the other ranks waiting.
            reference.Tokens.of(batch, objective, source.like, ops.UNKNOWN_VOCABULARY)
    except (TypeError, ValueError) as error:
        _layout(anything, "", "", [], [0], str(error), group)
        raise
    kind = [source.compatibility_key, f"entropy {with_entropy}"]
    shapes: dict[str, torch.Size] = {"tokens": batch.shape}
    asked = [
        (field.name, getattr(x, field.name)) for x in (batch, objective) for field in fields(x)
    ]
    mask = batch.sampling_mask
    if mask is not None:
        asked += [("token_ids", mask.token_ids), ("missing_label", mask.missing_label)]
    for name, value in asked:
        if isinstance(value, Tensor):
            kind.append(f"{name} {value.dtype}")
            shapes[name] = value.shape
        elif isinstance(value, SamplingMask):
            kind.append(f"{name} given")
        elif name != "shape" and not (
            # A number that a compilation must not depend on is not compared there.
            isinstance(value, float) and torch.compiler.is_compiling()
        ):
            kind.append(f"{name} {value}")
    if mask is not None and may_synchronise(mask.offsets) and not torch.compiler.is_compiling():
        shapes["checksum_of_token_ids"] = torch.Size([mask.checksum()])
    lengths = [len(shape) for shape in shapes.values()]
    flat = [n for shape in shapes.values() for n in shape]
    layout = _layout(
        anything, "\n".join(kind), " ".join(shapes), lengths, [*flat, source.vocabulary], "", group
    )
    shard = VocabularyShard(layout, source.vocabulary, group)
    return source.of_shard(shard), batch, objective
