"""The products of tokens that have a support: only its words' logits are formed (Eq. 27, 28)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends.calls import Tokens
from ..sampling import SamplingMask, segment_of_each
from .products import Products, of_device

# The product of a token and a word takes so many times as long where it is formed alone: sets that
# have a larger share of the vocabulary take dense products. Measured on a CPU by
# benchmarks/sparse_head.py; on a GPU by the bytes that both move, not measured.
DENSE_SPEED: dict[str, float] = {"cpu": 64, "elsewhere": 512}


def is_worthwhile(
    mask: SamplingMask | None, hidden: Tensor, vocabulary: int, compact: bool
) -> bool:
    """Whether tokens that have a support are better left to the sparse head.

    Which tokens have none is found together with those that are masked, by `compact`.
    """
    if mask is None or not compact:
        return False
    ids, logits = mask.token_ids.shape[0], hidden.shape[0] * vocabulary
    return 0 < ids * of_device(DENSE_SPEED, hidden) <= logits


class SparseHead:
    """The part of a call's products that dense ones leave out.

    `rows` are the kept words' logits, for the row kernels to read or to overwrite.
    """

    def __init__(self, kernels: Any, products: Products, tokens: Tokens) -> None:
        assert tokens.support is not None
        support = tokens.support._replace(compact=True)
        self.kernels, self.products = kernels, products
        self.tokens = replace(tokens, support=support)
        values = support.values
        self.rows = values.expand(1, tokens.tokens, -1)
        capped = products.softcap is not None
        self.slopes = torch.empty_like(values) if capped else None
        self.hidden = _by_rows(products.hidden.to(products.weight.dtype))
        self.weight = _by_rows(products.weight)

    def _head(self) -> tuple[Any, ...]:
        return self.tokens, self.hidden, self.weight, self.products.scale, self.slopes

    def logits(self) -> Tensor:
        """Eq. 27: the logits of the kept words, in `rows`."""
        softcap = self.products.softcap or 0.0
        self.kernels.head_logits(*self._head(), self.products.bias, softcap)
        return self.rows

    def add_gradients(self, by_word: Tensor, offsets: Tensor) -> None:
        """Eq. 28, from the gradient that has taken the place of the logits."""
        products = self.products
        if products.dhidden is not None:
            out = products.dhidden
            if out.dtype not in (self.weight.dtype, torch.float32):
                out = torch.zeros_like(out, dtype=torch.float32)
            self.kernels.head_dhidden(*self._head(), out)
            if out is not products.dhidden:
                products.dhidden += out
        if products.dweight is not None or products.dbias is not None:
            token_of = segment_of_each(offsets, by_word.shape[0]).int()
            self.kernels.head_dweight(
                *self._head(), by_word, token_of, products.dweight, products.dbias, products.begun
            )


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
