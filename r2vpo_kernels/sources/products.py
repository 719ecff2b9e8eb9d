"""The matrix products of the linear route, one chunk of tokens after another (Eq. 27, 28).

The logits of a chunk are a product into a buffer, which the kernels overwrite with their gradient;
two more products take that to the hidden states and the head. Low-rank adapters of the head add
thin ones to each.
"""

import functools
import os
import platform
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import registry
from ..checks import check_choice

# Bytes that the logits of a chunk may take, unless one chunk is to hold all tokens.
CHUNK_BYTES = {"cpu": 2**28, "elsewhere": 2**30}
# Elements at a time, where a temporary of all would be large.
TILE = {"cpu": 2**21, "elsewhere": 2**25}
# The side of a block of a float32 product, 4 MB where it is square; and what sides are multiples
# of, for rows that begin at a cache line.
SIDE, ALIGNED = 1024, 64


def of_device(table, x):
    return table.get(x.device.type, table["elsewhere"])


def _balanced(begin, end, most, multiple=1):
    """Slices of equal length, of `most` at most, itself a multiple."""
    number = -(-(end - begin) // most)
    size = -(-(end - begin) // (number * multiple)) * multiple if number else 1
    return [slice(at, min(at + size, end)) for at in range(begin, end, size)]


def _blocks(rows: int, width: int, x: Tensor) -> list[slice]:
    """Slices of rows of `width` elements, a tile each."""
    return _balanced(0, rows, max(1, of_device(TILE, x) // width))


# How a processor multiplies matrices: out = scale·(a @ b + bias), or `add` to what out holds.


def _multiply(a, b, scale, out, add=False, bias=None):
    """By torch."""
    if a.dtype != b.dtype:
        # Halves and the float32 of an adapter.
        for rows in _blocks(a.shape[0], a.shape[1], a):
            _multiply(a[rows].to(b.dtype), b, scale, out[rows], add)
    elif a.dtype == out.dtype:
        start, beta = (out, float(add)) if bias is None else (bias, scale)
        torch.addmm(start, a, b, beta=beta, alpha=scale, out=out)
    elif _leaves_float32(out) and out.dtype == torch.float32:
        start, beta = (out, float(add)) if bias is None else (out.copy_(bias), scale)
        torch.addmm(start, a, b, beta=beta, alpha=scale, out_dtype=torch.float32, out=out)
    else:
        # A product comes rounded to its factors' dtype here: by blocks, in one tile for all.
        blocks = _blocks(out.shape[0], out.shape[1], out)
        tile = a.new_empty(out[blocks[0]].shape)
        for rows in blocks:
            part = tile[: rows.stop - rows.start]
            _multiply(a[rows], b, scale, part)
            if add:
                out[rows] += part
            else:
                out[rows] = part


class _MultiplyInFloat32:
    """By torch, in float32, halves cast a block at a time: two tiles are read, one adds up."""

    def __init__(self, x: Tensor) -> None:
        self.tiles = [x.new_empty(0, dtype=torch.float32)] * 3

    def __call__(self, a, b, scale, out, add=False, bias=None):
        sizes = (*a.shape, b.shape[1])
        # A block has SIDE² elements at most, whichever two of the sizes are its sides.
        _, middle, _ = sorted(sizes)
        most = max(SIDE * SIDE // min(middle, SIDE) // ALIGNED, 1) * ALIGNED
        rows, inner, columns = (
            _balanced(0, size, SIDE if size <= middle else most, ALIGNED) for size in sizes
        )
        self.held = [None, None]
        for j in columns:
            for i in rows:
                total = out[i, j]
                if out.dtype != torch.float32:
                    total = self._tile(2, total.shape)
                    if add:
                        total.copy_(out[i, j])
                start, beta = (total, float(add)) if bias is None else (bias[j].float(), scale)
                for k in inner:
                    left, right = self._cast(0, a, i, k), self._cast(1, b, k, j)
                    torch.addmm(start, left, right, beta=beta, alpha=scale, out=total)
                    start, beta = total, 1.0
                if out.dtype != torch.float32:
                    out[i, j] = total

    def _tile(self, which, shape):
        size = shape[0] * shape[1]
        if self.tiles[which].numel() < size:
            self.tiles[which] = self.tiles[which].new_empty(size)
        return self.tiles[which][:size].view(shape)

    def _cast(self, which, x, rows, columns):
        """A block of a factor, in the order in which it lies in memory."""
        if x.stride(0) < x.stride(1):
            return self._cast(which, x.t(), columns, rows).t()
        block = x[rows, columns]
        tile = self._tile(which, block.shape)
        if self.held[which] != (rows, columns):
            self.held[which] = rows, columns
            tile.copy_(block)
        return tile


def _multiplier(x: Tensor, dtype: torch.dtype, exact: bool = False) -> Callable[..., None]:
    """What multiplies matrices of a dtype where x lies; `exact`: into float32, unrounded."""
    if multiplies_in_float32(x, dtype) or (exact and not _leaves_float32(x)):
        return _MultiplyInFloat32(x)
    return _multiply


def _leaves_float32(x: Tensor) -> bool:
    """Whether, where x lies, torch leaves the sums of a product of halves in float32 if asked."""
    return x.is_cuda and torch.version.hip is None


def multiplies_in_float32(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether matrices of a dtype, where x lies, are multiplied in float32 though they are halves.

    On a CPU without units for them torch's own products take ten to a hundred times as long.
    R2VPO_KERNELS_HALF_PRODUCTS, "native" or "float32", overrules what torch says of the processor.
    """
    if x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    name = "R2VPO_KERNELS_HALF_PRODUCTS"
    kind = os.environ.get(name) or ("native" if _has_units(dtype) else "float32")
    check_choice(name, kind, ("native", "float32"))
    return kind == "float32"


@functools.cache
def _has_units(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # On x86 oneDNN takes bfloat16 from AVX-512 on, with instructions for it or without.
    x86 = platform.machine() in ("x86_64", "AMD64")
    instructions = not x86 or torch.cpu._is_avx512_bf16_supported()
    return instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _in_order(activity):
    """(tokens by their activity, how many have a gradient, how many are not masked).

    None for the order where all have a gradient. Counting is what waits for a GPU, once.
    """
    ordered, order = activity.sort(stable=True)
    ends = torch.arange(1, 3, dtype=activity.dtype, device=activity.device)
    first, both = torch.searchsorted(ordered, ends).tolist()
    return None if first == activity.shape[0] else order, first, both


def _rounded_in_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of x (contiguous), in a dtype that is no wider, in the first of its memory."""
    if x.dtype == dtype:
        return x
    rounded = x.view(-1).view(dtype)[: x.numel()].view(x.shape)
    for rows in _blocks(x.shape[0], x.shape[1], x):
        # It lies over what was read in earlier blocks, or in this one.
        rounded[rows] = x[rows].to(dtype)
    return rounded


def _put_rows(x, rows, values):
    # index_copy_ takes an element at a time: the wider, the fewer.
    if x.shape[1] * x.itemsize % 8 == 0:
        x, values = x.view(torch.int64), values.view(torch.int64)
    x.index_copy_(0, rows, values)


class Head(NamedTuple):
    """What the products are of: hidden (N, H), and weight (V, H) + lora_b (V, R) @ lora_a (R, H).

    The two of lora have the dtype of their products: `dtype`, or float32.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype  # of the products
    logits_dtype: torch.dtype  # the same, or float32
    chunk_tokens: int  # 0: by CHUNK_BYTES
    compact: bool
    wanted: list[bool]  # which gradients, of `inputs`
    sparse: bool  # tokens that have a support are left to the sparse head

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What it is differentiable in: the first INPUTS of its fields."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b


INPUTS = 5


class Products:
    """The products of one call, in buffers that serve one chunk of tokens after another.

    activity (N,) uint8: 0 where a token has a gradient, 1 where that is known to be 0, more where
    it has no part in these products. `gradient_chunks` and `forward_only_chunks` are those of the
    first two, each a slice or an index. With compact=False every token is in the first: kernels
    take masked rows. The sparse head adds its part to the sums.
    """

    def __init__(self, head: Head, activity: Tensor) -> None:
        (
            hidden, weight, bias, lora_a, lora_b, softcap, scale, dtype, logits_dtype, chunk_tokens,
            compact, wanted, sparse,
        ) = head  # fmt: skip
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.lora = None if lora_a is None or lora_b is None else (lora_a, lora_b)
        self.softcap, self.scale = softcap, scale
        self.dtypes = [hidden.dtype if x is None else x.dtype for x in head.inputs]
        # What stands at a masked token must not meet its gradient of 0 in a product.
        self.hidden = hidden if compact else torch.where((activity < 2)[:, None], hidden, 0)

        # A gradient passes a softcap by its slope, which takes a buffer too.
        buffers = 2 if softcap is not None and any(wanted) else 1
        token = buffers * weight.shape[0] * logits_dtype.itemsize
        budget = of_device(CHUNK_BYTES, hidden)
        # One chunk saves the float32 accumulator, unless the gradient is one itself.
        saved = 4 * weight.numel() if wanted[1] and weight.dtype != torch.float32 else 0
        tokens = hidden.shape[0]
        order, first, both = _in_order(activity) if compact else (None, tokens, tokens)
        whole = first if first * token <= budget + saved else 0
        most = chunk_tokens or max(1, budget // token, whole)
        places = _balanced(0, first, most), _balanced(first, both, most)
        self.gradient_chunks, self.forward_only_chunks = (
            [place if order is None else order[place] for place in chunks] for chunks in places
        )
        longest = max((p.stop - p.start for chunks in places for p in chunks), default=0)
        size = longest, weight.shape[0]
        self.buffers = [
            registry.advise_huge_pages(hidden.new_empty(size, dtype=logits_dtype))
            for _ in range(buffers)
        ]

        def total(x, wants):
            if not wants:
                return None
            shape = (*x.shape, 1)[:2]
            # A sum of several parts is float32; what is one product is rounded once.
            parts = len(self.gradient_chunks) + sparse
            if parts == 0:
                return x.new_zeros(shape)
            # The sparse head writes the products' dtype, or float32.
            once = parts == 1 and not (sparse and x.dtype != dtype)
            kind = x.dtype if once else torch.float32
            return registry.advise_huge_pages(x.new_empty(shape, dtype=kind))

        # Where there is an order, some tokens have no gradient.
        made = hidden.new_empty if order is None else hidden.new_zeros
        self.dhidden = made(hidden.shape) if wanted[0] else None
        self.dweight, self.dbias, self.dlora_a, self.dlora_b = map(
            total, head.inputs[1:], wanted[1:]
        )
        self.begun = False
        self.multiply = _multiplier(hidden, dtype)
        # Into float32 logits, which are not to be rounded on their way.
        self.multiply_to_logits = self.multiply
        if logits_dtype != dtype:
            self.multiply_to_logits = _multiplier(hidden, dtype, exact=True)

    def _buffers(self):
        """Those of the logits of this chunk and, with a softcap, of their slope."""
        return [buffer[: self.chunk.shape[0]] for buffer in self.buffers]

    def logits(self, rows):
        """Eq. 27: (1, n, V), for the kernels to read or to overwrite, until the next chunk."""
        indexed = isinstance(rows, Tensor)
        hidden = self.hidden.index_select(0, rows) if indexed else self.hidden[rows]
        self.chunk = hidden.to(self.weight.dtype)
        z, *slopes = self._buffers()
        self.multiply_to_logits(self.chunk, self.weight.t(), self.scale, z, bias=self.bias)
        if self.lora is not None:
            lora_a, lora_b = self.lora
            self.lora_chunk = self.chunk.to(lora_a.dtype)
            self.lora_hidden = lora_a.new_empty(z.shape[0], lora_a.shape[0])
            self.multiply(self.lora_chunk, lora_a.t(), 1.0, self.lora_hidden)
            self.multiply_to_logits(self.lora_hidden, lora_b.t(), self.scale, z, add=True)
        if self.softcap is not None:
            for block in _blocks(z.shape[0], z.shape[1], z):
                t = torch.tanh(z[block].float() / self.softcap)
                z[block] = self.softcap * t
                for slope in slopes:
                    slope[block] = 1 - t * t
        return z.unsqueeze(0)

    def add_gradients(self, rows):
        """Eq. 28, from the gradient that has taken the place of the logits of these rows."""
        (dz, *slopes), scale = self._buffers(), self.scale
        for slope in slopes:
            dz *= slope
        dz = _rounded_in_place(dz, self.weight.dtype)
        if self.lora is not None:
            lora_a, lora_b = self.lora
            dlora_hidden = torch.empty_like(self.lora_hidden)
            self.multiply(dz, lora_b, scale, dlora_hidden)
        if self.dhidden is not None:
            indexed = isinstance(rows, Tensor)
            out = self.dhidden.new_empty(self.chunk.shape) if indexed else self.dhidden[rows]
            self.multiply(dz, self.weight, scale, out)
            if self.lora is not None:
                self.multiply(dlora_hidden, lora_a, 1.0, out, add=True)
            if indexed:
                _put_rows(self.dhidden, rows, out)
        if self.dweight is not None:
            self.multiply(dz.t(), self.chunk, scale, self.dweight, add=self.begun)
        if self.dbias is not None:
            ones = self.chunk.new_ones(self.chunk.shape[0], 1)
            self.multiply(dz.t(), ones, scale, self.dbias, add=self.begun)
        if self.dlora_a is not None:
            self.multiply(dlora_hidden.t(), self.lora_chunk, 1.0, self.dlora_a, add=self.begun)
        if self.dlora_b is not None:
            self.multiply(dz.t(), self.lora_hidden, scale, self.dlora_b, add=self.begun)
        self.begun = True

    def gradients(self):
        """Of the head's inputs, in their dtypes; empty where not wanted."""
        # Freed before `to` makes another tensor of the head's size.
        del self.buffers, self.multiply, self.multiply_to_logits
        dbias = None if self.dbias is None else self.dbias.squeeze(1)
        totals = self.dhidden, self.dweight, dbias, self.dlora_a, self.dlora_b
        return tuple(
            self.hidden.new_empty(0) if total is None else total.to(dtype)
            for total, dtype in zip(totals, self.dtypes, strict=True)
        )
