"""SkyRL: the policy loss "r2vpo", its configuration, and the trainers that it needs. To your script

    uv run --isolated --extra fsdp -m skyrl.train.entrypoints.main_base ...

add `--with /path/to/r2vpo_kernels` (this repository, or its wheel) after uv run, which Ray's
workers follow, and to its arguments

    trainer.override_entrypoint=r2vpo_kernels.integrations.skyrl

and, to change a default, trainer.algorithm.variance_coef=1.0 and so on; for the dual
trainer.algorithm.variance_target=0.02: λ then moves in the driver, once per optimizer step, and
SkyRL's checkpoints hold it. Nothing is clipped, and eps_clip_low and eps_clip_high are not read,
unless policy_loss=clip comes with its own clip_range=[0.2,0.28]. trainer.fully_async.enabled=true
selects the fully asynchronous trainer. A main() of your own takes `.trainer`'s classes.

anchor says whose log-probs the ratio is to: "old" (default) those that the trainer recomputes
before its first step on a batch, "rollout" the inference engine's, so that stale data count, and
the trainer saves the forward pass that recomputes. The fully asynchronous trainer takes "rollout"
alone, as with SkyRL's own losses: a batch is one mini-batch, where every ratio to "old" is 1.

SkyRL divides the advantages by the denominator of loss_reduction before a policy loss sees them.
The penalty needs the same denominator: R2VPOTrainer sends each token's weight along, and the stock
trainer, which sends none, is refused. KL and entropy are added outside. The trainer passes no group
ids: center is "one".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import invalid
from ...objective import default_variance_coef
from .. import Trainer
from ..hook import Settings, metrics, required, settings, token_losses

skyrl = Trainer("skyrl", tested="0.3.0")
with skyrl.imports():
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.train.config import AlgorithmConfig
skyrl.has(AlgorithmConfig, "policy_loss_type", "off_policy_correction")
skyrl.has(ppo_utils, "apply_off_policy_correction", "PolicyLossRegistry")

# What the driver makes RatioStats of: SkyRL sums metrics that are named so over micro-batches and
# ranks, and averages others.
SUMS = ("weight_loss", "d_sum_loss", "d_sq_sum_loss")


@dataclass
class R2VPOAlgorithmConfig(Settings, AlgorithmConfig):
    """SkyRL's AlgorithmConfig with the options of this loss."""

    policy_loss_type: str = "r2vpo"
    anchor: str = "old"


def r2vpo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    config: R2VPOAlgorithmConfig,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The mini-batch's loss is the sum over micro-batches and ranks. All (batch, response length).

    advantages are complex, w·A + i·w with the token's weight w in that sum, as R2VPOTrainer has it.
    """
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    if not advantages.is_complex():
        # Workers add micro-batches that are masked throughout.
        if mask.any():
            expected = "complex ones, with the tokens' weights: run R2VPOTrainer, as main() does"
            raise invalid("advantages", advantages, expected)
        advantages = torch.complex(advantages, torch.zeros_like(advantages))
    keywords, coef = settings(config), config.variance_coef
    coef = default_variance_coef(config.policy_loss) if coef is None else coef
    keywords["variance_coef"] = coef * advantages.imag
    anchor = rollout_logprobs if config.anchor == "rollout" else old_log_probs
    anchor_name = "rollout_logprobs" if config.anchor == "rollout" else "old_log_probs"
    old = required(anchor_name, anchor, log_probs)
    # SkyRL multiplies a loss by its importance weights: applied to ones, they are the result.
    keywords["importance_weights"], mask, logged = ppo_utils.apply_off_policy_correction(
        torch.ones_like(old), old, rollout_logprobs, mask, config.off_policy_correction
    )
    out = token_losses(log_probs, old, advantages.real, mask, anchor_name, **keywords)
    sums = (out.stats.weight, out.stats.d_sum, out.stats.d_sq_sum)
    # SkyRL reduces metrics whose name ends in _min or _max by minimum or maximum.
    logged |= {name.replace("/", "_"): x.item() for name, x in metrics(out).items()}
    logged |= {name: x.sum().item() for name, x in zip(SUMS, sums, strict=True)}
    return out.loss.sum(), logged


ppo_utils.PolicyLossRegistry.register("r2vpo", r2vpo_policy_loss)


def main() -> None:
    """SkyRL's main() with this loss and its trainers."""
    # Workers import this package for the loss alone.
    from .trainer import run

    run(sys.argv[1:])
