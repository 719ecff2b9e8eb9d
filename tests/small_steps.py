"""Rows of a few columns, walked by Triton's kernels in several steps."""

from r2vpo_kernels.backends import triton_kernels


def walk_in_small_steps():
    tuning = triton_kernels.Tuning(threads=4, per_thread=16, programs=1)
    triton_kernels.TUNING = ((2**63, tuning),)
