"""CUDA kernels over logits (csrc/cuda/): log-probs forward and backward, one-pass, scaling.

They are compiled for the architectures of setup.py's CUDA_TARGETS. None has run on hardware yet.
"""

import torch

from . import compiled

_cuda = compiled.load("cuda")

# The module of tests/emulator takes a CPU's tensors.
EMULATED = _cuda.EMULATED


def why_not(device):
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
    def kernels(self):
        return _cuda.kernels

    def where(self, logits, dlogits):
        if EMULATED:
            return 0, 0
        device = logits.get_device()
        return device, torch.cuda.current_stream(device).cuda_stream

    def device(self, logits):
        return torch.cuda.device_of(logits)


_launchers = _Launchers(_cuda)
logps_forward = _launchers.logps_forward
logps_backward = _launchers.logps_backward
one_pass = _launchers.one_pass
scale = _launchers.scale
