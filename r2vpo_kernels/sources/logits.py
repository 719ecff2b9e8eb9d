"""Logits that are there as a whole, or a rank's shard of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..backends import registry
from ..batch import Batch
from ..checks import Backend, check_float, check_labels, invalid
from ..objective import Objective
from .autograd import (
    Result,
    dense,
    first_derivative,
    graph_is_kept,
    like_labels,
    reference_loss,
    result,
    row_gradients,
    scale_saved_gradient,
    slopes_of,
    takes_one_pass,
    unshared,
)
from .shard import VocabularyShard, reference_tokens


class _OnePass(torch.autograd.Function):
    """The kernel finds the gradient in forward.

    It runs in here because autograd has noted by now where `logits` come from: mutated before, a
    view would be reached by as_strided, whose backward makes two more of it.
    """

    @staticmethod
    def forward(ctx, logits, inplace, *asked):
        values = logits.detach()
        if inplace:
            results, dlogits = ops.one_pass_(values, *asked), values
        else:
            *results, dlogits = ops.one_pass(values, *asked)
        ctx.save_for_backward(dlogits)
        ctx.backend = ops.Call.of(asked).backend
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_derivative
    def backward(ctx, upstream, *_):
        (dlogits,) = ctx.saved_tensors
        return (scale_saved_gradient(dlogits, upstream, ctx.backend),)


def _logps_forward(logits, shard, asked):
    """Of all words, what `logps_forward` finds in these logits."""
    if shard is None:
        return ops.logps_forward(logits, None, *asked)
    found = ops.logps_forward(logits, shard.layout, *asked)
    return shard.combine(found, ops.Call.of(asked))


def _save(ctx, inplace, shard, call):
    """All that backward takes but for tensors that were found."""
    ctx.inplace, ctx.with_entropy, ctx.backend = inplace, call.with_entropy, call.backend
    ctx.layout = None if shard is None else shard.layout


def _logps_backward(ctx, logits, token_ids, *arguments):
    arguments = *arguments, token_ids, ctx.layout, ctx.with_entropy, ctx.backend
    if ctx.inplace and not graph_is_kept():
        dlogits = logits.detach()
        ops.logps_backward_(dlogits, *arguments)
        return dlogits
    return ops.logps_backward(logits, *arguments)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, inplace, shard, *asked):
        workspace, *saved = _logps_forward(logits, shard, asked)
        call = ops.Call.of(asked)
        ctx.save_for_backward(logits, call.token_ids, workspace, *saved)
        _save(ctx, inplace, shard, call)
        ctx.set_materialize_grads(False)
        return unshared(saved, ctx.needs_input_grad[0])

    @staticmethod
    @first_derivative
    def backward(ctx, grad_logps, grad_entropy):
        logits, token_ids, *saved = ctx.saved_tensors
        _, logps, *_, entropy = saved
        upstream = dense(grad_logps, logps), dense(grad_entropy, entropy), None
        return (_logps_backward(ctx, logits, token_ids, *saved, *upstream),)


class _General(torch.autograd.Function):
    """From log-probs: the rows' gradient waits for backward.

    With a summed loss forward leaves dL/dlogp and dL/dH for an upstream of 1; with one loss for
    each token `finish` runs once more in backward, with its upstream gradient.
    """

    @staticmethod
    def forward(ctx, logits, inplace, shard, with_slopes, groups, finish_options, *asked):
        saved = _logps_forward(logits, shard, asked)
        workspace, logps, _, _, entropy = saved
        call = ops.Call.of(asked)
        *results, slopes = ops.finish(
            workspace, logps, entropy, None, groups, *finish_options, with_slopes, call.backend
        )
        ctx.save_for_backward(logits, call.token_ids, *saved, slopes)
        _save(ctx, inplace, shard, call)
        ctx.finish_options = groups, *finish_options
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_derivative
    def backward(ctx, upstream, *_):
        logits, token_ids, *saved, slopes = ctx.saved_tensors
        gradients = row_gradients(*slopes_of(ctx, saved, slopes, upstream))
        return (_logps_backward(ctx, logits, token_ids, *saved, *gradients),)


@dataclass(slots=True)
class Logits:
    """Logits (B, T, V) that are there as a whole, or this rank's shard of them."""

    logits: Tensor
    inplace: bool
    backend: str
    shard: VocabularyShard | None = None

    @staticmethod
    def build(
        logits: Tensor, labels: Tensor, inplace: bool, sharded: bool, backend: Backend
    ) -> Logits:
        """A packed batch becomes one row of tokens."""
        check_float("logits", logits)
        if logits.dim() not in (2, 3) or logits.shape[-1] < (0 if sharded else 1):
            raise invalid(
                "logits", logits, "shape (B, T, V), or (N, V) packed, with V of at least 1"
            )
        check_labels(labels, logits.shape[:-1], "logits less V")
        if logits.shape[-1] > 1 and logits.stride(-1) != 1:
            raise invalid("logits", f"stride {logits.stride(-1)} over V", "a contiguous vocabulary")
        if inplace:
            _check_inplace(logits)
        chosen = registry.choose_backend(backend, logits)
        if chosen != "eager" and not torch.compiler.is_compiling():
            ops.check_memory("logits", logits)
            ops.check_alignment("logits", logits, chosen)
        return Logits(logits if logits.dim() == 3 else logits.unsqueeze(0), inplace, chosen)

    def of_shard(self, shard: VocabularyShard) -> Logits:
        logits = self.logits
        if shard.words == 0 and self.backend != "eager":
            # Kernels read a word, which no token can have. The gradient is empty again.
            logits = nn.functional.pad(logits, (0, 1), value=-torch.inf)
        return replace(self, logits=logits, shard=shard)

    @property
    def vocabulary(self) -> int:
        """Of the shard, if it is one."""
        return self.logits.shape[-1]

    @property
    def like(self) -> Tensor:
        """What has the dtype and the device of the rest."""
        return self.logits

    @property
    def compatibility_key(self) -> str:
        """What has to be alike where shards meet."""
        return f"{self.logits.dtype}, {self.backend}"

    def loss(self, batch: Batch, objective: Objective, with_entropy: bool) -> Result:
        """Eq. 5 by the shortest route."""
        logits = self.logits
        if self.backend == "eager":
            return reference_loss(*self._reference_logps(batch, objective, with_entropy), batch)
        call = ops.Call(batch, objective, with_entropy, self.backend)
        asked = call.arguments(logits)
        if takes_one_pass(logits.dtype, call, self.shard is not None, logits):
            # Where a compiler decides what is mutated, the permission goes unused.
            inplace = self.inplace and not torch.compiler.is_compiling()
            results = _OnePass.apply(logits, inplace, *asked)
        else:
            with_slopes = torch.is_grad_enabled() and logits.requires_grad and not call.per_token
            results = _General.apply(
                logits,
                self.inplace,
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
        asked = call.arguments(self.logits)
        logps, entropy = _TokenLogps.apply(self.logits, self.inplace, self.shard, *asked)
        return logps, entropy if with_entropy else None

    def _reference_logps(
        self, batch: Batch, objective: Objective, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, reference.Tokens]:
        logits, shard = self.logits, self.shard
        tokens = reference_tokens(batch, objective, logits, self.vocabulary, shard)
        labels = tokens.labels
        if shard is not None:
            logits, labels = shard.gather(logits, -1), shard.checked(labels)
        logps = reference.token_logps(
            logits, labels, tokens.temperature, with_entropy, tokens.support
        )
        return *logps, tokens


def _check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise invalid("inplace", True, "False for a leaf or a view of one, whose values must stay")
    if ops.rows_overlap(logits):
        raise invalid("inplace", True, "False for logits whose rows share memory")
