"""How λ is set: by the dual, whose state is saved with checkpoints, or in closed form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ... import VarianceConstraint, fenchel_coef
from .arguments import corrects_rollouts, valid_tokens
from .config import R2VPOConfig

CONSTRAINT_FILE = "variance_constraint.pt"


def save_constraint(constraint: VarianceConstraint, checkpoint: Path) -> None:
    torch.save(constraint.state_dict(), checkpoint / CONSTRAINT_FILE)


def load_constraint(constraint: VarianceConstraint, checkpoint: Path) -> None:
    """Restore λ; warn where the checkpoint has none, and leave it where it starts."""
    path = checkpoint / CONSTRAINT_FILE
    if path.exists():
        state = torch.load(path, map_location=constraint.coef.device, weights_only=True)
        constraint.load_state_dict(state)
    else:
        coef = constraint.coef.item()
        warnings.warn(f"{path} does not exist: λ starts anew at {coef:g}", stacklevel=3)


def closed_form(trainer: GRPOTrainer, generated: dict[str, Any], num_groups: int) -> Tensor:
    """λ* (Eq. 18) over the generation batch of all ranks, with the loss's token weights."""
    config: R2VPOConfig = trainer.args
    assert config.variance_target is not None
    weight = valid_tokens(generated).float()
    if trainer.loss_type == "grpo":
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
    s_a: Tensor = generated["advantages"]
    s_a = s_a.unsqueeze(1) if s_a.dim() == 1 else s_a
    if corrects_rollouts(trainer):
        s_a = s_a * generated["importance_sampling_ratio"]
    if s_a.shape[1] == 1:
        weight = weight.sum(1, keepdim=True)
    ids = generated["group_ids"].unsqueeze(1).expand_as(s_a)

    def of_all_ranks(x: Tensor) -> Tensor:
        padded = trainer.accelerator.pad_across_processes(x.contiguous(), dim=1)
        gathered: Tensor = trainer.accelerator.gather(padded)
        return gathered

    return fenchel_coef(
        of_all_ranks(s_a),
        config.variance_target,
        weight=of_all_ranks(weight),
        center=config.center,
        group_ids=of_all_ranks(ids),
        num_groups=num_groups,
    )
