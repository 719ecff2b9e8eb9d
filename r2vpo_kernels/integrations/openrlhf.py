"""OpenRLHF 0.11.2: a `PolicyLoss`. In openrlhf/trainer/ray/ppo_actor.py, after its own imports:

    from r2vpo_kernels.integrations.openrlhf import R2VPOPolicyLoss as PolicyLoss

and, to change a default, variance_coef=... in its call of PolicyLoss. Nothing is clipped: eps_clip
is not read. --actor.policy_loss_type gspo means the ratio of the sequence; --actor.loss_agg_mode
and --algo.advantage.is_correction_* (by the ratio) what they mean there: the correction weighs the
advantage, and tokens that it drops have no penalty either. KL and entropy are added outside. No
group ids and no sign of an optimizer step come: no centre "group", λ is a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import check_version
from .hook import Settings, metrics, refuse, required, token_losses

check_version("openrlhf", "0.11.2", "0.12")

from openrlhf.models.loss import PolicyLoss, aggregate_loss, masked_mean  # noqa: E402


class R2VPOPolicyLoss(PolicyLoss):
    """Takes and returns what PolicyLoss does.

    clip_ratio is the share of tokens whose log-ratio was clamped at log_ratio_clamp.
    """

    def __init__(
        self,
        *args: Any,
        variance_coef: float = Settings.variance_coef,
        center: str = Settings.center,
        log_ratio_clamp: float = Settings.log_ratio_clamp,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse(self, "dual_clip")
        if self.is_correction_level != "off" and self.is_correction_gating != "ratio":
            refuse(self, "is_correction_gating")
        level = "sequence" if self.policy_loss_type == "gspo" else "token"
        self.settings = {
            "variance_coef": variance_coef,
            "center": center,
            "ratio_level": level,
            "log_ratio_clamp": log_ratio_clamp,
        }

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        **batch_info: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        old = required("old_log_probs", old_log_probs, log_probs)
        weights, keep, vllm_kl, filtered = None, mask != 0, None, None
        if self.is_correction_level != "off":
            rollout = required("rollout_log_probs", rollout_log_probs, log_probs)
            if self.policy_loss_type == "gspo":
                # The correction there: the ratio is to the rollout's log-probs.
                old = rollout
            else:
                weights, keep, filtered = self._correction(old, rollout, mask)
                vllm_kl = _mean(rollout - old, mask)
        keywords = self.settings | {"importance_weights": weights}
        out = token_losses(log_probs, old, advantages, keep, "old_log_probs", **keywords)
        loss = aggregate_loss(out.loss, mask, self.token_level_loss, **batch_info)
        ppo_kl = _mean(old_log_probs - log_probs.detach(), mask)
        return loss, metrics(out)["ratio/clamped"], ppo_kl, vllm_kl, filtered

    def _correction(
        self, old: Tensor, rollout: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a token's weight, whether it is kept, the share of tokens or sequences out of bounds)"""
        low, high = self.is_correction_threshold
        log_weight = torch.where(mask != 0, old - rollout, 0.0)
        weight = log_weight.exp()
        if self.is_correction_level == "seq":
            # NaN for a sequence without tokens, which then counts as dropped, as it does there.
            unit = masked_mean(log_weight, mask, dim=-1).exp()[:, None]
            within = (unit >= low) & (unit <= high)
            return weight, (mask != 0) & within, 1 - within.float().mean()
        outside = (weight < low) | (weight > high)
        share = masked_mean(outside.float(), mask)
        if self.is_correction_mode == "clip":
            return weight.clamp(low, high), mask != 0, share
        return weight, (mask != 0) & ~outside, share


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(torch.where(mask != 0, x, 0.0), mask)
