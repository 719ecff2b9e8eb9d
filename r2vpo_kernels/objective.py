"""From log-probs to the loss: the objective's arguments, its value, its statistics and metrics.

`Objective.build` is where the arguments that describe it are checked, once for all entries. The
equations themselves stand in reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .batch import Batch, check_choice, check_device, check_number, invalid
from .ops import KL_ESTIMATORS
from .reference import TokenTerms, token_terms

CENTERS = ("one", "group")
RATIO_LEVELS = ("token", "sequence")
# exp(2·40) = 5.5e34: the squared ratio stays finite in float32.
MAX_LOG_RATIO_CLAMP = 40.0
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Objective:
    """What Eq. 5 needs besides log-probs: (N,) what is per token, 0-dim tensors the numbers."""

    advantages: Tensor  # s·A
    old_logps: Tensor | None  # None: on-policy
    variance_coef: Tensor
    center: Tensor | None  # c - 1; None: the empirical mean of the group
    ratio_level: str
    ref_logps: Tensor | None
    kl_coef: Tensor
    kl_estimator: str
    entropy_coef: Tensor
    temperature: Tensor
    log_ratio_clamp: Tensor

    @property
    def separable(self) -> bool:
        """Whether each token's gradient depends on that token alone."""
        return self.center is not None and self.ratio_level == "token"

    @property
    def known_zero(self) -> Tensor:
        """Of a separable objective: (N,), where Eq. 7 is 0 whatever the logits."""
        level = self.variance_coef == 0
        if self.old_logps is None:
            level = level | (self.center == 0)
        return (self.advantages == 0) & level & (self.kl_coef == 0) & (self.entropy_coef == 0)

    @staticmethod
    def build(
        batch: Batch,
        *,
        old_logps: Tensor | None,
        advantages: Tensor,
        variance_coef: float | Tensor,
        center: str | Tensor,
        ratio_level: str,
        importance_weights: Tensor | None,
        ref_logps: Tensor | None,
        kl_coef: float,
        kl_estimator: str,
        entropy_coef: float,
        log_ratio_clamp: float,
        temperature: float | Tensor = 1.0,
    ) -> Objective:
        check_choice("ratio_level", ratio_level, RATIO_LEVELS)
        if ratio_level == "sequence" and batch.sequences is None:
            raise invalid(
                "ratio_level", "'sequence'", "sequences for it: labels (B, T), or cu_seqlens"
            )
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        check_number("kl_coef", kl_coef)
        check_number("entropy_coef", entropy_coef)
        check_number("log_ratio_clamp", log_ratio_clamp, 0.0, MAX_LOG_RATIO_CLAMP)
        if kl_coef != 0 and ref_logps is None:
            raise invalid("ref_logps", None, f"a tensor, for kl_coef is {kl_coef}")
        s_a = batch.per_token("advantages", advantages)
        if importance_weights is not None:
            s_a = s_a * batch.per_token("importance_weights", importance_weights)

        def per_token_only(name: str, value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return batch.per_token(name, value, per_sequence=False)

        return Objective(
            advantages=s_a,
            old_logps=per_token_only("old_logps", old_logps),
            variance_coef=batch.per_token("variance_coef", variance_coef, number=True, minimum=0.0),
            center=_center(batch, center),
            ratio_level=ratio_level,
            ref_logps=per_token_only("ref_logps", ref_logps),
            kl_coef=batch.scalar(kl_coef),
            kl_estimator=kl_estimator,
            entropy_coef=batch.scalar(entropy_coef),
            temperature=token_temperature(batch, temperature),
            log_ratio_clamp=batch.scalar(log_ratio_clamp),
        )


def token_temperature(batch: Batch, temperature: float | Tensor) -> Tensor:
    return batch.per_token(
        "temperature", temperature, fill=1.0, number=True, minimum=MIN_TEMPERATURE
    )


def _center(batch: Batch, center: str | Tensor) -> Tensor | None:
    """c - 1 per token: like every mean here, as a distance from one."""
    if not isinstance(center, Tensor):
        check_choice("center", center, CENTERS)
        return torch.zeros_like(batch.weight) if center == "one" else None
    check_device("center", center, batch.weight.device)
    if center.shape != (batch.groups.count,) or not center.is_floating_point():
        raise invalid(
            "center", center, f"a float tensor of means, one per group: ({batch.groups.count},)"
        )
    means = center.detach().to(batch.weight.dtype)
    return torch.where(batch.valid, batch.groups.spread(means - 1.0), 0.0)


def total(x: Tensor) -> Tensor:
    """The sum, accumulated in float64."""
    return x.sum(dtype=torch.float64).to(x.dtype)


@dataclass(frozen=True)
class RatioStats:
    """Moments of the ratio about one, per group: Σw, Σw·(ρ-1), Σw·(ρ-1)² (Eq. 10).

    The weights w are those before the batch's denominator, so that the sum over micro-batches or
    ranks is that of the whole batch. Each field is (num_groups,), float32 (float64 for float64
    input). A group without tokens has mean 1, variance 0, ess 1.
    """

    weight: Tensor
    d_sum: Tensor
    d_sq_sum: Tensor

    def __add__(self, other: RatioStats) -> RatioStats:
        if not isinstance(other, RatioStats):
            return NotImplemented
        if self.weight.shape != other.weight.shape:
            ours, theirs = self.weight.shape[0], other.weight.shape[0]
            raise ValueError(f"RatioStats: got {theirs} groups to add, expected {ours}")
        return RatioStats(
            self.weight + other.weight,
            self.d_sum + other.d_sum,
            self.d_sq_sum + other.d_sq_sum,
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> RatioStats:
        """The sum over the ranks of `group` (default: all); every rank calls it and receives it."""
        fields = torch.stack([self.weight, self.d_sum, self.d_sq_sum])
        dist.all_reduce(fields, group=group)
        return RatioStats(*fields.unbind())

    def _per_weight(self, moment: Tensor) -> Tensor:
        return moment / torch.where(self.weight == 0, 1.0, self.weight)

    @property
    def mean(self) -> Tensor:
        """The weighted mean of the ratio."""
        return 1.0 + self._per_weight(self.d_sum)

    @property
    def second_moment(self) -> Tensor:
        """The weighted mean of (ρ - 1)²."""
        return self._per_weight(self.d_sq_sum)

    @property
    def variance(self) -> Tensor:
        """The weighted variance of the ratio about its mean."""
        return (self.second_moment - self._per_weight(self.d_sum) ** 2).clamp(min=0.0)

    @property
    def ess(self) -> Tensor:
        """The effective sample fraction mean² / (mean² + variance)."""
        square = self.mean**2
        both = square + self.variance
        # All ratios vanishing alike is no spread.
        return torch.where(both == 0, 1.0, square / both)


@dataclass(frozen=True)
class R2VPOOutput:
    """The loss, and what came with it; all but `loss` is detached.

    loss: 0-dim, or the shape of labels with reduction="none".
    logps: like labels, nats, 0 where masked. entropy: the same, or None if it was not asked for.
    stats: the ratio's moments per group.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    stats: RatioStats
    _terms: TokenTerms
    _batch: Batch

    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors on the device, without a host sync; means are over the valid tokens.

        ratio/mean, ratio/var, ratio/min, ratio/max, ratio/ess (1, 0, 1, 1, 1 without tokens);
        ratio/clamped, the share of tokens whose log-ratio was clamped; kl/old, the mean of ρ-1-log
        ρ, the k3 estimate of KL(old ‖ new); kl/ref, if ref_logps were given; entropy, if it was
        computed; loss/policy and loss/penalty, the weighted sums that the loss is made of.
        """
        terms, valid, weight = self._terms, self._batch.valid, self._batch.weight
        count = valid.sum().clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return total(torch.where(valid, x, 0.0)) / count

        d = terms.ratio_minus_one
        # With a neutral 0 at masked tokens and at the end, the extremes of no tokens are 1.
        low = torch.cat([torch.where(valid, d, torch.inf), d.new_full((1,), torch.inf)]).amin()
        high = torch.cat([torch.where(valid, d, -torch.inf), d.new_full((1,), -torch.inf)]).amax()
        stats = RatioStats(d.new_ones(()), mean(d), mean(d**2))
        result = {
            "ratio/mean": stats.mean,
            "ratio/var": stats.variance,
            "ratio/min": 1.0 + torch.where(valid.any(), low, 0.0),
            "ratio/max": 1.0 + torch.where(valid.any(), high, 0.0),
            "ratio/ess": stats.ess,
            "ratio/clamped": mean(terms.clamped.to(weight.dtype)),
            "kl/old": mean(d - terms.log_ratio),
            "loss/policy": total(weight * terms.policy),
            "loss/penalty": total(weight * terms.penalty),
        }
        if terms.kl is not None:
            result["kl/ref"] = mean(terms.kl)
        if self.entropy is not None:
            result["entropy"] = mean(self.entropy.reshape(-1))
        return result


def evaluate(
    logps: Tensor, entropy: Tensor | None, batch: Batch, objective: Objective, reduction: str
) -> R2VPOOutput:
    """The loss of flat log-probs (N,), differentiable in them and in `entropy`."""
    terms = token_terms(logps, entropy, batch, objective)
    loss = terms.loss.reshape(batch.shape) if reduction == "none" else total(terms.loss)
    terms = terms.detach()
    d, weight = terms.ratio_minus_one, batch.token_weight
    stats = RatioStats(*(batch.groups.sum(x) for x in (weight, weight * d, weight * d**2)))
    if entropy is not None:
        entropy = entropy.detach().reshape(batch.shape)
    return R2VPOOutput(loss, logps.detach().reshape(batch.shape), entropy, stats, terms, batch)
