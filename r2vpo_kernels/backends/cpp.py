"""C++ kernels on a CPU (csrc/cpu/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled

_cpp = compiled.load("cpp")

# What the processor has, the best last.
INSTRUCTION_SETS: dict[str, Any] = _cpp.instruction_sets()


def _instruction_set() -> str:
    """The best, or a lesser one that torch was told to use (ATEN_CPU_CAPABILITY)."""
    best = list(INSTRUCTION_SETS)[-1]
    lesser = {"DEFAULT": "baseline", "AVX2": "avx2"}
    chosen = lesser.get(torch.backends.cpu.get_cpu_capability(), best)
    return chosen if chosen in INSTRUCTION_SETS else best


INSTRUCTION_SET = _instruction_set()


def advise_huge_pages(fresh: Tensor) -> None:
    """Ask for them for memory that nobody has touched: page faults are most of what it costs."""
    _cpp.advise_huge_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())


class _Launchers(compiled.Launchers):
    def _launch(self, name: str, x: Tensor, *arguments: object) -> None:
        kernels = INSTRUCTION_SETS[INSTRUCTION_SET]
        getattr(kernels, name)((torch.get_num_threads(), *arguments))


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
