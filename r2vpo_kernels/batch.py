"""The batch's geometry, as the caller gave it: which tokens count, where they belong, their weight.

Data, checked for names, types and shapes; `reference` and the kernels do the arithmetic (Eq. 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    REDUCTIONS,
    Reduction,
    check_choice,
    check_count,
    check_dense,
    check_device,
    check_integer,
    check_number,
    check_whole,
    invalid,
)
from .sampling import SamplingMask


@dataclass(slots=True)
class Batch:
    """Tokens of shape (B, T), or (N,) packed, with or without `cu_seqlens`."""

    shape: torch.Size
    labels: Tensor | None = None  # None: log-probs were given
    mask: Tensor | None = None
    ignore_index: int = -100
    cu_seqlens: Tensor | None = None
    group_ids: Tensor | None = None
    num_groups: int = 1
    group_size: int = 0  # sequences; 0: groups are named by group_ids, or all are one
    reduction: Reduction = "none"
    normalizer: float | Tensor | None = None
    sampling_mask: SamplingMask | None = None

    @property
    def tokens(self) -> int:
        # torch.Size.numel makes a constant of a symbolic size.
        return math.prod(self.shape)

    @property
    def sequences(self) -> int | None:
        """How many there are; None where a packed batch has no sequences."""
        if len(self.shape) == 2:
            return self.shape[0]
        return None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @staticmethod
    def build(
        shape: torch.Size,
        device: torch.device,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        ignore_index: int = -100,
        cu_seqlens: Tensor | None = None,
        group_ids: Tensor | None = None,
        num_groups: int | None = None,
        group_size: int | None = None,
        center: object = None,
        reduction: Reduction = "none",
        normalizer: float | Tensor | None = None,
        sampling_mask: SamplingMask | None = None,
    ) -> Batch:
        """`center`: where it is a tensor of means, it too says how many groups there are."""
        ignore_index = check_whole("ignore_index", ignore_index, -(2**63), "an integer of 64 bits")
        batch = Batch(shape, labels, mask, ignore_index, cu_seqlens, group_ids)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != shape:
                raise invalid("mask", mask, f"a tensor of shape {tuple(shape)}")
            check_dense("mask", mask)
            check_device("mask", mask, device)
        if labels is not None:
            check_integer("labels", labels)
            check_device("labels", labels, device)
        if cu_seqlens is not None:
            _check_cu_seqlens(cu_seqlens, shape, device)
        if group_ids is not None and isinstance(center, Tensor):
            num_groups = center.numel() if num_groups is None else num_groups
        if group_ids is not None or num_groups is not None or group_size is not None:
            batch._set_groups(num_groups, group_size, device)
        check_choice("reduction", reduction, REDUCTIONS)
        if reduction.startswith("seq") and batch.sequences is None:
            raise invalid("reduction", repr(reduction), "sequences: labels (B, T), or cu_seqlens")
        batch.reduction = reduction
        if normalizer is not None:
            normalizer = _checked_normalizer(normalizer, reduction, device)
        elif reduction == "seq-mean-token-sum-norm" and len(shape) == 1:
            raise invalid("normalizer", None, "a denominator for 'seq-mean-token-sum-norm', packed")
        batch.normalizer = normalizer
        if sampling_mask is not None:
            _check_sampling_mask(sampling_mask, batch.tokens, device)
            batch.sampling_mask = sampling_mask
        return batch

    def _set_groups(
        self, num_groups: int | None, group_size: int | None, device: torch.device
    ) -> None:
        group_ids, sequences = self.group_ids, self.sequences
        if num_groups is not None:
            num_groups = check_count("num_groups", num_groups)
        if group_size is not None:
            group_size = check_count("group_size", group_size)
        if group_ids is not None and group_size is not None:
            raise invalid("group_size", group_size, "None where group_ids are given")
        if group_ids is None and num_groups is not None:
            raise invalid("num_groups", num_groups, "None without group_ids, or with group_size")
        if group_size is not None:
            if sequences is None:
                raise invalid("group_size", group_size, "sequences: labels (B, T), or cu_seqlens")
            if sequences % group_size:
                expected = f"a divisor of the number of sequences, {sequences}"
                raise invalid("group_size", group_size, expected)
            self.group_size, self.num_groups = group_size, sequences // group_size
            return
        assert group_ids is not None
        check_integer("group_ids", group_ids)
        check_device("group_ids", group_ids, device)
        members = self.tokens if sequences is None else sequences
        if group_ids.shape != (members,):
            what = "token" if sequences is None else "sequence"
            raise invalid("group_ids", group_ids, f"shape ({members},), one per {what}")
        if num_groups is None:
            raise invalid("num_groups", None, "the number of groups where group_ids are given")
        self.num_groups = num_groups

    def check_per_token(
        self,
        name: str,
        value: object,
        device: torch.device,
        *,
        per_sequence: bool = True,
        number: bool = False,
        minimum: float = -torch.inf,
    ) -> float | Tensor:
        """A tensor per token or, if allowed, per sequence, or a number."""
        if not isinstance(value, Tensor):
            if not number:
                raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
            return check_number(name, value, minimum)
        check_device(name, value, device)
        check_dense(name, value)
        if value.is_complex():
            raise TypeError(f"{name}: got dtype {value.dtype}, expected real numbers")
        if value.shape == self.shape or (number and value.dim() == 0):
            return value
        sequences = self.sequences if per_sequence else None
        if sequences is None or value.shape != (sequences,):
            expected = f"shape {tuple(self.shape)}, one per token"
            if sequences is not None:
                expected += f", or ({sequences},), one per sequence"
            raise invalid(name, value, expected + (", or a number" if number else ""))
        return value


def _check_cu_seqlens(cu_seqlens: Tensor, shape: torch.Size, device: torch.device) -> None:
    if len(shape) == 2:
        raise invalid("cu_seqlens", cu_seqlens, "None with labels (B, T): rows are sequences")
    check_integer("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, device)
    tokens = math.prod(shape)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < (2 if tokens else 1):
        raise invalid("cu_seqlens", cu_seqlens, f"shape (sequences + 1,) for {tokens} tokens")


def _check_sampling_mask(mask: Any, tokens: int, device: torch.device) -> None:
    if not isinstance(mask, SamplingMask):
        raise TypeError(f"sampling_mask: got {type(mask).__name__}, expected a SamplingMask")
    # len() would make a constant of a symbolic size.
    if mask.offsets.shape[0] != tokens + 1:
        raise invalid("sampling_mask", f"sets of {len(mask)} tokens", f"{tokens}, one per label")
    check_device("sampling_mask", mask.offsets, device)


def _checked_normalizer(
    normalizer: float | Tensor, reduction: Reduction, device: torch.device
) -> float | Tensor:
    if reduction == "none":
        raise invalid("normalizer", normalizer, "None with reduction 'none', which has none")
    if not isinstance(normalizer, Tensor):
        return check_number("normalizer", normalizer, low=0.0)
    check_device("normalizer", normalizer, device)
    if normalizer.dim() != 0 or normalizer.is_complex():
        raise invalid("normalizer", normalizer, "a real number or a 0-dim tensor of one")
    return normalizer
