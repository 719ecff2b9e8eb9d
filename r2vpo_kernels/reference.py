"""The specification: each equation of the loss once, in eager torch, for any float dtype.

This is what every kernel is held to (in float64), and what runs where no kernel does. Everything
per token is flat, (N,). `evaluate` is the way from log-probs to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .checks import MIN_TEMPERATURE, KLEstimator, PolicyLoss, RatioLevel, check
from .objective import Objective
from .output import METRICS, RatioStats
from .sampling import SamplingMask, segment_of_each


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """Eq. 27: the logits (N, V) of hidden states (N, H) by a head (V, H)."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(compute_dtype(logits.dtype)) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    support: Support | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 and Eq. 3: (logps, entropy or None), each (N,), 0 where the label is negative.

    `logits` (B, T, V); `labels` (N,) with -1 where masked and V where out of range (logp NaN).
    """
    vocabulary = logits.shape[-1]
    valid = labels >= 0
    x = logits.reshape(-1, vocabulary).to(temperature.dtype)
    x = torch.where(valid[:, None], x, 0.0) / temperature[:, None]
    if support is not None:
        x = torch.where(support.words(vocabulary), x, -torch.inf)
    log_p = torch.log_softmax(x, dim=-1)
    logps = log_p.gather(-1, labels.clamp(0, vocabulary - 1)[:, None]).squeeze(-1)
    logps = torch.where(labels < vocabulary, logps, torch.nan)
    entropy = None
    if with_entropy:
        # Eq. 12: p·log p is 0 at p = 0, where log p is -inf.
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
        entropy = torch.where(valid, -(log_p.exp() * finite).sum(-1), 0.0)
    return torch.where(valid, logps, 0.0), entropy


@dataclass(frozen=True)
class Support:
    """K of Eq. 1, token by token: the words of `mask`, but all of them where `full` (N,)."""

    mask: SamplingMask
    full: Tensor

    @staticmethod
    def of(mask: SamplingMask, labels: Tensor) -> tuple[Support, Tensor]:
        """(the supports, where `labels` (N,) are not in theirs); masked labels are negative."""
        token = mask.token_of()
        is_label = (mask.token_ids == labels[token]).to(labels.dtype)
        found = torch.zeros_like(labels).index_add(0, token, is_label) > 0
        full = (mask.offsets.diff() == 0) | (labels < 0)
        if mask.missing_label == "full":
            full = full | ~found
        return Support(mask, full), ~(found | full)

    @property
    def size(self) -> Tensor:
        """(N,): how many words are in a token's set; 0 for all."""
        return torch.where(self.full, 0, self.mask.offsets.diff())

    def words(self, vocabulary: int) -> Tensor:
        """(N, V): whether each is in the token's support."""
        inside = self.full[:, None].repeat(1, vocabulary)
        # A word that there is not is reported where the mask came in.
        inside[self.mask.token_of(), self.mask.token_ids.long().clamp(max=vocabulary - 1)] = True
        return inside


@dataclass(frozen=True)
class Segments:
    """A partition of the tokens: `index` (N,) names each token's segment.

    `order` lists the tokens segment by segment (None: they lie so already), and segment i is
    order[offsets[i]:offsets[i + 1]]. Sums run in that order, in float64: no atomics, the same bits
    each time.
    """

    index: Tensor
    offsets: Tensor
    order: Tensor | None = None

    @property
    def count(self) -> int:
        return self.offsets.shape[0] - 1

    def sum(self, x: Tensor) -> Tensor:
        """(N,) → (count,)."""
        return _SegmentSum.apply(x, self.index, self.offsets, self.order)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N,), (N,) → (count,), the weighted mean; 0 where nothing has weight."""
        total = self.sum(weight)
        return self.sum(weight * x) / torch.where(total == 0, 1.0, total)

    def spread(self, x: Tensor) -> Tensor:
        """(count,) → (N,), each token its segment's value."""
        return _SegmentSpread.apply(x, self.index, self.offsets, self.order)

    @staticmethod
    def consecutive(offsets: Tensor, tokens: int) -> Segments:
        return Segments(segment_of_each(offsets, tokens), offsets)

    @staticmethod
    def of(index: Tensor, count: int) -> Segments:
        order = index.argsort(stable=True)
        ends = torch.arange(count + 1, device=index.device, dtype=index.dtype)
        return Segments(index, torch.searchsorted(index[order], ends), order)


def _segment_sum(x: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
    ordered = x if order is None else x[order]
    sums = torch.segment_reduce(
        ordered.double().contiguous(), "sum", offsets=offsets, unsafe=True, initial=0.0
    )
    return sums.to(x.dtype)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, offsets, order):
        ctx.save_for_backward(index)
        return _segment_sum(x, offsets, order)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad[index], None, None, None


class _SegmentSpread(torch.autograd.Function):
    """Its backward is the fixed-order sum, where that of plain indexing adds by atomics."""

    @staticmethod
    def forward(ctx, x, index, offsets, order):
        ctx.save_for_backward(offsets, order)
        return x[index]

    @staticmethod
    def backward(ctx, grad):
        offsets, order = ctx.saved_tensors
        return _segment_sum(grad, offsets, order), None, None, None


@dataclass(frozen=True)
class Tokens:
    """What `Batch` and `Objective` say, token by token: (N,), or 0-dim tensors for numbers."""

    valid: Tensor
    labels: Tensor  # int64: -1 where masked, V where out of range; empty without logits
    support: Support | None  # None: all words
    sequences: Segments | None
    groups: Segments
    token_weight: Tensor  # Eq. 4: the weight before the batch's denominator, that of the statistics
    weight: Tensor  # Eq. 4: the weight in the loss
    temperature: Tensor
    advantages: Tensor  # s·A
    old_logps: Tensor | None  # None: on-policy
    policy_loss: PolicyLoss
    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor
    variance_coef: Tensor
    center: Tensor | None  # c - 1; None: the empirical mean of the group
    ratio_level: RatioLevel
    ref_logps: Tensor | None
    kl_coef: Tensor
    kl_estimator: KLEstimator
    kl_unbiased: bool
    entropy_coef: Tensor
    log_ratio_clamp: Tensor

    @staticmethod
    def of(
        batch: Batch,
        objective: Objective,
        like: Tensor,
        vocabulary: int = 0,
        whole: int | None = None,
    ) -> Tokens:
        """Values are checked here: a ValueError on a CPU, NaN on a GPU.

        `whole`: the vocabulary of all shards, where `vocabulary` is not known yet.
        """
        valid, labels = _valid_labels(batch, vocabulary, like.device)
        one = torch.ones((), dtype=compute_dtype(like.dtype), device=like.device)
        support, mask = None, batch.sampling_mask
        if mask is not None:
            words = vocabulary if whole is None else whole
            fits = mask.largest < words
            expected = f"token_ids from 0 to {words - 1}"
            one = check(one, fits, mask.largest, "sampling_mask", expected)
            support, missing = Support.of(mask, labels)
            expected = "each in the token's set of sampling_mask, or its missing_label='full'"
            labels = check(labels, ~missing, labels, "labels", expected)
            labels = torch.where(missing | (~fits & valid), vocabulary, labels)
        one, sequences = _sequences(batch, one)
        unscaled_weight, groups = _groups(batch, valid, one, sequences)
        token_weight = torch.where(valid, unscaled_weight, 0.0)
        lengths = token_weight[:0] if sequences is None else sequences.sum(valid.to(one.dtype))
        denominator = _denominator(batch, valid, lengths, one)
        if batch.reduction == "seq-mean-token-mean":
            assert sequences is not None
            token_weight = token_weight / sequences.spread(lengths.clamp(min=1.0))
        weight = token_weight / torch.where(denominator == 0, 1.0, denominator)

        def per_token(
            name: str, value: float | Tensor, fill: float = 0.0, minimum: float | None = None
        ) -> Tensor:
            """A tensor per token or per sequence, or a number; `fill` at masked tokens."""
            if not isinstance(value, Tensor):
                return torch.where(valid, one.new_zeros(()) + value, fill)
            flat = value.detach().to(one.dtype)
            if value.shape == batch.shape:
                flat = flat.reshape(-1)
            elif value.dim() == 1:
                assert sequences is not None
                flat = flat[sequences.index]
            flat = torch.where(valid, flat, fill)
            if minimum is None:
                return flat
            return check(flat, flat >= minimum, flat, name, f"at least {minimum}")

        def optional(name: str, value: Tensor | None) -> Tensor | None:
            return None if value is None else per_token(name, value)

        advantages = torch.zeros_like(weight)
        if objective.advantages is not None:
            advantages = per_token("advantages", objective.advantages)
        if objective.importance_weights is not None:
            importance_weights = per_token("importance_weights", objective.importance_weights)
            advantages = advantages * importance_weights
        center = None if objective.empirical_center else torch.zeros_like(weight)
        if isinstance(objective.center, Tensor):
            means = objective.center.detach().to(one.dtype)
            center = torch.where(valid, groups.spread(means - 1.0), 0.0)
        return Tokens(
            valid=valid,
            labels=labels,
            support=support,
            sequences=sequences,
            groups=groups,
            token_weight=token_weight,
            weight=weight,
            temperature=per_token("temperature", objective.temperature, 1.0, MIN_TEMPERATURE),
            advantages=advantages,
            old_logps=optional("old_logps", objective.old_logps),
            policy_loss=objective.policy_loss,
            clip_low=one.new_zeros(()) + objective.clip_low,
            clip_high=one.new_zeros(()) + objective.clip_high,
            dual_clip=one.new_zeros(()) + objective.dual_clip,
            variance_coef=per_token("variance_coef", objective.variance_coef, minimum=0.0),
            center=center,
            ratio_level=objective.ratio_level,
            ref_logps=optional("ref_logps", objective.ref_logps),
            kl_coef=one.new_zeros(()) + objective.kl_coef,
            kl_estimator=objective.kl_estimator,
            kl_unbiased=objective.kl_unbiased,
            entropy_coef=one.new_zeros(()) + objective.entropy_coef,
            log_ratio_clamp=one.new_zeros(()) + objective.log_ratio_clamp,
        )


def _valid_labels(batch: Batch, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    valid = torch.ones(batch.tokens, dtype=torch.bool, device=device)
    if batch.mask is not None:
        valid = (batch.mask != 0).reshape(-1)
    if batch.labels is None:
        return valid, torch.zeros(0, dtype=torch.int64, device=device)
    labels = batch.labels.reshape(-1).long()
    valid = valid & (labels != batch.ignore_index)
    in_range = (labels >= 0) & (labels < vocabulary)
    checked = torch.where(valid, torch.where(in_range, labels, vocabulary), -1)
    expected = "0 <= label < the vocabulary's size, or ignore_index"
    return valid, check(checked, in_range | ~valid, labels, "labels", expected)


def _sequences(batch: Batch, one: Tensor) -> tuple[Tensor, Segments | None]:
    """(1, or NaN where cu_seqlens was wrong; the sequences, if there are any)."""
    tokens = batch.tokens
    if len(batch.shape) == 2:
        offsets = torch.arange(batch.shape[0] + 1, device=one.device) * batch.shape[1]
        return one, Segments.consecutive(offsets, tokens)
    if batch.cu_seqlens is None:
        return one, None
    offsets = batch.cu_seqlens.long()
    steps = offsets.diff()
    covers = (offsets[0] == 0) & (offsets[-1] == tokens) & (steps >= 0).all()
    one = check(one, covers, offsets, "cu_seqlens", "offsets that rise from 0 to the tokens")
    if steps.shape[0] == tokens:
        # A tensor of that shape could be per sequence or per token: they must be the same.
        expected = "one token in each sequence where there are as many sequences as tokens"
        one = check(one, (steps == 1).all(), offsets, "cu_seqlens", expected)
    # Whatever came, no sum may reach outside the tokens.
    offsets = offsets.clamp(0, tokens).cummax(0).values
    return one, Segments.consecutive(offsets, tokens)


def _groups(
    batch: Batch, valid: Tensor, one: Tensor, sequences: Segments | None
) -> tuple[Tensor, Segments]:
    """(1, or per token NaN in a group that does not exist; the groups)."""
    tokens = batch.tokens
    if batch.group_size:
        assert sequences is not None
        return one, Segments.consecutive(sequences.offsets[:: batch.group_size], tokens)
    if batch.group_ids is None:
        return one, Segments.consecutive(torch.arange(2, device=one.device) * tokens, tokens)
    ids = batch.group_ids.long()
    ids = ids if sequences is None else ids[sequences.index]
    in_range = (ids >= 0) & (ids < batch.num_groups)
    expected = f"0 <= id < {batch.num_groups}"
    ones = check(one.expand(tokens), in_range | ~valid, ids, "group_ids", expected)
    return ones, Segments.of(ids.clamp(0, batch.num_groups - 1), batch.num_groups)


def _denominator(batch: Batch, valid: Tensor, lengths: Tensor, one: Tensor) -> Tensor:
    """Eq. 4: what the token weights are divided by."""
    if isinstance(batch.normalizer, Tensor):
        given = batch.normalizer.detach().to(one)
        return check(given, given >= 0, given, "normalizer", "at least 0")
    if batch.normalizer is not None:
        return one.new_zeros(()) + batch.normalizer
    if batch.reduction == "none":
        return one
    if batch.reduction == "token-mean":
        return valid.sum().to(one.dtype)
    count = (lengths > 0).sum().to(one.dtype)
    return count * batch.shape[1] if batch.reduction == "seq-mean-token-sum-norm" else count


class _Difference(torch.autograd.Function):
    """a - b with b constant; 0 where they are equal, two infinities too (Eq. 2)."""

    @staticmethod
    def forward(ctx, a, b):
        return torch.where(a == b, 0.0, a - b)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class TokenTerms(NamedTuple):
    """Eq. 5, one entry per token, before aggregation."""

    ratio_minus_one: Tensor
    log_ratio: Tensor
    clamped: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    policy: Tensor
    penalty: Tensor
    kl: Tensor | None
    loss: Tensor


def token_terms(logps: Tensor, entropy: Tensor | None, tokens: Tokens) -> TokenTerms:
    """Eq. 5: what each token adds to the loss, from its log-prob; autograd gives Eq. 7."""
    clamp = tokens.log_ratio_clamp
    old_logps = logps.detach() if tokens.old_logps is None else tokens.old_logps
    raw = _Difference.apply(logps, old_logps)
    if tokens.ratio_level == "sequence":
        assert tokens.sequences is not None
        mean = tokens.sequences.mean(raw, tokens.valid.to(raw.dtype))
        raw = torch.where(tokens.valid, tokens.sequences.spread(mean), 0.0)
    delta = raw.clamp(-clamp, clamp)
    ratio, d = delta.exp(), delta.expm1()

    center = tokens.center
    if center is None:
        # Eq. 9: the empirical mean, as a distance from one, like every mean here.
        center = tokens.groups.spread(tokens.groups.mean(d, tokens.token_weight))

    clipped_low, clipped_high = clipped(d, tokens)
    policy = _policy(ratio, logps, clipped_low, clipped_high, tokens)
    penalty = tokens.variance_coef * (d - center) ** 2
    loss = policy + penalty
    kl = None
    if tokens.ref_logps is not None:
        kl = _kl(logps, tokens.ref_logps, tokens.kl_estimator, clamp)
        if tokens.kl_unbiased:
            kl = ratio * kl
        loss = loss + tokens.kl_coef * kl
    if entropy is not None:
        loss = loss - tokens.entropy_coef * entropy
    return TokenTerms(
        d, delta, raw.abs() > clamp, clipped_low, clipped_high, policy, penalty, kl,
        tokens.weight * loss,
    )  # fmt: skip


def clipped(d: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Where the clip of Eq. 5 binds, below and above: with "clip" only where it lowers the gain."""
    if tokens.policy_loss == "ratio":
        nowhere = torch.zeros_like(d, dtype=torch.bool)
        return nowhere, nowhere
    low, high = d < -tokens.clip_low, d > tokens.clip_high
    if tokens.policy_loss == "clip":
        gains = tokens.advantages > 0
        low = low & (tokens.advantages < 0)
        high = torch.where(gains, high, (tokens.advantages < 0) & (1.0 + d > tokens.dual_clip))
    return low, high


def _policy(
    ratio: Tensor, logps: Tensor, clipped_low: Tensor, clipped_high: Tensor, tokens: Tokens
) -> Tensor:
    """Eq. 5, P: with "clip" max(-sA·ρ, -sA·clamp(ρ, 1-ε_low, 1+ε_high)), and -sA·c at most."""
    highest = 1.0 + tokens.clip_high
    if tokens.policy_loss == "clip":
        highest = torch.where(tokens.advantages > 0, highest, tokens.dual_clip)
    factor = torch.where(clipped_low, 1.0 - tokens.clip_low, ratio)
    factor = torch.where(clipped_high, highest, factor)
    if tokens.policy_loss == "cispo":
        factor = factor.detach() * logps
    return -tokens.advantages * factor


def _kl(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator, clamp: Tensor) -> Tensor:
    """Eq. 6: an estimate of KL(new ‖ ref) per token."""
    gap = -_Difference.apply(logps, ref_logps).clamp(-clamp, clamp)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return 0.5 * gap**2
    return gap.expm1() - gap


class Evaluation(NamedTuple):
    loss: Tensor  # 0-dim, or (N,) with reduction "none"
    stats: Tensor  # (3, groups): the fields of RatioStats
    metrics: Tensor  # (len(METRICS),)


def evaluate(
    logps: Tensor, entropy: Tensor | None, tokens: Tokens, per_token: bool = False
) -> Evaluation:
    """The loss of flat log-probs (N,), differentiable in them and in `entropy`."""
    terms = token_terms(logps, entropy, tokens)
    loss = terms.loss if per_token else _total(terms.loss)
    with torch.no_grad():
        d, a = terms.ratio_minus_one.detach(), tokens.token_weight
        stats = torch.stack([tokens.groups.sum(x) for x in (a, a * d, a * d**2)])
        return Evaluation(loss, stats, _metrics(terms, entropy, tokens))


def _total(x: Tensor) -> Tensor:
    """The sum, accumulated in float64."""
    return x.sum(dtype=torch.float64).to(x.dtype)


def _metrics(terms: TokenTerms, entropy: Tensor | None, tokens: Tokens) -> Tensor:
    valid, weight, d = tokens.valid, tokens.weight, terms.ratio_minus_one
    count = valid.sum().clamp(min=1)
    zero = torch.zeros_like(d)

    def mean(x: Tensor) -> Tensor:
        return _total(torch.where(valid, x, 0.0)) / count

    # With a neutral infinity at masked tokens and at the end, the extremes of no tokens are 1.
    low = torch.cat([torch.where(valid, d, torch.inf), d.new_full((1,), torch.inf)]).amin()
    high = torch.cat([torch.where(valid, d, -torch.inf), d.new_full((1,), -torch.inf)]).amax()
    stats = RatioStats(d.new_ones(()), mean(d), mean(d**2))
    values: dict[str, Any] = {
        "ratio/mean": stats.mean,
        "ratio/var": stats.variance,
        "ratio/min": 1.0 + torch.where(valid.any(), low, 0.0),
        "ratio/max": 1.0 + torch.where(valid.any(), high, 0.0),
        "ratio/ess": stats.ess,
        "ratio/clamped": mean(terms.clamped.to(weight.dtype)),
        "kl/old": mean(d - terms.log_ratio),
        "loss/policy": _total(weight * terms.policy),
        "loss/penalty": _total(weight * terms.penalty),
        "kl/ref": mean(zero if terms.kl is None else terms.kl),
        "entropy": mean(zero if entropy is None else entropy),
    }
    size = zero if tokens.support is None else tokens.support.size.to(d.dtype)
    values |= {
        "support/single": mean((size == 1).to(d.dtype)),
        "support/size": _total(size) / (size > 0).sum().clamp(min=1),
        "clip/low": mean(terms.clipped_low.to(d.dtype)),
        "clip/high": mean(terms.clipped_high.to(d.dtype)),
    }
    return torch.stack([values[name] for name in METRICS])


def dual_step(
    coef: Tensor,
    stats: RatioStats,
    about_means: bool,
    target: float,
    lr: float,
    min_coef: float,
    max_coef: float,
) -> Tensor:
    """Eq. 16: λ after one step; where v is not finite, or nothing has weight, λ as it was."""
    v = stats.variance if about_means else stats.second_moment
    pooled = (stats.weight * v).sum() / stats.weight.sum()
    excess = pooled / target - 1.0
    moved = coef * (lr * excess.clamp(max=1.0)).exp()
    return torch.where(excess.isfinite(), moved.clamp(min_coef, max_coef), coef)
