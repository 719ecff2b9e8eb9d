"""C++ kernels over logits (csrc/cpu/): log-probs forward and backward, one-pass, scaling."""

import torch

from . import compiled

_cpp = compiled.load("cpp")

# What the processor has, the best last.
INSTRUCTION_SETS = _cpp.instruction_sets()
INSTRUCTION_SET = list(INSTRUCTION_SETS)[-1]


def advise_huge_pages(fresh):
    """Ask for them for memory that nobody has touched: page faults are most of what it costs."""
    _cpp.advise_huge_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())


class _Launchers(compiled.Launchers):
    def kernels(self):
        return INSTRUCTION_SETS[INSTRUCTION_SET]

    def where(self, logits, dlogits):
        if dlogits is not None and dlogits is not logits:
            advise_huge_pages(dlogits)
        return (torch.get_num_threads(),)


_launchers = _Launchers(_cpp)
logps_forward = _launchers.logps_forward
logps_backward = _launchers.logps_backward
one_pass = _launchers.one_pass
scale = _launchers.scale
