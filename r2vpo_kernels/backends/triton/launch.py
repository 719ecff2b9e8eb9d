"""How a kernel is launched: tuning, the options of a target, what is never specialised on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


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
# Token kernels: lanes of a tile of units by tokens, and the threads that share it.
TOKEN_THREADS = 512
LANES = 64 if INTERPRETED else 512
# Programs of `means` and `finish` at most. Fixed, as the order of their sums must be.
MOST_PROGRAMS = 2 if INTERPRETED else 512


def kernel(varying: str, pointers: str):
    """triton.jit where neither the value of a number nor the alignment of a pointer is specialised.

    A pointer that is named here is read and written one number at a time.
    """
    return triton.jit(
        do_not_specialize=varying.split(),
        do_not_specialize_on_alignment=pointers.split(),
    )


def target_options(threads: int) -> dict[str, int | bool]:
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


def most_ahead(with_entropy: bool) -> int:
    """Steps that an aligned row is loaded ahead of its use, into shared memory, at most."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or (with_entropy and target.arch < 90):
        # Their addresses would take registers that are not there, or so would they themselves.
        return 0
    return 3


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_shape(tokens: int, units: int) -> tuple[int, int]:
    """Units and tokens of a tile: one unit, or where every unit is one token, many."""
    return (LANES, 1) if tokens == units else (1, LANES)
