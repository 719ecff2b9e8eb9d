"""Triton kernels over logits: log-probs forward, log-probs backward, one-pass, scaling.

Equations are those of DERIVATION.md. A row of logits is z ∈ R^V and x = z / temperature; inside the
kernels exponents are in base 2, as the hardware's exponential is. The launchers at the end take
checked tensors: `logits` (B, T, V) with a contiguous vocabulary, whatever is per token flat and
contiguous (B·T,) float32, and `labels` int64 with -1 where a row must not be read and V where a
label was bad. `dlogits` has the shape of `logits` and rows at the same place within 16 bytes; it
may be `logits`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tuning(NamedTuple):
    """How rows are walked: in steps of threads·per_thread columns, by this many programs of the
    persistent kernel to a multiprocessor.
    """

    threads: int
    per_thread: int
    programs: int


# By the bytes of a row at most; benchmarks/results/NOTES.md has the reasons. Not yet measured on
# hardware. The step depends on V, the element size and the alignment alone: a row is summed in the
# same order by every kernel and in every batch.
TUNING = (
    (96 * 2**10, Tuning(threads=256, per_thread=16, programs=2)),
    (2**63, Tuning(threads=512, per_thread=16, programs=1)),
)
# Rows that are peeled need the registers for their edges.
PER_THREAD_PEELED = 8
# What is loaded ahead of its use, by each program.
BYTES_AHEAD = 48 * 2**10
REGISTERS = 65536
MOST_REGISTERS = 128
VECTOR_BYTES = 16
INTERPRETED = bool(triton.knobs.runtime.interpret)

KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, bound):
    # Comparisons, because tl.minimum and tl.maximum lose a NaN.
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _difference(a, b):
    # Eq. 2: equal log-probs differ by 0, two infinities too.
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def _expm1(x):
    # libdevice's expm1 is missing in the interpreter. Near 0 the Taylor series to x^10, whose
    # remainder at 0.5 is under 3e-11 of the value; elsewhere exp - 1, where exp's error grows
    # 2.6-fold at most.
    series = 1.0 + x * (1.0 / 10.0)
    series = 1.0 + x * (1.0 / 9.0) * series
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


# A row is walked in blocks from its last 16-byte boundary at or before its first element, which
# lies `lead` further on; `end` is one past its last element. ALIGNED says that lead is 0 and V a
# whole number of 16-byte words in every row. Divisions that look idle tell the compiler what is a
# whole number of them.


@triton.jit
def _place(
    token, length, vocabulary, misaligned, stride_batch, stride_token,
    ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of a token's row: its offset from the 16-byte boundary before the tensor, lead and end."""
    # length is an int64, and so are the products.
    offset = misaligned + (token // length) * stride_batch + (token % length) * stride_token
    if ALIGNED:
        lead = 0
        end = vocabulary // VECTOR * VECTOR
    else:
        lead = (offset % VECTOR).to(tl.int32)
        end = vocabulary + lead
    return offset, lead, end


@triton.jit
def _row(pointer, offset, VECTOR: tl.constexpr):
    return pointer + offset // VECTOR * VECTOR


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
    row, lead, end, label, temperature,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. 1 and Eq. 3 in one read: the label's logp, max z, log2 of the sum about it, entropy.

    Each lane keeps m = max z, s = Σ 2^x and r = Σ 2^x·x with x = (z - m)·scale over its columns
    (Eq. 14): one exponential per element, and threads meet only once per row.
    """
    scale = tl.div_rn(LOG2_E, temperature)
    # Every thread reads this one, and in place another thread will overwrite it: the reductions
    # below are the barrier between. A bad label reads nothing and makes logp NaN.
    z_label = tl.load(row + lead + label, mask=label < end - lead, other=float("nan"))
    # The lowest finite number in place of -inf: a block of -inf then meets no inf - inf.
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(0, tl.cdiv(end, BLOCK), num_stages=STAGES):
        z = _load(row, block, lead, end, ALIGNED, BLOCK)
        gap = (z - m) * scale
        decay = tl.exp2(-tl.abs(gap))
        rises = gap > 0
        if ENTROPY:
            # decay = 0 stands for a factor whose product with an infinite gap is 0.
            kept = tl.where(rises, (r - gap * s) * decay, r + gap * decay)
            r = tl.where(decay == 0, tl.where(rises, 0.0, r), kept)
        s = tl.fma(s, tl.where(rises, decay, 1.0), tl.where(rises, 1.0, decay))
        m = _nan_maximum(m, z)
    top = tl.reduce(m, 0, _nan_maximum)
    gap = (m - top) * scale
    decay = tl.exp2(gap)
    total = tl.sum(s * decay, 0)
    log_total = tl.log2(total)
    logp = ((z_label.to(tl.float32) - top) * scale - log_total) * LN_2
    entropy = 0.0
    if ENTROPY:
        moved = tl.where(decay == 0, 0.0, (r + gap * s) * decay)
        entropy = (log_total - tl.sum(moved, 0) / total) * LN_2
    return logp, top, log_total, entropy


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
    at_label = -dlogp * _expm1(logp)
    if ENTROPY:
        # Eq. 12: p·log p is 0 at p = 0, where log p is -inf.
        p_label = tl.exp(logp)
        at_label -= tl.where(p_label == 0, 0.0, dentropy * p_label * (logp + entropy))
    blocks = tl.cdiv(end, BLOCK)
    for step in tl.range(0, blocks, num_stages=STAGES):
        block = blocks - 1 - step
        z = _load(row, block, lead, end, ALIGNED, BLOCK)
        log2_p = tl.fma(z - top, scale, -log_total)
        p = tl.exp2(log2_p)
        dz = -p * dlogp
        if ENTROPY:
            dz -= tl.where(p == 0, 0.0, dentropy * p * (log2_p * LN_2 + entropy))
        column = block * BLOCK + tl.arange(0, BLOCK) - lead
        dz = tl.where(column == label, at_label, dz)
        _store(grad_row, block, lead, end, dz, ALIGNED, BLOCK)


@triton.jit
def _dlogp(
    logp, old_logp, ref_logp, weight, advantage, variance_coef, center, kl_coef, clamp,
    KL: tl.constexpr,
):  # fmt: skip
    """Eq. 7: dL/dlogp of one token from its own numbers; `center` is c - 1."""
    raw = _difference(logp, old_logp)
    delta = _clamp(raw, clamp)
    slope = tl.exp(delta) * (2.0 * variance_coef * (_expm1(delta) - center) - advantage)
    slope = tl.where(tl.abs(raw) > clamp, 0.0, slope)
    if KL > 0:
        raw = _difference(ref_logp, logp)
        if KL == 1:
            dkl = 1.0
        elif KL == 2:
            dkl = -raw
        else:
            dkl = -_expm1(raw)
        slope += kl_coef * tl.where(tl.abs(raw) > clamp, 0.0, dkl)
    return weight * slope


# Nothing that varies between steps is specialised on; what the compiler may assume of alignment is
# in the flag ALIGNED, which the host derives from pointers, strides and V.
_VARYING = ["rows", "length", "vocabulary", "misaligned"]
_VARYING += ["stride_batch", "stride_token", "grad_stride_batch", "grad_stride_token"]
# What is per token is read one number at a time: its alignment is nobody's concern.
_PER_TOKEN = ["labels", "temperature", "weight", "old_logps", "advantages", "variance_coef"]
_PER_TOKEN += ["center", "ref_logps", "logps", "top", "log_total", "entropy"]
_PER_TOKEN += ["grad_logps", "grad_entropy", "upstream"]
_PER_TOKEN += ["kl_coef", "entropy_coef", "log_ratio_clamp"]
_kernel = triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PER_TOKEN)


@_kernel
def logps_forward_kernel(
    logits, labels, temperature, logps, top, log_total, entropy,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for token in range(tl.program_id(0), rows, tl.num_programs(0)):
        label = tl.load(labels + token)
        logp_t = 0.0
        top_t = 0.0
        log_total_t = 0.0
        entropy_t = 0.0
        if label >= 0:
            offset, lead, end = _place(
                token, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
            )
            logp_t, top_t, log_total_t, entropy_t = _first_look(
                _row(logits, offset, VECTOR), lead, end, label, tl.load(temperature + token),
                ENTROPY, ALIGNED, BLOCK, STAGES,
            )  # fmt: skip
        tl.store(logps + token, logp_t)
        tl.store(top + token, top_t)
        tl.store(log_total + token, log_total_t)
        if ENTROPY:
            tl.store(entropy + token, entropy_t)


@_kernel
def logps_backward_kernel(
    logits, dlogits, labels, temperature, logps, top, log_total, entropy, grad_logps, grad_entropy,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    grad_stride_batch: tl.int64, grad_stride_token: tl.int64,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for token in range(tl.program_id(0), rows, tl.num_programs(0)):
        label = tl.load(labels + token)
        offset, lead, end = _place(
            token, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
        )
        # The gradient's rows lie alike within 16 bytes: the same lead and end.
        grad_offset, _, _ = _place(
            token, length, vocabulary, misaligned, grad_stride_batch, grad_stride_token,
            ALIGNED, VECTOR,
        )  # fmt: skip
        grad_row = _row(dlogits, grad_offset, VECTOR)
        if label >= 0:
            entropy_t = 0.0
            dentropy = 0.0
            if ENTROPY:
                entropy_t = tl.load(entropy + token)
                dentropy = tl.load(grad_entropy + token)
            _second_look(
                _row(logits, offset, VECTOR), grad_row, lead, end, label,
                tl.load(temperature + token), tl.load(logps + token), tl.load(top + token),
                tl.load(log_total + token), entropy_t, tl.load(grad_logps + token), dentropy,
                ENTROPY, ALIGNED, BLOCK, STAGES,
            )  # fmt: skip
        else:
            _store_zeros(grad_row, lead, end, ALIGNED, BLOCK)


@_kernel
def one_pass_kernel(
    logits, dlogits, labels, temperature, weight, old_logps, advantages, variance_coef, center,
    ref_logps, kl_coef, entropy_coef, log_ratio_clamp, logps, entropy,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    grad_stride_batch: tl.int64, grad_stride_token: tl.int64,
    ON_POLICY: tl.constexpr, KL: tl.constexpr,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for token in range(tl.program_id(0), rows, tl.num_programs(0)):
        label = tl.load(labels + token)
        offset, lead, end = _place(
            token, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
        )
        # The gradient's rows lie alike within 16 bytes: the same lead and end.
        grad_offset, _, _ = _place(
            token, length, vocabulary, misaligned, grad_stride_batch, grad_stride_token,
            ALIGNED, VECTOR,
        )  # fmt: skip
        grad_row = _row(dlogits, grad_offset, VECTOR)
        logp = 0.0
        entropy_t = 0.0
        if label >= 0:
            row = _row(logits, offset, VECTOR)
            temperature_t = tl.load(temperature + token)
            logp, top, log_total, entropy_t = _first_look(
                row, lead, end, label, temperature_t, ENTROPY, ALIGNED, BLOCK, STAGES
            )
            weight_t = tl.load(weight + token)
            dlogp = _dlogp(
                logp,
                logp if ON_POLICY else tl.load(old_logps + token),
                tl.load(ref_logps + token) if KL > 0 else 0.0,
                weight_t, tl.load(advantages + token), tl.load(variance_coef + token),
                tl.load(center + token), tl.load(kl_coef), tl.load(log_ratio_clamp), KL,
            )  # fmt: skip
            dentropy = -weight_t * tl.load(entropy_coef) if ENTROPY else 0.0
            _second_look(
                row, grad_row, lead, end, label, temperature_t, logp, top, log_total, entropy_t,
                dlogp, dentropy, ENTROPY, ALIGNED, BLOCK, STAGES,
            )  # fmt: skip
        else:
            _store_zeros(grad_row, lead, end, ALIGNED, BLOCK)
        tl.store(logps + token, logp)
        if ENTROPY:
            tl.store(entropy + token, entropy_t)


@_kernel
def scale_kernel(
    dlogits, upstream,
    rows: tl.int32, length: tl.int64, vocabulary: tl.int32, misaligned: tl.int32,
    stride_batch: tl.int64, stride_token: tl.int64,
    ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    factor = tl.load(upstream)
    # The usual upstream gradient is 1, and then nothing is read or written.
    if factor != 1.0:
        for token in range(tl.program_id(0), rows, tl.num_programs(0)):
            offset, lead, end = _place(
                token, length, vocabulary, misaligned, stride_batch, stride_token, ALIGNED, VECTOR
            )
            row = _row(dlogits, offset, VECTOR)
            for block in tl.range(0, tl.cdiv(end, BLOCK), num_stages=STAGES):
                dz = _load(row, block, lead, end, ALIGNED, BLOCK) * factor
                _store(row, block, lead, end, dz, ALIGNED, BLOCK)


def _target_options(threads: int) -> dict[str, int | bool]:
    if INTERPRETED:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    # Products are contracted where the code says fma and nowhere else, so that two kernels that
    # share a helper give the same bits: log-probs recorded by one make the other's log-ratio
    # exactly 0.
    options = {"num_warps": max(1, threads // target.warp_size), "enable_fp_fusion": False}
    if target.backend == "cuda":
        # Left to itself, ptxas spills a word or two to fit twice as many programs.
        options["maxnreg"] = min(MOST_REGISTERS, REGISTERS // max(threads, target.warp_size))
    return options


def _most_ahead(with_entropy: bool) -> int:
    """Steps that an aligned row is loaded ahead of its use, into shared memory, at most."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or (with_entropy and target.arch < 90):
        # Their addresses would take registers that are not there, or so would they themselves.
        return 0
    return 3


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel, logits, dlogits, tensors, persistent=False, **flags) -> None:
    """One program per row of `logits`, or a persistent grid."""
    batch, length, vocabulary = logits.shape
    rows = batch * length
    if rows == 0:
        return
    vector = VECTOR_BYTES // logits.element_size()
    misaligned = logits.data_ptr() % VECTOR_BYTES // logits.element_size()
    big = [logits] if dlogits is None else [logits, dlogits]
    # The stride of a dimension of size 1 is arbitrary and never used.
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for x in big for dim in (0, 1)]
    aligned = all(n % vector == 0 for n in (vocabulary, misaligned, *strides))
    row_bytes = vocabulary * logits.element_size()
    tuning = next(tuning for most, tuning in TUNING if row_bytes <= most)
    per_thread = tuning.per_thread if aligned else PER_THREAD_PEELED
    longest = vocabulary if aligned else vocabulary + vector - 1
    block = min(triton.next_power_of_2(longest), tuning.threads * per_thread)
    programs = rows
    if persistent:
        programs = min(rows, tuning.programs * _multiprocessors(logits.device))
    with torch.cuda.device_of(logits):
        options = _target_options(block // per_thread)
        ahead = BYTES_AHEAD // (block * logits.element_size())
        most = _most_ahead(flags.get("ENTROPY", False)) if aligned else 0
        kernel[(programs,)](
            *(_aligned_base(x, misaligned) for x in big), *tensors,
            rows, length, vocabulary, misaligned, *strides,
            ALIGNED=aligned, VECTOR=vector, BLOCK=block, STAGES=1 + min(ahead, most),
            **flags, **options,
        )  # fmt: skip


def _aligned_base(x: torch.Tensor, misaligned: int) -> torch.Tensor:
    """A pointer to the 16-byte boundary `misaligned` elements before x; a storage starts at one."""
    return x.as_strided((1,), (1,), x.storage_offset() - misaligned)


def logps_forward(logits, labels, temperature, logps, top, log_total, entropy, with_entropy):
    """Write Eq. 1 into logps, Eq. 3 into entropy, and for logps_backward top and log_total."""
    tensors = (labels, temperature, logps, top, log_total, entropy)
    _launch(logps_forward_kernel, logits, None, tensors, ENTROPY=with_entropy)


def logps_backward(
    logits, dlogits, labels, temperature, logps, top, log_total, entropy, grad_logps,
    grad_entropy, with_entropy,
):  # fmt: skip
    """Write into dlogits the gradient of logps and, with entropy, that of entropy (Eq. 8)."""
    tensors = (
        labels, temperature, logps, top, log_total, entropy, grad_logps, grad_entropy,
    )  # fmt: skip
    _launch(logps_backward_kernel, logits, dlogits, tensors, ENTROPY=with_entropy)


def one_pass(
    logits, dlogits, labels, temperature, weight, old_logps, advantages, variance_coef, center,
    ref_logps, kl_coef, entropy_coef, log_ratio_clamp, kl_estimator, logps, entropy, with_entropy,
):  # fmt: skip
    """Write Eq. 1 into logps, Eq. 3 into entropy and dL/dlogits (Eq. 7, 8) into dlogits."""
    tensors = (
        labels, temperature, weight, old_logps, advantages, variance_coef, center, ref_logps,
        kl_coef, entropy_coef, log_ratio_clamp, logps, entropy,
    )  # fmt: skip
    _launch(
        one_pass_kernel, logits, dlogits, tensors, persistent=True,
        ON_POLICY=old_logps is None, ENTROPY=with_entropy,
        KL=0 if ref_logps is None else KL_ESTIMATORS[kl_estimator],
    )  # fmt: skip


def scale(dlogits, upstream):
    """Multiply dlogits in place by the 0-dim upstream; 1 reads and writes nothing."""
    _launch(scale_kernel, dlogits, None, (upstream,))
