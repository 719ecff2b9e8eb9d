"""NeMo-RL 0.7: its policy loss without clip, plus the penalty. In a copy of examples/run_grpo.py,

    from r2vpo_kernels.integrations.nemo_rl import R2VPOLossFn
    loss_fn = R2VPOLossFn(config.loss_fn)

after setup(...), and in the YAML, beside the keys of loss_fn: variance_coef: 0.5, log_ratio_clamp:
20. The clip ranges are not read. The surrogate, its importance weights, KL and the metrics that
the trainer requires are NeMo-RL's, so policy_loss and its options are refused;
sequence_level_importance_ratios and token_level_loss apply to the penalty too. Tokens that
NeMo-RL's corrections drop from the surrogate keep their penalty, and log_ratio_clamp bounds the
penalty alone. The trainer passes no group ids and does not mark optimizer steps: center is "one"
and λ a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import check_version
from .hook import refuse, required, settings, token_losses

if TYPE_CHECKING:
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig

check_version("nemo-rl", "0.7", "0.8")

from nemo_rl.algorithms.loss.interfaces import LossType  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn  # noqa: E402
from nemo_rl.algorithms.utils import masked_mean  # noqa: E402


class R2VPOLossFn(ClippedPGLossFn):
    """Takes and returns what ClippedPGLossFn does."""

    def __init__(self, cfg: ClippedPGLossConfig) -> None:
        refuse(
            cfg, "disable_ppo_ratio", "ratio_clip_c", "use_cispo", "policy_loss", "clip_range",
            "dual_clip",
        )  # fmt: skip
        super().__init__(cfg)
        self.ratio_clip_min = self.ratio_clip_max = float("inf")
        self.settings = settings(cfg)
        by_sequence = self.sequence_level_importance_ratios
        self.settings["ratio_level"] = "sequence" if by_sequence else "token"

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """data's tensors (B, S), each log-prob at its token; sample_mask (B,)."""
        logps = next_token_logprobs
        old = logps.detach()
        if not self.force_on_policy_ratio:
            old = required("prev_logprobs", data.get("prev_logprobs"), data["token_mask"])[:, 1:]
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        mask, no_advantage = token_mask * sample_mask[:, None], torch.zeros_like(logps)
        out = token_losses(logps, old, no_advantage, mask, "prev_logprobs", **self.settings)
        surrogate, logged = super().__call__(logps, data, global_valid_seqs, global_valid_toks)
        if self.loss_type is LossType.TOKEN_LEVEL:
            penalty = masked_mean(out.loss, mask, None, global_valid_toks)
        else:
            by_sample = masked_mean(out.loss, token_mask, -1)
            penalty = masked_mean(by_sample, sample_mask, None, global_valid_seqs)
        loss, moment = surrogate + penalty, out.stats.d_sq_sum.sum() / global_valid_toks
        # The trainer logs the sum over micro-batches.
        ours = {"loss": loss, "variance_penalty": penalty, "ratio_second_moment": moment}
        return loss, logged | {name: value.item() for name, value in ours.items()}
