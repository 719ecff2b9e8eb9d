"""torchtitan 0.3, experiments/rl: a loss of its PolicyTrainer, alone or inside ChunkedLossWrapper.

    from r2vpo_kernels.integrations.torchtitan import R2VPOLoss
    loss=ChunkedLossWrapper.Config(num_chunks=8, loss_fn=R2VPOLoss.Config(variance_coef=0.5)),

The old log-probs are the generator's; tokens where they are not finite are left out, as in the
trainer's denominator. The log-probs come from torchtitan's own function, which handles sharded
logits. The trainer packs sequences into rows, cuts rows into chunks, passes no group ids and does
not mark optimizer steps: ratio_level is "token", center "one" and λ a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_choice
from . import check_version
from .hook import Settings, metrics, required, settings, token_losses

if TYPE_CHECKING:
    from torchtitan.config import CompileConfig

check_version("torchtitan", "0.3", "0.4")

from torchtitan.components.loss import BaseLoss, compute_logprobs  # noqa: E402


class R2VPOLoss(BaseLoss):
    """Takes and returns what the trainer's own losses do."""

    @dataclass(kw_only=True, slots=True)
    class Config(Settings, BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        check_choice("ratio_level", config.ratio_level, ("token",))
        self.settings = settings(config)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred: logits (B, L, V); the others (B, L), labels already shifted."""
        logps = compute_logprobs(pred, labels)
        old = required("generator_logprobs", generator_logprobs, logps)
        mask = loss_mask & torch.isfinite(old)
        out = token_losses(logps, old, advantages, mask, "generator_logprobs", **self.settings)
        denominator = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        loss = out.loss.sum() / denominator
        # The trainer sums metrics named *mean and *frac over chunks, ranks and micro-batches.
        share, means = mask.sum() / denominator, metrics(out)
        shares = (name for name in ("ratio/clamped", "clip/low", "clip/high") if name in means)
        return loss, {
            **{f"loss/{name.replace('/', '_')}_frac": means[name] * share for name in shares},
            "loss/mean": loss.detach(),
            "loss/ratio_mean": (out.stats.weight + out.stats.d_sum).sum() / denominator,
            "loss/ratio_second_moment_mean": out.stats.d_sq_sum.sum() / denominator,
            "loss/kl_old_mean": means["kl/old"] * share,
            "loss/ratio/max": means["ratio/max"],
        }
