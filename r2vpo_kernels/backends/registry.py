"""Who computes: a table of the backends, each loaded when it is first asked for.

To add one: a module with the functions of triton/__init__.py, and a row here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..checks import BACKENDS, Backend, check_choice

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (device, dtype, V) for which a file in benchmarks/results shows the CUDA kernels right and faster
# than Triton's; a test holds it to those files.
CUDA_IS_FASTER: frozenset[tuple[str, torch.dtype, int]] = frozenset()


def _needs_cpu(kernels: ModuleType, device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on a CPU, and the input is on {device}"


def _needs_gpu(kernels: ModuleType, device: torch.device) -> str | None:
    # An interpreter, or an emulated GPU, takes a CPU's tensors.
    if device.type == "cuda" or kernels.SIMULATED:
        return None
    return f"it runs on a GPU, and the input is on {device}"


def _needs_gpu_it_is_built_for(kernels: ModuleType, device: torch.device) -> str | None:
    reason = _needs_gpu(kernels, device)
    return reason or (None if kernels.SIMULATED else kernels.why_not(device))


@dataclass(frozen=True)
class Entry:
    module: str
    why_not: Callable[[ModuleType, torch.device], str | None]


TABLE = {
    "triton": Entry(".triton", _needs_gpu),
    "cpp": Entry(".cpp", _needs_cpu),
    "cuda": Entry(".cuda", _needs_gpu_it_is_built_for),
}


@functools.cache
def _imported(backend: str) -> ModuleType | str:
    """The module, or why it is not here."""
    try:
        return importlib.import_module(TABLE[backend].module, __package__)
    except ImportError as error:
        return f"it cannot be imported ({error})"


def load(backend: str) -> ModuleType:
    """The kernels of a backend that `choose_backend` chose."""
    kernels = _imported(backend)
    if isinstance(kernels, str):
        raise ValueError(f"backend: {backend!r} is not available: {kernels}")
    return kernels


def available() -> list[str]:
    """The backends with kernels that can be imported."""
    return [backend for backend in TABLE if not isinstance(_imported(backend), str)]


def why_not(backend: str, tensor: Tensor) -> str | None:
    """Why a backend cannot take this input; None if it can."""
    return None if backend == "eager" else _why_not(backend, tensor.device, tensor.dtype)


@torch.compiler.assume_constant_result  # type: ignore[misc]
def _why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    # torch.compile does not trace an import.
    kernels = _imported(backend)
    if isinstance(kernels, str):
        return kernels
    if dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, and the input is {dtype}"
    return TABLE[backend].why_not(kernels, device)


def _cuda_is_faster(logits: Tensor) -> bool:
    # On CUDA_IS_FASTER nothing stands yet, and then no device is asked for its name.
    if not CUDA_IS_FASTER or why_not("cuda", logits):
        return False
    device = torch.cuda.get_device_properties(logits.device).name
    return (device, logits.dtype, logits.shape[-1]) in CUDA_IS_FASTER


def choose_backend(name: Backend, tensor: Tensor) -> str:
    """The backend to run on this input.

    "auto": on a GPU CUDA where it is known to be faster, else Triton; on a CPU C++; eager where
    they cannot.
    """
    check_choice("backend", name, BACKENDS)
    if name == "auto":
        best = ("cuda" if _cuda_is_faster(tensor) else "triton") if tensor.is_cuda else "cpp"
        return "eager" if why_not(best, tensor) else best
    reason = why_not(name, tensor)
    if reason is not None:
        raise ValueError(f"backend: {name!r} is not available: {reason}")
    return name


def advise_huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, a tensor that nobody has touched, in huge pages where it is a CPU's memory."""
    if fresh.device.type == "cpu" and not isinstance(_imported("cpp"), str):
        load("cpp").advise_huge_pages(fresh)
    return fresh
