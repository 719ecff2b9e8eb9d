"""Registered ops over logits, the autograd Functions around them, and the choice of backend.

The ops are opaque to torch.compile and carry no autograd of their own: `Logits` at the end is what
the rest of the package calls; linear.py builds the same on top of the ops that overwrite logits.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .batch import Batch
    from .objective import Objective
    from .tensor_parallel import VocabularyShard

BACKENDS = ("auto", "eager", "triton", "cpp", "cuda")
KL_ESTIMATORS = ("k1", "k2", "k3")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR_BYTES = 16

# (device, dtype, V) for which a file in benchmarks/results shows the CUDA kernels right and faster
# than Triton's; a test holds it to those files.
CUDA_IS_FASTER: frozenset[tuple[str, torch.dtype, int]] = frozenset()

# The modules of kernels, and why one is not here.
KERNELS: dict[str, ModuleType] = {}
_MISSING: dict[str, str] = {}
for _name, _module in (("triton", "triton_kernels"), ("cpp", "cpp"), ("cuda", "cuda")):
    try:
        KERNELS[_name] = importlib.import_module(f".backends.{_module}", __package__)
    except ImportError as _error:
        _MISSING[_name] = f"it cannot be imported ({_error})"


def why_not(backend: str, logits: Tensor) -> str | None:
    """Why a backend cannot take these logits; None if it can."""
    if backend == "eager":
        return None
    if backend in _MISSING:
        return _MISSING[backend]
    if logits.dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, and logits are {logits.dtype}"
    if backend == "cpp" and logits.device.type != "cpu":
        return f"it runs on a CPU, and logits are on {logits.device}"
    if (backend == "triton" and KERNELS["triton"].INTERPRETED) or (
        backend == "cuda" and KERNELS["cuda"].EMULATED
    ):
        return None
    if backend != "cpp" and not logits.is_cuda:
        return f"it runs on a GPU, and logits are on {logits.device}"
    return KERNELS["cuda"].why_not(logits.device) if backend == "cuda" else None


def _cuda_is_faster(logits: Tensor) -> bool:
    # On CUDA_IS_FASTER nothing stands yet, and then no device is asked for its name.
    if not CUDA_IS_FASTER or why_not("cuda", logits):
        return False
    device = torch.cuda.get_device_properties(logits.device).name
    return (device, logits.dtype, logits.shape[-1]) in CUDA_IS_FASTER


def choose_backend(name: str, logits: Tensor) -> str:
    """The backend to run; `auto`: on a GPU CUDA where it is known to be faster, else Triton; on a
    CPU C++; eager where they cannot.
    """
    if not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if name == "auto":
        name = ("cuda" if _cuda_is_faster(logits) else "triton") if logits.is_cuda else "cpp"
        return "eager" if why_not(name, logits) else name
    reason = why_not(name, logits)
    if reason is not None:
        raise ValueError(f"backend: {name!r} is not available: {reason}")
    return name


def advise_huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, a tensor that nobody has touched, in huge pages where it is a CPU's memory."""
    if fresh.device.type == "cpu" and "cpp" in KERNELS:
        KERNELS["cpp"].advise_huge_pages(fresh)
    return fresh


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


def empty_outputs(logits: Tensor, count: int, with_entropy: bool) -> tuple[Tensor, ...]:
    """`count` per-token tensors, then one for the entropy, empty where it is not wanted."""
    tokens = logits.shape[0] * logits.shape[1]
    sizes = [tokens] * count + [tokens if with_entropy else 0]
    return tuple(logits.new_empty(size, dtype=torch.float32) for size in sizes)


# The ops. What is per token is (N,) float32, labels are int64 with -1 where a row is not to be read
# and V where the label was bad. `entropy` is empty where it is not wanted. A name that ends in _
# writes the gradient over the logits.

FORWARD = "Tensor labels, Tensor temperature, bool with_entropy, str backend"
BACKWARD = """Tensor labels, Tensor temperature, Tensor logps, Tensor top, Tensor log_total,
    Tensor entropy, Tensor grad_logps, Tensor grad_entropy, bool with_entropy, str backend"""
ONE_PASS = """Tensor labels, Tensor temperature, Tensor weight, Tensor? old_logps,
    Tensor advantages, Tensor variance_coef, Tensor center, Tensor? ref_logps, Tensor kl_coef,
    Tensor entropy_coef, Tensor log_ratio_clamp, str kl_estimator, bool with_entropy, str backend"""


_NUMBERS = ("kl_coef", "entropy_coef", "log_ratio_clamp", "upstream")


def _check_arguments(
    backend: str, with_entropy: bool = False, kl_estimator: str = "k3", **tensors: Tensor | None
) -> None:
    """What the kernels take for granted. The entries see to it; an op can be called by anyone."""
    (name, logits), *others = tensors.items()
    assert logits is not None
    whole = logits.dim() == 3 and logits.shape[2] > 0
    if not (whole and (logits.shape[2] == 1 or logits.stride(2) == 1)):
        got = f"shape {tuple(logits.shape)}, strides {logits.stride()}"
        raise ValueError(f"{name}: got {got}, expected (B, T, V) with a contiguous vocabulary")
    if logits.shape[2] >= 2**31:
        raise ValueError(f"{name}: got a vocabulary of {logits.shape[2]}, expected less than 2^31")
    if backend not in KERNELS or why_not(backend, logits):
        expected = f"one of {', '.join(KERNELS)} that takes them"
        raise ValueError(f"backend: got {backend!r} for {logits.dtype} logits, expected {expected}")
    if backend != "cpp" and logits.untyped_storage().data_ptr() % VECTOR_BYTES:
        # `_empty_gradient` would not lie like it.
        raise ValueError(
            f"{name}: got memory that does not begin at a 16-byte boundary, expected memory that "
            "does: clone them"
        )
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: got {kl_estimator!r}, expected one of {KL_ESTIMATORS}")
    tokens = logits.shape[0] * logits.shape[1]
    for name, value in tensors.items():
        # Memory may have been given back under a tensor that lives on.
        if value is not None and value.untyped_storage().nbytes() < _bytes_reached(value):
            held = f"{value.untyped_storage().nbytes()} bytes of storage"
            raise ValueError(f"{name}: got {held}, expected {_bytes_reached(value)} for its shape")
    for name, value in others:
        if value is None:
            continue
        shape: tuple[int, ...] = () if name in _NUMBERS else (tokens,)
        if name in ("entropy", "grad_entropy") and not with_entropy:
            shape = (0,)
        dtype = torch.int64 if name == "labels" else torch.float32
        wanted = (dtype, logits.device, shape, True)
        came = (value.dtype, value.device, tuple(value.shape), value.is_contiguous())
        if came != wanted:
            raise ValueError(f"{name}: got {_described(*came)}, expected {_described(*wanted)}")


def rows_overlap(logits: Tensor) -> bool:
    """Whether rows (B, T) or (N,) share memory."""
    # Each must begin past the end of the one before, in one order or the other.
    rows = zip(logits.shape[:-1], logits.stride()[:-1], strict=True)
    end = logits.shape[-1]
    for n, step in sorted(rows, key=lambda row: row[1]):
        if n > 1 and step < end:
            return True
        end += (n - 1) * step
    return False


def _bytes_reached(x):
    """How far into its storage a tensor reaches."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last + 1) * x.element_size()


def _described(dtype, device, shape, contiguous):
    return f"a {'' if contiguous else 'strided '}{dtype} tensor of shape {shape} on {device}"


def _op(name: str, schema: str, mutates_args: tuple[str, ...] = ()):
    """Register a function of `schema`, which gets arguments that were checked."""
    names = [argument.split()[-1] for argument in schema[1 : schema.index(") ->")].split(",")]

    def register(function):
        def checked(*arguments):
            given = dict(zip(names, arguments, strict=True))
            _check_arguments(**given)
            for name in mutates_args:
                if rows_overlap(given[name]):
                    expected = "rows of their own, for they are overwritten"
                    raise ValueError(f"{name}: got rows that share memory, expected {expected}")
            return function(*arguments)

        return torch.library.custom_op(
            f"r2vpo_kernels::{name}",
            checked,
            mutates_args=mutates_args,
            schema=" ".join(schema.split()),
        )

    return register


@_op("logps_forward", f"(Tensor logits, {FORWARD}) -> (Tensor, Tensor, Tensor, Tensor)")
def logps_forward(logits, labels, temperature, with_entropy, backend):
    """(logps, top, log2 total, entropy): Eq. 14, of which the backward needs the middle two."""
    outputs = empty_outputs(logits, 3, with_entropy)
    KERNELS[backend].logps_forward(logits, labels, temperature, *outputs, with_entropy)
    return outputs


@logps_forward.register_fake
def _(logits, labels, temperature, with_entropy, backend):
    return empty_outputs(logits, 3, with_entropy)


@_op("logps_backward", f"(Tensor logits, {BACKWARD}) -> Tensor")
def logps_backward(logits, *rest):
    dlogits = _empty_gradient(logits)
    *tensors, backend = rest
    KERNELS[backend].logps_backward(logits, dlogits, *tensors)
    return dlogits


@logps_backward.register_fake
def _(logits, *rest):
    return _empty_gradient(logits)


@_op("logps_backward_", f"(Tensor(a!) logits, {BACKWARD}) -> ()", ("logits",))
def logps_backward_(logits, *rest):
    *tensors, backend = rest
    KERNELS[backend].logps_backward(logits, logits, *tensors)


@_op("one_pass", f"(Tensor logits, {ONE_PASS}) -> (Tensor, Tensor, Tensor)")
def one_pass_op(logits, *rest):
    """(logps, entropy, dL/dlogits for an upstream gradient of 1)."""
    *tensors, with_entropy, backend = rest
    outputs = empty_outputs(logits, 1, with_entropy)
    dlogits = _empty_gradient(logits)
    KERNELS[backend].one_pass(logits, dlogits, *tensors, *outputs, with_entropy)
    return *outputs, dlogits


@one_pass_op.register_fake
def _(logits, *rest):
    return *empty_outputs(logits, 1, rest[-2]), _empty_gradient(logits)


@_op("one_pass_", f"(Tensor(a!) logits, {ONE_PASS}) -> (Tensor, Tensor)", ("logits",))
def one_pass_op_(logits, *rest):
    *tensors, with_entropy, backend = rest
    outputs = empty_outputs(logits, 1, with_entropy)
    KERNELS[backend].one_pass(logits, logits, *tensors, *outputs, with_entropy)
    return outputs


@one_pass_op_.register_fake
def _(logits, *rest):
    return empty_outputs(logits, 1, rest[-2])


@_op("scale_", "(Tensor(a!) dlogits, Tensor upstream, str backend) -> ()", ("dlogits",))
def scale_(dlogits, upstream, backend):
    KERNELS[backend].scale(dlogits, upstream)


# The autograd Functions.


def _graph_is_kept() -> bool:
    """Whether this backward may run again, so that what was saved must stay as it is."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def refuse_double_backward(what: str = "the kernels have", needed: str = "backend='eager'") -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"r2vpo_kernels: {what} no second derivative; create_graph=True needs {needed}"
        )


def hand_over(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """What forward found for an upstream gradient of 1, scaled; (B, T, V) like logits."""
    if _graph_is_kept():
        gradient = gradient.clone()
    scale_(gradient, upstream, backend)
    return gradient


def sharded_logps_forward(forward, shard, labels, temperature, *options):
    """What `forward` finds in these logits; of a shard, what all shards find together.

    Returns what a backward takes: (labels, temperature, logps, top, log2 total, entropy).
    """
    if shard is None:
        return labels, temperature, *forward(labels, temperature, *options)
    local = shard.local(labels)
    parts = forward(local, temperature, *options)
    return local, temperature, *shard.combine(labels, temperature, *parts)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, with_entropy, inplace, backend, shard):
        forward = functools.partial(logps_forward, logits)
        options = with_entropy, backend
        saved = sharded_logps_forward(forward, shard, labels, temperature, *options)
        ctx.save_for_backward(logits, *saved)
        ctx.with_entropy, ctx.inplace, ctx.backend = with_entropy, inplace, backend
        *_, logps, _, _, entropy = saved
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        refuse_double_backward()
        logits, *saved = ctx.saved_tensors
        # An upstream gradient may be expanded or strided.
        upstream = grad_logps.contiguous(), grad_entropy.contiguous()
        arguments = (*saved, *upstream, ctx.with_entropy, ctx.backend)
        if ctx.inplace and not _graph_is_kept():
            dlogits = logits.detach()
            logps_backward_(dlogits, *arguments)
        else:
            dlogits = logps_backward(logits, *arguments)
        return dlogits, *[None] * 6


class _OnePass(torch.autograd.Function):
    """The kernel finds the gradient in forward; a zero carries it to whatever it is added to.

    It runs in here because autograd has noted by now where `logits` come from: mutated before, a
    view would be reached by as_strided, whose backward makes two more of it.
    """

    @staticmethod
    def forward(ctx, logits, inplace, *arguments):
        values = logits.detach()
        if inplace:
            logps, entropy = one_pass_op_(values, *arguments)
            dlogits = values
        else:
            logps, entropy, dlogits = one_pass_op(values, *arguments)
        ctx.save_for_backward(dlogits)
        ctx.backend, ctx.others = arguments[-1], 1 + len(arguments)
        ctx.mark_non_differentiable(logps, entropy)
        ctx.set_materialize_grads(False)
        return logps.new_zeros(()), logps, entropy

    @staticmethod
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        (dlogits,) = ctx.saved_tensors
        return hand_over(dlogits, upstream, ctx.backend), *[None] * ctx.others


def takes_one_pass(
    dtype: torch.dtype, backend: str, shard: VocabularyShard | None, *inputs: Tensor | None
) -> bool:
    """Whether the one-pass kernel serves logits of this dtype, made of these inputs.

    Not float16: its gradients would underflow before a loss scale reaches them. Not a shard: its
    coefficients wait for the other ranks.
    """
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return wanted and backend != "eager" and dtype != torch.float16 and shard is None


def one_pass_arguments(batch: Batch, objective: Objective) -> tuple[Tensor | str | None, ...]:
    """What the one-pass ops take between the logits and with_entropy."""
    return (
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
    )


@dataclass(frozen=True)
class Logits:
    """Logits (B, T, V) that are there as a whole, or this rank's shard of them."""

    logits: Tensor
    inplace: bool
    backend: str
    shard: VocabularyShard | None = None

    @property
    def vocabulary(self) -> int:
        """Of the shard, if it is one."""
        return self.logits.shape[-1]

    @property
    def like(self) -> Tensor:
        """What has the dtype and the device of the rest."""
        return self.logits

    @property
    def kind(self) -> str:
        """What has to be alike where shards meet."""
        return f"{self.logits.dtype}, {self.backend}"

    @property
    def takes_one_pass(self) -> bool:
        return takes_one_pass(self.logits.dtype, self.backend, self.shard, self.logits)

    def token_logps(
        self, labels: Tensor, temperature: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Eq. 1 and Eq. 3, differentiable: (logps, entropy or None), each (N,)."""
        if self.backend == "eager":
            logits = self.logits
            if self.shard is not None:
                logits, labels = self.shard.gather(logits, -1), self.shard.checked(labels)
            return reference.token_logps(logits, labels, temperature, with_entropy)
        logps, entropy = _TokenLogps.apply(
            self.logits, labels, temperature, with_entropy, self.inplace, self.backend, self.shard
        )
        return logps, entropy if with_entropy else None

    def one_pass(
        self, batch: Batch, objective: Objective, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(a zero that carries dL/dlogits, logps, entropy or None); only it is differentiable."""
        inplace = self.inplace and not torch.compiler.is_compiling()
        arguments = one_pass_arguments(batch, objective)
        carrier, logps, entropy = _OnePass.apply(
            self.logits, inplace, *arguments, with_entropy, self.backend
        )
        return carrier, logps, entropy if with_entropy else None
