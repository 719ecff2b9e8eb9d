"""R²VPO: ratio-variance regularised policy optimisation, one pass over the logits."""

from .dual import VarianceConstraint, fenchel_coef
from .loss import (
    linear_r2vpo_loss,
    linear_token_logps,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    token_logps,
)
from .output import R2VPOOutput, RatioStats
from .sampling import SamplingMask

__all__ = [
    "R2VPOOutput",
    "RatioStats",
    "SamplingMask",
    "VarianceConstraint",
    "fenchel_coef",
    "linear_r2vpo_loss",
    "linear_token_logps",
    "r2vpo_loss",
    "r2vpo_loss_from_logps",
    "token_logps",
]
