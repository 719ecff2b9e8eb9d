"""The objective, as the caller gave it: what Eq. 5 needs besides log-probs.

Data, checked for names, types and shapes; `reference` and the kernels do the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .checks import (
    CENTERS,
    KL_ESTIMATORS,
    MAX_LOG_RATIO_CLAMP,
    MIN_TEMPERATURE,
    POLICY_LOSSES,
    RATIO_LEVELS,
    Center,
    KLEstimator,
    PolicyLoss,
    RatioLevel,
    check_choice,
    check_device,
    check_number,
    invalid,
)


@dataclass(slots=True, kw_only=True)
class Objective:
    """Tensors are per token or per sequence, `center` per group."""

    advantages: Tensor | None = None  # None: log-probs alone are wanted
    old_logps: Tensor | None = None  # None: on-policy
    policy_loss: PolicyLoss = "ratio"
    clip_low: float = 0.0  # both not read with "ratio"
    clip_high: float = 0.0
    dual_clip: float = math.inf
    variance_coef: float | Tensor = 0.5
    center: Center | Tensor = "one"
    ratio_level: RatioLevel = "token"
    importance_weights: Tensor | None = None
    ref_logps: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_unbiased: bool = False
    entropy_coef: float = 0.0
    temperature: float | Tensor = 1.0
    log_ratio_clamp: float = 20.0

    @property
    def separable(self) -> bool:
        """Whether each token's gradient depends on that token alone."""
        return self.ratio_level == "token" and not self.empirical_center

    @property
    def empirical_center(self) -> bool:
        return isinstance(self.center, str) and self.center == "group"

    @staticmethod
    def build(
        batch: Batch,
        device: torch.device,
        *,
        old_logps: Tensor | None,
        advantages: Tensor,
        policy_loss: PolicyLoss,
        clip_range: float | tuple[float, float] | None,
        dual_clip: float | None,
        variance_coef: float | Tensor | None,
        center: Center | Tensor,
        ratio_level: RatioLevel,
        importance_weights: Tensor | None,
        ref_logps: Tensor | None,
        kl_coef: float,
        kl_estimator: KLEstimator,
        kl_unbiased: bool,
        entropy_coef: float,
        log_ratio_clamp: float,
        temperature: float | Tensor = 1.0,
    ) -> Objective:
        check_choice("policy_loss", policy_loss, POLICY_LOSSES)
        clip_low, clip_high = _checked_clip_range(clip_range, policy_loss)
        dual_clip = _checked_dual_clip(dual_clip, policy_loss)
        check_choice("ratio_level", ratio_level, RATIO_LEVELS)
        if ratio_level == "sequence" and batch.sequences is None:
            raise invalid(
                "ratio_level", "'sequence'", "sequences for it: labels (B, T), or cu_seqlens"
            )
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        kl_coef = check_number("kl_coef", kl_coef)
        entropy_coef = check_number("entropy_coef", entropy_coef)
        log_ratio_clamp = check_number("log_ratio_clamp", log_ratio_clamp, 0.0, MAX_LOG_RATIO_CLAMP)
        if kl_coef != 0 and ref_logps is None:
            raise invalid("ref_logps", None, f"a tensor, for kl_coef is {kl_coef}")
        if not isinstance(kl_unbiased, bool):
            raise TypeError(f"kl_unbiased: got {type(kl_unbiased).__name__}, expected a bool")
        if kl_unbiased and ref_logps is None:
            raise invalid("ref_logps", None, "a tensor, for kl_unbiased is True")
        batch.check_per_token("advantages", advantages, device)
        if importance_weights is not None:
            batch.check_per_token("importance_weights", importance_weights, device)
        for name, value in (("old_logps", old_logps), ("ref_logps", ref_logps)):
            if value is not None:
                batch.check_per_token(name, value, device, per_sequence=False)
        if variance_coef is None:
            variance_coef = default_variance_coef(policy_loss)
        variance_coef = batch.check_per_token(
            "variance_coef", variance_coef, device, number=True, minimum=0.0
        )
        temperature = checked_temperature(batch, temperature, device)
        if isinstance(center, Tensor):
            check_device("center", center, device)
            groups = batch.num_groups
            if center.shape != (groups,) or not center.is_floating_point():
                expected = f"a float tensor of means, one per group: ({groups},)"
                raise invalid("center", center, expected)
        else:
            check_choice("center", center, CENTERS)
        return Objective(
            advantages=advantages,
            old_logps=old_logps,
            policy_loss=policy_loss,
            clip_low=clip_low,
            clip_high=clip_high,
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
            temperature=temperature,
            log_ratio_clamp=log_ratio_clamp,
        )


def default_variance_coef(policy_loss: str) -> float:
    """λ where none is given: a clip needs no penalty."""
    return 0.5 if policy_loss == "ratio" else 0.0


def _checked_clip_range(
    clip_range: float | tuple[float, float] | None, policy_loss: PolicyLoss
) -> tuple[float, float]:
    """(ε_low, ε_high)"""
    if policy_loss == "ratio":
        if clip_range is not None:
            raise invalid("clip_range", clip_range, "None with policy_loss 'ratio'")
        return 0.0, 0.0
    if clip_range is None:
        expected = f"ε, or (ε_low, ε_high), with policy_loss {policy_loss!r}"
        raise invalid("clip_range", None, expected)
    if not isinstance(clip_range, (tuple, list)):
        clip_range = clip_range, clip_range
    if len(clip_range) != 2:
        raise invalid("clip_range", clip_range, "ε, or (ε_low, ε_high)")
    low, high = clip_range
    return check_number("clip_range", low, 0.0, 1.0), check_number("clip_range", high, 0.0)


def _checked_dual_clip(dual_clip: float | None, policy_loss: PolicyLoss) -> float:
    if dual_clip is None:
        return math.inf
    if policy_loss != "clip":
        raise invalid("dual_clip", dual_clip, f"None with policy_loss {policy_loss!r}")
    dual_clip = check_number("dual_clip", dual_clip)
    if dual_clip <= 1:
        raise invalid("dual_clip", dual_clip, "a number above 1")
    return dual_clip


def checked_temperature(
    batch: Batch, temperature: float | Tensor, device: torch.device
) -> float | Tensor:
    return batch.check_per_token(
        "temperature", temperature, device, number=True, minimum=MIN_TEMPERATURE
    )
