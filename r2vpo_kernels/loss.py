"""The entries: from logits or log-probs to the R²VPO loss.

Each checks its arguments where a source of logits, `Batch` and `Objective` are built, and hands
them over to the source, which chooses the route.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batch import Batch
from .checks import Backend, Center, KLEstimator, PolicyLoss, RatioLevel, Reduction, invalid
from .objective import Objective, checked_temperature
from .output import R2VPOOutput, RatioStats
from .sampling import SamplingMask
from .sources.autograd import Result
from .sources.dtensor import is_dtensor, local_arguments
from .sources.linear import LinearLogits
from .sources.logits import Logits
from .sources.logps import LogProbs
from .sources.shard import exchange_shard_layout

P = ParamSpec("P")
R = TypeVar("R")
Source = TypeVar("Source", Logits, LinearLogits)


def _entry(entry: Callable[P, R]) -> Callable[P, R]:
    """The entry, which gets the local parts of DTensors. An error names a misspelt keyword."""
    known = tuple(inspect.signature(entry).parameters)

    @functools.wraps(entry)
    def checked(*arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            if is_dtensor(*arguments, *keywords.values()):
                here, named = local_arguments(known, arguments, keywords)
                return entry(*here, **named)
            return entry(*arguments, **keywords)
        except TypeError:
            for name in keywords:
                if name not in known:
                    expected = "one of " + ", ".join(known)
                    error = TypeError(f"{name}: got an unknown keyword, expected {expected}")
                    raise error from None
            raise

    return checked


def _output(result: Result, batch: Batch, objective: Objective) -> R2VPOOutput:
    loss, stats, metrics, logps, entropy = result
    return R2VPOOutput(
        loss,
        logps,
        entropy,
        RatioStats(*stats.unbind()),
        metrics,
        objective.ref_logps is not None,
        batch.sampling_mask is not None,
        objective.policy_loss != "ratio",
    )


def _asked(
    tp_group: dist.ProcessGroup | None,
    ask: Callable[[], tuple[Source, Batch, Objective]],
    with_entropy: bool,
) -> tuple[Source, Batch, Objective]:
    """What was asked; of a shard of the vocabulary, what all ranks have asked alike."""
    return ask() if tp_group is None else exchange_shard_layout(tp_group, ask, with_entropy)


@_entry
def r2vpo_loss(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    policy_loss: PolicyLoss = "ratio",
    clip_range: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    variance_coef: float | Tensor | None = None,
    center: Center | Tensor = "one",
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    ratio_level: RatioLevel = "token",
    importance_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    kl_unbiased: bool = False,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    log_ratio_clamp: float = 20.0,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
) -> R2VPOOutput:
    """The R²VPO loss from logits (Eq. 5), with one pass over them where the objective allows it:

        L = Σ w·P + Σ w·λ·(ρ - c)² + β·Σ w·m·KL(logp, ref) - η·Σ w·H,    ρ = exp(logp - old)

    where P is -s·A·ρ and m is 1, unless `policy_loss` and `kl_unbiased` say otherwise.

    In torch, with the defaults and no mask:

        logp = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
        ratio = (logp - old_logps).exp()
        loss = (-advantages * ratio + variance_coef * (ratio - 1) ** 2).mean()

    At ρ = 1 + s·A / (2λ) a token's gradient changes sign: past it the penalty pulls back.

    Args:
        logits: (B, T, V), or (N, V) packed; float32, bfloat16, float16 (float64: eager). The
            vocabulary is contiguous, the rest may be a view. `logits[:, t]` scores `labels[:, t]`:
            there is no shift inside. A DTensor is taken as this rank's part. Shard of the
            vocabulary, over one dimension of the mesh, is `tp_group` over that dimension; with
            Shard of tokens and Replicate each rank has the loss of its own tokens, as with data
            parallelism, and `normalizer` makes ranks add up. Other placements are refused. The
            gradient is placed like logits. The other tensors are plain, this rank's part, or
            DTensors on the same mesh: sharded as the logits' tokens are (per sequence: as
            sequences are), and otherwise Replicate. What is returned is plain, this rank's part.
        labels: (B, T) or (N,), any integer dtype.
        old_logps: like labels, nats, log-probs of the labels when they were sampled. None:
            on-policy, ρ = 1 with the gradient of ρ.
        advantages: per sequence or per token.
        policy_loss: P. "ratio": -s·A·ρ; "clip", of PPO and GRPO (of GSPO at sequence level):
            max(-s·A·ρ, -s·A·clamp(ρ, 1-ε_low, 1+ε_high)); "cispo": -s·A·sg(clamp(ρ, 1-ε_low,
            1+ε_high))·logp, sg a constant. All other terms are the same with each.
        clip_range: ε, or (ε_low, ε_high) with ε_low ≤ 1, for "clip" and "cispo", which need it.
        dual_clip: c > 1; with "clip", P is -s·A·c at most where s·A < 0.
        variance_coef: λ ≥ 0: a number, a 0-dim tensor, or per sequence or per token. None: 0.5 with
            policy_loss "ratio", else 0. The 0.5 is from docs/study.md, "How strict?": with 2.5,
            where that ρ is 1 ± 0.2 at |A| = 1, less was learned on both tasks, from data one and
            five updates old. In docs/control.md 0.5 was level with PPO's clip on fresh data.
        center: c: "one"; "group", the weighted mean of ρ in each group; or a float tensor of given
            means (num_groups,), which reproduces "group" exactly where λ is constant in the group.
        group_ids: integers, one per sequence (one per token where there are no sequences).
        num_groups: how many groups group_ids name; a tensor `center` gives it too.
        group_size: every so many consecutive sequences are a group. Neither: all are one group.
        mask: like labels, nonzero is valid. What stands in any input at other tokens is harmless.
        ignore_index: labels of this value are masked too.
        sampling_mask: the words that each token was sampled from, by top-k, top-p or min-p, in the
            order of the flattened labels: log-probs, entropy and gradients are those of the policy
            renormalised over them, and old_logps and ref_logps must be too. With DTensors it is
            that of this rank's tokens. docs/sampling_masks.md.
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
        kl_unbiased: m is ρ, with its gradient: the importance-weighted estimate, whose gradient is
            that of the KL of the present policy. kl/ref of the metrics has the m too.
        entropy_coef: η, a bonus for entropy (nats).
        temperature: what logits are divided by: a number or per sequence or per token, ≥ 1e-6.
        log_ratio_clamp: bound on |log ρ| and on the KL's exponent, nats, at most 40; past it the
            ratio, or the KL, has no gradient.
        cu_seqlens: (S + 1,) integers, where packed sequences begin and end. Without it a packed
            batch has no sequences: every input is per token. Where S = N, each holds one token.
        return_entropy: compute `out.entropy` although entropy_coef is 0.
        tp_group: the ranks that share out the vocabulary, in their order, each with its part of the
            columns, of any size, 0 among them; everything else, labels of the whole vocabulary
            among it, is the same on all of them, and so is the result. An error on one rank, or
            options and shapes that differ, are an error on all. Costs that exchange (for which the
            host waits), a MAX of one and a SUM of four or five numbers per token. Takes the general
            route.
        inplace: the gradient may take the logits' memory: whoever reads logits after this call, or
            after backward, may see the gradient. Refused for a leaf, a view of one, and rows that
            share memory; under torch.compile, and for a DTensor, the permission goes unused.
        backend: "auto" (Triton on a GPU, C++ on a CPU, eager where those cannot), "triton", "cuda",
            "cpp" or "eager".

    Returns:
        The loss is differentiable in logits alone, once (backend "eager": any number of times);
        everything else is constant and detached.

    Raises:
        ValueError: naming the argument, what came and what was expected. On a GPU bad values in a
            tensor (a label outside the vocabulary, λ < 0) make the loss NaN instead, or raise with
            R2VPO_KERNELS_VALIDATE=1 at the price of a sync.
        TypeError: the same, for a wrong type.

    Source: docs/derivation, Eq. 1 to 11, and 30 for tp_group.
    """

    def ask() -> tuple[Logits, Batch, Objective]:
        source = Logits.build(logits, labels, inplace, tp_group is not None, backend)
        batch = Batch.build(
            labels.shape,
            logits.device,
            labels=labels,
            mask=mask,
            ignore_index=ignore_index,
            cu_seqlens=cu_seqlens,
            group_ids=group_ids,
            num_groups=num_groups,
            group_size=group_size,
            center=center,
            reduction=reduction,
            normalizer=normalizer,
            sampling_mask=sampling_mask,
        )
        objective = Objective.build(
            batch,
            logits.device,
            old_logps=old_logps,
            advantages=advantages,
            policy_loss=policy_loss,
            clip_range=clip_range,
            dual_clip=dual_clip,
            variance_coef=variance_coef,
            center=center,
            ratio_level=ratio_level,
            importance_weights=importance_weights,
            ref_logps=ref_logps,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_unbiased=kl_unbiased,
            entropy_coef=entropy_coef,
            log_ratio_clamp=log_ratio_clamp,
            temperature=temperature,
        )
        return source, batch, objective

    with_entropy = return_entropy or entropy_coef != 0
    source, batch, objective = _asked(tp_group, ask, with_entropy)
    return _output(source.loss(batch, objective, with_entropy), batch, objective)


@_entry
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
    logits_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    compact: bool = True,
    policy_loss: PolicyLoss = "ratio",
    clip_range: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    variance_coef: float | Tensor | None = None,
    center: Center | Tensor = "one",
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    ratio_level: RatioLevel = "token",
    importance_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    kl_unbiased: bool = False,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    log_ratio_clamp: float = 20.0,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> R2VPOOutput:
    """The R²VPO loss from hidden states and the LM head (Eq. 27, 5); logits never exist as a whole.

    In torch:

        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        logits = softcap * torch.tanh(logits / softcap)  # unless softcap is None
        loss = r2vpo_loss(logits, labels, old_logps, advantages, ...).loss

    Where each token's gradient depends on that token alone (`center` "one" or given, token level, a
    summed loss, not float16) it costs three matrix products, all in forward; otherwise four, three
    of them in backward; without grad one. Memory, beside inputs and gradients: the logits of a
    chunk, a float32 sum of the weight's gradient where there are several chunks, and under autocast
    the weight in its dtype.

    Args:
        hidden: (B, T, H), or (N, H) packed; float32, bfloat16, float16 (float64: eager), a view or
            not. What it holds at masked tokens is harmless. `hidden[:, t]` scores `labels[:, t]`.
            A DTensor is taken as logits are by `r2vpo_loss`, but H may not be sharded.
        weight: (V, H), in the dtype of hidden, unless under autocast, whose dtype the products then
            have. Or the head itself, a torch.nn.Linear, whose weight and bias are taken and whose
            hooks do not run, or one that peft's LoRA wraps: each active adapter adds scaling · B A
            to the weight by thin products, and A and B get their gradients. Dropout in training
            mode, DoRA, other adapters, adapters with tp_group and other classes are refused. A
            DTensor (FSDP2) is cast to hidden's dtype and gathered once; its gradient is the mean
            over ranks.
        bias: (V,), or None.
        softcap: C > 0 in C·tanh(logits / C), or None. Its slope takes a second buffer.
        logit_scale: what hidden · weightᵀ + bias is multiplied by, before the softcap.
        logits_dtype: of the logits and of their gradient. None: that of the products. float32
            beside bfloat16 or float16: logits are not rounded, which makes log-probs more exact;
            their gradient is rounded once, for its products. They take twice the memory, and on a
            CPU a float32 product. The sparse head's are float32 in any case.
        chunk_tokens: tokens in a chunk at most. None: all, where their logits need no more than the
            budget of 256 MiB on a CPU, 1 GiB elsewhere, plus the float32 sum that one chunk saves;
            else as many as the budget holds, in chunks of equal size.
        compact: leave masked tokens out of every product, and tokens whose gradient is known to be
            0 (advantage 0, no KL, no entropy bonus, and on-policy or λ = 0) out of those for the
            gradient. On a GPU finding them waits for it once, and once more in a backward that
            recomputes; False for no wait, no saving, and a copy of hidden.
        sampling_mask: as for `r2vpo_loss`. With `compact`, and sets that are small beside the
            vocabulary, only the kept words' logits are formed, in float32, from their rows of
            weight (docs/sampling_masks.md, "From hidden states"): no product over the vocabulary,
            but for tokens of an empty set.
        tp_group: as for `r2vpo_loss`. Each rank has its rows of weight and bias, and the same
            hidden, whose gradient is summed over the ranks (in float32). Weight or bias as a
            DTensor is refused then: give the local part.
        backend: as for `r2vpo_loss`. "eager" holds all logits.

    The other keywords are those of `r2vpo_loss`, except inplace.

    Returns:
        The loss is differentiable in hidden, weight and bias, once; only what requires grad is
        computed, in its own dtype. Sums are float32, within a product on a GPU as far as
        torch.backends.cuda.matmul is set to have them so.

    Errors are those of `r2vpo_loss`.

    Source: docs/derivation, Eq. 27 to 29.
    """

    def ask() -> tuple[LinearLogits, Batch, Objective]:
        source = LinearLogits.build(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            logits_dtype=logits_dtype,
            chunk_tokens=chunk_tokens,
            compact=compact,
            sharded=tp_group is not None,
            backend=backend,
        )
        batch = Batch.build(
            labels.shape,
            hidden.device,
            labels=labels,
            mask=mask,
            ignore_index=ignore_index,
            cu_seqlens=cu_seqlens,
            group_ids=group_ids,
            num_groups=num_groups,
            group_size=group_size,
            center=center,
            reduction=reduction,
            normalizer=normalizer,
            sampling_mask=sampling_mask,
        )
        objective = Objective.build(
            batch,
            hidden.device,
            old_logps=old_logps,
            advantages=advantages,
            policy_loss=policy_loss,
            clip_range=clip_range,
            dual_clip=dual_clip,
            variance_coef=variance_coef,
            center=center,
            ratio_level=ratio_level,
            importance_weights=importance_weights,
            ref_logps=ref_logps,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_unbiased=kl_unbiased,
            entropy_coef=entropy_coef,
            log_ratio_clamp=log_ratio_clamp,
            temperature=temperature,
        )
        return source, batch, objective

    with_entropy = return_entropy or entropy_coef != 0
    source, batch, objective = _asked(tp_group, ask, with_entropy)
    return _output(source.loss(batch, objective, with_entropy), batch, objective)


@_entry
def r2vpo_loss_from_logps(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    policy_loss: PolicyLoss = "ratio",
    clip_range: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    variance_coef: float | Tensor | None = None,
    center: Center | Tensor = "one",
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    ratio_level: RatioLevel = "token",
    importance_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    kl_unbiased: bool = False,
    entropy_coef: float = 0.0,
    log_ratio_clamp: float = 20.0,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> R2VPOOutput:
    """The R²VPO loss from log-probs that are already at hand (Eq. 5).

    In torch, with the defaults and no mask:

        ratio = (logps - old_logps).exp()
        loss = (-advantages * ratio + variance_coef * (ratio - 1) ** 2).mean()

    Args:
        logps: (B, T), or (N,) packed, nats, any float dtype; computed in float32 (float64 stays).
            A DTensor is taken as logits are by `r2vpo_loss`.
        entropy: like logps, nats, for entropy_coef; both come from `token_logps`.
        backend: as for `r2vpo_loss`. Float64 takes "eager", which is plain torch.

    The other keywords are those of `r2vpo_loss`, except ignore_index, sampling_mask, temperature,
    return_entropy, tp_group and inplace, which are about logits.

    Returns:
        The loss is differentiable in logps and entropy, once (backend "eager": any number of
        times).

    Errors are those of `r2vpo_loss`.

    Source: docs/derivation, Eq. 4 to 11.
    """
    source = LogProbs.build(logps, entropy, backend)
    if entropy is None and entropy_coef != 0:
        raise invalid("entropy", None, f"a tensor, for entropy_coef is {entropy_coef}")
    batch = Batch.build(
        logps.shape,
        logps.device,
        mask=mask,
        cu_seqlens=cu_seqlens,
        group_ids=group_ids,
        num_groups=num_groups,
        group_size=group_size,
        center=center,
        reduction=reduction,
        normalizer=normalizer,
    )
    objective = Objective.build(
        batch,
        logps.device,
        old_logps=old_logps,
        advantages=advantages,
        policy_loss=policy_loss,
        clip_range=clip_range,
        dual_clip=dual_clip,
        variance_coef=variance_coef,
        center=center,
        ratio_level=ratio_level,
        importance_weights=importance_weights,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_unbiased=kl_unbiased,
        entropy_coef=entropy_coef,
        log_ratio_clamp=log_ratio_clamp,
    )
    return _output(source.loss(batch, objective), batch, objective)


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: Literal[False] = False,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: Literal[True],
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: bool,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
@_entry
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of the labels (Eq. 1) and, on request, entropies (Eq. 3), both differentiable.

    In torch:

        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logps = log_p.gather(-1, labels[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)

    Args:
        temperature: a number, or per sequence (labels (B, T)) or per token, ≥ 1e-6.
        return_entropy: return (logps, entropy).

    The other arguments are those of `r2vpo_loss`.

    Returns:
        logps, or (logps, entropy): like labels, nats, float32 (float64 for float64 logits), 0 where
        masked. Without grad the logits are read once.

    Errors are those of `r2vpo_loss`.

    Source: docs/derivation, Eq. 1, 3 and 8.
    """

    def ask() -> tuple[Logits, Batch, Objective]:
        source = Logits.build(logits, labels, False, tp_group is not None, backend)
        return source, *_labels_alone(
            source, labels, mask, ignore_index, sampling_mask, temperature
        )

    source, batch, objective = _asked(tp_group, ask, return_entropy)
    return _log_probs(source, batch, objective, return_entropy)


def _labels_alone(
    source: Logits | LinearLogits,
    labels: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    sampling_mask: SamplingMask | None,
    temperature: float | Tensor,
) -> tuple[Batch, Objective]:
    device = source.like.device
    batch = Batch.build(
        labels.shape,
        device,
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        sampling_mask=sampling_mask,
    )
    temperature = checked_temperature(batch, temperature, device)
    return batch, Objective(temperature=temperature)


def _log_probs(
    source: Logits | LinearLogits, batch: Batch, objective: Objective, return_entropy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    logps, entropy = source.token_logps(batch, objective, return_entropy)
    return logps if entropy is None else (logps, entropy)


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: Literal[False] = False,
    chunk_tokens: int | None = None,
    compact: bool = True,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: Literal[True],
    chunk_tokens: int | None = None,
    compact: bool = True,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: bool,
    chunk_tokens: int | None = None,
    compact: bool = True,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
@_entry
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    sampling_mask: SamplingMask | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    compact: bool = True,
    tp_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logps` from hidden states and the LM head (Eq. 27); logits never exist as a whole.

    In torch:

        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        logits = softcap * torch.tanh(logits / softcap)  # unless softcap is None
        logps = token_logps(logits, labels, temperature=temperature)

    One matrix product; for the gradient three more, in backward.

    Arguments are those of `linear_r2vpo_loss` and `token_logps`, and so are results and errors.
    With `compact` the backward leaves out tokens that get no gradient.

    Source: docs/derivation, Eq. 27 to 29.
    """

    def ask() -> tuple[LinearLogits, Batch, Objective]:
        source = LinearLogits.build(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            logits_dtype=logits_dtype,
            chunk_tokens=chunk_tokens,
            compact=compact,
            sharded=tp_group is not None,
            backend=backend,
        )
        return source, *_labels_alone(
            source, labels, mask, ignore_index, sampling_mask, temperature
        )

    source, batch, objective = _asked(tp_group, ask, return_entropy)
    return _log_probs(source, batch, objective, return_entropy)
