"""The matrix products of the linear route, one chunk of tokens after another (Eq. 27, 28).

The logits of a chunk are a product into a buffer, which the kernels overwrite with their gradient;
two more products take that to the hidden states and the head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import registry

# Bytes that the logits of a chunk may take, unless one chunk is to hold all tokens.
CHUNK_BYTES = {"cpu": 2**28, "elsewhere": 2**30}
# Elements at a time, where a temporary of all would be large.
TILE = {"cpu": 2**21, "elsewhere": 2**25}


def _of_device(table, x):
    return table.get(x.device.type, table["elsewhere"])


def _balanced(begin, end, most):
    """Slices of equal length, of `most` at most."""
    number = -(-(end - begin) // most)
    size = -(-(end - begin) // number) if number else 1
    return [slice(at, min(at + size, end)) for at in range(begin, end, size)]


def _blocks(rows: int, width: int, x: Tensor) -> list[slice]:
    """Slices of rows of `width` elements, a tile each."""
    return _balanced(0, rows, max(1, _of_device(TILE, x) // width))


def _product(a, b, scale, out, keep=False):
    """out = scale·(a @ b), added to what out holds if `keep`."""
    beta = 1 if keep else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=scale, out=out)
    elif out.is_cuda and out.dtype == torch.float32 and torch.version.hip is None:
        torch.addmm(out, a, b, beta=beta, alpha=scale, out_dtype=torch.float32, out=out)
    else:
        # A product of halves comes rounded to them here: by blocks, in one tile for all.
        blocks = _blocks(out.shape[0], out.shape[1], out)
        tile = a.new_empty(out[blocks[0]].shape)
        for rows in blocks:
            part = _product(a[rows], b, scale, tile[: rows.stop - rows.start])
            if keep:
                out[rows] += part
            else:
                out[rows] = part
    return out


def _in_order(activity):
    """(tokens by their activity, how many have a gradient, how many are not masked).

    None for the order where all have a gradient. Counting is what waits for a GPU, once.
    """
    counts = torch.stack([(activity == 0).sum(), (activity < 2).sum()]).tolist()
    if counts[0] == activity.shape[0]:
        return None, counts
    return activity.argsort(stable=True), counts


class Head(NamedTuple):
    """What the products are of: hidden (N, H), weight (V, H)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype  # of the products and of the logits
    chunk_tokens: int  # 0: by CHUNK_BYTES
    compact: bool
    wanted: list[bool]  # which gradients, of hidden, weight and bias


class Products:
    """The products of one call, in buffers that serve one chunk of tokens after another.

    activity (N,) uint8: 0 where a token has a gradient, 1 where that is known to be 0, 2 where it
    is masked. `gradient_chunks` and `forward_only_chunks` are those of the first two, each a slice
    or an index. With compact=False every token is in the first: kernels take masked rows.
    """

    def __init__(self, head: Head, activity: Tensor) -> None:
        hidden, weight, bias, softcap, scale, dtype, chunk_tokens, compact, wanted = head
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.softcap, self.scale, self.dtypes = softcap, scale, [hidden.dtype, weight.dtype]
        self.dtypes.append(hidden.dtype if bias is None else bias.dtype)
        # What stands at a masked token must not meet its gradient of 0 in a product.
        self.hidden = hidden if compact else torch.where((activity < 2)[:, None], hidden, 0)

        # A gradient passes a softcap by its slope, which takes a buffer too.
        buffers = 2 if softcap is not None and any(wanted) else 1
        token = buffers * weight.shape[0] * dtype.itemsize
        budget = _of_device(CHUNK_BYTES, hidden)
        # One chunk saves the float32 accumulator, unless the gradient is one itself.
        saved = 4 * weight.numel() if wanted[1] and weight.dtype != torch.float32 else 0
        tokens = hidden.shape[0]
        order, (first, both) = _in_order(activity) if compact else (None, (tokens, tokens))
        whole = first if first * token <= budget + saved else 0
        most = chunk_tokens or max(1, budget // token, whole)
        places = _balanced(0, first, most), _balanced(first, both, most)
        self.gradient_chunks, self.forward_only_chunks = (
            [place if order is None else order[place] for place in chunks] for chunks in places
        )
        longest = max((p.stop - p.start for chunks in places for p in chunks), default=0)
        self.buffers = registry.advise_huge_pages(
            self.weight.new_empty(buffers, longest, weight.shape[0])
        )

        def empty(x, *shape):
            # A sum over several chunks is float32; what is one product is rounded once.
            dtype = x.dtype if len(self.gradient_chunks) == 1 else torch.float32
            if not self.gradient_chunks:
                return x.new_zeros(shape)
            return registry.advise_huge_pages(x.new_empty(shape, dtype=dtype))

        self.dhidden = hidden.new_zeros(hidden.shape) if wanted[0] else None
        self.dweight = empty(weight, *weight.shape) if wanted[1] else None
        self.dbias = empty(bias, weight.shape[0], 1) if wanted[2] else None
        self.begun = False

    def logits(self, rows):
        """Eq. 27: (1, n, V), for the kernels to read or to overwrite, until the next chunk."""
        self.chunk = self.hidden[rows].to(self.weight.dtype)
        z = self.buffers[0, : self.chunk.shape[0]]
        if self.bias is None:
            _product(self.chunk, self.weight.t(), self.scale, z)
        else:
            scale = self.scale
            torch.addmm(self.bias, self.chunk, self.weight.t(), beta=scale, alpha=scale, out=z)
        if self.softcap is not None:
            for block in _blocks(z.shape[0], z.shape[1], z):
                t = torch.tanh(z[block].float() / self.softcap)
                z[block] = self.softcap * t
                if len(self.buffers) == 2:
                    self.buffers[1, block] = 1 - t * t
        return z.unsqueeze(0)

    def add_gradients(self, rows):
        """Eq. 28, from the gradient that has taken the place of the logits of these rows."""
        dz, scale = self.buffers[0, : self.chunk.shape[0]], self.scale
        if self.softcap is not None:
            dz *= self.buffers[1, : self.chunk.shape[0]]
        if self.dhidden is not None:
            out = self.dhidden.new_empty(self.chunk.shape)
            self.dhidden[rows] = _product(dz, self.weight, scale, out)
        if self.dweight is not None:
            _product(dz.t(), self.chunk, scale, self.dweight, self.begun)
        if self.dbias is not None:
            ones = self.chunk.new_ones(self.chunk.shape[0], 1)
            _product(dz.t(), ones, scale, self.dbias, self.begun)
        self.begun = True

    def gradients(self):
        """Of hidden states, head and bias, in their dtypes; empty where not wanted."""
        # Freed before `to` makes another tensor of the head's size.
        del self.buffers
        dbias = None if self.dbias is None else self.dbias.squeeze(1)
        return tuple(
            self.hidden.new_empty(0) if total is None else total.to(dtype)
            for total, dtype in zip((self.dhidden, self.dweight, dbias), self.dtypes, strict=True)
        )
