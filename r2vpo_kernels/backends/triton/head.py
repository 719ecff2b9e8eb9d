"""Triton kernels of the sparse head: products of hidden states and the rows of kept words alone.

The k-th kept word of a token is row token_ids[begin + k] - first_word of the head, and values[begin
+ k] its logit, later its gradient. Sums are float32, in an order that depends on the widths alone.
"""

import triton
import triton.language as tl

from . import launch
from .math import expm1
from .workspace import (
    HEADER,
    SUPPORT_BEGIN,
    SUPPORT_COUNT,
    SUPPORT_SIZE,
    integers,
)

# Of a step: kept words or, by word, ids; columns of the head.
WORDS, COLUMNS = 8, 256
IDS = 16
# Words that a program writes the gradient of.
WORDS_OF_PROGRAM = 16
THREADS = 128


@triton.jit
def _support(workspace, tokens, token):
    """(first id, number of kept words, of the whole set); masked tokens have none."""
    place = integers(workspace) + HEADER + token
    label = tl.load(place)
    count = tl.where(label >= 0, tl.load(place + tokens * SUPPORT_COUNT), -1)
    begin = tl.load(place + tokens * SUPPORT_BEGIN)
    return begin.to(tl.int64), count, tl.load(place + tokens * SUPPORT_SIZE)


@triton.jit
def _slope(values, slopes, place, inside):
    """dL/dz of a kept word before its softcap."""
    dz = tl.load(values + place, mask=inside, other=0.0)
    if slopes is not None:
        dz *= tl.load(slopes + place, mask=inside, other=0.0)
    return dz


@launch.Kernel
def head_logits_kernel(
    hidden, weight, bias, workspace, token_ids, values, slopes,
    tokens: tl.int64, first_word: tl.int64, width: tl.int32, hidden_stride: tl.int64,
    weight_stride: tl.int64, scale: tl.float32, softcap: tl.float32,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    begin, count, size = _support(workspace, tokens, token)
    row = hidden + token * hidden_stride
    for first in range(0, count, WORDS):
        k = first + tl.arange(0, WORDS)
        inside = k < count
        word = tl.load(token_ids + begin + k, mask=inside, other=0).to(tl.int64) - first_word
        total = tl.zeros([WORDS], tl.float32)
        # All the probability of a set of one is on its word, whatever the logit.
        if size != 1:
            sums = tl.zeros([WORDS, COLUMNS], tl.float32)
            for left in range(0, width, COLUMNS):
                column = left + tl.arange(0, COLUMNS)
                h = tl.load(row + column, mask=column < width, other=0.0).to(tl.float32)
                w = tl.load(
                    weight + word[:, None] * weight_stride + column[None, :],
                    mask=inside[:, None] & (column < width)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                sums = tl.fma(w, tl.broadcast_to(h[None, :], [WORDS, COLUMNS]), sums)
            total = tl.sum(sums, 1)
            if bias is not None:
                total += tl.load(bias + word, mask=inside, other=0.0).to(tl.float32)
            total *= scale
        if slopes is not None:
            # tanh, without cancellation at 0 or overflow.
            e = expm1(-2.0 * tl.abs(total) / softcap)
            t = -e / (2.0 + e)
            t = tl.where(total < 0, -t, t)
            total = softcap * t
            tl.store(slopes + begin + k, 1.0 - t * t, mask=inside)
        tl.store(values + begin + k, total, mask=inside)


@launch.Kernel
def head_dhidden_kernel(
    dhidden, weight, workspace, token_ids, values, slopes,
    tokens: tl.int64, first_word: tl.int64, width: tl.int32, stripes: tl.int32,
    weight_stride: tl.int64, scale: tl.float32,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // stripes).to(tl.int64)
    begin, count, _size = _support(workspace, tokens, token)
    column = (tl.program_id(0) % stripes) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, WORDS):
        k = first + tl.arange(0, WORDS)
        inside = k < count
        word = tl.load(token_ids + begin + k, mask=inside, other=0).to(tl.int64) - first_word
        dz = _slope(values, slopes, begin + k, inside)
        # A weight that is not finite does not meet a gradient of 0.
        w = tl.load(
            weight + word[:, None] * weight_stride + column[None, :],
            mask=(dz != 0)[:, None] & (column < width)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total += tl.sum(dz[:, None] * w, 0)
    if count >= 0:
        place = dhidden + token * width + column
        tl.store(place, (scale * total).to(dhidden.dtype.element_ty), mask=column < width)


@launch.Kernel
def head_dweight_kernel(
    hidden, dweight, dbias, workspace, token_ids, by_word, token_of, values, slopes,
    tokens: tl.int64, first_word: tl.int64, ids: tl.int64, words: tl.int64, width: tl.int32,
    stripes: tl.int32, hidden_stride: tl.int64, scale: tl.float32, steps: tl.int32,
    ON_TOP: tl.constexpr, IDS: tl.constexpr, COLUMNS: tl.constexpr,
    WORDS_OF_PROGRAM: tl.constexpr,
):  # fmt: skip
    stripe = tl.program_id(0) % stripes
    first = (tl.program_id(0) // stripes).to(tl.int64) * WORDS_OF_PROGRAM
    column = stripe * COLUMNS + tl.arange(0, COLUMNS)
    # Where each word's ids begin, in their order by word: 2^steps are more than there are.
    lane = tl.arange(0, 2 * WORDS_OF_PROGRAM)
    low = tl.zeros([2 * WORDS_OF_PROGRAM], tl.int64)
    high = low + ids
    for _step in range(0, steps):
        middle = (low + high) // 2
        place = tl.load(by_word + middle, mask=low < high, other=0)
        word = tl.load(token_ids + place, mask=low < high, other=0).to(tl.int64) - first_word
        less = word < first + lane
        low = tl.where((low < high) & less, middle + 1, low)
        high = tl.where((low <= middle) & (less == 0), middle, high)
    for n in range(0, WORDS_OF_PROGRAM):
        word = first + n
        begin = tl.sum(tl.where(lane == n, low, 0), 0)
        end = tl.sum(tl.where(lane == n + 1, low, 0), 0)
        total = tl.zeros([COLUMNS], tl.float32)
        of_bias = tl.zeros([IDS], tl.float32)
        for at in range(begin, end, IDS):
            place = at + tl.arange(0, IDS)
            pair = tl.load(by_word + place, mask=place < end, other=0)
            token = tl.load(token_of + pair, mask=place < end, other=0).to(tl.int64)
            row = integers(workspace) + HEADER + token
            # Of tokens that are masked, or have the full vocabulary, nobody wrote a value.
            known = (place < end) & (tl.load(row, mask=place < end, other=-1) >= 0)
            known &= tl.load(row + tokens * SUPPORT_COUNT, mask=known, other=-1) >= 0
            dz = _slope(values, slopes, pair, known)
            h = tl.load(
                hidden + token[:, None] * hidden_stride + column[None, :],
                mask=(dz != 0)[:, None] & (column < width)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            total += tl.sum(dz[:, None] * h, 0)
            of_bias += dz
        if dweight is not None:
            place = dweight + word * width + column
            inside = (column < width) & (word < words)
            value = scale * total
            if ON_TOP:
                value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, value.to(dweight.dtype.element_ty), mask=inside)
        if dbias is not None:
            value = scale * tl.sum(of_bias, 0)
            inside = (word < words) & (stripe == 0)
            if ON_TOP:
                value += tl.load(dbias + word, mask=inside, other=0.0).to(tl.float32)
            tl.store(dbias + word, value.to(dbias.dtype.element_ty), mask=inside)


def head_logits(t, hidden, weight, scale, slopes, bias, softcap) -> None:
    """Write Eq. 27 into values, of each token's kept words, and into slopes."""
    support = t.support
    if t.tokens:
        head_logits_kernel(
            t.tokens,
            (hidden, weight, bias, t.workspace, support.token_ids, support.values, slopes),
            (
                t.tokens, support.first_word, hidden.shape[1], hidden.stride(0), weight.stride(0),
                scale, softcap,
            ),
            threads=THREADS, WORDS=WORDS, COLUMNS=COLUMNS,
        )  # fmt: skip


def _stripes(width: int) -> int:
    return -(-width // COLUMNS)


def head_dhidden(t, hidden, weight, scale, slopes, dhidden) -> None:
    """Write Eq. 28 into the rows of dhidden (N, H) of tokens that have a support."""
    support, width = t.support, hidden.shape[1]
    if t.tokens:
        head_dhidden_kernel(
            t.tokens * _stripes(width),
            (dhidden, weight, t.workspace, support.token_ids, support.values, slopes),
            (t.tokens, support.first_word, width, _stripes(width), weight.stride(0), scale),
            threads=THREADS, WORDS=WORDS, COLUMNS=COLUMNS,
        )  # fmt: skip


def head_dweight(
    t, hidden, weight, scale, slopes, by_word, token_of, dweight, dbias, on_top
) -> None:
    """Write Eq. 28 into every row of dweight (V, H) and dbias (V, 1), or add it.

    by_word and token_of (M,) int32: the places of all ids by word, and the token of each.
    """
    support, (words, width) = t.support, weight.shape
    ids = by_word.shape[0]
    programs = -(-words // WORDS_OF_PROGRAM) * _stripes(width)
    head_dweight_kernel(
        programs,
        (
            hidden, dweight, dbias, t.workspace, support.token_ids, by_word, token_of,
            support.values, slopes,
        ),
        (
            t.tokens, support.first_word, ids, words, width, _stripes(width), hidden.stride(0),
            scale, ids.bit_length(),
        ),
        threads=THREADS, ON_TOP=on_top, IDS=IDS, COLUMNS=COLUMNS, WORDS_OF_PROGRAM=WORDS_OF_PROGRAM,
    )  # fmt: skip
