"""OpenRLHF 0.11.2: a `PolicyLoss`. In openrlhf/trainer/ray/ppo_actor.py, after its own imports:

    from r2vpo_kernels.integrations.openrlhf import R2VPOPolicyLoss as PolicyLoss

and, to change a default, variance_coef=... in its call of PolicyLoss. Nothing is clipped, and
eps_clip is not read, unless that call has policy_loss="clip" (or "cispo"): then OpenRLHF's own
ranges and dual clip are those of the loss. --actor.policy_loss_type gspo selects the sequence's
ratio. --actor.loss_agg_mode and --algo.advantage.is_correction_* (with gating "ratio" only) keep
their meaning: the correction weights the advantage, and tokens that it drops have no penalty
either. KL and entropy are added outside. The trainer passes no group ids and does not mark
optimizer steps: center is "one" and λ a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from . import check_version
from .hook import LossKeywords, Settings, metrics, refuse, required, token_losses

check_version("openrlhf", "0.11.2", "0.12")

from openrlhf.models.loss import PolicyLoss, aggregate_loss, masked_mean  # noqa: E402


class R2VPOPolicyLoss(PolicyLoss):
    """Takes and returns what PolicyLoss does, with four options more.

    The clip_ratio returned is the share of tokens that are clipped; with policy_loss "ratio" of
    those whose log-ratio was clamped at log_ratio_clamp.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
        *,
        policy_loss: checks.PolicyLoss = "ratio",
        variance_coef: float | None = Settings.variance_coef,
        center: checks.Center = "one",
        log_ratio_clamp: float = Settings.log_ratio_clamp,
    ) -> None:
        super().__init__(
            clip_eps_low,
            clip_eps_high,
            dual_clip,
            token_level_loss,
            policy_loss_type,
            is_correction_level,
            is_correction_mode,
            is_correction_gating,
            is_correction_threshold,
        )
        if policy_loss != "clip":
            refuse(self, "dual_clip")
        if self.is_correction_level != "off" and self.is_correction_gating != "ratio":
            refuse(self, "is_correction_gating")
        self.settings: LossKeywords = {
            "policy_loss": policy_loss,
            "clip_range": None if policy_loss == "ratio" else (clip_eps_low, clip_eps_high),
            "dual_clip": dual_clip,
            "variance_coef": variance_coef,
            "center": center,
            "ratio_level": "sequence" if self.policy_loss_type == "gspo" else "token",
            "log_ratio_clamp": log_ratio_clamp,
        }

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        old = required("old_log_probs", old_log_probs, log_probs)
        weights, keep, vllm_kl, filtered = None, mask != 0, None, None
        if self.is_correction_level != "off":
            rollout = required("rollout_log_probs", rollout_log_probs, log_probs)
            if self.policy_loss_type == "gspo":
                # PolicyLoss corrects gspo by taking the ratio to the rollout's log-probs.
                old = rollout
            else:
                weights, keep, filtered = self._correction(old, rollout, mask)
                vllm_kl = _mean(rollout - old, mask)
        keywords: LossKeywords = {**self.settings, "importance_weights": weights}
        out = token_losses(log_probs, old, advantages, keep, "old_log_probs", **keywords)
        loss = aggregate_loss(
            out.loss, mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
        ppo_kl = _mean(old_log_probs - log_probs.detach(), mask)
        shares = metrics(out)
        clip_ratio = shares["ratio/clamped"]
        if "clip/low" in shares:
            clip_ratio = shares["clip/low"] + shares["clip/high"]
        return loss, clip_ratio, ppo_kl, vllm_kl, filtered

    def _correction(
        self, old: Tensor, rollout: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weight per token, mask of kept tokens, share of tokens or sequences out of bounds)."""
        low, high = self.is_correction_threshold
        log_weight = torch.where(mask != 0, old - rollout, 0.0)
        weight = log_weight.exp()
        if self.is_correction_level == "seq":
            # A sequence without tokens gives NaN and counts as dropped, as in PolicyLoss.
            sequence_weight = masked_mean(log_weight, mask, dim=-1).exp()[:, None]
            within = (sequence_weight >= low) & (sequence_weight <= high)
            return weight, (mask != 0) & within, 1 - within.float().mean()
        outside = (weight < low) | (weight > high)
        share = masked_mean(outside.float(), mask)
        if self.is_correction_mode == "clip":
            return weight.clamp(low, high), mask != 0, share
        return weight, (mask != 0) & ~outside, share


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    mean: Tensor = masked_mean(torch.where(mask != 0, x, 0.0), mask)
    return mean
