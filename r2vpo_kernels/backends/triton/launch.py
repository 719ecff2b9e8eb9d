"""How a kernel is launched: tuning, the options of a target, variants that are compiled once."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

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


# By the bytes of a row at most: on an H100 within 1 % of the fastest that was tried
# (benchmarks/results/NOTES.md). The step depends on V, the element size and the alignment alone: a
# row is summed in the same order by every kernel and in every batch.
TUNING = (
    (96 * 2**10, Tuning(threads=256, per_thread=16, programs=2)),
    (2**63, Tuning(threads=512, per_thread=16, programs=1)),
)
# Rows that are peeled need the registers for their edges.
PER_THREAD_PEELED = 8
# What is loaded ahead of its use, by each program.
BYTES_AHEAD = 48 * 2**10
# The step over the words of a support, whatever the row, and the threads of values that have none.
SUPPORT_STEP = 512
COMPACT_THREADS = 128
REGISTERS = 65536
MOST_REGISTERS = 128
VECTOR_BYTES = 16
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Token kernels: lanes of a tile of units by tokens, and the threads that share it.
TOKEN_THREADS = 512
LANES = 64 if INTERPRETED else 512
# Programs of `means` and `finish` at most. Fixed, as the order of their sums must be.
MOST_PROGRAMS = 2 if INTERPRETED else 512


class Kernel:
    """A Triton kernel: its pointers come first, then its numbers, then its flags (constexpr).

    Nothing is specialised on a number's value or a pointer's alignment. So the device, the threads,
    the flags and the pointers' dtypes name a variant. Triton compiles it at its first launch; later
    ones go to what it compiled, with addresses, past Triton's own search for the variant.
    """

    def __init__(self, function) -> None:
        parameters = inspect.signature(function).parameters
        names = [x for x, kind in parameters.items() if kind.annotation is not tl.constexpr]
        self.jit = triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(
            function
        )
        self.variants: dict[tuple[Any, ...], Any] = {}

    def __call__(self, programs, pointers, numbers, *, threads=TOKEN_THREADS, **flags) -> None:
        device = pointers[0].get_device()
        dtypes = [x if x is None else x.dtype for x in pointers]
        variant = (device, threads, *flags.values(), *dtypes)
        compiled = self.variants.get(variant)
        with torch.cuda.device_of(pointers[0]):
            if compiled is None:
                # The interpreter compiles nothing and returns None.
                self.variants[variant] = self.jit[programs, 1, 1](
                    *map(_readable, pointers), *numbers, **flags, **target_options(device, threads)
                )
            else:
                addresses = [x if x is None else x.data_ptr() for x in pointers]
                # What stands for a flag is not read.
                compiled[programs, 1, 1](*addresses, *numbers, *flags)


def _readable(x: torch.Tensor | None) -> torch.Tensor | None:
    """Triton takes no bool."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


@functools.cache
def target_of(device: int):
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()


def target_options(device: int, threads: int) -> dict[str, int | bool]:
    if INTERPRETED:
        return {}
    target = target_of(device)
    # Products are contracted where the code says fma and nowhere else, so that two kernels that
    # share a helper give the same bits: log-probs recorded by one make the other's log-ratio
    # exactly 0.
    options = {"num_warps": max(1, threads // target.warp_size), "enable_fp_fusion": False}
    if target.backend == "cuda":
        # Left to itself, ptxas spills a word or two to fit twice as many programs.
        options["maxnreg"] = min(MOST_REGISTERS, REGISTERS // max(threads, target.warp_size))
    return options


def most_ahead(device: int, with_entropy: bool) -> int:
    """Steps that an aligned row is loaded ahead of its use, into shared memory, at most."""
    if INTERPRETED:
        return 0
    target = target_of(device)
    if target.backend != "cuda" or (with_entropy and target.arch < 90):
        # Their addresses would take registers that are not there, or so would they themselves.
        return 0
    return 3


@functools.cache
def multiprocessors(device: int) -> int:
    if device < 0:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_shape(tokens: int, units: int) -> tuple[int, int]:
    """Units and tokens of a tile: one unit, or where every unit is one token, many."""
    return (LANES, 1) if tokens == units else (1, LANES)
