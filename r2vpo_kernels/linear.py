"""The linear route: from hidden states and the LM head, the logits of one chunk after another.

They are a product into a buffer, which the kernels overwrite with their gradient; two more products
take that to the hidden states and the head (Eq. 27, 28). As in ops.py, opaque ops do the work,
autograd Functions stand around them, and `LinearLogits` is what loss.py calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from . import ops, reference
from .batch import check_device, check_float, check_labels, check_number, invalid

if TYPE_CHECKING:
    from .batch import Batch
    from .objective import Objective

# Bytes that the logits of a chunk may take, unless one chunk is to hold all tokens.
CHUNK_BYTES = {"cpu": 2**28, "elsewhere": 2**30}
# Elements at a time, where a temporary of all would be large.
TILE = {"cpu": 2**21, "elsewhere": 2**25}


def _of_device(table, x):
    return table.get(x.device.type, table["elsewhere"])


def _balanced(begin, end, most):
    """Slices of equal length, of `most` at most."""
    number = -(-(end - begin) // most)
    size = -(-(end - begin) // number) if number else 1
    return [slice(at, min(at + size, end)) for at in range(begin, end, size)]


def _blocks(rows, width, x):
    """Slices of rows of `width` elements, a tile each."""
    return _balanced(0, rows, max(1, _of_device(TILE, x) // width))


def _product(a, b, scale, out, keep=False):
    """out = scale·(a @ b), added to what out holds if `keep`; float32 inside, rounded once."""
    beta = 1 if keep else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=scale, out=out)
    elif out.is_cuda and out.dtype == torch.float32 and torch.version.hip is None:
        torch.addmm(out, a, b, beta=beta, alpha=scale, out_dtype=torch.float32, out=out)
    else:
        # A product of halves comes rounded to them here: by blocks, without a second tensor.
        for rows in _blocks(*out.shape, out):
            part = _product(a[rows], b, scale, a.new_empty(out[rows].shape))
            if keep:
                out[rows] += part
            else:
                out[rows] = part
    return out


def _in_order(scored, active):
    """(the active tokens, then the other scored ones, then the rest; how many are active, scored).

    None for the order where all tokens are active. Counting is what waits for a GPU, once.
    """
    active = active & scored
    counts = torch.stack([active.sum(), scored.sum()]).tolist()
    if counts[0] == scored.shape[0]:
        return None, counts
    return torch.where(active, 0, torch.where(scored, 1, 2)).argsort(stable=True), counts


class _Products:
    """The products of one call, in buffers that serve one chunk of tokens after another.

    scored (N,): which tokens have a label. active (N,): which of them add to the gradient. In
    `self.active` and `self.passive` are the chunks of these and of the other scored tokens, each a
    slice or an index. With compact=False all tokens are active: the kernels take a label below 0.
    """

    def __init__(
        self, hidden, head, bias, softcap, scale, dtype, chunk_tokens, compact, wanted, scored,
        active,
    ):  # fmt: skip
        self.weight, self.bias = head.to(dtype), None if bias is None else bias.to(dtype)
        self.softcap, self.scale, self.dtypes = softcap, scale, [hidden.dtype, head.dtype]
        self.dtypes.append(None if bias is None else bias.dtype)
        # What stands at a masked token must not meet its gradient of 0 in a product.
        self.hidden = hidden if compact else torch.where(scored[:, None], hidden, 0)

        # A gradient passes a softcap by its slope, which takes a buffer too.
        buffers = 2 if softcap is not None and any(wanted) else 1
        token = buffers * head.shape[0] * dtype.itemsize
        budget = _of_device(CHUNK_BYTES, hidden)
        # One chunk saves the float32 accumulator, unless the gradient is one itself.
        saved = 4 * head.numel() if wanted[1] and head.dtype != torch.float32 else 0
        tokens = hidden.shape[0]
        order, (active, scored) = _in_order(scored, active) if compact else (None, (tokens, tokens))
        whole = active if active * token <= budget + saved else 0
        most = chunk_tokens or max(1, budget // token, whole)
        places = _balanced(0, active, most), _balanced(active, scored, most)
        self.active, self.passive = (
            [place if order is None else order[place] for place in chunks] for chunks in places
        )
        longest = max((p.stop - p.start for chunks in places for p in chunks), default=0)
        self.buffers = ops.advise_huge_pages(self.weight.new_empty(buffers, longest, head.shape[0]))

        def empty(x, *shape):
            # A sum over several chunks is float32; what is one product is rounded once.
            dtype = x.dtype if len(self.active) == 1 else torch.float32
            if not self.active:
                return x.new_zeros(shape)
            return ops.advise_huge_pages(x.new_empty(shape, dtype=dtype))

        self.dhidden = torch.zeros_like(hidden) if wanted[0] else None
        self.dhead = empty(head, *head.shape) if wanted[1] else None
        self.dbias = empty(bias, head.shape[0], 1) if wanted[2] else None

    def logits(self, rows):
        """Eq. 27: (1, n, V), for the kernels to read or to overwrite, until the next chunk."""
        self.chunk = self.hidden[rows].to(self.weight.dtype)
        z = self.buffers[0, : self.chunk.shape[0]]
        if self.bias is None:
            _product(self.chunk, self.weight.t(), self.scale, z)
        else:
            scale = self.scale
            torch.addmm(self.bias, self.chunk, self.weight.t(), beta=scale, alpha=scale, out=z)
        if self.softcap is not None:
            for block in _blocks(*z.shape, z):
                t = torch.tanh(z[block].float() / self.softcap)
                z[block] = self.softcap * t
                if len(self.buffers) == 2:
                    self.buffers[1, block] = 1 - t * t
        return z.unsqueeze(0)

    def add_gradients(self, rows):
        """Eq. 28, from the gradient that has taken the place of the logits of these rows."""
        dz, scale = self.buffers[0, : self.chunk.shape[0]], self.scale
        if self.softcap is not None:
            dz *= self.buffers[1, : self.chunk.shape[0]]
        further = rows is not self.active[0]
        if self.dhidden is not None:
            out = self.dhidden.new_empty(self.chunk.shape)
            self.dhidden[rows] = _product(dz, self.weight, scale, out)
        if self.dhead is not None:
            _product(dz.t(), self.chunk, scale, self.dhead, further)
        if self.dbias is not None:
            ones = self.chunk.new_ones(self.chunk.shape[0], 1)
            _product(dz.t(), ones, scale, self.dbias, further)

    def gradients(self):
        """Of hidden states, head and bias, in their dtypes; empty where not wanted."""
        # Before there is another tensor of the head's size.
        self.buffers = None
        dbias = None if self.dbias is None else self.dbias.squeeze(1)
        return tuple(
            self.weight.new_empty(0) if total is None else total.to(dtype)
            for total, dtype in zip((self.dhidden, self.dhead, dbias), self.dtypes, strict=True)
        )


# The ops. What is per token is (N,), and is checked by the ops of ops.py, chunk by chunk. `wanted`:
# which gradients of (hidden, head, bias) are to be found; the others are empty.

_HEAD = """Tensor hidden, Tensor head, Tensor? bias, float? softcap, float scale,
    ScalarType dtype, int chunk_tokens, bool compact, bool[] wanted"""
_IN_HEAD = _HEAD.count(",") + 1
_GRADIENTS = "Tensor, Tensor, Tensor"


def _op(name, schema):
    return torch.library.custom_op(
        f"r2vpo_kernels::{name}", mutates_args=(), schema=" ".join(schema.split())
    )


def _zeros(hidden, count, with_entropy):
    """`count` per-token tensors, then one for the entropy, empty where it is not wanted."""
    tokens = hidden.shape[0]
    sizes = [tokens] * count + [tokens if with_entropy else 0]
    return tuple(hidden.new_zeros(size, dtype=torch.float32) for size in sizes)


def _empty_gradients(hidden, head, bias, *rest):
    wanted = rest[_IN_HEAD - 4]
    return tuple(
        x.new_empty(x.shape) if wants else hidden.new_empty(0)
        for x, wants in zip((hidden, head, bias), wanted, strict=True)
    )


def _place(outputs, rows, parts):
    for output, part in zip(outputs, parts, strict=True):
        # An entropy that is not wanted is empty.
        if part.numel():
            output[rows] = part


@_op("linear_logps_forward", f"({_HEAD}, {ops.FORWARD}) -> (Tensor, Tensor, Tensor, Tensor)")
def linear_logps_forward(*arguments):
    """(logps, top, log2 total, entropy), as `logps_forward`."""
    labels, temperature, with_entropy, backend = arguments[_IN_HEAD:]
    products = _Products(*arguments[:_IN_HEAD], labels >= 0, labels >= 0)
    outputs = _zeros(products.hidden, 3, with_entropy)
    for rows in products.active:
        z = products.logits(rows)
        parts = ops.logps_forward(z, labels[rows], temperature[rows], with_entropy, backend)
        _place(outputs, rows, parts)
    return outputs


@linear_logps_forward.register_fake
def _(hidden, *rest):
    return _zeros(hidden, 3, rest[-2])


@_op("linear_logps_backward", f"({_HEAD}, {ops.BACKWARD}) -> ({_GRADIENTS})")
def linear_logps_backward(*arguments):
    """The logits once more, and their gradient, of tokens that get one from above."""
    *per_token, with_entropy, backend = arguments[_IN_HEAD:]
    labels, (grad_logps, grad_entropy) = per_token[0], per_token[-2:]
    active = grad_logps != 0
    if with_entropy:
        active = active | (grad_entropy != 0)
    products = _Products(*arguments[:_IN_HEAD], labels >= 0, active)
    for rows in products.active:
        z = products.logits(rows)
        of_chunk = [x[rows] if x.numel() else x for x in per_token]
        ops.logps_backward_(z, *of_chunk, with_entropy, backend)
        products.add_gradients(rows)
    return products.gradients()


@linear_logps_backward.register_fake
def _(*arguments):
    return _empty_gradients(*arguments)


_ONE_PASS = ops.ONE_PASS.replace("Tensor weight", "Tensor token_weight")


@_op(
    "linear_one_pass",
    f"({_HEAD}, Tensor known_zero, {_ONE_PASS}) -> (Tensor, Tensor, {_GRADIENTS})",
)
def linear_one_pass(*arguments):
    """(logps, entropy, and the gradients for an upstream gradient of 1)."""
    known_zero, *per_token = arguments[_IN_HEAD:-6]
    rest = arguments[-6:]
    (labels, temperature), (with_entropy, backend) = per_token[:2], rest[-2:]
    products = _Products(*arguments[:_IN_HEAD], labels >= 0, ~known_zero)
    outputs = _zeros(products.hidden, 1, with_entropy)
    for rows in products.active:
        z = products.logits(rows)
        of_chunk = [x if x is None else x[rows] for x in per_token]
        _place(outputs, rows, ops.one_pass_op_(z, *of_chunk, *rest))
        products.add_gradients(rows)
    for rows in products.passive:
        z = products.logits(rows)
        parts = ops.logps_forward(z, labels[rows], temperature[rows], with_entropy, backend)
        _place(outputs, rows, (parts[0], parts[3]))
    return *outputs, *products.gradients()


@linear_one_pass.register_fake
def _(*arguments):
    return *_zeros(arguments[0], 1, arguments[-2]), *_empty_gradients(*arguments)


# The autograd Functions.


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, *arguments):
        *options, labels, temperature, with_entropy, backend = arguments
        nothing = [False] * 3
        saved = linear_logps_forward(
            hidden, head, bias, *options, nothing, labels, temperature, with_entropy, backend
        )
        ctx.save_for_backward(hidden, head, bias, labels, temperature, *saved)
        ctx.options, ctx.with_entropy, ctx.backend = options, with_entropy, backend
        ctx.others = len(arguments)
        logps, _, _, entropy = saved
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        ops.refuse_double_backward()
        hidden, head, bias, *saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        upstream = grad_logps.contiguous(), grad_entropy.contiguous()
        gradients = linear_logps_backward(
            hidden, head, bias, *ctx.options, wanted, *saved, *upstream, ctx.with_entropy,
            ctx.backend,
        )  # fmt: skip
        chosen = (x if wants else None for x, wants in zip(gradients, wanted, strict=True))
        return *chosen, *[None] * ctx.others


class _LinearOnePass(torch.autograd.Function):
    """As _OnePass of ops.py: a zero carries what forward found."""

    @staticmethod
    def forward(ctx, hidden, head, bias, *arguments):
        logps, entropy, *gradients = linear_one_pass(hidden, head, bias, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.wanted, ctx.backend = arguments[_IN_HEAD - 4], arguments[-1]
        ctx.others = len(arguments)
        ctx.mark_non_differentiable(logps, entropy)
        ctx.set_materialize_grads(False)
        return logps.new_zeros(()), logps, entropy

    @staticmethod
    def backward(ctx, upstream, *_):
        ops.refuse_double_backward()
        gradients = []
        for gradient, wants in zip(ctx.saved_tensors, ctx.wanted, strict=True):
            if wants:
                rows = gradient.view(1, -1, gradient.shape[-1])
                gradients.append(ops.hand_over(rows, upstream, ctx.backend).view_as(gradient))
            else:
                gradients.append(None)
        return *gradients, *[None] * ctx.others


@dataclass(frozen=True)
class LinearLogits:
    """The logits of hidden states (N, H) by a head (V, H), which do not exist as a whole."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype  # of the products and of the logits
    chunk_tokens: int  # 0: by CHUNK_BYTES
    compact: bool
    backend: str

    @staticmethod
    def build(
        hidden: Tensor,
        weight: Tensor | nn.Module,
        labels: Tensor,
        *,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        chunk_tokens: int | None,
        compact: bool,
        backend: str,
    ) -> LinearLogits:
        _check_hidden(hidden, labels)
        weight, bias = _head(weight, bias)
        vocabulary, width = _check_dense("weight", weight, 2)
        if width != hidden.shape[-1] or vocabulary == 0:
            raise invalid("weight", weight, f"shape (V, {hidden.shape[-1]}), H that of hidden")
        if bias is not None and _check_dense("bias", bias, 1) != (vocabulary,):
            raise invalid("bias", bias, f"shape ({vocabulary},), one per row of weight")
        dtype = _common_dtype(hidden, weight, bias)
        if softcap is not None:
            check_number("softcap", softcap)
            if not softcap > 0:
                raise invalid("softcap", softcap, "a number above 0, or None")
        check_number("logit_scale", logit_scale)
        if chunk_tokens is not None and not (isinstance(chunk_tokens, int) and chunk_tokens >= 1):
            raise invalid("chunk_tokens", chunk_tokens, "a whole number of at least 1, or None")
        if not isinstance(compact, bool):
            raise TypeError(f"compact: got {type(compact).__name__}, expected True or False")
        return LinearLogits(
            hidden.reshape(-1, width),
            _gathered(weight),
            None if bias is None else _gathered(bias),
            None if softcap is None else float(softcap),
            float(logit_scale),
            dtype,
            chunk_tokens or 0,
            compact,
            ops.choose_backend(backend, hidden),
        )

    @property
    def _options(self) -> tuple[Any, ...]:
        return self.softcap, self.logit_scale, self.dtype, self.chunk_tokens, self.compact

    @property
    def takes_one_pass(self) -> bool:
        return ops.takes_one_pass(self.dtype, self.backend, self.hidden, self.weight, self.bias)

    def token_logps(
        self, labels: Tensor, temperature: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Eq. 1 and Eq. 3, differentiable: (logps, entropy or None), each (N,)."""
        if self.backend == "eager":
            hidden = torch.where((labels >= 0)[:, None], self.hidden, 0)
            logits = reference.linear_logits(
                hidden, self.weight, self.bias, self.softcap, self.logit_scale
            )
            return reference.token_logps(logits, labels, temperature, with_entropy)
        logps, entropy = _LinearTokenLogps.apply(
            self.hidden, self.weight, self.bias, *self._options, labels, temperature, with_entropy,
            self.backend,
        )  # fmt: skip
        return logps, entropy if with_entropy else None

    def one_pass(
        self, batch: Batch, objective: Objective, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(a zero that carries the gradients, logps, entropy or None)."""
        inputs = self.hidden, self.weight, self.bias
        wanted = [x is not None and x.requires_grad for x in inputs]
        carrier, logps, entropy = _LinearOnePass.apply(
            *inputs, *self._options, wanted, objective.known_zero,
            *ops.one_pass_arguments(batch, objective), with_entropy, self.backend,
        )  # fmt: skip
        return carrier, logps, entropy if with_entropy else None


def _check_hidden(hidden: Tensor, labels: Tensor) -> None:
    check_float("hidden", hidden)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        raise invalid("hidden", hidden, "shape (B, T, H), or (N, H) packed, with H of at least 1")
    if isinstance(hidden, DTensor):
        raise invalid("hidden", "a DTensor", "a plain tensor: its to_local() or full_tensor()")
    check_labels(labels, hidden.shape[:-1], "hidden less H")


def _head(weight: Tensor | nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head that is given as a module brings its own bias, and must be no more than linear."""
    if not isinstance(weight, nn.Module):
        return weight, bias
    # An adapter brings a class of its own, a patch a function of the instance.
    if (
        not isinstance(weight, nn.Linear)
        or type(weight).forward is not nn.Linear.forward
        or "forward" in weight.__dict__
    ):
        name = f"{type(weight).__module__}.{type(weight).__qualname__}"
        raise TypeError(
            f"weight: got a {name}, which does not compute what torch.nn.Linear does, expected a "
            "tensor (V, H) or a torch.nn.Linear: merge an adapter into its layer first, or give "
            "r2vpo_loss the logits"
        )
    if bias is not None:
        raise invalid("bias", bias, "None where weight is a module, which brings its own")
    return weight.weight, weight.bias


def _check_dense(name: str, value: Tensor, dims: int) -> torch.Size:
    check_float(name, value)
    # Of the subclasses that hold other tensors, quantised ones among them, one is known here.
    wraps = hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor)
    if wraps or value.layout != torch.strided or value.is_quantized:
        kind = type(value).__name__ if wraps else f"{value.layout} {value.dtype} tensor"
        raise TypeError(f"{name}: got a {kind}, expected a dense tensor of floats")
    if value.dim() != dims:
        raise invalid(name, value, "shape (V, H)" if dims == 2 else "shape (V,)")
    return value.shape


def _common_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """That of all three; under autocast its own, as `torch.nn.functional.linear` has it."""
    named = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in named.items():
        check_device(name, value, hidden.device)
    kind = hidden.device.type
    casts = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    for name, value in named.items():
        if value.dtype != hidden.dtype and not (casts and value.dtype in ops.KERNEL_DTYPES):
            raise invalid(name, value, f"{hidden.dtype}, the dtype of hidden, or autocast")
    return torch.get_autocast_dtype(kind) if casts else hidden.dtype


def _gathered(x: Tensor) -> Tensor:
    """A sharded parameter (FSDP2) as a whole; its gradient is reduced to the ranks' mean.

    The mean is what FSDP2 makes of every other gradient, and what ranks that computed the same
    (tensor parallelism) must make of theirs.
    """
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)
