"""Hidden states and the LM head: the logits of one chunk of tokens after another."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..backends import registry
from ..backends.calls import Tokens
from ..batch import Batch
from ..checks import (
    Backend,
    check_count,
    check_device,
    check_float,
    check_integer,
    check_labels,
    check_number,
    check_positive,
    invalid,
)
from ..objective import Objective
from ..sampling import order_by_word
from .adapter import Adapter, joined, read_head
from .autograd import (
    Result,
    dense,
    first_derivative,
    like_labels,
    reference_loss,
    result,
    row_gradients,
    scale_saved_gradient,
    slopes_of,
    takes_one_pass,
    unshared,
)
from .dtensor import gathered, is_dtensor
from .products import INPUTS, Head, Products
from .shard import VocabularyShard, reference_tokens
from .sparse import SparseHead, is_worthwhile

# The ops; the gradients that are not `wanted` are empty. _HEAD: the fields of Head.

_HEAD = """Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b,
    float? softcap, float logit_scale, ScalarType dtype, ScalarType logits_dtype, int chunk_tokens,
    bool compact, bool[] wanted, bool sparse"""
_HEAD_LENGTH = _HEAD.count(",") + 1
_GRADIENTS = ", ".join(["Tensor"] * INPUTS)


def _head_of(arguments: tuple[Any, ...]) -> tuple[Head, tuple[Any, ...]]:
    """(those of _HEAD, the others)"""
    return Head(*arguments[:_HEAD_LENGTH]), arguments[_HEAD_LENGTH:]


def _check_head(head: Head, token_ids: Tensor | None) -> None:
    hidden, weight, bias, lora_a, lora_b = head.inputs
    if hidden.dim() != 2:
        raise invalid("hidden", hidden, "shape (N, H)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise invalid("weight", weight, f"shape (V, {hidden.shape[1]})")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise invalid("bias", bias, f"shape ({weight.shape[0]},)")
    wide = reference.compute_dtype(head.dtype)
    if head.logits_dtype not in (head.dtype, wide):
        raise invalid("logits_dtype", head.logits_dtype, f"{head.dtype} or {wide}")
    if (lora_a is None) != (lora_b is None):
        raise invalid("lora_b", lora_b, "a tensor where lora_a is one")
    if lora_a is not None and lora_b is not None:
        if lora_a.dim() != 2 or lora_a.shape[1] != hidden.shape[1]:
            raise invalid("lora_a", lora_a, f"shape (R, {hidden.shape[1]})")
        if lora_b.shape != (weight.shape[0], lora_a.shape[0]):
            raise invalid("lora_b", lora_b, f"shape ({weight.shape[0]}, {lora_a.shape[0]})")
        for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
            if value.dtype not in (head.dtype, wide) or value.dtype != lora_a.dtype:
                raise invalid(name, value, f"{head.dtype} or {wide}, both the same")
    wanted = head.wanted
    if len(wanted) != INPUTS or any(
        x is None and wants for x, wants in zip(head.inputs, wanted, strict=True)
    ):
        raise invalid("wanted", wanted, f"{INPUTS} booleans, of gradients that there are")
    if head.sparse and (token_ids is None or not head.compact or lora_a is not None):
        raise invalid("sparse", True, "False without a sampling mask or compact, or with lora_a")
    for name, x in zip(head._fields, head.inputs, strict=False):
        if x is not None:
            check_device(name, x, hidden.device)


def _check_call(head: Head, flat: tuple[Any, ...]) -> None:
    hidden, call = head.hidden, ops.Call.of(flat)
    _check_head(head, call.token_ids)
    ops.check_backend(call.backend, hidden.new_empty(0, dtype=head.logits_dtype))
    if call.batch.tokens != hidden.shape[0] or call.batch.labels is None:
        raise invalid("labels", call.batch.labels, f"{hidden.shape[0]} integers")
    call.check(hidden.device)


def _prepare(
    head: Head, layout: Tensor | None, flat: tuple[Any, ...]
) -> tuple[Any, ops.Call, Tokens, Tensor, Tensor, Tensor]:
    """(kernels, call, tokens, their activity, logps, entropy), zeros where no chunk comes."""
    call = ops.Call.of(flat)
    kernels, hidden = registry.load(call.backend), head.hidden
    arguments = ops.arguments_of(call, hidden.device, head.weight.shape[0], layout)
    activity = hidden.new_empty(call.batch.tokens, dtype=torch.uint8)
    arguments.activity, arguments.sparse_head = activity, head.sparse
    tokens = ops.prepare(kernels, call, arguments)
    logps = hidden.new_zeros(call.batch.shape, dtype=torch.float32)
    entropy = torch.zeros_like(logps) if call.with_entropy else logps.new_empty(0)
    return kernels, call, tokens, activity, logps, entropy


def _place(rows: slice | Tensor) -> tuple[Tensor | None, int]:
    """(index, first): which tokens the rows of a chunk are, as the row kernels take it."""
    return (None, rows.start) if isinstance(rows, slice) else (rows, 0)


def _overwrite(kernel: Callable[..., None], logits: Tensor, *arguments: Any) -> None:
    """Put the gradient over the logits, which no name in a caller then keeps alive."""
    kernel(logits, logits, *arguments)


def _empty_gradients(head: Head) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if wants and x is not None else head.hidden.new_empty(0)
        for x, wants in zip(head.inputs, head.wanted, strict=True)
    )


def _check_forward(*arguments: Any) -> None:
    head, (layout, *flat) = _head_of(arguments)
    _check_call(head, tuple(flat))
    ops.check_layout(layout)


@ops.register(
    "linear_logps_forward",
    f"({_HEAD}, Tensor? layout, {ops.CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda hidden, *rest: ops.fake_forward(hidden, rest[_HEAD_LENGTH:]),
    check=_check_forward,
)
def linear_logps_forward(*arguments: Any) -> Any:
    """(workspace, logps, top, log2 total, entropy), as `logps_forward`."""
    head, (layout, *flat) = _head_of(arguments)
    kernels, call, tokens, activity, logps, entropy = _prepare(head, layout, tuple(flat))
    # Without a gradient to come, all tokens that are not masked are alike.
    products = Products(head, activity & 2)
    top, log_total = torch.zeros_like(logps), torch.zeros_like(logps)
    outputs = logps, top, log_total, entropy if call.with_entropy else None
    for rows in products.gradient_chunks:
        kernels.logps_forward(products.logits(rows), tokens, *_place(rows), *outputs)
    if head.sparse:
        sparse = SparseHead(kernels, products, tokens)
        kernels.logps_forward(sparse.logits(), sparse.tokens, None, 0, *outputs)
    return tokens.workspace, logps, top, log_total, entropy


def _check_backward(*arguments: Any) -> None:
    head, rest = _head_of(arguments)
    (
        *saved,
        grad_logps,
        grad_entropy,
        upstream,
        token_ids,
        layout,
        with_entropy,
        backend,
        offsets,
    ) = rest
    hidden = head.hidden
    _check_head(head, token_ids)
    ops.check_layout(layout)
    ops.check_backend(backend, hidden.new_empty(0, dtype=head.logits_dtype))
    names = ("workspace", "logps", "top", "log_total", "entropy")
    ops.check_saved(
        hidden.shape[0], hidden.device, with_entropy, grad_logps=grad_logps,
        grad_entropy=grad_entropy, **dict(zip(names, saved, strict=True)),
    )  # fmt: skip
    ops.check_support(saved[0], hidden.shape[0], token_ids, layout, head.weight.shape[0])
    if head.sparse:
        check_integer("offsets", offsets)
        ops.check_is("offsets", offsets, torch.int64, hidden.device, (hidden.shape[0] + 1,))
    if upstream is not None:
        ops.check_is("upstream", upstream, torch.float32, hidden.device, ())


@ops.register(
    "linear_logps_backward",
    f"({_HEAD}, {ops.BACKWARD}, Tensor? offsets) -> ({_GRADIENTS})",
    fake=lambda *arguments: _empty_gradients(_head_of(arguments)[0]),
    check=_check_backward,
)
def linear_logps_backward(*arguments: Any) -> Any:
    """The logits once more, and their gradient, of tokens that get one from above."""
    head, rest = _head_of(arguments)
    workspace, logps, top, log_total, entropy, grad_logps, grad_entropy, *options = rest
    upstream, token_ids, layout, with_entropy, backend, offsets = options
    kernels = registry.load(backend)
    tokens = ops.row_tokens(workspace, logps.numel(), token_ids, layout)
    idle = grad_logps.reshape(-1) == 0
    if with_entropy:
        idle = idle & (grad_entropy.reshape(-1) == 0)
    if token_ids is not None:
        # The one word of its set has all the probability.
        idle = idle | (tokens.supports[2] == 1)
    activity = torch.where(tokens.labels < 0, 2, idle.to(torch.uint8))
    if head.sparse:
        activity = torch.where(tokens.supports[1] >= 0, 3, activity)
    products = Products(head, activity)
    found = logps, top, log_total, entropy if with_entropy else None
    gradients = grad_logps, grad_entropy if with_entropy else None, upstream
    for rows in products.gradient_chunks:
        _overwrite(
            kernels.logps_backward, products.logits(rows), tokens, *_place(rows), *found, *gradients
        )
        products.add_gradients(rows)
    if head.sparse:
        sparse = SparseHead(kernels, products, tokens)
        _overwrite(
            kernels.logps_backward, sparse.logits(), sparse.tokens, None, 0, *found, *gradients
        )
        sparse.add_gradients(order_by_word(token_ids), offsets)
    return products.gradients()


def _fake_one_pass(*arguments: Any) -> tuple[Tensor, ...]:
    head, flat = _head_of(arguments)
    _, logps, *_, entropy = ops.fake_forward(head.hidden, flat)
    results = ops.empty_results(logps, ops.Call.of(flat).batch.num_groups, False)
    return *results, logps, entropy, *_empty_gradients(head)


@ops.register(
    "linear_one_pass",
    f"({_HEAD}, {ops.CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, {_GRADIENTS})",
    fake=_fake_one_pass,
    check=lambda *arguments: _check_call(*_head_of(arguments)),
)
def linear_one_pass(*arguments: Any) -> Any:
    """(loss, stats, metrics, logps, entropy, and the gradients for an upstream of 1)."""
    head, flat = _head_of(arguments)
    kernels, call, tokens, activity, logps, entropy = _prepare(head, None, flat)
    products = Products(head, activity)
    wanted = entropy if call.with_entropy else None
    for rows in products.gradient_chunks:
        _overwrite(kernels.one_pass, products.logits(rows), tokens, *_place(rows), logps, wanted)
        products.add_gradients(rows)
    if products.forward_only_chunks:
        unused = torch.empty_like(logps), torch.empty_like(logps)
        for rows in products.forward_only_chunks:
            kernels.logps_forward(
                products.logits(rows), tokens, *_place(rows), logps, *unused, wanted
            )
    mask = call.batch.sampling_mask
    if head.sparse and mask is not None:
        sparse = SparseHead(kernels, products, tokens)
        _overwrite(kernels.one_pass, sparse.logits(), sparse.tokens, None, 0, logps, wanted)
        sparse.add_gradients(mask.by_word(), mask.offsets)
    results = ops.finish_tokens(kernels, tokens, logps, wanted, False, False)
    return *results, logps, entropy, *products.gradients()


# The autograd Functions. Their first INPUTS arguments are the first fields of Head.


def _forward(inputs, options, sparse, shard, asked):
    """Of all words, what `linear_logps_forward` finds with these rows of the head."""
    nothing = [False] * INPUTS
    forward = functools.partial(linear_logps_forward, *inputs, *options, nothing, sparse)
    if shard is None:
        return forward(None, *asked)
    return shard.combine(forward(shard.layout, *asked), ops.Call.of(asked))


def _backward(ctx, saved, *gradients):
    """Of the inputs, from those of log-probs and entropies."""
    inputs, (token_ids, offsets, *saved) = saved[:INPUTS], saved[INPUTS:]
    wanted = list(ctx.needs_input_grad[:INPUTS])
    layout = None if ctx.shard is None else ctx.shard.layout
    dhidden, *others = linear_logps_backward(
        *inputs, *ctx.options, wanted, ctx.sparse, *saved, *gradients, token_ids, layout,
        ctx.with_entropy, ctx.backend, offsets,
    )  # fmt: skip
    if ctx.shard is not None and wanted[0]:
        # Each rank has found what comes from its own words.
        dhidden = ctx.shard.sum(dhidden)
    found = zip((dhidden, *others), wanted, strict=True)
    return tuple(x if wants else None for x, wants in found)


def _save(ctx, inputs, saved, options, sparse, shard, asked):
    call = ops.Call.of(asked)
    ctx.save_for_backward(*inputs, call.token_ids, call.offsets, *saved)
    ctx.options, ctx.sparse, ctx.shard = options, sparse, shard
    ctx.with_entropy, ctx.backend = call.with_entropy, call.backend


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, lora_a, lora_b, options, sparse, shard, *asked):
        inputs = hidden, head, bias, lora_a, lora_b
        workspace, *saved = _forward(inputs, options, sparse, shard, asked)
        _save(ctx, inputs, (workspace, *saved), options, sparse, shard, asked)
        ctx.set_materialize_grads(False)
        return unshared(saved, any(ctx.needs_input_grad))

    @staticmethod
    @first_derivative
    def backward(ctx, grad_logps, grad_entropy):
        *_, logps, _, _, entropy = ctx.saved_tensors
        upstream = dense(grad_logps, logps), dense(grad_entropy, entropy), None
        return _backward(ctx, ctx.saved_tensors, *upstream)


class _LinearGeneral(torch.autograd.Function):
    """As _General of logits.py: the logits are computed once more in backward."""

    @staticmethod
    def forward(
        ctx, hidden, head, bias, lora_a, lora_b, options, sparse, shard, with_slopes, groups,
        finish_options, *asked,
    ):  # fmt: skip
        inputs = hidden, head, bias, lora_a, lora_b
        saved = _forward(inputs, options, sparse, shard, asked)
        workspace, logps, _, _, entropy = saved
        *results, slopes = ops.finish(
            workspace,
            logps,
            entropy,
            None,
            groups,
            *finish_options,
            with_slopes,
            ops.Call.of(asked).backend,
        )
        _save(ctx, inputs, (*saved, slopes), options, sparse, shard, asked)
        ctx.finish_options = groups, *finish_options
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_derivative
    def backward(ctx, upstream, *_):
        *saved, slopes = ctx.saved_tensors
        # Past the inputs and what the sampling mask has.
        gradients = row_gradients(*slopes_of(ctx, saved[INPUTS + 2 :], slopes, upstream))
        return _backward(ctx, saved, *gradients)


class _LinearOnePass(torch.autograd.Function):
    """As _OnePass of logits.py: forward finds the gradients."""

    @staticmethod
    def forward(ctx, hidden, head, bias, lora_a, lora_b, options, wanted, sparse, *asked):
        found = linear_one_pass(
            hidden, head, bias, lora_a, lora_b, *options, wanted, sparse, *asked
        )
        results = found[:-INPUTS]
        ctx.save_for_backward(*found[-INPUTS:])
        ctx.backend = ops.Call.of(asked).backend
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_derivative
    def backward(ctx, upstream, *_):
        gradients: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[:INPUTS]
        for gradient, wants in zip(ctx.saved_tensors, wanted, strict=True):
            if wants:
                rows = gradient.view(1, -1, gradient.shape[-1])
                scaled = scale_saved_gradient(rows, upstream, ctx.backend)
                gradients.append(scaled.view_as(gradient))
            else:
                gradients.append(None)
        return tuple(gradients)


@dataclass(slots=True)
class LinearLogits:
    """The logits of hidden states (N, H) by a head (V, H), which do not exist as a whole."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype  # of the products
    logits_dtype: torch.dtype  # the same, or float32
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
        logits_dtype: torch.dtype | None,
        chunk_tokens: int | None,
        compact: bool,
        sharded: bool,
        backend: Backend,
    ) -> LinearLogits:
        _check_dense("hidden", hidden)
        if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
            raise invalid("hidden", hidden, "shape (B, T, H), or (N, H) packed, with H at least 1")
        width = hidden.shape[-1]
        check_labels(labels, hidden.shape[:-1], "hidden less H")
        weight, bias, adapters = read_head(weight, bias)
        if sharded and adapters:
            raise invalid("weight", "a head with LoRA adapters", "merged ones with tp_group")
        for name, value in (("weight", weight), ("bias", bias)):
            if sharded and is_dtensor(value):
                raise invalid(name, "a DTensor", "this rank's rows (to_local()) with tp_group")
        weight = gathered(weight, hidden.dtype)
        _check_dense("weight", weight)
        if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < (0 if sharded else 1):
            raise invalid("weight", weight, f"shape (V, {width}), H that of hidden")
        if bias is not None:
            bias = gathered(bias, hidden.dtype)
            _check_dense("bias", bias)
            if bias.shape != weight.shape[:1]:
                raise invalid("bias", bias, f"shape ({weight.shape[0]},), one per row of weight")
        autocast = _autocast_dtype(hidden)
        dtype = autocast or hidden.dtype
        _check_dtypes(hidden, weight, bias, autocast is not None)
        lora_a, lora_b = _joined(hidden, weight, adapters, autocast)
        logits_dtype = _checked_logits_dtype(logits_dtype, dtype)
        if softcap is not None:
            softcap = check_positive("softcap", softcap)
        logit_scale = check_number("logit_scale", logit_scale)
        if chunk_tokens is not None:
            chunk_tokens = check_count("chunk_tokens", chunk_tokens)
        if not isinstance(compact, bool):
            raise TypeError(f"compact: got {type(compact).__name__}, expected True or False")
        return LinearLogits(
            hidden.reshape(-1, width),
            weight,
            bias,
            lora_a,
            lora_b,
            None if softcap is None else float(softcap),
            float(logit_scale),
            dtype,
            logits_dtype,
            chunk_tokens or 0,
            compact,
            registry.choose_backend(backend, hidden),
        )

    @property
    def _inputs(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    @property
    def _options(self) -> tuple[Any, ...]:
        return (
            self.softcap, self.logit_scale, self.dtype, self.logits_dtype, self.chunk_tokens,
            self.compact,
        )  # fmt: skip

    def _is_sparse(self, batch: Batch) -> bool:
        # It forms no products with adapters.
        if self.lora_a is not None:
            return False
        return is_worthwhile(batch.sampling_mask, self.hidden, self.vocabulary, self.compact)

    def of_shard(self, shard: VocabularyShard) -> LinearLogits:
        if shard.words or self.backend == "eager":
            return replace(self, shard=shard)
        # As Logits.of_shard: a word whose logit is -inf.
        weight = nn.functional.pad(self.weight, (0, 0, 0, 1))
        bias = self.weight.new_empty(0) if self.bias is None else self.bias
        bias = nn.functional.pad(bias, (0, 1), value=-torch.inf)
        return replace(self, weight=weight, bias=bias, softcap=None, logit_scale=1.0, shard=shard)

    @property
    def vocabulary(self) -> int:
        """Of the shard, if it is one."""
        return self.weight.shape[0]

    @property
    def like(self) -> Tensor:
        """What has the dtype and the device of the rest."""
        return self.hidden

    @property
    def compatibility_key(self) -> str:
        """What has to be alike where shards meet: the last, for the gradient is summed."""
        sums = torch.is_grad_enabled() and self.hidden.requires_grad
        options = f"bias {self.bias is not None}, softcap {self.softcap}, scale {self.logit_scale}"
        dtypes = f"{self.dtype}, logits {self.logits_dtype}"
        return f"{dtypes}, {self.backend}, {options}, gradient of hidden {sums}"

    def loss(self, batch: Batch, objective: Objective, with_entropy: bool) -> Result:
        """Eq. 5 by the shortest route."""
        if self.backend == "eager":
            return reference_loss(*self._reference_logps(batch, objective, with_entropy), batch)
        call = ops.Call(batch, objective, with_entropy, self.backend)
        asked = call.arguments(self.hidden)
        inputs = self._inputs
        wanted = [x is not None and x.requires_grad for x in inputs]
        if takes_one_pass(self.dtype, call, self.shard is not None, *inputs):
            results = _LinearOnePass.apply(
                *inputs, self._options, wanted, self._is_sparse(batch), *asked
            )
        else:
            with_slopes = torch.is_grad_enabled() and any(wanted) and not call.per_token
            results = _LinearGeneral.apply(
                *inputs,
                self._options,
                self._is_sparse(batch),
                self.shard,
                with_slopes,
                batch.num_groups,
                ops.finish_options(call),
                *asked,
            )
        return result(results, with_entropy)

    def token_logps(
        self, batch: Batch, objective: Objective, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Eq. 1 and Eq. 3, differentiable: (logps, entropy or None), like labels."""
        if self.backend == "eager":
            logps, entropy, _ = self._reference_logps(batch, objective, with_entropy)
            return like_labels(batch, logps, entropy)
        call = ops.Call(batch, objective, with_entropy, self.backend)
        logps, entropy = _LinearTokenLogps.apply(
            *self._inputs,
            self._options,
            self._is_sparse(batch),
            self.shard,
            *call.arguments(self.hidden),
        )
        return logps, entropy if with_entropy else None

    def _reference_logps(
        self, batch: Batch, objective: Objective, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, reference.Tokens]:
        weight, bias, shard = self.weight, self.bias, self.shard
        tokens = reference_tokens(batch, objective, self.hidden, self.vocabulary, shard)
        labels = tokens.labels
        hidden = torch.where((labels >= 0)[:, None], self.hidden, 0)
        if shard is not None:
            labels, weight = shard.checked(labels), shard.gather(weight, 0)
            bias = None if bias is None else shard.gather(bias, 0)
        logits = self._reference_logits(hidden, weight, bias)
        logps = reference.token_logps(
            logits, labels, tokens.temperature, with_entropy, tokens.support
        )
        return *logps, tokens

    def _reference_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Eq. 27, of operands of `dtype`, in `logits_dtype`."""
        kind = self.hidden.device.type
        known = _has_autocast(kind)
        with torch.autocast(kind, enabled=False) if known else contextlib.nullcontext():
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
            bias = None if bias is None else bias.to(self.dtype)
            dtype = self.logits_dtype
            if self.lora_a is not None and self.lora_b is not None:
                # All logits are held here: the head may be copied as well.
                dtype = torch.promote_types(dtype, self.lora_a.dtype)
                low = nn.functional.linear(hidden.to(self.lora_a.dtype), self.lora_a)
                hidden = torch.cat([hidden.to(dtype), low.to(dtype)], -1)
                weight = torch.cat([weight.to(dtype), self.lora_b.to(dtype)], -1)
            return reference.linear_logits(
                hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
                self.softcap, self.logit_scale,
            )  # fmt: skip


def _joined(
    hidden: Tensor, weight: Tensor, adapters: list[Adapter], autocast: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """`joined`, of what fits hidden (…, H) and weight (V, H)."""
    vocabulary, width = weight.shape
    dtypes = *registry.KERNEL_DTYPES, hidden.dtype
    whole = []
    for a, b, scaling in adapters:
        a, b = gathered(a, a.dtype), gathered(b, b.dtype)
        for name, value in (("lora_A", a), ("lora_B", b)):
            name = f"weight's {name}"
            _check_dense(name, value)
            check_device(name, value, hidden.device)
            if value.dtype not in dtypes:
                raise invalid(name, value, f"one of {dtypes}")
        if a.shape[1:] != (width,) or b.shape != (vocabulary, a.shape[0]):
            raise invalid("weight's lora_B", b, f"shape ({vocabulary}, R), lora_A (R, {width})")
        whole.append(Adapter(a, b, scaling))
    return joined(whole, autocast or hidden.dtype, autocast is not None)


def _check_dense(name: str, value: Tensor) -> None:
    check_float(name, value)
    # A tensor that holds others: quantised, or distributed.
    wraps = hasattr(value, "__tensor_flatten__")
    if wraps or value.layout != torch.strided or value.is_quantized:
        kind = type(value).__name__ if wraps else f"{value.layout} {value.dtype} tensor"
        raise TypeError(f"{name}: got a {kind}, expected a plain, dense tensor of floats")


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    # A strict export by torch 2.11 does not trace it.
    return torch.amp.is_autocast_available(kind)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    # Of a device that knows no autocast, torch raises when it is asked.
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return None if hidden.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """One for all three, or autocast makes it so, as in `torch.nn.functional.linear`."""
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is None:
            continue
        check_device(name, value, hidden.device)
        if value.dtype != hidden.dtype and not (autocast and value.dtype in registry.KERNEL_DTYPES):
            raise invalid(name, value, f"{hidden.dtype}, the dtype of hidden, or autocast")


def _checked_logits_dtype(logits_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if logits_dtype is None:
        return dtype
    if not isinstance(logits_dtype, torch.dtype):
        kind = type(logits_dtype).__name__
        raise TypeError(f"logits_dtype: got {kind}, expected a torch.dtype, or None")
    expected = f"{dtype}, that of hidden (of autocast, where it is on)"
    wide = reference.compute_dtype(dtype)
    if logits_dtype not in (dtype, wide):
        raise invalid("logits_dtype", logits_dtype, expected + f", or {wide}" * (wide != dtype))
    return logits_dtype
