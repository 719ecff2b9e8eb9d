"""SkyRL 0.3: the policy loss "r2vpo" of its registry. Before your entry point reads its config:

    from r2vpo_kernels.integrations.skyrl import R2VPOAlgorithmConfig
    Config = make_config(algorithm_cls=R2VPOAlgorithmConfig)  # from skyrl.train.config
    cfg = Config.from_cli_overrides(sys.argv[1:])  # trainer.algorithm.mini_batch_size=512 ...

SkyRL divides the advantages by the denominator of loss_reduction before it calls a policy loss,
which then sums over tokens. The penalty needs the same denominator. It is known for "sequence_mean"
and "seq_mean_token_sum_norm", given mini_batch_size, which counts sequences
(policy_mini_batch_size · n_samples_per_prompt); other loss_reductions are refused. KL and entropy
are added outside. The trainer passes no group ids and does not mark optimizer steps: center is
"one" and λ a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, invalid
from ..objective import default_variance_coef
from . import check_version
from .hook import Settings, metrics, required, settings, token_losses

check_version("skyrl", "0.3", "0.4")

from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402
from skyrl.train.config import AlgorithmConfig  # noqa: E402


@dataclass
class R2VPOAlgorithmConfig(Settings, AlgorithmConfig):
    """SkyRL's AlgorithmConfig with the options of this loss."""

    policy_loss_type: str = "r2vpo"
    loss_reduction: str = "sequence_mean"
    mini_batch_size: int = 0


def r2vpo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: R2VPOAlgorithmConfig,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """All tensors (batch, response length)."""
    reductions = ("sequence_mean", "seq_mean_token_sum_norm")
    check_choice("loss_reduction", config.loss_reduction, reductions)
    if config.mini_batch_size < 1:
        raise invalid("mini_batch_size", config.mini_batch_size, "the sequences in a mini-batch")
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    length = mask.sum(-1, keepdim=True).clamp(min=1).expand_as(mask)
    if config.loss_reduction != "sequence_mean":
        length = torch.full_like(length, config.max_seq_len)
    keywords, coef = settings(config), config.variance_coef
    coef = default_variance_coef(config.policy_loss) if coef is None else coef
    keywords["variance_coef"] = coef / (config.mini_batch_size * length)
    old = required("old_log_probs", old_log_probs, log_probs)
    # SkyRL multiplies a loss by its importance weights: applied to ones, they are the result.
    keywords["importance_weights"], mask, logged = ppo_utils.apply_off_policy_correction(
        torch.ones_like(old), old, rollout_logprobs, mask, config.off_policy_correction
    )
    out = token_losses(log_probs, old, advantages, mask, "old_log_probs", **keywords)
    # SkyRL reduces metrics whose name ends in _min or _max by minimum or maximum.
    logged |= {name.replace("/", "_"): x.item() for name, x in metrics(out).items()}
    return out.loss.sum(), logged


ppo_utils.PolicyLossRegistry.register("r2vpo", r2vpo_policy_loss)
