"""What the autograd Functions of all sources share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from ..batch import Batch


class Result(NamedTuple):
    """What a source finds: only `loss` is differentiable."""

    loss: Tensor
    stats: Tensor  # (3, groups): the fields of RatioStats
    metrics: Tensor
    logps: Tensor  # like labels
    entropy: Tensor | None


def graph_is_kept() -> bool:
    """Whether this backward may run again, so that what was saved must stay as it is."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def first_derivative(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A Function's backward that finds the gradients of its first inputs; the others have none.

    Nor has any where no upstream gradient is defined.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        found: tuple[Any, ...] = ()
        given = [x for x in upstream if x is not None]
        if given:
            refuse_double_backward()
            if not torch.compiler.is_compiling() and not all(map(torch._C._has_storage, given)):
                raise RuntimeError(
                    "r2vpo_kernels: the kernels take one upstream gradient at a time; "
                    "is_grads_batched=True and vmap need backend='eager'"
                )
            found = backward(ctx, *upstream)
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    return checked


def refuse_double_backward(what: str = "the kernels have", needed: str = "backend='eager'") -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"r2vpo_kernels: {what} no second derivative; create_graph=True needs {needed}"
        )


def scale_saved_gradient(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """What forward found for an upstream gradient of 1, scaled; (B, T, V) like logits."""
    if graph_is_kept():
        gradient = gradient.clone()
    ops.scale_(gradient, upstream, backend)
    return gradient


def takes_one_pass(
    dtype: torch.dtype, call: ops.Call, sharded: bool, *inputs: Tensor | None
) -> bool:
    """Whether the one-pass kernel serves logits of this dtype, made of these inputs.

    Each token's coefficient must depend on that token alone. Not float16: its gradients would
    underflow before a loss scale reaches them. Not a shard: its coefficients wait for the other
    ranks.
    """
    if not call.objective.separable or call.per_token or sharded or dtype == torch.float16:
        return False
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def slopes_of(
    ctx: Any, saved: list[Tensor], slopes: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(dL/dlogp and dL/dH, what is still to multiply them with); `saved` is that of ops.SAVED."""
    if upstream.dim() == 0:
        return slopes, upstream
    workspace, logps, *_, entropy = saved
    *_, slopes = ops.finish(
        workspace, logps, entropy, upstream, *ctx.finish_options, True, ctx.backend
    )
    return slopes, None


def row_gradients(slopes: Tensor, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """(grad_logps, grad_entropy, upstream) as ops.BACKWARD has them."""
    dlogps, *others = slopes.unbind()
    return dlogps, others[0] if others else dlogps[:0], upstream


def dense(upstream: Tensor | None, like: Tensor) -> Tensor:
    """An upstream gradient, which may be expanded, strided or undefined."""
    return torch.zeros_like(like) if upstream is None else upstream.contiguous()


def unshared(saved: list[Tensor], wanted: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies for a caller, who may change them; `saved` is that of backward."""
    logps, *_, entropy = saved
    return (logps.clone(), entropy.clone()) if wanted else (logps, entropy)


def result(results: tuple[Tensor, ...], with_entropy: bool) -> Result:
    """What an autograd Function returned: there an entropy that is not wanted is empty."""
    loss, stats, metrics, logps, entropy = results
    return Result(loss, stats, metrics, logps, entropy if with_entropy else None)


def like_labels(
    batch: Batch, logps: Tensor, entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Flat values in the shape of labels."""
    shape = batch.shape
    return logps.reshape(shape), None if entropy is None else entropy.reshape(shape)


def reference_loss(
    logps: Tensor, entropy: Tensor | None, tokens: reference.Tokens, batch: Batch
) -> Result:
    """Eq. 5 in eager torch, from flat log-probs."""
    per_token = batch.reduction == "none"
    loss, stats, metrics = reference.evaluate(logps, entropy, tokens, per_token)
    logps = logps.detach()
    entropy = None if entropy is None else entropy.detach()
    loss = loss.reshape(batch.shape) if per_token else loss
    return Result(loss, stats, metrics, *like_labels(batch, logps, entropy))
