"""The batch's geometry: which tokens count, where they belong, and with what weight.

`Batch.build` is where the arguments that describe it are checked, once for all entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference import compute_dtype

FLOAT32_MAX = 3.4028234663852886e38
REDUCTIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "none",
)


def invalid(name: str, got: Any, expected: str) -> ValueError:
    if isinstance(got, Tensor):
        got = f"a {got.dtype} tensor of shape {tuple(got.shape)}"
    return ValueError(f"{name}: got {got}, expected {expected}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise invalid(name, repr(value), "one of " + ", ".join(map(repr, choices)))


def check_number(name: str, value: Any, low: float = -torch.inf, high: float = torch.inf) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (low <= value <= high and abs(value) <= FLOAT32_MAX):
        raise invalid(name, value, f"a finite number from {low} to {high}")


def check_positive(name: str, value: Any) -> None:
    check_number(name, value)
    if value <= 0:
        raise invalid(name, value, "a number above 0")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    # A 0-dim tensor on the CPU is to torch what a number is.
    if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise invalid(name, f"a tensor on {value.device}", f"one on {device}, with the rest")


def check_integer(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor of integers")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected integers")


def check_float(name: str, value: Tensor) -> None:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a tensor of floats")


def check_labels(labels: Tensor, shape: torch.Size, whose: str) -> None:
    check_integer("labels", labels)
    if labels.shape != shape:
        raise invalid("labels", labels, f"shape {tuple(shape)}, that of {whose}")


@dataclass(frozen=True)
class Segments:
    """A partition of the tokens: `index` (N,) names each token's segment.

    `order` lists the tokens segment by segment (None: they lie so already), and segment i is
    order[offsets[i]:offsets[i + 1]]. Sums run in that order, in float64: no atomics, the same bits
    each time.
    """

    index: Tensor
    offsets: Tensor
    order: Tensor | None = None

    @property
    def count(self) -> int:
        return self.offsets.shape[0] - 1

    def sum(self, x: Tensor) -> Tensor:
        """(N,) → (count,)."""
        return _SegmentSum.apply(x, self.index, self.offsets, self.order)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N,), (N,) → (count,), the weighted mean; 0 where nothing has weight."""
        total = self.sum(weight)
        return self.sum(weight * x) / torch.where(total == 0, 1.0, total)

    def spread(self, x: Tensor) -> Tensor:
        """(count,) → (N,), each token its segment's value."""
        return _SegmentSpread.apply(x, self.index, self.offsets, self.order)

    @staticmethod
    def consecutive(offsets: Tensor, tokens: int) -> Segments:
        position = torch.arange(tokens, device=offsets.device)
        index = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        # Offsets that end early (and are reported where they came in) leave no index outside.
        return Segments(index.clamp(max=max(offsets.shape[0] - 2, 0)), offsets)

    @staticmethod
    def of(index: Tensor, count: int) -> Segments:
        order = index.argsort(stable=True)
        ends = torch.arange(count + 1, device=index.device, dtype=index.dtype)
        return Segments(index, torch.searchsorted(index[order], ends), order)


def _segment_sum(x: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
    ordered = x if order is None else x[order]
    sums = torch.segment_reduce(
        ordered.double().contiguous(), "sum", offsets=offsets, unsafe=True, initial=0.0
    )
    return sums.to(x.dtype)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, offsets, order):
        ctx.save_for_backward(index)
        return _segment_sum(x, offsets, order)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad[index], None, None, None


class _SegmentSpread(torch.autograd.Function):
    """Its backward is the fixed-order sum, where that of plain indexing adds by atomics."""

    @staticmethod
    def forward(ctx, x, index, offsets, order):
        ctx.save_for_backward(offsets, order)
        return x[index]

    @staticmethod
    def backward(ctx, grad):
        offsets, order = ctx.saved_tensors
        return _segment_sum(grad, offsets, order), None, None, None


@dataclass(frozen=True)
class Batch:
    """Tokens, flattened to (N,), with what the arguments say of where they belong."""

    shape: torch.Size
    valid: Tensor
    labels: Tensor  # int64: -1 where masked, V where out of range; empty without logits
    sequences: Segments | None
    groups: Segments
    token_weight: Tensor  # Eq. 4: the weight before the batch's denominator, that of the statistics
    weight: Tensor  # Eq. 4: the weight in the loss

    @staticmethod
    def build(
        shape: torch.Size,
        like: Tensor,
        *,
        labels: Tensor | None = None,
        vocabulary: int = 0,
        ignore_index: int = -100,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        group_ids: Tensor | None = None,
        num_groups: int | None = None,
        group_size: int | None = None,
        reduction: str = "none",
        normalizer: float | Tensor | None = None,
    ) -> Batch:
        device, dtype = like.device, compute_dtype(like.dtype)
        tokens = shape.numel()
        valid = torch.ones(tokens, dtype=torch.bool, device=device)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != shape:
                raise invalid("mask", mask, f"a tensor of shape {tuple(shape)}")
            check_device("mask", mask, device)
            valid = (mask != 0).reshape(-1)
        checked = torch.zeros(0, dtype=torch.int64, device=device)
        if labels is not None:
            check_integer("labels", labels)
            check_device("labels", labels, device)
            if not isinstance(ignore_index, int):
                raise invalid("ignore_index", ignore_index, "an integer")
            flat = labels.reshape(-1).long()
            valid = valid & (flat != ignore_index)
            in_range = (flat >= 0) & (flat < vocabulary)
            checked = torch.where(valid, torch.where(in_range, flat, vocabulary), -1)
            expected = "0 <= label < the vocabulary's size, or ignore_index"
            checked = ops.check(checked, in_range | ~valid, flat, "labels", expected)

        one = torch.ones((), dtype=dtype, device=device)
        unit, sequences = _sequences(shape, cu_seqlens, one)
        unit, groups = _groups(valid, unit, sequences, group_ids, num_groups, group_size, device)
        token_weight = torch.where(valid, unit, 0.0)
        check_choice("reduction", reduction, REDUCTIONS)
        lengths = token_weight[:0]
        if sequences is not None:
            lengths = sequences.sum(valid.to(dtype))
        elif reduction.startswith("seq"):
            raise invalid("reduction", repr(reduction), "sequences: labels (B, T), or cu_seqlens")
        denominator = _denominator(reduction, normalizer, shape, valid, lengths, one)
        if reduction == "seq-mean-token-mean":
            assert sequences is not None
            token_weight = token_weight / sequences.spread(lengths.clamp(min=1.0))
        weight = token_weight / torch.where(denominator == 0, 1.0, denominator)
        return Batch(shape, valid, checked, sequences, groups, token_weight, weight)

    def per_token(
        self,
        name: str,
        value: float | Tensor,
        *,
        fill: float = 0.0,
        per_sequence: bool = True,
        number: bool = False,
        minimum: float = -torch.inf,
    ) -> Tensor:
        """A tensor per token or per sequence, or a number, as (N,), `fill` at masked tokens."""
        count = self.sequences.count if per_sequence and self.sequences is not None else None
        if not isinstance(value, Tensor):
            if not number:
                raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
            check_number(name, value, minimum)
            return torch.where(self.valid, self.scalar(value), fill)
        check_device(name, value, self.weight.device)
        if value.is_complex():
            raise TypeError(f"{name}: got dtype {value.dtype}, expected real numbers")
        flat = value.detach().to(self.weight.dtype)
        if value.shape == self.shape:
            flat = flat.reshape(-1)
        elif count is not None and value.shape == (count,):
            assert self.sequences is not None
            flat = flat[self.sequences.index]
        elif not (number and value.dim() == 0):
            expected = f"shape {tuple(self.shape)}, one per token"
            if count is not None:
                expected += f", or ({count},), one per sequence"
            raise invalid(name, value, expected + (", or a number" if number else ""))
        flat = torch.where(self.valid, flat, fill)
        if minimum == -torch.inf:
            return flat
        return ops.check(flat, flat >= minimum, flat, name, f"at least {minimum}")

    def scalar(self, value: float) -> Tensor:
        """A number as a 0-dim tensor, by arithmetic, so that no compilation depends on it."""
        return self.weight.new_zeros(()) + value


def _sequences(
    shape: torch.Size, cu_seqlens: Tensor | None, one: Tensor
) -> tuple[Tensor, Segments | None]:
    """(1, or NaN where cu_seqlens was wrong; the sequences, if there are any)."""
    tokens = shape.numel()
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise invalid("cu_seqlens", cu_seqlens, "None with labels (B, T): rows are sequences")
        offsets = torch.arange(shape[0] + 1, device=one.device) * shape[1]
        return one, Segments.consecutive(offsets, tokens)
    if cu_seqlens is None:
        return one, None
    check_integer("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, one.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < (2 if tokens else 1):
        raise invalid("cu_seqlens", cu_seqlens, f"shape (sequences + 1,) for {tokens} tokens")
    offsets = cu_seqlens.long()
    steps = offsets.diff()
    covers = (offsets[0] == 0) & (offsets[-1] == tokens) & (steps >= 0).all()
    one = ops.check(one, covers, offsets, "cu_seqlens", "offsets that rise from 0 to the tokens")
    if steps.shape[0] == tokens:
        # A tensor of that shape could be per sequence or per token: they must be the same.
        expected = "one token in each sequence where there are as many sequences as tokens"
        one = ops.check(one, (steps == 1).all(), offsets, "cu_seqlens", expected)
    # Whatever came, no sum may reach outside the tokens.
    offsets = offsets.clamp(0, tokens).cummax(0).values
    return one, Segments.consecutive(offsets, tokens)


def _groups(
    valid: Tensor,
    unit: Tensor,
    sequences: Segments | None,
    group_ids: Tensor | None,
    num_groups: int | None,
    group_size: int | None,
    device: torch.device,
) -> tuple[Tensor, Segments]:
    """(the unit weight, NaN at tokens of a group that does not exist; the groups)."""
    tokens = valid.shape[0]
    for name, value in (("num_groups", num_groups), ("group_size", group_size)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise invalid(name, value, "a whole number of at least 1")
    if group_ids is not None and group_size is not None:
        raise invalid("group_size", group_size, "None where group_ids are given")
    if group_ids is None and num_groups is not None:
        raise invalid("num_groups", num_groups, "None without group_ids, or with group_size")
    if group_size is not None:
        if sequences is None:
            raise invalid("group_size", group_size, "sequences: labels (B, T), or cu_seqlens")
        if sequences.count % group_size:
            expected = f"a divisor of the number of sequences, {sequences.count}"
            raise invalid("group_size", group_size, expected)
        return unit, Segments.consecutive(sequences.offsets[::group_size], tokens)
    if group_ids is None:
        whole = torch.arange(2, device=device) * tokens
        return unit, Segments.consecutive(whole, tokens)
    check_integer("group_ids", group_ids)
    check_device("group_ids", group_ids, device)
    members = tokens if sequences is None else sequences.count
    if group_ids.shape != (members,):
        what = "token" if sequences is None else "sequence"
        raise invalid("group_ids", group_ids, f"shape ({members},), one per {what}")
    if num_groups is None:
        raise invalid("num_groups", None, "the number of groups where group_ids are given")
    ids = group_ids.long() if sequences is None else group_ids.long()[sequences.index]
    in_range = (ids >= 0) & (ids < num_groups)
    unit = ops.check(
        unit.expand(tokens), in_range | ~valid, ids, "group_ids", f"0 <= id < {num_groups}"
    )
    return unit, Segments.of(ids.clamp(0, num_groups - 1), num_groups)


def _denominator(
    reduction: str,
    normalizer: float | Tensor | None,
    shape: torch.Size,
    valid: Tensor,
    lengths: Tensor,
    one: Tensor,
) -> Tensor:
    """Eq. 4: what the token weights are divided by."""
    if normalizer is not None:
        if reduction == "none":
            raise invalid("normalizer", normalizer, "None with reduction 'none', which has none")
        if isinstance(normalizer, Tensor):
            check_device("normalizer", normalizer, one.device)
            if normalizer.dim() != 0:
                raise invalid("normalizer", normalizer, "a number or a 0-dim tensor")
            given = normalizer.detach().to(one)
            return ops.check(given, given >= 0, given, "normalizer", "at least 0")
        check_number("normalizer", normalizer, low=0.0)
        return one.new_zeros(()) + normalizer
    if reduction == "none":
        return one
    if reduction == "token-mean":
        return valid.sum().to(one.dtype)
    count = (lengths > 0).sum().to(one.dtype)
    if reduction != "seq-mean-token-sum-norm":
        return count
    if len(shape) == 1:
        raise invalid("normalizer", None, "a denominator for 'seq-mean-token-sum-norm', packed")
    return count * shape[1]
