"""What the adapters share: one loss per token, for a trainer that aggregates them by its rules.

So every mode of aggregation and every global denominator is what it is for the trainer's own
losses. None of these hooks passes group ids, and none marks an optimizer step: behind them there
is neither the centre "group" nor `VarianceConstraint`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..batch import invalid
from ..loss import r2vpo_loss_from_logps
from ..objective import R2VPOOutput


@dataclass(kw_only=True)
class Settings:
    """What a trainer's configuration can say of the objective, as keywords of `r2vpo_loss`."""

    variance_coef: float = 0.5
    center: str = "one"
    ratio_level: str = "token"
    log_ratio_clamp: float = 20.0


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Those that `config` has as attributes, under their own name or behind a prefix."""
    names = [f.name for f in fields(Settings)]
    return {
        name: getattr(config, prefix + name) for name in names if hasattr(config, prefix + name)
    }


def refuse(config: Any, *options: str) -> None:
    """An error for an option of the trainer that this loss would leave without effect."""
    for name in options:
        if getattr(config, name, None):
            raise invalid(name, repr(getattr(config, name)), "it unset: r2vpo does not follow it")


def required(name: str, value: Tensor | None, like: Tensor) -> Tensor:
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
    **keywords: Any,
) -> R2VPOOutput:
    """`r2vpo_loss_from_logps(..., reduction="none")`: 0 at masked tokens, whatever stands there.

    old_name is what the trainer calls the old log-probs. None is an error, where `r2vpo_loss` takes
    it for on-policy: a trainer that dropped them did not say so.
    """
    old_logps = required(old_name, old_logps, logps)
    center = keywords.get("center", "one")
    if center != "one":
        raise invalid("center", repr(center), "'one': this trainer passes no group ids to its loss")
    return r2vpo_loss_from_logps(
        logps, old_logps, advantages, mask=mask, reduction="none", **keywords
    )


def metrics(out: R2VPOOutput) -> dict[str, Tensor]:
    """`out.metrics()` but for the sums, which have no denominator where each token has its loss."""
    return {name: x for name, x in out.metrics().items() if not name.startswith("loss/")}
