"""verl 0.9: the policy loss "r2vpo", registered when this module is imported.

    VERL_USE_EXTERNAL_MODULES=r2vpo_kernels.integrations.verl python -m verl.trainer.main_ppo ... \\
        actor_rollout_ref.actor.policy_loss.loss_mode=r2vpo

or actor_rollout_ref.model.external_lib=r2vpo_kernels.integrations.verl. To change a default, add

        actor_rollout_ref.actor.policy_loss._target_=\\
            r2vpo_kernels.integrations.verl.R2VPOPolicyLossConfig \\
        +actor_rollout_ref.actor.policy_loss.variance_coef=1.0

and so for the clipped losses, whose ranges are these and not verl's clip_ratio:

        +actor_rollout_ref.actor.policy_loss.policy_loss=clip \\
        +actor_rollout_ref.actor.policy_loss.clip_range=[0.2,0.28]

loss_agg_mode and the global denominators are verl's, by its `agg_loss`; verl adds KL and entropy
outside. verl averages a policy loss's metrics over micro-batches, ratio/min and ratio/max included.
It passes no group ids and does not mark optimizer steps: center is "one" and λ a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from . import check_version
from .hook import LossKeywords, Settings, metrics, settings, token_losses

if TYPE_CHECKING:
    from verl.workers.config import ActorConfig

check_version("verl", "0.9", "0.10")

from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss  # noqa: E402
from verl.workers.config import PolicyLossConfig  # noqa: E402


@dataclass
class R2VPOPolicyLossConfig(Settings, PolicyLossConfig):
    """verl's PolicyLossConfig with the options of this loss."""

    loss_mode: str = "r2vpo"


def r2vpo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All tensors (batch, response length); config is the actor's."""
    assert config is not None  # verl's own losses declare it optional too, and always get it
    keywords: LossKeywords = {
        **settings(config.policy_loss),
        "importance_weights": rollout_is_weights,
    }
    out = token_losses(
        log_prob, old_log_prob, advantages, response_mask, "old_log_prob", **keywords
    )
    loss = agg_loss(out.loss, response_mask, loss_agg_mode, **config.global_batch_info)
    return loss, {f"actor/{name}": value for name, value in metrics(out).items()}


register_policy_loss("r2vpo")(r2vpo_policy_loss)
