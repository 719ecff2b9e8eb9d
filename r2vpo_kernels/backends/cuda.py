"""CUDA kernels (csrc/cuda/), for the architectures of setup.py's CUDA_TARGETS.

They have run on an H100 (benchmarks/results/NOTES.md), on no other GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled
from .calls import Tokens

_cuda = compiled.load("cuda")

# The module of tests/support/emulator takes a CPU's tensors.
SIMULATED: bool = _cuda.EMULATED

# csrc/cuda/tokens.h puts there four numbers of each unit, and seventeen of each of so many blocks.
MOMENTS = 4
TOTALS = 17
MOST_BLOCKS = 512


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU; None if they can."""
    if torch.version.hip:
        return "it runs on NVIDIA GPUs, and this torch is for AMD's"
    major, minor = torch.cuda.get_device_capability(device)
    # Code for 8.0 runs on all of 8 but Tegra's; that for 9.0a and 10.0a nowhere else.
    if (major, minor) not in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0)):
        has = f"{device} has {major}.{minor}"
        return f"it is compiled for capability 8.0, 8.6, 8.9, 9.0 and 10.0, and {has}"
    return None


class _Launchers(compiled.Launchers):
    def launch_target(self, x: Tensor) -> tuple[int, int]:
        """The device and its stream."""
        if SIMULATED:
            return 0, 0
        device = x.get_device()
        return device, torch.cuda.current_stream(device).cuda_stream

    def _launch(self, name: str, x: Tensor, *arguments: object) -> None:
        with torch.cuda.device_of(x):
            getattr(_cuda.kernels, name)((*self.launch_target(x), *arguments))

    def scratch(self, t: Tokens) -> Tensor:
        size = MOMENTS * t.units + TOTALS * MOST_BLOCKS
        return torch.empty(size, dtype=torch.float64, device=t.workspace.device)


_launchers = _Launchers()
logps_forward = _launchers.logps_forward
logps_backward = _launchers.logps_backward
one_pass = _launchers.one_pass
scale = _launchers.scale
prepare = _launchers.prepare
means = _launchers.means
finish = _launchers.finish
shard_parts = _launchers.shard_parts
shard_combine = _launchers.shard_combine
dual_step = _launchers.dual_step
head_logits = _launchers.head_logits
head_dhidden = _launchers.head_dhidden
head_dweight = _launchers.head_dweight
