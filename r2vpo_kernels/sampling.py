"""The kept sets of top-k, top-p and min-p sampling: the words that each token was sampled from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, register_pytree_node

from .checks import (
    MISSING_LABELS,
    NAMESPACE,
    MissingLabel,
    check_choice,
    check_device,
    check_integer,
    check_whole,
    invalid,
    may_synchronise,
)

# Larger than any word: what `largest` says of sets that are wrong.
NO_WORD = 2**62


class SamplingMask:
    """For each token the words that it was sampled from; the policy is renormalised over them:

        p_j = exp(x_j) / Σ_{k in the set} exp(x_k) inside the set, 0 outside;    x = z / temperature

    Log-probs, ratio, entropy and gradients are those of that distribution (K of Eq. 1). An empty
    set stands for the full vocabulary.

    Args:
        token_ids: (M,) integers ≥ 0, one set after another, in any order within a set, none twice.
        offsets: (N + 1,) integers that rise from 0 to M: the set of token i, in the order of the
            flattened labels, is token_ids[offsets[i] : offsets[i + 1]]. Masked tokens have sets
            too, empty or not, which count for nothing.
        missing_label: what becomes of a token whose label is not in its set: "error", or "full",
            the full vocabulary.

    `len()` counts the tokens; `mask[a:b]` and `mask[index]`, with integers or a mask, select some,
    and `cat` joins. The sets are sorted once, here, for all calls that they are passed to.

    Raises:
        ValueError: naming what is wrong. What tensors on a GPU hold is checked there: bad sets make
            the loss of each call NaN, or raise here with R2VPO_KERNELS_VALIDATE=1 at the price of a
            sync.
        TypeError: the same, for a wrong type.

    Source: docs/derivation, Eq. 1.
    """

    __slots__ = ("_by_word", "largest", "missing_label", "offsets", "token_ids")

    token_ids: Tensor  # int32, rising within each set
    offsets: Tensor  # int64
    largest: Tensor  # 0-dim int64: no id is larger; NO_WORD where the sets are wrong
    missing_label: MissingLabel
    _by_word: Tensor | None

    def __init__(
        self, token_ids: Tensor, offsets: Tensor, *, missing_label: MissingLabel = "error"
    ) -> None:
        _check_vector("token_ids", token_ids)
        _check_vector("offsets", offsets)
        check_device("offsets", offsets, token_ids.device)
        check_choice("missing_label", missing_label, MISSING_LABELS)
        count = token_ids.shape[0]
        if offsets.shape[0] < (2 if count else 1):
            raise invalid("offsets", offsets, f"shape (tokens + 1,) for {count} ids")
        if count >= 2**31:
            raise invalid("token_ids", token_ids, "less than 2^31 of them")
        ids, given = token_ids.long(), offsets.long()
        # Whatever came, no set may reach outside the ids.
        self.offsets = given.clamp(0, count).cummax(0).values
        token = segment_of_each(self.offsets, count)
        by_word = ids.argsort(stable=True)
        ids = ids[by_word[token[by_word].argsort(stable=True)]]

        rises = (given[:1] == 0).all() & (given[-1:] == count).all() & (given.diff() >= 0).all()
        negative = ids < 0
        twice = (ids.diff() == 0) & (token.diff() == 0)
        if may_synchronise(token_ids):
            if not rises:
                raise invalid("offsets", given.tolist(), f"numbers that rise from 0 to {count}")
            if negative.any():
                raise invalid("token_ids", ids[negative][0].item(), "ids of at least 0")
            if twice.any():
                at = twice.nonzero()[0, 0]
                raise invalid(
                    "token_ids",
                    f"{ids[at].item()} twice in the set of token {token[at].item()}",
                    "each id once",
                )
        wrong = ~rises | negative.any() | twice.any()
        self.largest = torch.where(wrong, NO_WORD, _largest(ids))
        self.token_ids = ids.clamp(0, 2**31 - 1).int()
        self.missing_label = missing_label
        self._by_word = None

    @staticmethod
    def from_lists(
        sets: Sequence[Any],
        *,
        device: torch.device | str | None = None,
        missing_label: MissingLabel = "error",
    ) -> SamplingMask:
        """From one list of ids for each token, or None for the full vocabulary."""
        try:
            counts = [0 if ids is None else len(ids) for ids in sets]
            flat = list(itertools.chain.from_iterable(ids for ids in sets if ids is not None))
            token_ids = torch.tensor(flat, dtype=None if flat else torch.int64, device=device)
        except (TypeError, ValueError) as error:
            expected = "a list of ids, or None, for each token"
            raise TypeError(f"sets: got another kind ({error}), expected {expected}") from error
        return SamplingMask.from_counts(
            token_ids,
            torch.tensor(counts, dtype=torch.int64, device=device),
            missing_label=missing_label,
        )

    @staticmethod
    def from_counts(
        token_ids: Tensor, counts: Tensor, *, missing_label: MissingLabel = "error"
    ) -> SamplingMask:
        """From the ids (M,) of all sets, and how many each of them has (N,)."""
        _check_vector("token_ids", token_ids)
        _check_vector("counts", counts)
        check_device("counts", counts, token_ids.device)
        offsets = nn.functional.pad(counts.long().cumsum(0), (1, 0))
        if may_synchronise(counts):
            count = token_ids.shape[0]
            if (counts < 0).any() or offsets[-1] != count:
                got = f"{counts.min().item()} at least, {offsets[-1].item()} in all"
                raise invalid("counts", got, f"numbers of at least 0 that add up to {count} ids")
        return SamplingMask(token_ids, offsets, missing_label=missing_label)

    @staticmethod
    def from_padded(
        token_ids: Tensor,
        *,
        pad: int | None = None,
        sizes: Tensor | None = None,
        missing_label: MissingLabel = "error",
    ) -> SamplingMask:
        """From (N, K) or (B, T, K) ids.

        A set is what is not `pad` (default -1), or the first of `sizes` (N,) or (B, T) ids. On a
        GPU this waits for it once.
        """
        check_integer("token_ids", token_ids)
        if token_ids.dim() not in (2, 3):
            raise invalid("token_ids", token_ids, "shape (N, K) or (B, T, K)")
        if sizes is None:
            pad = check_whole("pad", -1 if pad is None else pad, -(2**63), "an integer of 64 bits")
            # An integer of 8 bits without a sign is never -1, but 255 would count as it.
            inside = token_ids.long() != pad
        else:
            check_integer("sizes", sizes)
            check_device("sizes", sizes, token_ids.device)
            most = token_ids.shape[-1]
            if pad is not None:
                raise invalid("pad", pad, "None where sizes are given")
            if sizes.shape != token_ids.shape[:-1]:
                raise invalid("sizes", sizes, f"shape {tuple(token_ids.shape[:-1])}")
            wrong = (sizes < 0) | (sizes > most)
            if may_synchronise(sizes) and wrong.any():
                raise invalid("sizes", sizes[wrong][0].item(), f"numbers from 0 to {most}")
            inside = torch.arange(most, device=token_ids.device) < sizes[..., None]
        counts = inside.sum(-1).reshape(-1)
        return SamplingMask.from_counts(token_ids[inside], counts, missing_label=missing_label)

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def __repr__(self) -> str:
        return (
            f"SamplingMask({self.token_ids.shape[0]} ids for {len(self)} tokens, "
            f"missing_label={self.missing_label!r})"
        )

    def __getitem__(self, tokens: slice | Tensor) -> SamplingMask:
        """The sets of these tokens: a slice of step 1, integers or a mask.

        On a GPU it waits for it.
        """
        if isinstance(tokens, slice):
            begin, end, step = tokens.indices(len(self))
            if step != 1:
                raise invalid("tokens", tokens, "a slice of step 1, or a tensor of integers")
            offsets = self.offsets[begin : max(begin, end) + 1]
            first, last = offsets[[0, -1]].tolist()
            return self._of(self.token_ids[first:last], offsets - first)
        if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
            if tokens.shape != (len(self),):
                raise invalid("tokens", tokens, f"shape ({len(self)},) where it is a mask")
            tokens = tokens.nonzero().squeeze(1)
        _check_vector("tokens", tokens)
        check_device("tokens", tokens, self.offsets.device)
        tokens, count = tokens.long(), len(self)
        wrong = (tokens < -count) | (tokens >= count)
        if wrong.any():
            raise invalid("tokens", tokens[wrong][0].item(), f"those of {count} tokens")
        begins = self.offsets[:-1][tokens]
        counts = self.offsets.diff()[tokens]
        offsets = nn.functional.pad(counts.cumsum(0), (1, 0))
        place = torch.arange(int(offsets[-1]), device=offsets.device)
        place += (begins - offsets[:-1]).repeat_interleave(counts)
        return self._of(self.token_ids[place], offsets)

    @staticmethod
    def cat(masks: Sequence[SamplingMask]) -> SamplingMask:
        """The sets of all their tokens, one mask after another; all with the same missing_label."""
        if len({mask.missing_label for mask in masks}) != 1:
            raise invalid("masks", list(masks), "some, with the same missing_label")
        begins = [0, *itertools.accumulate(mask.token_ids.shape[0] for mask in masks)]
        offsets = [mask.offsets[1:] + begin for mask, begin in zip(masks, begins, strict=False)]
        return SamplingMask.of(
            torch.cat([mask.token_ids for mask in masks]),
            torch.cat([masks[0].offsets[:1], *offsets]),
            torch.stack([mask.largest for mask in masks]).amax(),
            masks[0].missing_label,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SamplingMask:
        """The same on another device."""
        ids, offsets, largest = (x.to(device, non_blocking=non_blocking) for x in self.tensors())
        return SamplingMask.of(ids, offsets, largest, self.missing_label)

    def token_of(self) -> Tensor:
        """(M,) int64: the token whose set each id is in."""
        return segment_of_each(self.offsets, self.token_ids.shape[0])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `of` takes."""
        return self.token_ids, self.offsets, self.largest

    @staticmethod
    def of(
        token_ids: Tensor, offsets: Tensor, largest: Tensor, missing_label: MissingLabel
    ) -> SamplingMask:
        """Of the fields of another one."""
        mask = SamplingMask.__new__(SamplingMask)
        mask.token_ids, mask.offsets, mask.largest = token_ids, offsets, largest
        mask.missing_label = missing_label
        mask._by_word = None
        return mask

    def checksum(self) -> int:
        """Of the ids and where they are; on a GPU this waits for it."""
        place = torch.arange(1, self.token_ids.shape[0] + 1, device=self.offsets.device)
        return int((self.token_ids * place).sum() + 31 * self.offsets.sum())

    def by_word(self) -> Tensor:
        """(M,) int32: the places of all ids by word and, of one word, by token. It is kept."""
        if self._by_word is None:
            self._by_word = order_by_word(self.token_ids)
        return self._by_word

    def _of(self, token_ids: Tensor, offsets: Tensor) -> SamplingMask:
        largest = torch.where(self.largest == NO_WORD, NO_WORD, _largest(token_ids))
        return SamplingMask.of(token_ids, offsets, largest, self.missing_label)


def _largest(ids: Tensor) -> Tensor:
    """-1 of none."""
    return nn.functional.pad(ids.long(), (0, 1), value=-1).amax()


def _check_vector(name: str, value: Any) -> None:
    check_integer(name, value)
    if value.dim() != 1:
        raise invalid(name, value, "one dimension")


def segment_of_each(offsets: Tensor, count: int) -> Tensor:
    """(count,) int64: the segment of each element, of an id the token in whose set it is."""
    position = torch.arange(count, device=offsets.device)
    # Not in offsets[1:]: on a GPU torch 2.11's inductor searches a view from its base's beginning.
    segment = torch.searchsorted(offsets.contiguous(), position, right=True) - 1
    # Offsets that begin late or end early (and are reported) leave no index outside.
    return segment.clamp(0, max(offsets.shape[0] - 2, 0))


def order_by_word(token_ids: Tensor) -> Tensor:
    """(M,) int32: the places of all ids by word and, of one word, by token."""
    return token_ids.argsort(stable=True).int()


# Tools that walk inputs, such as torch.export, find the tensors.
register_pytree_node(
    SamplingMask,
    lambda mask: (list(mask.tensors()), mask.missing_label),
    lambda tensors, missing_label: SamplingMask.of(*(*tensors, missing_label)),
    serialized_type_name=f"{NAMESPACE}.SamplingMask",
    flatten_with_keys_fn=lambda mask: (
        [(GetAttrKey(n), getattr(mask, n)) for n in ("token_ids", "offsets", "largest")],
        mask.missing_label,
    ),
)
