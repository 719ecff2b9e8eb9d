"""Log-probs that are already at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import registry
from ..batch import Batch
from ..checks import Backend, check_device, check_float, invalid
from ..objective import Objective
from .autograd import Result, first_derivative, reference_loss, result, slopes_of


class _FromLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, entropy, with_slopes, groups, finish_options, *asked):
        call = ops.Call.of(asked)
        ctx.dtypes = [None if x is None else x.dtype for x in (logps, entropy)]
        workspace, logps, entropy = ops.prepare_logps(logps, entropy, *asked)
        *results, slopes = ops.finish(
            workspace, logps, entropy, None, groups, *finish_options, with_slopes, call.backend
        )
        # `finish` runs once more in backward, unless it has found the slopes.
        kept = () if with_slopes else (workspace, logps, entropy)
        ctx.save_for_backward(slopes, *kept)
        ctx.shape, ctx.backend = call.batch.shape, call.backend
        ctx.finish_options = groups, *finish_options
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_derivative
    def backward(ctx, upstream, *_):
        slopes, *saved = ctx.saved_tensors
        slopes, remaining = slopes_of(ctx, saved, slopes, upstream)
        needed = ctx.needs_input_grad[:2]
        dtypes = {dtype for dtype, needs in zip(ctx.dtypes, needed, strict=True) if needs}
        # One launch multiplies and rounds, where both are of one dtype.
        dtype = dtypes.pop() if len(dtypes) == 1 else slopes.dtype
        if remaining is None:
            slopes = slopes.to(dtype)
        else:
            slopes = torch.mul(slopes, remaining, out=slopes.new_empty(slopes.shape, dtype=dtype))
        found = [slopes[0], slopes[-1]]
        return tuple(
            x.reshape(ctx.shape).to(dtype) if needs else None
            for x, dtype, needs in zip(found, ctx.dtypes, needed, strict=True)
        )


@dataclass(slots=True)
class LogProbs:
    """Log-probs (B, T) or (N,) of any float dtype, and entropies or None."""

    logps: Tensor
    entropy: Tensor | None
    backend: str

    @staticmethod
    def build(logps: Tensor, entropy: Tensor | None, backend: Backend) -> LogProbs:
        check_float("logps", logps)
        if logps.dim() not in (1, 2):
            raise invalid("logps", logps, "shape (B, T), or (N,) packed")
        if entropy is not None:
            check_float("entropy", entropy)
            check_device("entropy", entropy, logps.device)
            if entropy.shape != logps.shape:
                raise invalid("entropy", entropy, f"shape {tuple(logps.shape)}, that of logps")
        return LogProbs(logps, entropy, registry.choose_backend(backend, logps))

    def loss(self, batch: Batch, objective: Objective) -> Result:
        logps, entropy = self.logps, self.entropy
        with_entropy = entropy is not None
        if self.backend == "eager":
            tokens = reference.Tokens.of(batch, objective, logps)

            def flat(x: Tensor) -> Tensor:
                return torch.where(tokens.valid, x.reshape(-1).to(tokens.weight.dtype), 0.0)

            flat_entropy = None if entropy is None else flat(entropy)
            return reference_loss(flat(logps), flat_entropy, tokens, batch)
        call = ops.Call(batch, objective, with_entropy, self.backend)
        wanted = logps.requires_grad or (entropy is not None and entropy.requires_grad)
        with_slopes = torch.is_grad_enabled() and wanted and not call.per_token
        results = _FromLogps.apply(
            logps,
            entropy,
            with_slopes,
            batch.num_groups,
            ops.finish_options(call),
            *call.arguments(logps),
        )
        return result(results, with_entropy)
