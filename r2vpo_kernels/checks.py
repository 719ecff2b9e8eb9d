"""Errors: one sentence that names the argument, what came and what was expected.

Shapes, dtypes and names are checked on the host. What a tensor holds is checked by the registered
op `check`, or in a kernel.
"""

from __future__ import annotations

import numbers
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "eager", "triton", "cpp", "cuda"]
Center = Literal["one", "group"]
PolicyLoss = Literal["ratio", "clip", "cispo"]
RatioLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Reduction = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none"
]
MissingLabel = Literal["error", "full"]
BACKENDS: tuple[str, ...] = get_args(Backend)
CENTERS: tuple[str, ...] = get_args(Center)
POLICY_LOSSES: tuple[str, ...] = get_args(PolicyLoss)
RATIO_LEVELS: tuple[str, ...] = get_args(RatioLevel)
KL_ESTIMATORS: tuple[str, ...] = get_args(KLEstimator)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
MISSING_LABELS: tuple[str, ...] = get_args(MissingLabel)

REAL: Any = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
WHOLE: Any = (int, torch.SymInt, numbers.Integral)
FLOAT32_MAX = 3.4028234663852886e38
MIN_TEMPERATURE = 1e-6
# exp(2·40) = 5.5e34: the squared ratio stays finite in float32.
MAX_LOG_RATIO_CLAMP = 40.0


def invalid(name: str, got: Any, expected: str) -> ValueError:
    if isinstance(got, Tensor):
        got = f"a {got.dtype} tensor of shape {tuple(got.shape)}"
    return ValueError(f"{name}: got {got}, expected {expected}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise invalid(name, repr(value), "one of " + ", ".join(map(repr, choices)))


def _plain(value: Any) -> Any:
    """A number of NumPy's, or an array of one, as Python's number."""
    if isinstance(value, (int, float, Tensor)) or getattr(value, "shape", None) != ():
        return value
    return value.item()


def check_number(name: str, value: Any, low: float = -torch.inf, high: float = torch.inf) -> float:
    """The value, as Python's number."""
    number = value if type(value) is float else _plain(value)
    if not isinstance(number, REAL):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (low <= number <= high and abs(number) <= FLOAT32_MAX):
        raise invalid(name, value, f"a finite number from {low} to {high}")
    symbolic = isinstance(number, (torch.SymInt, torch.SymFloat))
    return number if symbolic or isinstance(number, (int, float)) else float(number)


def check_positive(name: str, value: Any) -> float:
    number = check_number(name, value)
    if number <= 0:
        raise invalid(name, value, "a number above 0")
    return number


def check_whole(name: str, value: Any, low: int, expected: str) -> int:
    """The value, as Python's number of at most 64 bits; a bool is none."""
    number = _plain(value)
    is_whole = isinstance(number, WHOLE) and not isinstance(number, bool)
    if not (is_whole and low <= number < 2**63):
        raise invalid(name, value, expected)
    whole: int = number
    return whole


def check_count(name: str, value: Any) -> int:
    return check_whole(name, value, 1, "a whole number of at least 1")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    # A 0-dim tensor on the CPU is to torch what a number is.
    if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise invalid(name, f"a tensor on {value.device}", f"one on {device}, with the rest")


def check_dense(name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        expected = "a dense one"
        if value.layout == torch.jagged:
            expected += ": of a jagged batch pass values(), and offsets() as cu_seqlens"
        raise invalid(name, f"a tensor of layout {value.layout}", expected)


def check_integer(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor of integers")
    check_dense(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected integers")


def check_float(name: str, value: Any) -> None:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a tensor of floats")
    check_dense(name, value)


def check_labels(labels: Any, shape: torch.Size, whose: str) -> None:
    check_integer("labels", labels)
    if labels.shape != shape:
        raise invalid("labels", labels, f"shape {tuple(shape)}, that of {whose}")


def may_synchronise(value: Tensor) -> bool:
    """Whether the host may look at a tensor: on a GPU only if R2VPO_KERNELS_VALIDATE=1 asks."""
    return not value.is_cuda or os.environ.get("R2VPO_KERNELS_VALIDATE") == "1"


# Of the ops: the name that the package is imported by. Two copies in a process do not clash.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::check", mutates_args=())
def check(value: Tensor, ok: Tensor, shown: Tensor, name: str, expected: str) -> Tensor:
    """`value`, having made sure of `ok` (0-dim or like value): an op, to survive torch.compile.

    On a CPU it raises. On a GPU a float value becomes NaN where it is not ok, unless
    R2VPO_KERNELS_VALIDATE=1 asks for the error.
    """
    if may_synchronise(value) and not ok.all():
        got = str(shown.tolist())
        if ok.dim():
            at = int((~ok).reshape(-1).nonzero()[0])
            got = f"{shown.reshape(-1)[at].item()} at {at}"
        raise ValueError(f"{name}: got {got}, expected {expected}")
    if not value.is_floating_point():
        return value.clone()
    return torch.where(ok, value, torch.nan)


@check.register_fake
def _(value: Tensor, ok: Tensor, shown: Tensor, name: str, expected: str) -> Tensor:
    shape = (
        torch.broadcast_shapes(value.shape, ok.shape) if value.is_floating_point() else value.shape
    )
    return value.new_empty(shape)
