"""Processes over gloo, each a rank that runs the same function."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r2vpo_kernels.backends import triton

from .emulator.build import emulate_cuda
from .small_steps import walk_in_small_steps


def _work(rank: int, ranks: int, meeting_point: str, function: Callable, arguments: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty comes filled with NaN
    if triton.SIMULATED:
        walk_in_small_steps()
        emulate_cuda()
    # Ranks that wait for one another are an error soon.
    dist.init_process_group(
        "gloo", init_method=meeting_point, rank=rank, world_size=ranks, timeout=timedelta(minutes=2)
    )
    function(rank, *arguments)
    dist.barrier()  # no rank leaves while another still connects to it
    dist.destroy_process_group()


# What takes long to import is imported once, in a process that ranks are forked from.
multiprocessing.set_forkserver_preload(["hypothesis", "pytest", "torch", "r2vpo_kernels"])


def run_on(ranks: int, folder: Path, function: Callable, *arguments: Any) -> None:
    """function(rank, *arguments) on so many ranks; an error on one of them is raised here."""
    arguments = ranks, f"file://{folder}/meeting", function, arguments
    mp.start_processes(_work, arguments, ranks, start_method="forkserver")
