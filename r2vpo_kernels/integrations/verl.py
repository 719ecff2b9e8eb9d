"""verl: the policy loss "r2vpo". Where this package is installed, verl finds it as a plugin:

    python -m verl.trainer.main_ppo ... actor_rollout_ref.actor.policy_loss.loss_mode=r2vpo

and, to be told why it could not be loaded, or without plugins (VERL_USE_EXTERNAL_PLUGINS=none),

        actor_rollout_ref.model.external_lib=r2vpo_kernels.integrations.verl

To change a default, add

        actor_rollout_ref.actor.policy_loss._target_=\\
            r2vpo_kernels.integrations.verl.R2VPOPolicyLossConfig \\
        +actor_rollout_ref.actor.policy_loss.variance_coef=1.0

and so for the dual, with a file for λ, which verl's checkpoints have no place for,

        +actor_rollout_ref.actor.policy_loss.variance_target=0.02 \\
        +actor_rollout_ref.actor.policy_loss.variance_coef_file=/shared/run/lambda.json

and for the clipped losses, whose ranges are these and not verl's clip_ratio:

        +actor_rollout_ref.actor.policy_loss.policy_loss=clip \\
        +actor_rollout_ref.actor.policy_loss.clip_range=[0.2,0.28]

verl recomputes the old log-probs by the trainer. To take the rollout engine's, so that the penalty
sees how old the data are,

        algorithm.rollout_correction.bypass_mode=True \\
        '+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}'

whose second line lets rollout_rs be refused, which has no effect then; nor has rollout_is, whose
weights are the ratio itself. Without bypass_mode its weights multiply the advantage, and tokens of
weight 0 keep their penalty.

loss_agg_mode and the global denominators are verl's, by its `agg_loss`; verl adds KL and entropy
outside. It averages a policy loss's metrics over micro-batches, ratio/min and ratio/max included;
those of the last optimizer step are actor/step/*. It passes no group ids: center is "one".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks import invalid
from . import Trainer
from .hook import (
    LossKeywords,
    Settings,
    check_settings,
    megatron_group,
    metrics,
    optimizer_steps,
    settings,
    token_losses,
)

if TYPE_CHECKING:
    from verl.workers.config import ActorConfig

verl = Trainer("verl", tested="0.9.1")
with verl.imports():
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.workers.config import PolicyLossConfig
verl.takes(agg_loss, "dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")
verl.has(PolicyLossConfig, "rollout_correction")

ADVICE = (
    "Set algorithm.rollout_correction.bypass_mode=True, or take several optimizer steps per batch "
    "(actor.ppo_mini_batch_size, actor.ppo_epochs)."
)


@dataclass
class R2VPOPolicyLossConfig(Settings, PolicyLossConfig):
    """verl's PolicyLossConfig with the options of this loss."""

    loss_mode: str = "r2vpo"

    def __post_init__(self) -> None:
        check_settings(self)
        correction: Any = self.rollout_correction
        if correction and correction.get("bypass_mode") and correction.get("rollout_rs"):
            got, expected = repr(correction.get("rollout_rs")), "null: bypass_mode ignores it"
            raise invalid("rollout_correction.rollout_rs", got, expected)


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
    steps = optimizer_steps(config.policy_loss, advice=ADVICE, group=megatron_group)
    keywords: LossKeywords = {
        **settings(config.policy_loss),
        "importance_weights": rollout_is_weights,
    }
    out = token_losses(
        log_prob, old_log_prob, advantages, response_mask, "old_log_prob", steps, **keywords
    )
    loss = agg_loss(out.loss, response_mask, loss_agg_mode, **config.global_batch_info)
    return loss, {f"actor/{name}": value for name, value in metrics(out, steps).items()}


register_policy_loss("r2vpo")(r2vpo_policy_loss)
