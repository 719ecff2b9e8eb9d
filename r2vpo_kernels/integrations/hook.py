"""What the adapters share: a loss per token, which the trainer aggregates as it does its own.

Every aggregation mode and every global denominator thus means what it means for the trainer's own
losses. These trainers pass no group ids to a loss and do not mark optimizer steps, so neither
center "group" nor `VarianceConstraint` is available behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypedDict, cast

from torch import Tensor

from ..checks import Center, KLEstimator, PolicyLoss, RatioLevel, invalid
from ..loss import r2vpo_loss_from_logps
from ..output import R2VPOOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(kw_only=True)
class Settings:
    """The options of `r2vpo_loss` that a trainer's configuration may hold.

    Names are plain strings here, since OmegaConf reads no Literal, and clip_range is [ε_low,
    ε_high], since it reads no union with a list; the loss checks them.
    """

    policy_loss: str = "ratio"
    clip_range: list[float] | None = None
    dual_clip: float | None = None
    variance_coef: float | None = None
    center: str = "one"
    ratio_level: str = "token"
    log_ratio_clamp: float = 20.0


class LossOptions(TypedDict, total=False):
    """The keywords of `r2vpo_loss_from_logps` that choose the objective."""

    policy_loss: PolicyLoss
    clip_range: float | tuple[float, float] | None
    dual_clip: float | None
    variance_coef: float | Tensor | None
    center: Center
    ratio_level: RatioLevel
    kl_coef: float
    kl_estimator: KLEstimator
    kl_unbiased: bool
    log_ratio_clamp: float


class LossKeywords(LossOptions, total=False):
    """All keywords of `r2vpo_loss_from_logps` that an adapter may pass on."""

    importance_weights: Tensor | None
    ref_logps: Tensor | None
    entropy: Tensor | None
    entropy_coef: float
    cu_seqlens: Tensor | None


def settings(config: object, prefix: str = "") -> LossKeywords:
    """The `Settings` that `config` has as attributes, each named `prefix` + its own name."""
    names = [f.name for f in fields(Settings)]
    found = {
        name: getattr(config, prefix + name) for name in names if hasattr(config, prefix + name)
    }
    return cast("LossKeywords", found)


def refuse(config: object, *options: str) -> None:
    """Raise if an option is set that this loss would ignore."""
    for name in options:
        if getattr(config, name, None):
            raise invalid(name, repr(getattr(config, name)), "it unset: r2vpo does not follow it")


def required(name: str, value: Tensor | None, like: Tensor) -> Tensor:
    """`value`, which must be a tensor."""
    if not isinstance(value, Tensor):
        expected = f"log-probs, a tensor of shape {tuple(like.shape)}"
        raise invalid(name, value, expected)
    return value


def token_losses(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    old_name: str,
    **keywords: Unpack[LossKeywords],
) -> R2VPOOutput:
    """`r2vpo_loss_from_logps(..., reduction="none")`: 0 at masked tokens, whatever they hold.

    old_name is the trainer's name for old_logps. None is an error here, where `r2vpo_loss` reads it
    as on-policy: a trainer that lost its old log-probs must not train as if it were on-policy.
    """
    old_logps = required(old_name, old_logps, logps)
    center = keywords.get("center", "one")
    if center != "one":
        raise invalid("center", repr(center), "'one': this trainer passes no group ids to its loss")
    return r2vpo_loss_from_logps(
        logps, old_logps, advantages, mask=mask, reduction="none", **keywords
    )


def metrics(out: R2VPOOutput) -> dict[str, Tensor]:
    """`out.metrics()` without loss/*: sums that have no denominator with reduction "none"."""
    return {name: x for name, x in out.metrics().items() if not name.startswith("loss/")}
