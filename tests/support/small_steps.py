"""Small vocabularies walked as large ones are: by Triton in several steps, and from hidden states
by the sparse head where sets are small.
"""

from r2vpo_kernels.backends.triton import head, launch
from r2vpo_kernels.sources import sparse


def walk_in_small_steps():
    tuning = launch.Tuning(threads=4, per_thread=16, programs=1)
    launch.TUNING = ((2**63, tuning),)
    launch.SUPPORT_STEP = 8
    head.WORDS, head.COLUMNS, head.IDS = 4, 16, 4
    sparse.DENSE_SPEED["cpu"] = 4
