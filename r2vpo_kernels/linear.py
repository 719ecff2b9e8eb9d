"""The linear route: from hidden states and the LM head, the logits of one chunk after another.

They are a product into a buffer, which the kernels overwrite with their gradient; two more products
take that to the hidden states and the head (Eq. 27, 28). As in ops.py, opaque ops do the work,
autograd Functions stand around them, and `LinearLogits` is what loss.py calls.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from . import ops, reference
from .batch import check_device, check_float, check_labels, check_number, invalid

if TYPE_CHECKING:
    from .batch import Batch
    from .objective import Objective
    from .tensor_parallel import VocabularyShard

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
    """out = scale·(a @ b), added to what out holds if `keep`."""
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
        order, (first, both) = _in_order(scored, active) if compact else (None, (tokens, tokens))
        whole = first if first * token <= budget + saved else 0
        most = chunk_tokens or max(1, budget // token, whole)
        places = _balanced(0, first, most), _balanced(first, both, most)
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

        self.dhidden = hidden.new_zeros(hidden.shape) if wanted[0] else None
        self.dhead = empty(head, *head.shape) if wanted[1] else None
        self.dbias = empty(bias, head.shape[0], 1) if wanted[2] else None
        self.begun = False

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
        if self.dhidden is not None:
            out = self.dhidden.new_empty(self.chunk.shape)
            self.dhidden[rows] = _product(dz, self.weight, scale, out)
        if self.dhead is not None:
            _product(dz.t(), self.chunk, scale, self.dhead, self.begun)
        if self.dbias is not None:
            ones = self.chunk.new_ones(self.chunk.shape[0], 1)
            _product(dz.t(), ones, scale, self.dbias, self.begun)
        self.begun = True

    def gradients(self):
        """Of hidden states, head and bias, in their dtypes; empty where not wanted."""
        # Before there is another tensor of the head's size.
        self.buffers = None
        dbias = None if self.dbias is None else self.dbias.squeeze(1)
        return tuple(
            self.hidden.new_empty(0) if total is None else total.to(dtype)
            for total, dtype in zip((self.dhidden, self.dhead, dbias), self.dtypes, strict=True)
        )


# The ops. What is per token is (N,), and is checked by the ops of ops.py, chunk by chunk. `wanted`:
# which gradients of (hidden, head, bias) are to be found; the others are empty.

_HEAD = """Tensor hidden, Tensor head, Tensor? bias, float? softcap, float scale,
    ScalarType dtype, int chunk_tokens, bool compact, bool[] wanted"""
_GRADIENTS = "Tensor, Tensor, Tensor"


def _parts(arguments):
    """(those of _HEAD, the others)"""
    count = _HEAD.count(",") + 1
    return arguments[:count], arguments[count:]


def _op(name, schema):
    return torch.library.custom_op(
        f"r2vpo_kernels::{name}", mutates_args=(), schema=" ".join(schema.split())
    )


def _zeros(hidden, count, with_entropy):
    """As `ops.empty_outputs`, but zeros: what tokens in no chunk get."""
    return tuple(x.zero_() for x in ops.empty_outputs(hidden.unsqueeze(0), count, with_entropy))


def _empty_gradients(hidden, head, bias, *rest):
    *_, wanted = rest
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
    head, (labels, temperature, with_entropy, backend) = _parts(arguments)
    products = _Products(*head, labels >= 0, labels >= 0)
    outputs = _zeros(products.hidden, 3, with_entropy)
    for rows in products.active:
        of_chunk = labels[rows], temperature[rows]
        parts = ops.logps_forward(products.logits(rows), *of_chunk, with_entropy, backend)
        _place(outputs, rows, parts)
    return outputs


@linear_logps_forward.register_fake
def _(hidden, *rest):
    return _zeros(hidden, 3, rest[-2])


@_op("linear_logps_backward", f"({_HEAD}, {ops.BACKWARD}) -> ({_GRADIENTS})")
def linear_logps_backward(*arguments):
    """The logits once more, and their gradient, of tokens that get one from above."""
    head, (*per_token, with_entropy, backend) = _parts(arguments)
    labels, (grad_logps, grad_entropy) = per_token[0], per_token[-2:]
    active = grad_logps != 0
    if with_entropy:
        active = active | (grad_entropy != 0)
    products = _Products(*head, labels >= 0, active)
    for rows in products.active:
        of_chunk = [x[rows] if x.numel() else x for x in per_token]
        ops.logps_backward_(products.logits(rows), *of_chunk, with_entropy, backend)
        products.add_gradients(rows)
    return products.gradients()


@linear_logps_backward.register_fake
def _(*arguments):
    head, _ = _parts(arguments)
    return _empty_gradients(*head)


_ONE_PASS = ops.ONE_PASS.replace("Tensor weight", "Tensor token_weight")


@_op(
    "linear_one_pass",
    f"({_HEAD}, Tensor known_zero, {_ONE_PASS}) -> (Tensor, Tensor, {_GRADIENTS})",
)
def linear_one_pass(*arguments):
    """(logps, entropy, and the gradients for an upstream gradient of 1)."""
    head, (known_zero, labels, temperature, *rest) = _parts(arguments)
    *per_token, kl_coef, entropy_coef, log_ratio_clamp, kl_estimator, with_entropy, backend = rest
    numbers = kl_coef, entropy_coef, log_ratio_clamp, kl_estimator
    products = _Products(*head, labels >= 0, ~known_zero)
    outputs = _zeros(products.hidden, 1, with_entropy)
    for rows in products.active:
        of_chunk = (
            labels[rows],
            temperature[rows],
            *(x if x is None else x[rows] for x in per_token),
        )
        parts = ops.one_pass_op_(products.logits(rows), *of_chunk, *numbers, with_entropy, backend)
        _place(outputs, rows, parts)
        products.add_gradients(rows)
    for rows in products.passive:
        of_chunk = labels[rows], temperature[rows]
        logps, _, _, entropy = ops.logps_forward(
            products.logits(rows), *of_chunk, with_entropy, backend
        )
        _place(outputs, rows, (logps, entropy))
    return *outputs, *products.gradients()


@linear_one_pass.register_fake
def _(*arguments):
    head, _ = _parts(arguments)
    return *_zeros(arguments[0], 1, arguments[-2]), *_empty_gradients(*head)


# The autograd Functions.


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, *arguments):
        *options, labels, temperature, with_entropy, backend, shard = arguments
        nothing = [False] * 3
        forward = functools.partial(linear_logps_forward, hidden, head, bias, *options, nothing)
        saved = ops.sharded_logps_forward(
            forward, shard, labels, temperature, with_entropy, backend
        )
        ctx.save_for_backward(hidden, head, bias, *saved)
        ctx.options, ctx.with_entropy, ctx.backend = options, with_entropy, backend
        ctx.shard, ctx.others = shard, len(arguments)
        *_, logps, _, _, entropy = saved
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        ops.refuse_double_backward()
        hidden, head, bias, *saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        upstream = grad_logps.contiguous(), grad_entropy.contiguous()
        dhidden, *others = linear_logps_backward(
            hidden, head, bias, *ctx.options, wanted, *saved, *upstream, ctx.with_entropy,
            ctx.backend,
        )  # fmt: skip
        if ctx.shard is not None and wanted[0]:
            # Each rank has found what comes from its own words.
            dhidden = ctx.shard.sum(dhidden)
        gradients = dhidden, *others
        chosen = (x if wants else None for x, wants in zip(gradients, wanted, strict=True))
        return *chosen, *[None] * ctx.others


class _LinearOnePass(torch.autograd.Function):
    """As _OnePass of ops.py: a zero carries what forward found."""

    @staticmethod
    def forward(ctx, hidden, head, bias, *arguments):
        logps, entropy, *gradients = linear_one_pass(hidden, head, bias, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.backend, ctx.others = arguments[-1], len(arguments)
        ctx.mark_non_differentiable(logps, entropy)
        ctx.set_materialize_grads(False)
        return logps.new_zeros(()), logps, entropy

    @staticmethod
    def backward(ctx, upstream, *_):
        ops.refuse_double_backward()
        gradients = []
        for gradient, wants in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True):
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
    shard: VocabularyShard | None = None

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
        sharded: bool,
        backend: str,
    ) -> LinearLogits:
        _check_dense("hidden", hidden)
        if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
            raise invalid("hidden", hidden, "shape (B, T, H), or (N, H) packed, with H at least 1")
        width = hidden.shape[-1]
        check_labels(labels, hidden.shape[:-1], "hidden less H")
        weight, bias = _head(weight, bias)
        for name, value in (("weight", weight), ("bias", bias)):
            if sharded and isinstance(value, DTensor):
                raise invalid(name, "a DTensor", "this rank's rows (to_local()) with tp_group")
        weight = _gathered(weight, hidden.dtype)
        _check_dense("weight", weight)
        if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
            raise invalid("weight", weight, f"shape (V, {width}), H that of hidden")
        if bias is not None:
            bias = _gathered(bias, hidden.dtype)
            _check_dense("bias", bias)
            if bias.shape != weight.shape[:1]:
                raise invalid("bias", bias, f"shape ({weight.shape[0]},), one per row of weight")
        dtype = _common_dtype(hidden, weight, bias)
        if softcap is not None:
            check_number("softcap", softcap)
            if not softcap > 0:
                raise invalid("softcap", softcap, "a number above 0, or None")
        check_number("logit_scale", logit_scale)
        whole = isinstance(chunk_tokens, int) and not isinstance(chunk_tokens, bool)
        if chunk_tokens is not None and not (whole and chunk_tokens >= 1):
            raise invalid("chunk_tokens", chunk_tokens, "a whole number of at least 1, or None")
        if not isinstance(compact, bool):
            raise TypeError(f"compact: got {type(compact).__name__}, expected True or False")
        return LinearLogits(
            hidden.reshape(-1, width),
            weight,
            bias,
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
    def vocabulary(self) -> int:
        """Of the shard, if it is one."""
        return self.weight.shape[0]

    @property
    def like(self) -> Tensor:
        """What has the dtype and the device of the rest."""
        return self.hidden

    @property
    def kind(self) -> str:
        """What has to be alike where shards meet: the last, for the gradient is summed."""
        sums = torch.is_grad_enabled() and self.hidden.requires_grad
        options = f"bias {self.bias is not None}, softcap {self.softcap}, scale {self.logit_scale}"
        return f"{self.dtype}, {self.backend}, {options}, gradient of hidden {sums}"

    @property
    def takes_one_pass(self) -> bool:
        inputs = self.hidden, self.weight, self.bias
        return ops.takes_one_pass(self.dtype, self.backend, self.shard, *inputs)

    def token_logps(
        self, labels: Tensor, temperature: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Eq. 1 and Eq. 3, differentiable: (logps, entropy or None), each (N,)."""
        if self.backend == "eager":
            hidden = torch.where((labels >= 0)[:, None], self.hidden, 0)
            weight, bias = self.weight, self.bias
            if self.shard is not None:
                labels, weight = self.shard.checked(labels), self.shard.gather(weight, 0)
                bias = None if bias is None else self.shard.gather(bias, 0)
            logits = reference.linear_logits(hidden, weight, bias, self.softcap, self.logit_scale)
            return reference.token_logps(logits, labels, temperature, with_entropy)
        logps, entropy = _LinearTokenLogps.apply(
            self.hidden, self.weight, self.bias, *self._options, labels, temperature, with_entropy,
            self.backend, self.shard,
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


def _head(weight: Tensor | nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head that is given as a module brings its own bias, and must be no more than linear."""
    if not isinstance(weight, nn.Module):
        return weight, bias
    # An adapter has a class of its own, a patch is an attribute, and so is a weight that a hook
    # makes (weight_norm, prune).
    if (
        not isinstance(weight, nn.Linear)
        or type(weight).forward is not nn.Linear.forward
        or any(name in weight.__dict__ for name in ("forward", "weight", "bias"))
    ):
        raise TypeError(
            f"weight: got a {type(weight).__module__}.{type(weight).__qualname__} that may compute "
            "more than torch.nn.Linear, expected a tensor (V, H) or a plain torch.nn.Linear: merge "
            "and unload an adapter first, or give r2vpo_loss the logits"
        )
    if bias is not None:
        raise invalid("bias", bias, "None where weight is a module, which brings its own")
    return weight.weight, weight.bias


def _gathered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A sharded parameter (FSDP2) as a whole, in the dtype that FSDP2's mixed precision would have.

    Its gradient is reduced to the ranks' mean. That is what FSDP2 makes of every other gradient,
    and what ranks that computed the same (tensor parallelism) must make of theirs.
    """
    if not isinstance(x, DTensor):
        return x
    cast_first = cast(DTensor, x.to(dtype))
    return cast_first.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def _check_dense(name: str, value: Tensor) -> None:
    check_float(name, value)
    # A tensor that holds others: quantised, or distributed.
    wraps = hasattr(value, "__tensor_flatten__")
    if wraps or value.layout != torch.strided or value.is_quantized:
        kind = type(value).__name__ if wraps else f"{value.layout} {value.dtype} tensor"
        raise TypeError(f"{name}: got a {kind}, expected a plain, dense tensor of floats")


def _common_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """That of all three; under autocast its own, as `torch.nn.functional.linear` has it."""
    named = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in named.items():
        check_device(name, value, hidden.device)
    kind = hidden.device.type
    # Of a device that knows no autocast, torch raises when it is asked.
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    casts = casts and hidden.dtype != torch.float64
    for name, value in named.items():
        if value.dtype != hidden.dtype and not (casts and value.dtype in ops.KERNEL_DTYPES):
            raise invalid(name, value, f"{hidden.dtype}, the dtype of hidden, or autocast")
    return torch.get_autocast_dtype(kind) if casts else hidden.dtype
