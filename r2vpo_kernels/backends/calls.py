"""What every backend is given: the caller's tensors where they lie, and the workspace of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..checks import invalid
from ..objective import Objective
from ..sampling import SamplingMask

# The workspace, a flat float32 tensor; integers lie in it bit by bit. Its numbers, the tickets of
# `means` and `finish` with the fault of `shard_combine`, the partial counts of prepare's programs
# and whether each met a bad value (0 or 1), then for each token ROWS numbers, then for each unit
# begin, end and group. The last SUPPORT_ROWS of a token's are written with a sampling mask alone.
TICKETS = 8
SHARD_FAULT = 10
COUNTS = 16
MOST_PARTS = 512
FAULTS = COUNTS + MOST_PARTS
HEADER = FAULTS + MOST_PARTS
ROWS = 11
SUPPORT_ROWS = 3
UNIT_ROWS = 3
# How many numbers an objective has: those of ops.Call.numbers.
NUMBERS = 9


class Support(NamedTuple):
    """Where a row's words are not all of its logits' (calls with a sampling mask).

    token_ids (M,) int32 are those of the mask. values (M,) float32 hold the logits of the kept
    words, and then their gradients. With `compact` the values are there already, no other logits
    are, and tokens of the full vocabulary are left out; `logits` are then values, seen N times.
    """

    token_ids: Tensor
    values: Tensor
    first_word: int = 0  # of this shard
    compact: bool = False


class Column(NamedTuple):
    """A tensor, whose element for token i of unit u is u·stride_unit + i·stride_token in."""

    tensor: Tensor | None = None
    stride_unit: int = 0
    stride_token: int = 0


NOTHING = Column()

# What kernels read where it lies; the rest is converted first.
_READ = frozenset(
    (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
)  # fmt: skip
# Tokens in a unit, where neither sequences nor groups say.
TILE = 1024


def units_of(batch: Batch) -> tuple[int, int]:
    """How many consecutive units the tokens form, and their length (cu_seqlens given: 0).

    A unit is a sequence. A packed batch without sequences has one per token, where groups are
    named by token, or tiles.
    """
    if len(batch.shape) == 2:
        return batch.shape[0], batch.shape[1]
    if batch.cu_seqlens is not None:
        return batch.cu_seqlens.shape[0] - 1, 0
    if batch.group_ids is not None:
        return batch.tokens, 1
    return -(-batch.tokens // TILE), TILE


def parts_of(units: int, backend: str) -> int:
    """How many programs of `prepare` count: on a CPU one does."""
    return 1 if backend == "cpp" else min(max(units, 1), MOST_PARTS)


def workspace_size(tokens: int, units: int) -> int:
    return HEADER + ROWS * tokens + UNIT_ROWS * units


def units_in(workspace: Tensor, tokens: int) -> int:
    """How many units the workspace of so many tokens has."""
    return (workspace.numel() - HEADER - ROWS * tokens) // UNIT_ROWS


def _readable(name: str, value: Tensor, device: torch.device) -> Tensor:
    """The tensor, where kernels can read it."""
    if value.data_ptr() == 0 and value.numel() > 0:
        raise invalid(name, "a tensor whose memory was given back", "one that holds values")
    if value.device != device:
        # A 0-dim tensor on the CPU is a number.
        value = value.to(device, non_blocking=True)
    if value.dtype in _READ:
        return value
    return value.to(torch.float32 if value.is_floating_point() else torch.int64)


def _readable_or_none(name: str, value: object, device: torch.device) -> Tensor | None:
    """None for what is no tensor."""
    return _readable(name, value, device) if isinstance(value, Tensor) else None


def column(name: str, value: object, shape: torch.Size, device: torch.device) -> Column:
    """A value per token, of `shape`, or per sequence, or a 0-dim tensor; a number is NOTHING."""
    if not isinstance(value, Tensor):
        return NOTHING
    value = _readable(name, value, device)
    if value.dim() == 0:
        return Column(value)
    strides = value.stride()
    if len(strides) == 2:
        return Column(value, strides[0] - shape[1] * strides[1], strides[1])
    if value.shape == shape:
        return Column(value, 0, strides[0])
    return Column(value, strides[0], 0)


@dataclass(slots=True)
class Tokens:
    """The workspace that `prepare` wrote, and what the other kernels must know of it."""

    workspace: Tensor
    tokens: int
    units: int
    groups: int
    parts: int
    on_policy: bool
    sequence_level: bool
    policy_loss: str = "ratio"
    kl: str | None = None  # the estimator, where ref_logps were given
    kl_unbiased: bool = False
    with_support: bool = False  # a sampling mask was given
    support: Support | None = None  # for the row kernels, where one was given

    def row(self, index: int) -> Tensor:
        begin = HEADER + index * self.tokens
        return self.workspace[begin : begin + self.tokens]

    @property
    def labels(self) -> Tensor:
        return self.row(0).view(torch.int32)

    @property
    def supports(self) -> Tensor:
        """(SUPPORT_ROWS, N) int32, written with a sampling mask alone.

        The first of a token's ids that are words of these logits, their number, and that of its
        whole set. The number is -1, and the last 0, where it has the full vocabulary.
        """
        begin, end = (HEADER + n * self.tokens for n in (ROWS - SUPPORT_ROWS, ROWS))
        return self.workspace[begin:end].view(torch.int32).view(SUPPORT_ROWS, -1)


@dataclass(slots=True)
class Prepare:
    """The arguments of `prepare`; a column that was not given is NOTHING."""

    tokens: Tokens
    advantages: Column = NOTHING
    labels: Column = NOTHING
    mask: Column = NOTHING
    old_logps: Column = NOTHING
    importance_weights: Column = NOTHING
    variance_coef: Column = NOTHING
    temperature: Column = NOTHING
    ref_logps: Column = NOTHING
    logps: Column = NOTHING
    entropy: Column = NOTHING
    cu_seqlens: Tensor | None = None
    group_ids: Tensor | None = None
    center: Tensor | None = None
    normalizer: Tensor | None = None
    unit_length: int = 0
    units_per_group: int = 0
    ignore_index: int = -100
    vocabulary: int = 1  # labels are 0 ≤ label < vocabulary
    first_word: int = 0  # of this shard
    words: int = 1
    sampling_mask: SamplingMask | None = None
    sampling_vocabulary: int = 1  # the mask's words are less: those of all shards
    mean_over_unit: bool = False
    count_kind: int = 0  # of the denominator: 0 given, 1 valid tokens, 2 units with a valid token
    # Those of Call.numbers, in their order.
    numbers: tuple[float, ...] | Tensor = field(
        default=(0.0, 1.0, 1.0, 0.0, 0.0, 20.0, 0.0, 0.0, math.inf)
    )
    logps_out: Tensor | None = None
    entropy_out: Tensor | None = None
    # uint8: 0 has a gradient, 1 it is known to be 0, 2 masked, 3 left to the sparse head
    activity: Tensor | None = None
    sparse_head: bool = False

    @staticmethod
    def of(
        batch: Batch,
        objective: Objective,
        numbers: tuple[float, ...] | Tensor,
        device: torch.device,
        backend: str,
    ) -> Prepare:
        """From what was asked; the vocabulary, a shard and outputs are the caller's to set."""
        shape, tokens = batch.shape, batch.tokens
        cu_seqlens = _readable_or_none("cu_seqlens", batch.cu_seqlens, device)
        mask = batch.mask
        if mask is not None and mask.dtype not in _READ:
            mask = mask != 0
        units, unit_length = units_of(batch)
        size = workspace_size(tokens, units)
        compact = Tokens(
            torch.empty(size, dtype=torch.float32, device=device),
            tokens,
            units,
            batch.num_groups,
            parts_of(units, backend),
            objective.old_logps is None,
            objective.ratio_level == "sequence",
            objective.policy_loss,
            None if objective.ref_logps is None else objective.kl_estimator,
            objective.kl_unbiased,
            batch.sampling_mask is not None,
        )
        if batch.normalizer is not None or batch.reduction == "none":
            count_kind = 0
        else:
            count_kind = 1 if batch.reduction == "token-mean" else 2
        return Prepare(
            compact,
            column("advantages", objective.advantages, shape, device),
            column("labels", batch.labels, shape, device),
            column("mask", mask, shape, device),
            column("old_logps", objective.old_logps, shape, device),
            column("importance_weights", objective.importance_weights, shape, device),
            column("variance_coef", objective.variance_coef, shape, device),
            column("temperature", objective.temperature, shape, device),
            column("ref_logps", objective.ref_logps, shape, device),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
            group_ids=_readable_or_none("group_ids", batch.group_ids, device),
            center=_readable_or_none("center", objective.center, device),
            normalizer=_readable_or_none("normalizer", batch.normalizer, device),
            unit_length=unit_length,
            units_per_group=batch.group_size,
            ignore_index=batch.ignore_index,
            sampling_mask=batch.sampling_mask,
            mean_over_unit=batch.reduction == "seq-mean-token-mean",
            count_kind=count_kind,
            numbers=numbers,
        )
