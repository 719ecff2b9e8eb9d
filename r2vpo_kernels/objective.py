"""The objective, as the caller gave it: what Eq. 5 needs besides log-probs.

Data, checked for names, types and shapes; `reference` and the kernels do the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .checks import (
    CENTERS,
    KL_ESTIMATORS,
    MAX_LOG_RATIO_CLAMP,
    MIN_TEMPERATURE,
    RATIO_LEVELS,
    Center,
    KLEstimator,
    RatioLevel,
    check_choice,
    check_device,
    check_number,
    invalid,
)


@dataclass(slots=True)
class Objective:
    """Tensors are per token or per sequence, `center` per group."""

    advantages: Tensor | None = None  # None: log-probs alone are wanted
    old_logps: Tensor | None = None  # None: on-policy
    variance_coef: float | Tensor = 0.5
    center: Center | Tensor = "one"
    ratio_level: RatioLevel = "token"
    importance_weights: Tensor | None = None
    ref_logps: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
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
        variance_coef: float | Tensor,
        center: Center | Tensor,
        ratio_level: RatioLevel,
        importance_weights: Tensor | None,
        ref_logps: Tensor | None,
        kl_coef: float,
        kl_estimator: KLEstimator,
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
        kl_coef = check_number("kl_coef", kl_coef)
        entropy_coef = check_number("entropy_coef", entropy_coef)
        log_ratio_clamp = check_number("log_ratio_clamp", log_ratio_clamp, 0.0, MAX_LOG_RATIO_CLAMP)
        if kl_coef != 0 and ref_logps is None:
            raise invalid("ref_logps", None, f"a tensor, for kl_coef is {kl_coef}")
        batch.check_per_token("advantages", advantages, device)
        if importance_weights is not None:
            batch.check_per_token("importance_weights", importance_weights, device)
        for name, value in (("old_logps", old_logps), ("ref_logps", ref_logps)):
            if value is not None:
                batch.check_per_token(name, value, device, per_sequence=False)
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
            advantages, old_logps, variance_coef, center, ratio_level, importance_weights,
            ref_logps, kl_coef, kl_estimator, entropy_coef, temperature, log_ratio_clamp,
        )  # fmt: skip


def checked_temperature(
    batch: Batch, temperature: float | Tensor, device: torch.device
) -> float | Tensor:
    return batch.check_per_token(
        "temperature", temperature, device, number=True, minimum=MIN_TEMPERATURE
    )
