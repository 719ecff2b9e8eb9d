"""What the adapters share: a loss per token, which the trainer aggregates as it does its own.

Every aggregation mode and every global denominator thus means what it means for the trainer's own
losses. These trainers pass no group ids to a loss, so center "group" is not available behind them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import Center, KLEstimator, PolicyLoss, RatioLevel, invalid
from ..dual import VarianceConstraint
from ..loss import r2vpo_loss_from_logps
from ..objective import default_variance_coef
from ..output import R2VPOOutput
from .steps import OptimizerSteps, all_ranks, variance_constraint

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Whose log-probs the ratio is taken to: recomputed by the trainer, or the rollout engine's.
Anchor = Literal["old", "rollout"]
ANCHORS: tuple[str, ...] = get_args(Anchor)


@dataclass(kw_only=True)
class Settings:
    """The options of `r2vpo_loss` that a trainer's configuration may hold.

    Names are plain strings here, since OmegaConf reads no Literal, and clip_range is [ε_low,
    ε_high], since it reads no union with a list; the loss checks them.

    With variance_target λ follows the dual, `VarianceConstraint`, once per optimizer step: it
    starts at variance_coef (default 0.5), moves by variance_coef_lr, and stays within
    variance_coef_min and variance_coef_max. variance_coef_file keeps it for a run that resumes: λ
    is taken from there if it exists, and written there after each step.
    """

    policy_loss: str = "ratio"
    clip_range: list[float] | None = None
    dual_clip: float | None = None
    variance_coef: float | None = None
    center: str = "one"
    ratio_level: str = "token"
    log_ratio_clamp: float = 20.0
    variance_target: float | None = None
    variance_coef_lr: float = 0.1
    variance_coef_min: float = 1e-3
    variance_coef_max: float = 100.0
    variance_coef_file: str | None = None


# The settings of the dual, with the defaults of `Settings`; the others are keywords of the loss.
_DUAL = (
    "variance_target", "variance_coef_lr", "variance_coef_min", "variance_coef_max",
    "variance_coef_file",
)  # fmt: skip


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
    group_ids: Tensor | None
    num_groups: int | None


def settings(config: object, prefix: str = "") -> LossKeywords:
    """The keywords of the loss among `config`'s attributes, each named `prefix` + its own name."""
    names = [f.name for f in fields(Settings) if f.name not in _DUAL]
    found = {
        name: getattr(config, prefix + name) for name in names if hasattr(config, prefix + name)
    }
    return cast("LossKeywords", found)


def check_settings(config: object, prefix: str = "") -> None:
    """Raise what the loss would raise for these options, before there is a batch."""
    token = torch.zeros(1, 1)
    try:
        _check_center(settings(config, prefix))
        r2vpo_loss_from_logps(token, token, token, **settings(config, prefix))
    except (TypeError, ValueError) as error:
        raise type(error)(prefix + str(error)) from None
    constraint_of(config, prefix)


_steps: dict[tuple[Any, ...], OptimizerSteps] = {}


def optimizer_steps(
    config: object,
    prefix: str = "",
    *,
    advice: str | None,
    group: Callable[[], dist.ProcessGroup | None] | None = all_ranks,
) -> OptimizerSteps:
    """The optimizer steps of this process's policy, with the dual that `config` asks for.

    There is one for each choice of the dual's settings, which lives as long as the process:
    trainers send losses to their workers by pickle, or give a function alone. `advice` and `group`
    as in `OptimizerSteps`.
    """
    coef = getattr(config, prefix + "variance_coef", None)
    options = tuple(getattr(config, prefix + n, getattr(Settings, n)) for n in _DUAL)
    target, *_, path = options
    if coef is None:
        coef = default_variance_coef(getattr(config, prefix + "policy_loss", "ratio"))
    if target is None and coef == 0:
        advice = None
    key = (advice, coef, *options) if target is not None else (advice,)
    if key not in _steps:
        file = None if path is None else Path(path)
        _steps[key] = OptimizerSteps(
            constraint_of(config, prefix), advice=advice, group=group, file=file
        )
    return _steps[key]


def constraint_of(
    config: object, prefix: str = "", *, center: Center = "one", device: torch.device | None = None
) -> VarianceConstraint | None:
    """The dual that `config`'s attributes ask for; None without a variance_target."""
    options = {n: getattr(config, prefix + n, getattr(Settings, n)) for n in _DUAL}
    coef = getattr(config, prefix + "variance_coef", None)
    return variance_constraint(
        **options, variance_coef=coef, center=center, device=device, prefix=prefix
    )


def megatron_group() -> dist.ProcessGroup | None:
    """The ranks that call the loss under Megatron, where it trains; else None, all ranks."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None or not parallel_state.is_initialized():
        return None
    group: dist.ProcessGroup
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


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
    steps: OptimizerSteps | None = None,
    follow: bool = True,
    **keywords: Unpack[LossKeywords],
) -> R2VPOOutput:
    """`r2vpo_loss_from_logps(..., reduction="none")`: 0 at masked tokens, whatever they hold.

    old_name is the trainer's name for old_logps. None is an error here, where `r2vpo_loss` reads it
    as on-policy: a trainer that lost its old log-probs must not train as if it were on-policy. λ is
    that of `steps`, if they have a dual; they follow what is trained on, unless follow=False, where
    the adapter tells them. Without `steps` a driver follows `out.stats`.
    """
    old_logps = required(old_name, old_logps, logps)
    _check_center(keywords)
    if steps is not None and steps.constraint is not None:
        keywords["variance_coef"] = steps.constraint.coef
    out = r2vpo_loss_from_logps(
        logps, old_logps, advantages, mask=mask, reduction="none", **keywords
    )
    if steps is not None and follow and out.loss.requires_grad:
        steps.follow(out.stats)
    return out


def _check_center(keywords: LossKeywords) -> None:
    center = keywords.get("center", "one")
    if center != "one":
        raise invalid("center", repr(center), "'one': this trainer passes no group ids to its loss")


def metrics(out: R2VPOOutput, steps: OptimizerSteps | None = None) -> dict[str, Tensor]:
    """`out.metrics()` and those of the last optimizer step.

    Without loss/*: sums that have no denominator with reduction "none".
    """
    of_call = {name: x for name, x in out.metrics().items() if not name.startswith("loss/")}
    return of_call if steps is None else of_call | steps.metrics()
