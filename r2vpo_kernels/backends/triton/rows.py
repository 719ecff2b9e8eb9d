"""Triton kernels over logits: log-probs forward, log-probs backward, one-pass, scaling.

Equations are those of docs/derivation. A row of logits is z ∈ R^V and x = z / temperature; inside
the kernels exponents are in base 2, as the hardware's exponential is. The launchers at the end take
checked tensors: `logits` (batch, length, V) with a contiguous vocabulary, and the workspace, whose
label is -1 where a row must not be read and V or more where it matches no column. Row r belongs to
token index[r], or first + r without an index (int64); what is per token is (N,) and contiguous.
`dlogits` has the shape of `logits` and rows at the same place within 16 bytes; it may be `logits`.
"""

import triton
import triton.language as tl

from . import launch
from .math import (
    KL_ESTIMATORS,
    LN_2,
    LOG2_E,
    POLICY_LOSSES,
    difference,
    entropy_slope,
    expm1,
    kl_term,
    logp_slope,
    nan_maximum,
    penalty_term,
    policy_term,
    ratio_of,
    ratio_slope,
)
from .workspace import (
    ADVANTAGE,
    CENTER,
    CLAMP,
    CLIP_HIGH,
    CLIP_LOW,
    DUAL_CLIP,
    ENTROPY_COEF,
    HEADER,
    KL_COEF,
    OLD_LOGP,
    REF_LOGP,
    SUPPORT_BEGIN,
    SUPPORT_COUNT,
    TEMPERATURE,
    TOKEN_WEIGHT,
    VARIANCE_COEF,
    denominator,
    integers,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)


# A row is walked in blocks from its last 16-byte boundary at or before its first element, which
# lies `lead` further on; `end` is one past its last element. ALIGNED says that lead is 0 and V a
# whole number of 16-byte words in every row. Divisions that look idle tell the compiler what is a
# whole number of them.


@triton.jit
def _place(
    row, length, vocabulary, misaligned, stride_batch, stride_token,
    ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of a row: the boundary's offset from the tensor's first element, lead and end."""
    # length is an int64, and so are the products.
    offset = (row // length) * stride_batch + (row % length) * stride_token
    if ALIGNED:
        lead = 0
        end = vocabulary // VECTOR * VECTOR
    else:
        # VECTOR is a power of two: the low bits say it.
        lead = (misaligned + offset.to(tl.int32)) & (VECTOR - 1)
        end = vocabulary + lead
    return offset - lead, lead, end


@triton.jit
def _row(pointer, offset):
    return tl.multiple_of(pointer + offset, 16)


@triton.jit
def _load(row, block, lead, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    place = block * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:
        z = tl.load(row + place, mask=place < end, other=-float("inf"))
    elif (block > 0) & ((block + 1) * BLOCK <= end):
        # A mask whose edge is not known to be aligned makes the access narrow: only the blocks
        # that an edge of the row cuts have one.
        z = tl.load(row + place)
    else:
        z = tl.load(row + place, mask=(place >= lead) & (place < end), other=-float("inf"))
    return z.to(tl.float32)


@triton.jit
def _store(row, block, lead, end, value, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    place = block * BLOCK + tl.arange(0, BLOCK)
    value = value.to(row.dtype.element_ty)
    # What is stored is not read again here: it leaves the cache before rows that are.
    if ALIGNED:
        tl.store(row + place, value, mask=place < end, cache_modifier=".cs")
    elif (block > 0) & ((block + 1) * BLOCK <= end):
        tl.store(row + place, value, cache_modifier=".cs")
    else:
        edges = (place >= lead) & (place < end)
        tl.store(row + place, value, mask=edges, cache_modifier=".cs")


@triton.jit
def _store_zeros(row, lead, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    zeros = tl.zeros([BLOCK], tl.float32)
    for block in range(0, tl.cdiv(end, BLOCK)):
        _store(row, block, lead, end, zeros, ALIGNED, BLOCK)


@triton.jit
def _first_look(
    row, lead, end, label, temperature, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. 1 and Eq. 3 in one read: the label's logp, max z, log2 of the sum about it, entropy.

    Each lane keeps m = max z, s = Σ 2^x and r = Σ 2^x·x with x = (z - m)·scale over its words
    of VECTOR columns (Eq. 14): one exponential per column and one per word, and threads meet only
    once per row.
    """
    LANES: tl.constexpr = BLOCK // VECTOR
    scale = tl.div_rn(LOG2_E, temperature)
    # Every thread reads this one, and in place another thread will overwrite it: the reductions
    # below are the barrier between. A bad label reads nothing and makes logp NaN.
    z_label = tl.load(row + lead + label, mask=label < end - lead, other=float("nan"))
    # The lowest finite number in place of -inf: a block of -inf then meets no inf - inf.
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    r = tl.zeros([LANES], tl.float32)
    for block in tl.range(0, tl.cdiv(end, BLOCK), num_stages=STAGES):
        z = tl.reshape(_load(row, block, lead, end, ALIGNED, BLOCK), [LANES, VECTOR])
        high = nan_maximum(m, tl.reduce(z, 1, nan_maximum))
        s, r = _moved(s, r, (m - high) * scale, ENTROPY)
        x = (z - high[:, None]) * scale
        e = tl.exp2(x)
        s += tl.sum(e, 1)
        if ENTROPY:
            # e = 0 stands for a term that is 0 however far x is off.
            r += tl.sum(tl.where(e == 0, 0.0, e * x), 1)
        m = high
    top = tl.reduce(m, 0, nan_maximum)
    s, r = _moved(s, r, (m - top) * scale, ENTROPY)
    total = tl.sum(s, 0)
    log_total = tl.log2(total)
    logp = ((z_label.to(tl.float32) - top) * scale - log_total) * LN_2
    entropy = 0.0
    if ENTROPY:
        entropy = (log_total - tl.sum(r, 0) / total) * LN_2
    return logp, top, log_total, entropy


@triton.jit
def _moved(s, r, gap, ENTROPY: tl.constexpr):
    """s and r about a maximum that is higher: gap, in x, is at most 0."""
    decay = tl.exp2(gap)
    if ENTROPY:
        # decay = 0 stands for a factor whose product with an infinite gap is 0.
        r = tl.where(decay == 0, 0.0, (r + gap * s) * decay)
    return s * decay, r


@triton.jit
def _second_look(
    row, grad_row, lead, end, label, temperature, logp, top, log_total, entropy, dlogp, dentropy,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. 8: dL/dz of a row from dL/dlogp and dL/dH.

    It walks from the last block to the first, because what the first look read last is still in
    cache.
    """
    scale = tl.div_rn(LOG2_E, temperature)
    dlogp = dlogp / temperature
    dentropy = dentropy / temperature
    # -expm1(logp) is 1 - p without cancellation at p = 1.
    at_label = -dlogp * expm1(logp)
    if ENTROPY:
        # Eq. 12: p·log p is 0 at p = 0, where log p is -inf.
        p_label = tl.exp(logp)
        at_label -= tl.where(p_label == 0, 0.0, dentropy * p_label * (logp + entropy))
    blocks = tl.cdiv(end, BLOCK)
    minus_dlogp = -dlogp
    for step in tl.range(0, blocks, num_stages=STAGES):
        block = blocks - 1 - step
        z = _load(row, block, lead, end, ALIGNED, BLOCK)
        log2_p = tl.fma(z - top, scale, -log_total)
        p = tl.exp2(log2_p)
        dz = p * minus_dlogp
        if ENTROPY:
            dz -= tl.where(p == 0, 0.0, dentropy * p * (log2_p * LN_2 + entropy))
        _store(grad_row, block, lead, end, dz, ALIGNED, BLOCK)
    # Over what another thread has stored there.
    tl.debug_barrier()
    at_label = at_label.to(grad_row.dtype.element_ty)
    tl.store(grad_row + lead + label, at_label, mask=label < end - lead)


@triton.jit
def _dlogp(
    logp, workspace, tokens, token, weight,
    ON_POLICY: tl.constexpr, POLICY: tl.constexpr, KL: tl.constexpr, UNBIASED: tl.constexpr,
):  # fmt: skip
    """Eq. 7: dL/dlogp of one token from its own numbers."""
    clamp = tl.load(workspace + CLAMP)
    place = workspace + HEADER + token
    old_logp = logp if ON_POLICY else tl.load(place + tokens * OLD_LOGP)
    r = ratio_of(difference(logp, old_logp), clamp)
    policy = policy_term(
        tl.load(place + tokens * ADVANTAGE), logp, r, tl.load(workspace + CLIP_LOW),
        tl.load(workspace + CLIP_HIGH), tl.load(workspace + DUAL_CLIP), POLICY,
    )  # fmt: skip
    coef = tl.load(place + tokens * VARIANCE_COEF)
    penalty = penalty_term(coef, tl.load(place + tokens * CENTER), r)
    ref_logp = tl.load(place + tokens * REF_LOGP)
    kl = kl_term(logp, ref_logp, clamp, r, KL, UNBIASED)
    kl_coef = tl.load(workspace + KL_COEF)
    slope = ratio_slope(policy, penalty, kl_coef, kl, weight)
    return slope + logp_slope(policy, kl_coef, kl, weight)


# A row that has a support: the logits of its words go into `values`, from the first of its ids on,
# and are looked at there as a row of their own. `column` of a word is its id less first_word. With
# COMPACT they are there, and there is no other row.


@triton.jit
def _support(workspace, tokens, token, support):
    """(the first of its ids, how many words; below 0 the full vocabulary)."""
    begin = tl.full((), 0, tl.int64)
    count = tl.full((), -1, tl.int32)
    if support is not None:
        place = integers(workspace) + HEADER + token
        begin = tl.load(place + tokens * SUPPORT_BEGIN).to(tl.int64)
        count = tl.load(place + tokens * SUPPORT_COUNT)
    return begin, count


@triton.jit
def _gather(
    row, lead, token_ids, values, count, first_word, label,
    COMPACT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Fill values; returns the label's place among them, or their number."""
    found = count
    for start in range(0, count, STEP):
        k = start + tl.arange(0, STEP)
        inside = k < count
        column = tl.load(token_ids + k, mask=inside, other=0) - first_word
        found = tl.minimum(found, tl.min(tl.where(inside & (column == label), k, count), 0))
        if not COMPACT:
            z = tl.load(row + lead + column, mask=inside)
            tl.store(values + k, z.to(tl.float32), mask=inside)
    # Of other threads too; and in place, all are read before any is overwritten.
    tl.debug_barrier()
    return found


@triton.jit
def _scatter(grad_row, lead, end, token_ids, values, count, first_word, ALIGNED: tl.constexpr,
             BLOCK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Zeros, and values at their columns."""
    _store_zeros(grad_row, lead, end, ALIGNED, BLOCK)
    tl.debug_barrier()
    for start in range(0, count, STEP):
        k = start + tl.arange(0, STEP)
        column = tl.load(token_ids + k, mask=k < count, other=0) - first_word
        dz = tl.load(values + k, mask=k < count)
        tl.store(grad_row + lead + column, dz.to(grad_row.dtype.element_ty), mask=k < count)


@triton.jit
def _look(
    row, lead, end, label, temperature, token_ids, values, begin, count, first_word,
    ENTROPY: tl.constexpr, COMPACT: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The first look at a row or, where it has one, at its support; and the label's place there."""
    place = 0
    logp = 0.0
    top = 0.0
    log_total = 0.0
    entropy = 0.0
    if count >= 0:
        if token_ids is not None:
            place = _gather(
                row, lead, token_ids + begin, values + begin, count, first_word, label, COMPACT,
                STEP,
            )  # fmt: skip
            logp, top, log_total, entropy = _first_look(
                values + begin, 0, count, place, temperature, ENTROPY, False, 1, STEP, 1
            )
    elif not COMPACT:
        logp, top, log_total, entropy = _first_look(
            row, lead, end, label, temperature, ENTROPY, ALIGNED, VECTOR, BLOCK, STAGES
        )
    return place, logp, top, log_total, entropy


@triton.jit
def _pull_back(
    row, grad_row, lead, end, label, place, temperature, logp, top, log_total, entropy, dlogp,
    dentropy, token_ids, values, begin, count, first_word,
    ENTROPY: tl.constexpr, COMPACT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The second look likewise, once the values are there, and the whole row's gradient."""
    if count >= 0:
        if token_ids is not None:
            _second_look(
                values + begin, values + begin, 0, count, place, temperature, logp, top, log_total,
                entropy, dlogp, dentropy, ENTROPY, False, STEP, 1,
            )  # fmt: skip
            if not COMPACT:
                _scatter(
                    grad_row, lead, end, token_ids + begin, values + begin, count, first_word,
                    ALIGNED, BLOCK, STEP,
                )  # fmt: skip
    elif not COMPACT:
        _second_look(
            row, grad_row, lead, end, label, temperature, logp, top, log_total, entropy, dlogp,
            dentropy, ENTROPY, ALIGNED, BLOCK, STAGES,
        )  # fmt: skip


@launch.Kernel
def logps_forward_kernel(
    logits, workspace, index, token_ids, values, logps, top, log_total, entropy,
    tokens: tl.int64, first: tl.int64, first_word: tl.int32,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    COMPACT: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    ENTROPY: tl.constexpr = entropy is not None
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        token = first + row if index is None else tl.load(index + row)
        label = tl.load(integers(workspace) + HEADER + token)
        begin, count = _support(workspace, tokens, token, token_ids)
        logp_t = 0.0
        top_t = 0.0
        log_total_t = 0.0
        entropy_t = 0.0
        if label >= 0:
            offset, lead, end = _place(
                row, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
            )
            temperature = tl.load(workspace + HEADER + tokens * TEMPERATURE + token)
            _label, logp_t, top_t, log_total_t, entropy_t = _look(
                _row(logits, offset), lead, end, label, temperature, token_ids, values, begin,
                count, first_word, ENTROPY, COMPACT, ALIGNED, VECTOR, BLOCK, STAGES, STEP,
            )  # fmt: skip
        # Tokens of the full vocabulary are left out of compact values.
        ours = (label < 0) | (count >= 0) | (COMPACT == 0)
        tl.store(logps + token, logp_t, mask=ours)
        tl.store(top + token, top_t, mask=ours)
        tl.store(log_total + token, log_total_t, mask=ours)
        if ENTROPY:
            tl.store(entropy + token, entropy_t, mask=ours)


@launch.Kernel
def logps_backward_kernel(
    logits, dlogits, workspace, index, token_ids, values, logps, top, log_total, entropy,
    grad_logps, grad_entropy, upstream, tokens: tl.int64, first: tl.int64, first_word: tl.int32,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    grad_stride_batch: tl.int64, grad_stride_token: tl.int64,
    COMPACT: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    ENTROPY: tl.constexpr = grad_entropy is not None
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        token = first + row if index is None else tl.load(index + row)
        label = tl.load(integers(workspace) + HEADER + token)
        begin, count = _support(workspace, tokens, token, token_ids)
        offset, lead, end = _place(
            row, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
        )
        # The gradient's rows lie alike within 16 bytes: the same lead and end.
        grad_offset, _, _ = _place(
            row, length, vocabulary, misaligned, grad_stride_batch, grad_stride_token,
            ALIGNED, VECTOR,
        )  # fmt: skip
        grad_row = _row(dlogits, grad_offset)
        if label >= 0:
            scale = 1.0
            if upstream is not None:
                scale = tl.load(upstream)
            entropy_t = 0.0
            dentropy = 0.0
            if ENTROPY:
                entropy_t = tl.load(entropy + token)
                dentropy = tl.load(grad_entropy + token) * scale
            z = _row(logits, offset)
            place = 0
            if token_ids is not None:
                place = _gather(
                    z, lead, token_ids + begin, values + begin, count, first_word, label, COMPACT,
                    STEP,
                )  # fmt: skip
            _pull_back(
                z, grad_row, lead, end, label, place,
                tl.load(workspace + HEADER + tokens * TEMPERATURE + token), tl.load(logps + token),
                tl.load(top + token), tl.load(log_total + token), entropy_t,
                tl.load(grad_logps + token) * scale, dentropy, token_ids, values, begin, count,
                first_word, ENTROPY, COMPACT, ALIGNED, BLOCK, STAGES, STEP,
            )  # fmt: skip
        elif not COMPACT:
            _store_zeros(grad_row, lead, end, ALIGNED, BLOCK)


@launch.Kernel
def one_pass_kernel(
    logits, dlogits, workspace, index, token_ids, values, logps, entropy,
    tokens: tl.int64, first: tl.int64, first_word: tl.int32, parts: tl.int32,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    grad_stride_batch: tl.int64, grad_stride_token: tl.int64,
    ON_POLICY: tl.constexpr, POLICY: tl.constexpr, KL: tl.constexpr, UNBIASED: tl.constexpr,
    COMPACT: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    ENTROPY: tl.constexpr = entropy is not None
    divisor = denominator(workspace, parts)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        token = first + row if index is None else tl.load(index + row)
        label = tl.load(integers(workspace) + HEADER + token)
        begin, count = _support(workspace, tokens, token, token_ids)
        offset, lead, end = _place(
            row, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
        )
        # The gradient's rows lie alike within 16 bytes: the same lead and end.
        grad_offset, _, _ = _place(
            row, length, vocabulary, misaligned, grad_stride_batch, grad_stride_token,
            ALIGNED, VECTOR,
        )  # fmt: skip
        grad_row = _row(dlogits, grad_offset)
        logp = 0.0
        entropy_t = 0.0
        if label >= 0:
            z = _row(logits, offset)
            temperature = tl.load(workspace + HEADER + tokens * TEMPERATURE + token)
            place, logp, top, log_total, entropy_t = _look(
                z, lead, end, label, temperature, token_ids, values, begin, count, first_word,
                ENTROPY, COMPACT, ALIGNED, VECTOR, BLOCK, STAGES, STEP,
            )  # fmt: skip
            weight = tl.div_rn(tl.load(workspace + HEADER + tokens * TOKEN_WEIGHT + token), divisor)
            dlogp = _dlogp(logp, workspace, tokens, token, weight, ON_POLICY, POLICY, KL, UNBIASED)
            dentropy = 0.0
            if ENTROPY:
                dentropy = entropy_slope(tl.load(workspace + ENTROPY_COEF), weight)
            _pull_back(
                z, grad_row, lead, end, label, place, temperature, logp, top, log_total, entropy_t,
                dlogp, dentropy, token_ids, values, begin, count, first_word,
                ENTROPY, COMPACT, ALIGNED, BLOCK, STAGES, STEP,
            )  # fmt: skip
        elif not COMPACT:
            _store_zeros(grad_row, lead, end, ALIGNED, BLOCK)
        # Tokens of the full vocabulary are left out of compact values.
        ours = (label < 0) | (count >= 0) | (COMPACT == 0)
        tl.store(logps + token, logp, mask=ours)
        if ENTROPY:
            tl.store(entropy + token, entropy_t, mask=ours)


@launch.Kernel
def scale_kernel(
    dlogits, upstream,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    factor = tl.load(upstream)
    # The usual upstream gradient is 1, and then nothing is read or written.
    if factor != 1.0:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            offset, lead, end = _place(
                row, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
            )
            z = _row(dlogits, offset)
            for block in tl.range(0, tl.cdiv(end, BLOCK), num_stages=STAGES):
                dz = _load(z, block, lead, end, ALIGNED, BLOCK) * factor
                _store(z, block, lead, end, dz, ALIGNED, BLOCK)


def _launch(
    kernel, logits, dlogits, pointers, numbers=(), entropy=False, persistent=False, compact=False,
    **flags,
) -> None:  # fmt: skip
    """One program per row of `logits`, or a persistent grid."""
    batch, length, vocabulary = logits.shape
    rows = batch * length
    if rows == 0:
        return
    vector = launch.VECTOR_BYTES // logits.element_size()
    misaligned = logits.data_ptr() % launch.VECTOR_BYTES // logits.element_size()
    big = [logits] if dlogits is None else [logits, dlogits]
    # The stride of a dimension of size 1 is arbitrary and never used.
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for x in big for dim in (0, 1)]
    aligned = all(n % vector == 0 for n in (vocabulary, misaligned, *strides))
    row_bytes = vocabulary * logits.element_size()
    tuning = next(tuning for most, tuning in launch.TUNING if row_bytes <= most)
    per_thread = tuning.per_thread if aligned else launch.PER_THREAD_PEELED
    longest = vocabulary if aligned else vocabulary + vector - 1
    block = min(1 << (longest - 1).bit_length(), tuning.threads * per_thread)
    threads = block // per_thread
    ahead = launch.BYTES_AHEAD // (block * logits.element_size())
    if compact:
        # How many values there are must not change what is done with a row of them.
        aligned, block, threads, ahead = False, vector, launch.COMPACT_THREADS, 0
    programs = rows
    if persistent:
        programs = min(rows, tuning.programs * launch.multiprocessors(logits.get_device()))
    most = launch.most_ahead(logits.get_device(), entropy) if aligned else 0
    kernel(
        programs, (*big, *pointers), (*numbers, rows, length, vocabulary, misaligned, *strides),
        threads=threads, ALIGNED=aligned, VECTOR=vector, BLOCK=block, STAGES=1 + min(ahead, most),
        **flags,
    )  # fmt: skip


def _launch_with_support(kernel, logits, dlogits, t, index, pointers, numbers, **flags) -> None:
    """`pointers` and `numbers` come after those of the tokens and their supports."""
    token_ids, values, first_word, compact = t.support or (None, None, 0, False)
    _launch(
        kernel, logits, dlogits, (t.workspace, index, token_ids, values, *pointers),
        (t.tokens, *numbers[:1], first_word, *numbers[1:]), compact=compact, COMPACT=compact,
        STEP=launch.SUPPORT_STEP, **flags,
    )  # fmt: skip


def logps_forward(logits, tokens, index, first, logps, top, log_total, entropy):
    """Write Eq. 1 into logps, Eq. 3 into entropy, and for logps_backward top and log_total."""
    _launch_with_support(
        logps_forward_kernel, logits, None, tokens, index, (logps, top, log_total, entropy),
        (first,), entropy=entropy is not None,
    )  # fmt: skip


def logps_backward(
    logits, dlogits, tokens, index, first, logps, top, log_total, entropy, grad_logps,
    grad_entropy, upstream,
):  # fmt: skip
    """Write into dlogits upstream times the gradient of logps and, if given, of entropy (Eq. 8)."""
    _launch_with_support(
        logps_backward_kernel, logits, dlogits, tokens, index,
        (logps, top, log_total, entropy, grad_logps, grad_entropy, upstream), (first,),
        entropy=grad_entropy is not None,
    )  # fmt: skip


def one_pass(logits, dlogits, tokens, index, first, logps, entropy):
    """Write Eq. 1 into logps, Eq. 3 into entropy and dL/dlogits (Eq. 7, 8) into dlogits."""
    _launch_with_support(
        one_pass_kernel, logits, dlogits, tokens, index, (logps, entropy), (first, tokens.parts),
        entropy=entropy is not None, persistent=True,
        ON_POLICY=tokens.on_policy, POLICY=POLICY_LOSSES[tokens.policy_loss],
        KL=KL_ESTIMATORS[tokens.kl], UNBIASED=tokens.kl_unbiased,
    )  # fmt: skip


def scale(dlogits, upstream):
    """Multiply dlogits in place by the 0-dim upstream; 1 reads and writes nothing."""
    _launch(scale_kernel, dlogits, None, (upstream,), persistent=True)
