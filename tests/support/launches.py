"""What a call launches: the backends' kernels, and torch operators that run one on a GPU.

Counted on any device, so that a change that adds a launch shows on a machine without a GPU.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2vpo_kernels.backends import registry

ROW_KERNELS = ("logps_forward", "logps_backward", "one_pass", "scale")
TOKEN_KERNELS = ("prepare", "means", "finish", "shard_parts", "shard_combine", "dual_step")
HEAD_KERNELS = ("head_logits", "head_dhidden", "head_dweight")
# Operators that make a tensor and leave it as it is, or look at its shape alone.
_IDLE = frozenset(
    (
        "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
        "_unsafe_view", "is_same_size",
    )
)  # fmt: skip


def count_launches(call: Callable[[], Any]) -> Counter[str]:
    """How often `call` ran each kernel, by its name, and each torch operator, as "aten.mul".

    A kernel counts once for each call of the backend's function. An operator counts once unless it
    is a view, an allocation, or returns empty tensors alone; on a GPU some run several kernels.
    What a backward does counts too; give it an upstream gradient, for autograd fills one otherwise.
    """
    mode = _CountOperators()
    with ExitStack() as stack:
        for backend in registry.available():
            module = registry.load(backend)
            for name in (*ROW_KERNELS, *TOKEN_KERNELS, *HEAD_KERNELS):
                counted = mode.counted(name, module)
                stack.enter_context(patch.object(module, name, counted))
        stack.enter_context(mode)
        call()
    return mode.counts


class _CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.simulating = False

    def counted(self, name: str, module: Any) -> Callable[..., None]:
        """The kernel `name` of a backend's module, counted."""
        kernel = getattr(module, name)
        simulated = getattr(module, "SIMULATED", False)

        @functools.wraps(kernel)
        def count(*arguments: Any) -> None:
            self.counts[name] += 1
            # An interpreter computes with operators of its own.
            self.simulating = simulated
            kernel(*arguments)
            self.simulating = False

        return count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "r2vpo_kernels":
            # The mode is off in here. On again, it sees the operators inside; a dispatch below it
            # does not come back here.
            devices = {x.device.type for x in tree_leaves(args) if isinstance(x, Tensor)}
            key = torch._C.DispatchKey.CUDA if "cuda" in devices else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        empty = bool(tensors) and all(x.numel() == 0 for x in tensors)
        name = func.overloadpacket.__name__
        # How `tolist` brings numbers of a GPU to the host, where on a CPU nothing is to be done.
        to_host = name == "_to_copy" and results.device.type == "cpu" != args[0].device.type
        if not (self.simulating or func.is_view or name in _IDLE or empty or to_host):
            self.counts[f"{func.namespace}.{name}"] += 1
        return results
