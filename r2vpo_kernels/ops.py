"""Registered ops over logits, the autograd Functions around them, and the choice of backend.

The ops are opaque to torch.compile and carry no autograd of their own: `token_logps` and `one_pass`
below are what the rest of the package calls.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference

try:
    from .backends import triton_kernels
except ImportError as error:  # no Triton on this machine
    triton_kernels = None  # type: ignore[assignment]
    _TRITON_MISSING = f"it cannot be imported ({error})"

if TYPE_CHECKING:
    from .batch import Batch
    from .objective import Objective

BACKENDS = ("auto", "eager", "triton")
_KERNELS = {"triton": triton_kernels}
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR_BYTES = 16


def _why_not_triton(logits: Tensor) -> str | None:
    if triton_kernels is None:
        return _TRITON_MISSING
    if logits.dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, and logits are {logits.dtype}"
    if not (logits.is_cuda or triton_kernels.INTERPRETED):
        return f"it runs on a GPU, and logits are on {logits.device}"
    return None


def choose_backend(name: str, logits: Tensor) -> str:
    """The backend to run: `auto` takes Triton on a GPU where it can, eager torch elsewhere."""
    if not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    why_not = _why_not_triton(logits)
    if name == "auto":
        return "triton" if logits.is_cuda and why_not is None else "eager"
    if name == "triton" and why_not is not None:
        raise ValueError(f"backend: 'triton' is not available: {why_not}")
    return name


def _looks(value: Tensor) -> bool:
    # Looking at values on a GPU would wait for it.
    return not value.is_cuda or os.environ.get("R2VPO_KERNELS_VALIDATE") == "1"


@torch.library.custom_op("r2vpo_kernels::check", mutates_args=())
def check(value: Tensor, ok: Tensor, shown: Tensor, name: str, expected: str) -> Tensor:
    """`value`, having made sure of `ok` (0-dim or like value): an op, to survive torch.compile.

    On a CPU it raises. On a GPU a float value becomes NaN where it is not ok, unless
    R2VPO_KERNELS_VALIDATE=1 asks for the error.
    """
    if _looks(value) and not ok.all():
        got = str(shown.tolist())
        if ok.dim():
            at = int((~ok).reshape(-1).nonzero()[0])
            got = f"{shown.reshape(-1)[at].item()} at {at}"
        raise ValueError(f"{name}: got {got}, expected {expected}")
    if not value.is_floating_point():
        return value.clone()
    return torch.where(ok, value, torch.nan)


@check.register_fake
def _(value, ok, shown, name, expected):
    shape = (
        torch.broadcast_shapes(value.shape, ok.shape) if value.is_floating_point() else value.shape
    )
    return value.new_empty(shape)


def _empty_gradient(logits: Tensor) -> Tensor:
    """An empty tensor like logits, with each row at the same place within 16 bytes.

    The kernels read and write in whole 16-byte words, which only rows that lie alike allow. For
    contiguous logits this is an ordinary contiguous tensor.
    """
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    vector = VECTOR_BYTES // logits.element_size()
    batch, length, vocabulary = logits.shape
    token = vocabulary + (logits.stride(1) - vocabulary) % vector if length > 1 else vocabulary
    row = length * token
    row = row + (logits.stride(0) - row) % vector if batch > 1 else row
    start = logits.storage_offset() % vector
    size = start + (batch - 1) * row + (length - 1) * token + vocabulary
    return logits.new_empty(size).as_strided(logits.shape, (row, token, 1), start)


def _empty_outputs(logits: Tensor, count: int, with_entropy: bool) -> tuple[Tensor, ...]:
    """`count` per-token tensors, then one for the entropy, empty where it is not wanted."""
    tokens = logits.shape[0] * logits.shape[1]
    sizes = [tokens] * count + [tokens if with_entropy else 0]
    return tuple(logits.new_empty(size, dtype=torch.float32) for size in sizes)


# The ops. What is per token is (N,) float32, labels are int64 with -1 where a row is not to be read
# and V where the label was bad. `entropy` is empty where it is not wanted. A name that ends in _
# writes the gradient over the logits.

_FORWARD = "Tensor labels, Tensor temperature, bool with_entropy, str backend"
_BACKWARD = """Tensor labels, Tensor temperature, Tensor logps, Tensor lse, Tensor entropy,
    Tensor grad_logps, Tensor grad_entropy, bool with_entropy, str backend"""
_ONE_PASS = """Tensor labels, Tensor temperature, Tensor weight, Tensor? old_logps,
    Tensor advantages, Tensor variance_coef, Tensor center, Tensor? ref_logps, Tensor kl_coef,
    Tensor entropy_coef, Tensor log_ratio_clamp, str kl_estimator, bool with_entropy, str backend"""


def _op(name: str, schema: str, mutates_args: tuple[str, ...] = ()):
    return torch.library.custom_op(
        f"r2vpo_kernels::{name}", mutates_args=mutates_args, schema=" ".join(schema.split())
    )


@_op("logps_forward", f"(Tensor logits, {_FORWARD}) -> (Tensor, Tensor, Tensor)")
def logps_forward(logits, labels, temperature, with_entropy, backend):
    """(logps, the kernel's own logsumexp, entropy)."""
    outputs = _empty_outputs(logits, 2, with_entropy)
    _KERNELS[backend].logps_forward(logits, labels, temperature, *outputs, with_entropy)
    return outputs


@logps_forward.register_fake
def _(logits, labels, temperature, with_entropy, backend):
    return _empty_outputs(logits, 2, with_entropy)


@_op("logps_backward", f"(Tensor logits, {_BACKWARD}) -> Tensor")
def logps_backward(logits, *rest):
    dlogits = _empty_gradient(logits)
    *tensors, backend = rest
    _KERNELS[backend].logps_backward(logits, dlogits, *tensors)
    return dlogits


@logps_backward.register_fake
def _(logits, *rest):
    return _empty_gradient(logits)


@_op("logps_backward_", f"(Tensor(a!) logits, {_BACKWARD}) -> ()", ("logits",))
def logps_backward_(logits, *rest):
    *tensors, backend = rest
    _KERNELS[backend].logps_backward(logits, logits, *tensors)


@_op("one_pass", f"(Tensor logits, {_ONE_PASS}) -> (Tensor, Tensor, Tensor)")
def one_pass_op(logits, *rest):
    """(logps, entropy, dL/dlogits for an upstream gradient of 1)."""
    *tensors, with_entropy, backend = rest
    outputs = _empty_outputs(logits, 1, with_entropy)
    dlogits = _empty_gradient(logits)
    _KERNELS[backend].one_pass(logits, dlogits, *tensors, *outputs, with_entropy)
    return *outputs, dlogits


@one_pass_op.register_fake
def _(logits, *rest):
    return *_empty_outputs(logits, 1, rest[-2]), _empty_gradient(logits)


@_op("one_pass_", f"(Tensor(a!) logits, {_ONE_PASS}) -> (Tensor, Tensor)", ("logits",))
def one_pass_op_(logits, *rest):
    *tensors, with_entropy, backend = rest
    outputs = _empty_outputs(logits, 1, with_entropy)
    _KERNELS[backend].one_pass(logits, logits, *tensors, *outputs, with_entropy)
    return outputs


@one_pass_op_.register_fake
def _(logits, *rest):
    return _empty_outputs(logits, 1, rest[-2])


@_op("scale_", "(Tensor(a!) dlogits, Tensor upstream, str backend) -> ()", ("dlogits",))
def scale_(dlogits, upstream, backend):
    _KERNELS[backend].scale(dlogits, upstream)


# The autograd Functions.


def _graph_is_kept() -> bool:
    """Whether this backward may run again, so that what was saved must stay as it is."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "r2vpo_kernels: the kernels have no second derivative; create_graph=True needs "
            "backend='eager'"
        )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, with_entropy, inplace, backend):
        logps, lse, entropy = logps_forward(logits, labels, temperature, with_entropy, backend)
        ctx.save_for_backward(logits, labels, temperature, logps, lse, entropy)
        ctx.with_entropy, ctx.inplace, ctx.backend = with_entropy, inplace, backend
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        _refuse_double_backward()
        logits, *saved = ctx.saved_tensors
        # An upstream gradient may be expanded or strided.
        upstream = grad_logps.contiguous(), grad_entropy.contiguous()
        arguments = (*saved, *upstream, ctx.with_entropy, ctx.backend)
        if ctx.inplace and not _graph_is_kept():
            dlogits = logits.detach()
            logps_backward_(dlogits, *arguments)
        else:
            dlogits = logps_backward(logits, *arguments)
        return dlogits, None, None, None, None, None


class _OnePass(torch.autograd.Function):
    """Ties a loss to its gradient, which the one-pass kernel has already found."""

    @staticmethod
    def forward(ctx, logits, loss, dlogits, backend):
        ctx.save_for_backward(dlogits)
        ctx.backend = backend
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        _refuse_double_backward()
        (dlogits,) = ctx.saved_tensors
        if _graph_is_kept():
            dlogits = dlogits.clone()
        scale_(dlogits, upstream.float(), ctx.backend)
        return dlogits, None, None, None


def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 and Eq. 3, differentiable: (logps, entropy or None), each (N,)."""
    if backend == "eager":
        return reference.token_logps(logits, labels, temperature, with_entropy)
    logps, entropy = _TokenLogps.apply(logits, labels, temperature, with_entropy, inplace, backend)
    return logps, entropy if with_entropy else None


def takes_one_pass(logits: Tensor, backend: str) -> bool:
    """Whether the one-pass kernel serves these logits.

    Not float16: its gradients would underflow before a loss scale reaches them.
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return backend != "eager" and wanted and logits.dtype != torch.float16


def one_pass(
    logits: Tensor,
    batch: Batch,
    objective: Objective,
    with_entropy: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logps, entropy or None, dL/dlogits), none of them differentiable."""
    values = logits.detach()
    arguments = (
        batch.labels,
        objective.temperature,
        batch.weight,
        objective.old_logps,
        objective.advantages,
        objective.variance_coef,
        objective.center,
        objective.ref_logps,
        objective.kl_coef,
        objective.entropy_coef,
        objective.log_ratio_clamp,
        objective.kl_estimator,
        with_entropy,
        backend,
    )
    if inplace and not torch.compiler.is_compiling():
        logps, entropy = one_pass_op_(values, *arguments)
        dlogits = values
    else:
        logps, entropy, dlogits = one_pass_op(values, *arguments)
    return logps, entropy if with_entropy else None, dlogits


def attach_gradient(logits: Tensor, loss: Tensor, dlogits: Tensor, backend: str) -> Tensor:
    """The loss, whose backward hands `dlogits` to `logits`, scaled by the upstream gradient."""
    return _OnePass.apply(logits, loss, dlogits, backend)
