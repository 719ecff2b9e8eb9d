"""OpenRLHF: a `PolicyLoss`. In your copy of openrlhf/trainer/ray/ppo_actor.py, after its own
imports:

    from r2vpo_kernels.integrations.openrlhf import R2VPOPolicyLoss as PolicyLoss

and, to change a default, variance_coef=... in its call of PolicyLoss. Nothing is clipped, and
eps_clip is not read, unless that call has policy_loss="clip" (or "cispo"): then OpenRLHF's own
ranges and dual clip are those of the loss. --actor.policy_loss_type gspo selects the sequence's
ratio. --actor.loss_agg_mode and --algo.advantage.is_correction_* (with gating "ratio" only) keep
their meaning: the correction weights the advantage, and tokens that it drops have no penalty
either. KL and entropy are added outside. The trainer passes no group ids: center is "one".

To log the ratio's statistics and λ, add after `experience.info["ppo_kl"] = ppo_kl.detach()`

        experience.info |= self.actor_loss_fn.metrics()

With the dual, variance_target=0.02, λ moves once per optimizer step. So that a checkpoint holds it,
add after `client_states = client_states or {}` in PolicyModelActor.save_checkpoint

        client_states["r2vpo"] = self.trainer.actor_loss_fn.state_dict()

and at the end of PolicyModelActor.init_model_from_pretrained

        self.trainer.actor_loss_fn.load_state_dict(self.checkpoint_states.get("r2vpo", {}), False)

anchor says whose log-probs the ratio is to: "old" (default) those that the trainer recomputes
before its first step on a rollout, "rollout" vLLM's, so that stale data count. OpenRLHF has those
with --algo.advantage.is_correction_level alone, whose mode "mask" then drops tokens or sequences as
before. Its weight would count twice and is left out; "clip", nothing but a weight, is refused.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, invalid
from . import Trainer
from .hook import (
    ANCHORS,
    LossKeywords,
    Settings,
    check_settings,
    metrics,
    optimizer_steps,
    refuse,
    required,
    settings,
    token_losses,
)

openrlhf = Trainer("openrlhf", tested="0.11.2")
with openrlhf.imports():
    from openrlhf.models.loss import PolicyLoss, aggregate_loss, masked_mean
openrlhf.takes(aggregate_loss, "dp_size", "batch_num_tokens", "global_batch_size")
openrlhf.takes(
    PolicyLoss.__init__, "clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss",
    "policy_loss_type", "is_correction_level", "is_correction_mode", "is_correction_gating",
    "is_correction_threshold",
)  # fmt: skip

ADVICE = (
    'Pass anchor="rollout" in the call of PolicyLoss, with --algo.advantage.is_correction_level '
    "token, or take several optimizer steps per rollout (--train.batch_size, --train.max_epochs)."
)

# These come from PolicyLoss's own arguments.
OPTIONS = {f.name for f in fields(Settings)} - {"dual_clip", "clip_range", "ratio_level"}


class R2VPOPolicyLoss(PolicyLoss):
    """Takes and returns what PolicyLoss does, with further options: anchor, and `Settings`' fields.

    The clip_ratio returned is the share of tokens that are clipped; with policy_loss "ratio" of
    those whose log-ratio was clamped at log_ratio_clamp.
    """

    def __init__(self, *args: Any, anchor: str = "old", **options: Any) -> None:
        ours = {name: options.pop(name) for name in OPTIONS & set(options)}
        super().__init__(*args, **options)
        config = Settings(
            dual_clip=self.dual_clip,
            ratio_level="sequence" if self.policy_loss_type == "gspo" else "token",
            **ours,
        )
        if config.policy_loss != "ratio":
            config.clip_range = [self.clip_eps_low, self.clip_eps_high]
        check_settings(config)
        check_choice("anchor", anchor, ANCHORS)
        if self.is_correction_level != "off" and self.is_correction_gating != "ratio":
            refuse(self, "is_correction_gating")
        if anchor == "rollout" and self.is_correction_level == "off":
            expected = "'token' or 'seq': otherwise vLLM returns no log-probs for anchor 'rollout'"
            raise invalid("is_correction_level", "'off'", expected)
        if anchor == "rollout" and self.is_correction_mode == "clip":
            expected = "'mask': with anchor 'rollout' the weight would count twice"
            raise invalid("is_correction_mode", "'clip'", expected)
        self.anchor = anchor
        self.settings = settings(config)
        self.steps = optimizer_steps(config, advice=ADVICE)
        self._metrics: dict[str, Tensor] = {}

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
        anchor, anchor_name = old, "old_log_probs"
        if self.is_correction_level != "off":
            rollout = required("rollout_log_probs", rollout_log_probs, log_probs)
            # PolicyLoss corrects gspo by taking the ratio to the rollout's log-probs.
            gspo = self.policy_loss_type == "gspo"
            if not gspo:
                weights, keep, filtered = self._correction(old, rollout, mask)
                vllm_kl = _mean(rollout - old, mask)
            if gspo or self.anchor == "rollout":
                anchor, anchor_name, weights = rollout, "rollout_log_probs", None
        keywords: LossKeywords = {**self.settings, "importance_weights": weights}
        out = token_losses(log_probs, anchor, advantages, keep, anchor_name, self.steps, **keywords)
        loss = aggregate_loss(
            out.loss, mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
        ppo_kl = _mean(old - log_probs.detach(), mask)
        self._metrics = shares = metrics(out, self.steps)
        clip_ratio = shares["ratio/clamped"]
        if "clip/low" in shares:
            clip_ratio = shares["clip/low"] + shares["clip/high"]
        return loss, clip_ratio, ppo_kl, vllm_kl, filtered

    def metrics(self) -> dict[str, Tensor]:
        """Of the last call, and of the last optimizer step: 0-dim tensors."""
        return self._metrics

    def get_extra_state(self) -> dict[str, Any]:
        # On the CPU: the trainer's driver, which has no GPU, reads what a checkpoint holds.
        constraint = self.steps.constraint
        return {} if constraint is None else {"coef": constraint.coef.cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.steps.constraint is not None and state:
            self.steps.constraint.load_state_dict(state)

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
