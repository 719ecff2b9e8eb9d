"""Rows of a few columns, walked by Triton's kernels in several steps."""

from r2vpo_kernels.backends.triton import head, launch


def walk_in_small_steps():
    tuning = launch.Tuning(threads=4, per_thread=16, programs=1)
    launch.TUNING = ((2**63, tuning),)
    launch.SUPPORT_STEP = 8
    head.WORDS, head.COLUMNS, head.IDS = 4, 16, 4
