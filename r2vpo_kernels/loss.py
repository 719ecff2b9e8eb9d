"""The entries: from logits or log-probs to the R²VPO loss. Arguments are checked where `Batch` and
`Objective` are built; here the route is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .batch import Batch, check_float, check_labels, invalid
from .linear import LinearLogits
from .objective import Objective, R2VPOOutput, evaluate, token_temperature
from .tensor_parallel import UNKNOWN_VOCABULARY, agree


def r2vpo_loss(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    variance_coef: float | Tensor = 0.5,
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
    tp_group: dist.ProcessGroup | None = None,
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
        variance_coef: λ ≥ 0: a number, a 0-dim tensor, or per sequence or per token. The default is
            from examples/STUDY.md, examples/study/strength.png: with 2.5, where that ρ is 1 ± 0.2
            at |A| = 1, less was learned on both tasks, from data one and five updates old.
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
        tp_group: the ranks that share out the vocabulary, in their order, each with its part of the
            columns, of any size; everything else, labels of the whole vocabulary among it, is the
            same on all of them, and so is the result. An error on one rank, or options and shapes
            that differ, are an error on all. Costs that exchange (for which the host waits), a MAX
            of one and a SUM of four or five numbers per token. Takes the general route.
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

    Source: DERIVATION.md, Eq. 1 to 11, and 30 for tp_group.
    """
    keywords = {
        "old_logps": old_logps,
        "advantages": advantages,
        "variance_coef": variance_coef,
        "center": center,
        "group_ids": group_ids,
        "num_groups": num_groups,
        "group_size": group_size,
        "mask": mask,
        "reduction": reduction,
        "normalizer": normalizer,
        "ratio_level": ratio_level,
        "importance_weights": importance_weights,
        "ref_logps": ref_logps,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "entropy_coef": entropy_coef,
        "temperature": temperature,
        "log_ratio_clamp": log_ratio_clamp,
        "cu_seqlens": cu_seqlens,
    }
    with_entropy = return_entropy or entropy_coef != 0

    def prepare() -> tuple[ops.Logits, Batch, Objective]:
        source = _source(logits, labels, inplace, backend)
        labelling = _labelling(source, labels, ignore_index, tp_group)
        return source, *_build(labels.shape, source.like, labelling, **keywords)

    options = keywords | {"labels": labels, "entropy": with_entropy}
    source, batch, objective = agree(tp_group, options, prepare)
    return _by_route(source, batch, objective, reduction, with_entropy)


def _by_route(
    source: ops.Logits | LinearLogits,
    batch: Batch,
    objective: Objective,
    reduction: str,
    with_entropy: bool,
) -> R2VPOOutput:
    """One pass where each token's coefficient depends on that token alone; else from log-probs."""
    if objective.separable and reduction != "none" and source.takes_one_pass:
        carrier, logps, entropy = source.one_pass(batch, objective, with_entropy)
        out = evaluate(logps, entropy, batch, objective, reduction)
        return dataclasses.replace(out, loss=out.loss + carrier)
    logps, entropy = source.token_logps(batch.labels, objective.temperature, with_entropy)
    return evaluate(logps, entropy, batch, objective, reduction)


# The other entries take the keywords of r2vpo_loss that make sense for them, with its defaults.
_KEYWORDS = {
    name: parameter
    for name, parameter in inspect.signature(r2vpo_loss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_OF_LOGITS = ("ignore_index", "temperature", "return_entropy", "tp_group", "inplace", "backend")


def _sharing_keywords(*without: str) -> Callable[[Any], Any]:
    """Let the `**keywords` of an entry be those of r2vpo_loss, but for some."""
    shared = {name: p for name, p in _KEYWORDS.items() if name not in without}
    defaults = {name: parameter.default for name, parameter in shared.items()}

    def decorate(function: Any) -> Any:
        *own, _ = inspect.signature(function).parameters.values()
        known = [*(p.name for p in own), *defaults]

        @functools.wraps(function)
        def entry(*arguments: Any, **keywords: Any) -> R2VPOOutput:
            for name in keywords:
                if name not in known:
                    expected = "one of " + ", ".join(known)
                    raise TypeError(f"{name}: got an unknown keyword, expected {expected}")
            return function(*arguments, **(defaults | keywords))

        # What help() and editors show.
        entry.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore
        return entry

    return decorate


@_sharing_keywords("inplace")
def linear_r2vpo_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    compact: bool = True,
    **keywords: Any,
) -> R2VPOOutput:
    """The R²VPO loss from hidden states and the LM head (Eq. 27, 5); logits never exist as a whole.

    In torch:

        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        logits = softcap * torch.tanh(logits / softcap)  # unless softcap is None
        loss = r2vpo_loss(logits, labels, old_logps, advantages, **keywords).loss

    Where each token's gradient depends on that token alone (`center` "one" or given, token level, a
    summed loss, not float16) it costs three matrix products, all in forward; otherwise four, three
    of them in backward; without grad one. Memory, beside inputs and gradients: the logits of a
    chunk, a float32 sum of the weight's gradient where there are several chunks, and under autocast
    the weight in its dtype.

    Args:
        hidden: (B, T, H), or (N, H) packed; float32, bfloat16, float16 (float64: eager), a view or
            not. What it holds at masked tokens is harmless. `hidden[:, t]` scores `labels[:, t]`.
        weight: (V, H), in the dtype of hidden, unless under autocast, whose dtype the products then
            have. Or the head itself, a torch.nn.Linear, whose weight and bias are taken and whose
            hooks do not run; an adapter, or another class, is refused. A DTensor (FSDP2) is cast to
            hidden's dtype and gathered once; its gradient is the mean over ranks.
        bias: (V,), or None.
        softcap: C > 0 in C·tanh(logits / C), or None. Its slope takes a second buffer.
        logit_scale: what hidden · weightᵀ + bias is multiplied by, before the softcap.
        chunk_tokens: tokens in a chunk at most. None: all, where their logits need no more than the
            budget of 256 MiB on a CPU, 1 GiB elsewhere, plus the float32 sum that one chunk saves;
            else as many as the budget holds, in chunks of equal size.
        compact: leave masked tokens out of every product, and tokens whose gradient is known to be
            0 (advantage 0, no KL, no entropy bonus, and on-policy or λ = 0) out of those for the
            gradient. On a GPU finding them waits for it once, and once more in a backward that
            recomputes; False for no wait, no saving, and a copy of hidden.
        keywords: those of `r2vpo_loss`, except inplace. Backend "eager" holds all logits. With
            tp_group each rank has its rows of weight and bias, and the same hidden, whose gradient
            is summed over the ranks (in float32); a DTensor is refused: give its local part.

    Returns: R2VPOOutput. Its loss is differentiable in hidden, weight and bias, once; only what
        requires grad is computed, in its own dtype. Sums are float32, within a product on a GPU as
        far as torch.backends.cuda.matmul is set to have them so.

    Raises: as `r2vpo_loss`.

    Source: DERIVATION.md, Eq. 27 to 29.
    """
    keywords |= {"old_logps": old_logps, "advantages": advantages}
    tp_group, backend, ignore_index, return_entropy = (
        keywords.pop(name) for name in ("tp_group", "backend", "ignore_index", "return_entropy")
    )
    with_entropy = return_entropy or keywords["entropy_coef"] != 0

    def prepare() -> tuple[LinearLogits, Batch, Objective]:
        source = LinearLogits.build(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk_tokens=chunk_tokens,
            compact=compact,
            sharded=tp_group is not None,
            backend=backend,
        )
        labelling = _labelling(source, labels, ignore_index, tp_group)
        return source, *_build(labels.shape, source.like, labelling, **keywords)

    options = keywords | {"labels": labels, "hidden": hidden, "entropy": with_entropy}
    source, batch, objective = agree(tp_group, options, prepare)
    return _by_route(source, batch, objective, keywords["reduction"], with_entropy)


@_sharing_keywords(*_OF_LOGITS)
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
        keywords: those of `r2vpo_loss`, except ignore_index, temperature, return_entropy,
            tp_group, inplace and backend, which are about logits.

    Returns: R2VPOOutput. Its loss is differentiable in logps and entropy.

    Raises: as `r2vpo_loss`.

    Source: DERIVATION.md, Eq. 4 to 11.
    """
    check_float("logps", logps)
    if logps.dim() not in (1, 2):
        raise invalid("logps", logps, "shape (B, T), or (N,) packed")
    if entropy is not None:
        check_float("entropy", entropy)
        if entropy.shape != logps.shape:
            raise invalid("entropy", entropy, f"shape {tuple(logps.shape)}, that of logps")
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
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of the labels (Eq. 1) and, on request, entropies (Eq. 3), both differentiable.

    In torch:

        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logps = log_p.gather(-1, labels[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)

    Args:
        logits, labels, mask, ignore_index, tp_group, backend: as for `r2vpo_loss`.
        temperature: a number, or per sequence (labels (B, T)) or per token, ≥ 1e-6.
        return_entropy: return (logps, entropy).

    Returns: logps, or (logps, entropy): like labels, nats, float32 (float64 for float64 logits), 0
        where masked. Without grad the logits are read once.

    Raises: as `r2vpo_loss`.

    Source: DERIVATION.md, Eq. 1, 3 and 8.
    """

    def source() -> ops.Logits:
        return _source(logits, labels, False, backend)

    return _log_probs(source, labels, temperature, mask, ignore_index, return_entropy, tp_group)


def _log_probs(
    build_source: Callable[[], ops.Logits | LinearLogits],
    labels: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
    tp_group: dist.ProcessGroup | None,
) -> Tensor | tuple[Tensor, Tensor]:
    def prepare() -> tuple[ops.Logits | LinearLogits, Batch, Tensor]:
        source = build_source()
        labelling = _labelling(source, labels, ignore_index, tp_group)
        batch = Batch.build(labels.shape, source.like, mask=mask, **labelling)
        return source, batch, token_temperature(batch, temperature)

    options = {"labels": labels, "temperature": temperature, "mask": mask}
    source, batch, per_token = agree(tp_group, options | {"entropy": return_entropy}, prepare)
    logps, entropy = source.token_logps(batch.labels, per_token, return_entropy)
    if entropy is None:
        return logps.reshape(batch.shape)
    return logps.reshape(batch.shape), entropy.reshape(batch.shape)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    compact: bool = True,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logps` from hidden states and the LM head (Eq. 27); logits never exist as a whole.

    In torch:

        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        logits = softcap * torch.tanh(logits / softcap)  # unless softcap is None
        logps = token_logps(logits, labels, temperature=temperature)

    One matrix product; for the gradient three more, in backward.

    Args:
        hidden, weight, bias, softcap, logit_scale, chunk_tokens, compact, tp_group: as for
            `linear_r2vpo_loss`; what the backward leaves out are tokens that get no gradient.
        labels, temperature, mask, ignore_index, return_entropy, backend: as for `token_logps`.

    Returns, raises: as `token_logps`.

    Source: DERIVATION.md, Eq. 27 to 29.
    """

    def source() -> LinearLogits:
        return LinearLogits.build(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk_tokens=chunk_tokens,
            compact=compact,
            sharded=tp_group is not None,
            backend=backend,
        )

    return _log_probs(source, labels, temperature, mask, ignore_index, return_entropy, tp_group)


def _labelling(
    source: ops.Logits | LinearLogits,
    labels: Tensor,
    ignore_index: int,
    tp_group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    vocabulary = source.vocabulary if tp_group is None else UNKNOWN_VOCABULARY
    return {"labels": labels, "vocabulary": vocabulary, "ignore_index": ignore_index}


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


def _source(logits: Tensor, labels: Tensor, inplace: bool, backend: str) -> ops.Logits:
    """The logits as (B, T, V); a packed batch is one row of tokens."""
    check_float("logits", logits)
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise invalid("logits", logits, "shape (B, T, V), or (N, V) packed, with V of at least 1")
    check_labels(labels, logits.shape[:-1], "logits less V")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise invalid("logits", f"stride {logits.stride(-1)} over V", "a contiguous vocabulary")
    if inplace:
        _check_inplace(logits)
    batch = logits if logits.dim() == 3 else logits.unsqueeze(0)
    return ops.Logits(batch, inplace, ops.choose_backend(backend, logits))


def _check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        # Where the compiler decides what is mutated, the permission goes unused.
        return
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise invalid("inplace", True, "False for a leaf or a view of one, whose values must stay")
    if ops.rows_overlap(logits):
        raise invalid("inplace", True, "False for logits whose rows share memory")
