"""The entries: from logits or log-probs to the R²VPO loss. Arguments are checked where `Batch` and
`Objective` are built; here the route is chosen.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .batch import Batch, check_integer, invalid
from .objective import Objective, R2VPOOutput, evaluate, token_temperature


def r2vpo_loss(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    variance_coef: float | Tensor = 2.5,
    center: str | Tensor = "one",
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ratio_level: str = "token",
    importance_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    log_ratio_clamp: float = 20.0,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> R2VPOOutput:
    """The R²VPO loss from logits (Eq. 5), with one pass over them where the objective allows it:

        L = Σ w·(-s·A·ρ) + Σ w·λ·(ρ - c)² + β·Σ w·KL(logp, ref) - η·Σ w·H,    ρ = exp(logp - old)

    In torch, with the defaults and no mask:

        logp = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
        ratio = (logp - old_logps).exp()
        loss = (-advantages * ratio + variance_coef * (ratio - 1) ** 2).mean()

    At ρ = 1 + s·A / (2λ) a token's gradient changes sign: past it the penalty pulls back.

    Args:
        logits: (B, T, V), or (N, V) packed; float32, bfloat16, float16 (float64: eager). The
            vocabulary is contiguous, the rest may be a view. `logits[:, t]` scores `labels[:, t]`:
            there is no shift inside.
        labels: (B, T) or (N,), any integer dtype.
        old_logps: like labels, nats, log-probs of the labels when they were sampled. None:
            on-policy, ρ = 1 with the gradient of ρ.
        advantages: per sequence or per token.
        variance_coef: λ ≥ 0: a number, a 0-dim tensor, or per sequence or per token.
        center: c: "one"; "group", the weighted mean of ρ in each group; or a float tensor of given
            means (num_groups,), which reproduces "group" exactly where λ is constant in the group.
        group_ids: integers, one per sequence (one per token where there are no sequences).
        num_groups: how many groups group_ids name; a tensor `center` gives it too.
        group_size: every so many consecutive sequences are a group. Neither: all are one group.
        mask: like labels, nonzero is valid. What stands in any input at other tokens is harmless.
        ignore_index: labels of this value are masked too.
        reduction: w, over valid tokens. "token-mean": 1 / tokens; "seq-mean-token-mean":
            1 / sequences / the sequence's tokens; "seq-mean-token-sum": 1 / sequences;
            "seq-mean-token-sum-norm": 1 / sequences / T; "none": 1, one loss per token. Sequences
            without a valid token do not count.
        normalizer: replaces the whole denominator, so that micro-batches or ranks sum to the full
            batch; a number or a 0-dim tensor. 0 counts as 1.
        ratio_level: "token", or "sequence": log ρ is the mean of logp - old over the sequence.
        importance_weights: s, per sequence or per token, constant; 1 by default.
        ref_logps: like labels, nats, for the KL term or its metric alone.
        kl_coef: β. kl_estimator: "k1", "k2" or "k3".
        entropy_coef: η, a bonus for entropy (nats).
        temperature: what logits are divided by: a number or per sequence or per token, ≥ 1e-6.
        log_ratio_clamp: bound on |log ρ| and on the KL's exponent, nats, at most 40; past it the
            gradient is 0.
        cu_seqlens: (S + 1,) integers, where packed sequences begin and end. Without it a packed
            batch has no sequences: every input is per token. Where S = N, each holds one token.
        return_entropy: compute `out.entropy` although entropy_coef is 0.
        inplace: the gradient may take the logits' memory: whoever reads logits after this call, or
            after backward, may see the gradient. Refused for a leaf, a view of one, and rows that
            share memory; under torch.compile the permission goes unused.
        backend: "auto" (Triton on a GPU, C++ on a CPU, eager where those cannot), "triton", "cpp"
            or "eager".

    Returns: R2VPOOutput. Its loss is differentiable in logits alone, once (backend "eager": any
        number of times); everything else is constant and detached.

    Raises: ValueError, or TypeError for a wrong type, naming the argument, what came and what was
        expected. On a GPU bad values in a tensor (a label outside the vocabulary, λ < 0) make the
        loss NaN instead, or raise with R2VPO_KERNELS_VALIDATE=1 at the price of a sync.

    Source: DERIVATION.md, Eq. 1 to 11.
    """
    given, logits = logits, _check_logits(logits, labels)
    if inplace:
        _check_inplace(given)
    backend = ops.choose_backend(backend, logits)
    batch, objective = _build(
        labels.shape,
        logits,
        {"labels": labels, "vocabulary": logits.shape[-1], "ignore_index": ignore_index},
        old_logps=old_logps,
        advantages=advantages,
        variance_coef=variance_coef,
        center=center,
        group_ids=group_ids,
        num_groups=num_groups,
        group_size=group_size,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        ratio_level=ratio_level,
        importance_weights=importance_weights,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        temperature=temperature,
        log_ratio_clamp=log_ratio_clamp,
        cu_seqlens=cu_seqlens,
    )
    with_entropy = return_entropy or entropy_coef != 0
    one_pass = objective.separable and reduction != "none"
    if one_pass and ops.takes_one_pass(logits, backend):
        carrier, logps, entropy = ops.one_pass(
            logits, batch, objective, with_entropy, inplace, backend
        )
        out = evaluate(logps, entropy, batch, objective, reduction)
        return dataclasses.replace(out, loss=out.loss + carrier)
    logps, entropy = ops.token_logps(
        logits, batch.labels, objective.temperature, with_entropy, inplace, backend
    )
    return evaluate(logps, entropy, batch, objective, reduction)


# The other entries take the keywords of r2vpo_loss that make sense for them, with its defaults.
_KEYWORDS = {
    name: parameter
    for name, parameter in inspect.signature(r2vpo_loss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_OF_LOGITS = ("ignore_index", "temperature", "return_entropy", "inplace", "backend")
_OF_LOGPS = {name: p for name, p in _KEYWORDS.items() if name not in _OF_LOGITS}
_LOGPS_DEFAULTS = {name: parameter.default for name, parameter in _OF_LOGPS.items()}


def _showing(shared: dict[str, inspect.Parameter]) -> Callable[[Any], Any]:
    """Put the shared keywords in the place of `**keywords` in what help() and editors show."""

    def decorate(function: Any) -> Any:
        own = list(inspect.signature(function).parameters.values())[:-1]
        function.__signature__ = inspect.Signature([*own, *shared.values()])
        return function

    return decorate


@_showing(_OF_LOGPS)
def r2vpo_loss_from_logps(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    **keywords: Any,
) -> R2VPOOutput:
    """The R²VPO loss from log-probs that are already at hand (Eq. 5), in plain torch.

    In torch, with the defaults and no mask:

        ratio = (logps - old_logps).exp()
        loss = (-advantages * ratio + variance_coef * (ratio - 1) ** 2).mean()

    Args:
        logps: (B, T), or (N,) packed, nats, any float dtype; computed in float32 (float64 stays).
        entropy: like logps, nats, for entropy_coef; both come from `token_logps`.
        keywords: those of `r2vpo_loss`, except ignore_index, temperature, return_entropy, inplace
            and backend, which are about logits.

    Returns: R2VPOOutput. Its loss is differentiable in logps and entropy.

    Raises: as `r2vpo_loss`.

    Source: DERIVATION.md, Eq. 4 to 11.
    """
    _check_float("logps", logps)
    if logps.dim() not in (1, 2):
        raise invalid("logps", logps, "shape (B, T), or (N,) packed")
    if entropy is not None:
        _check_float("entropy", entropy)
        if entropy.shape != logps.shape:
            raise invalid("entropy", entropy, f"shape {tuple(logps.shape)}, that of logps")
    for name in keywords:
        if name not in _LOGPS_DEFAULTS:
            expected = "one of entropy, " + ", ".join(_LOGPS_DEFAULTS)
            raise TypeError(f"{name}: got an unknown keyword, expected {expected}")
    keywords = _LOGPS_DEFAULTS | keywords
    if entropy is None and keywords["entropy_coef"] != 0:
        raise invalid("entropy", None, f"a tensor, for entropy_coef is {keywords['entropy_coef']}")
    batch, objective = _build(
        logps.shape, logps, {}, old_logps=old_logps, advantages=advantages, **keywords
    )

    def flat(x: Tensor) -> Tensor:
        return torch.where(batch.valid, x.reshape(-1).to(batch.weight.dtype), 0.0)

    flat_entropy = None if entropy is None else flat(entropy)
    return evaluate(flat(logps), flat_entropy, batch, objective, keywords["reduction"])


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of the labels (Eq. 1) and, on request, entropies (Eq. 3), both differentiable.

    In torch:

        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logps = log_p.gather(-1, labels[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)

    Args:
        logits, labels, mask, ignore_index, backend: as for `r2vpo_loss`.
        temperature: a number, or per sequence (labels (B, T)) or per token, ≥ 1e-6.
        return_entropy: return (logps, entropy).

    Returns: logps, or (logps, entropy): like labels, nats, float32 (float64 for float64 logits), 0
        where masked. Without grad the logits are read once.

    Raises: as `r2vpo_loss`.

    Source: DERIVATION.md, Eq. 1, 3 and 8.
    """
    logits = _check_logits(logits, labels)
    backend = ops.choose_backend(backend, logits)
    batch = Batch.build(
        labels.shape,
        logits,
        labels=labels,
        vocabulary=logits.shape[-1],
        ignore_index=ignore_index,
        mask=mask,
    )
    temperature = token_temperature(batch, temperature)
    logps, entropy = ops.token_logps(
        logits, batch.labels, temperature, return_entropy, False, backend
    )
    if entropy is None:
        return logps.reshape(labels.shape)
    return logps.reshape(labels.shape), entropy.reshape(labels.shape)


_GEOMETRY = (
    "mask", "cu_seqlens", "group_ids", "num_groups", "group_size", "reduction", "normalizer",
)  # fmt: skip


def _build(
    shape: torch.Size, like: Tensor, labelling: dict[str, Any], **keywords: Any
) -> tuple[Batch, Objective]:
    """The two objects that the keywords travel in from here on."""
    center = keywords["center"]
    if isinstance(center, Tensor) and keywords["group_ids"] is not None:
        # Means given for each group say how many groups there are.
        keywords["num_groups"] = keywords["num_groups"] or center.numel()
    geometry = {name: keywords.pop(name) for name in _GEOMETRY}
    batch = Batch.build(shape, like, **labelling, **geometry)
    return batch, Objective.build(batch, **keywords)


def _check_float(name: str, value: Tensor) -> None:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a tensor of floats")


def _check_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits as (B, T, V); a packed batch is one row of tokens."""
    _check_float("logits", logits)
    check_integer("labels", labels)
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise invalid("logits", logits, "shape (B, T, V), or (N, V) packed, with V of at least 1")
    if labels.shape != logits.shape[:-1]:
        raise invalid("labels", labels, f"shape {tuple(logits.shape[:-1])}, that of logits less V")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise invalid("logits", f"stride {logits.stride(-1)} over V", "a contiguous vocabulary")
    return logits if logits.dim() == 3 else logits.unsqueeze(0)


def _check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        # Where the compiler decides what is mutated, the permission goes unused.
        return
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise invalid("inplace", True, "False for a leaf or a view of one, whose values must stay")
    # Rows (B, T) or (N,), each past the end of the one before, in one order or the other.
    rows = zip(logits.shape[:-1], logits.stride()[:-1], strict=True)
    end = logits.shape[-1]
    for n, step in sorted(rows, key=lambda row: row[1]):
        if n > 1 and step < end:
            raise invalid("inplace", True, "False for logits whose rows share memory")
        end += (n - 1) * step
