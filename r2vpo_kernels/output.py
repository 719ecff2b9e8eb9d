"""What the entries return: the loss, per-token values, and the ratio's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from .checks import NAMESPACE

# The order in which `reference` and the kernels write metrics.
METRICS = (
    "ratio/mean",
    "ratio/var",
    "ratio/min",
    "ratio/max",
    "ratio/ess",
    "ratio/clamped",
    "kl/old",
    "loss/policy",
    "loss/penalty",
    "kl/ref",
    "entropy",
    "support/single",
    "support/size",
    "clip/low",
    "clip/high",
)


@dataclass(slots=True)
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


@dataclass(slots=True)
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
    _metrics: Tensor
    _has_ref: bool
    _has_support: bool
    _has_clip: bool

    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors on the device, already computed; means are over the valid tokens.

        ratio/mean, ratio/var, ratio/min, ratio/max, ratio/ess (1, 0, 1, 1, 1 without tokens);
        ratio/clamped, the share of tokens whose log-ratio was clamped; kl/old, the mean of ρ-1-log
        ρ, the k3 estimate of KL(old ‖ new); kl/ref, if ref_logps were given; entropy, if it was
        computed; loss/policy and loss/penalty, the weighted sums that the loss is made of; with a
        sampling_mask support/single, the share of tokens whose set has one word, and support/size,
        the mean size of the sets that are not the full vocabulary; with policy_loss "clip" clip/low
        and clip/high, the shares of tokens whose policy gradient the clip removes below 1 - ε_low
        and above 1 + ε_high (or dual_clip), and with "cispo" those whose ratio it replaces.
        """
        result = dict(zip(METRICS, self._metrics.unbind(), strict=True))
        if not self._has_ref:
            del result["kl/ref"]
        if self.entropy is None:
            del result["entropy"]
        if not self._has_support:
            del result["support/single"], result["support/size"]
        if not self._has_clip:
            del result["clip/low"], result["clip/high"]
        return result


# Tools that walk outputs, such as DistributedDataParallel and torch.export, find the tensors.
register_pytree_node(
    RatioStats,
    lambda stats: ([stats.weight, stats.d_sum, stats.d_sq_sum], None),
    lambda fields, _: RatioStats(*fields),
    serialized_type_name=f"{NAMESPACE}.RatioStats",
)
register_pytree_node(
    R2VPOOutput,
    lambda out: (
        [out.loss, out.logps, out.entropy, out.stats, out._metrics],
        (out._has_ref, out._has_support, out._has_clip),
    ),
    lambda fields, has: R2VPOOutput(*(*fields, *has)),
    serialized_type_name=f"{NAMESPACE}.R2VPOOutput",
)
