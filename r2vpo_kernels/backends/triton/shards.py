"""Triton kernels for a vocabulary shared out over ranks: `shard_parts`, `shard_combine`."""

import triton.language as tl

from . import launch
from .math import LN_2
from .workspace import HEADER, SHARD_FAULT, TEMPERATURE, integers

INFINITY = tl.constexpr(float("inf"))


@launch.Kernel
def shard_parts_kernel(
    workspace, logps, top, log_total, entropy, whole_top, parts,
    tokens: tl.int64, words: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """What this rank's shard adds to the sums over all ranks, in float64."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    label = tl.load(integers(workspace) + HEADER + token, mask=inside, other=-1)
    temperature = tl.load(workspace + HEADER + tokens * TEMPERATURE + token, mask=inside, other=1.0)
    distance = tl.load(top + token, mask=inside, other=0.0).to(tl.float64)
    distance -= tl.load(whole_top + token, mask=inside, other=0.0).to(tl.float64)
    log_total_t = tl.load(log_total + token, mask=inside, other=0.0).to(tl.float64)
    log_part = log_total_t + distance / (LN_2 * temperature.to(tl.float64))
    part = tl.exp2(log_part)
    logp = tl.load(logps + token, mask=inside, other=0.0).to(tl.float64)
    # The label's distance from the maximum; in a shard of -inf alone it would be a NaN.
    at_label = tl.where(log_total_t == -INFINITY, -INFINITY, logp / LN_2 + log_part)
    here = (label >= 0) & (label < words)
    place = parts + token
    tl.store(place, part, mask=inside)
    tl.store(place + tokens, tl.where(here, at_label, 0.0), mask=inside)
    tl.store(place + 2 * tokens, here.to(tl.float64), mask=inside)
    tl.store(place + 3 * tokens, (label >= 0).to(tl.float64), mask=inside)
    if entropy is not None:
        entropy_t = tl.load(entropy + token, mask=inside, other=0.0).to(tl.float64)
        # Eq. 12, for a shard without weight.
        mean = tl.where(part == 0, 0.0, log_part - entropy_t / LN_2)
        tl.store(place + 4 * tokens, part * mean, mask=inside)


@launch.Kernel
def shard_combine_kernel(
    workspace, logps, log_total, entropy, parts, tokens: tl.int64, ranks: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole vocabulary's log-probs from the sums over ranks; NaN where these are not alike."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    scored = tl.load(integers(workspace) + HEADER + token, mask=inside, other=-1) >= 0
    place = parts + token
    total = tl.load(place, mask=inside, other=1.0)
    at_label = tl.load(place + tokens, mask=inside, other=0.0)
    owners = tl.load(place + 2 * tokens, mask=inside, other=0.0)
    readers = tl.load(place + 3 * tokens, mask=inside, other=0.0)
    # One rank has the label and all score the token, or none does.
    alike = tl.where(scored, (owners == 1) & (readers == ranks), readers == 0)
    log_total_t = tl.log2(total)
    logp = tl.where(scored, (at_label - log_total_t) * LN_2, 0.0)
    logp = tl.where(alike, logp, float("nan"))
    tl.store(logps + token, logp.to(tl.float32), mask=inside)
    tl.store(log_total + token, log_total_t.to(tl.float32), mask=inside)
    if entropy is not None:
        mean = tl.load(place + 4 * tokens, mask=inside, other=0.0)
        entropy_t = tl.where(scored, (log_total_t - mean / total) * LN_2, 0.0)
        tl.store(entropy + token, entropy_t.to(tl.float32), mask=inside)
    fault = tl.max((inside & (alike == 0)).to(tl.int32), 0)
    tl.store(integers(workspace) + SHARD_FAULT, 1, mask=fault > 0)


def _launch(kernel, t, pointers, number) -> None:
    """One program for each block of tokens."""
    block = launch.LANES
    if t.tokens:
        kernel(-(-t.tokens // block), (t.workspace, *pointers), (t.tokens, number), BLOCK=block)


def shard_parts(t, words, logps, top, log_total, entropy, whole_top, parts) -> None:
    """Write what is summed over ranks into parts, (4, N) float64, with entropy (5, N).

    A shard of `words` words; whole_top is the maximum of `top` over ranks.
    """
    _launch(shard_parts_kernel, t, (logps, top, log_total, entropy, whole_top, parts), words)


def shard_combine(t, parts, ranks, logps, log_total, entropy) -> None:
    """From `parts` summed over ranks, overwrite logps, log_total and, if given, entropy."""
    _launch(shard_combine_kernel, t, (logps, log_total, entropy, parts), ranks)
