"""torchtitan, experiments/rl: a loss of its PolicyTrainer, alone or inside ChunkedLossWrapper.

    from r2vpo_kernels.integrations.torchtitan import R2VPOLoss
    loss=ChunkedLossWrapper.Config(num_chunks=8, loss_fn=R2VPOLoss.Config(variance_coef=0.5)),

in the trainer's configuration; for the dual Config(variance_target=0.02, variance_coef_file=
"/shared/run/lambda.json") (the trainer's checkpoints have no place for λ).

The old log-probs are the generator's, so the penalty sees how old the data are; tokens where they
are not finite are left out, as in the trainer's denominator. Both sides' log-probs are of the full
vocabulary and before temperature, whatever the generator samples by: no sampling mask is needed.
Log-probs come from torchtitan's own function, which handles sharded logits, rows of sequences
(0.3.0) and one packed row (main); trainer/entropy and bit_wise/logprob_diff are the metrics that
the trainer's own losses have.

The trainer sums metrics over chunks, ranks and micro-batches, except for those named */max: so are
λ and the ratio's statistics over the last complete optimizer step, the same on each rank. It packs
sequences into rows, cuts rows into chunks and passes no group ids: ratio_level is "token", center
"one".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_choice
from . import Trainer
from .hook import (
    Settings,
    check_settings,
    metrics,
    optimizer_steps,
    required,
    settings,
    token_losses,
)

if TYPE_CHECKING:
    from torchtitan.config import CompileConfig

torchtitan = Trainer("torchtitan", tested="0.3.0")
with torchtitan.imports():
    from torchtitan.components.loss import BaseLoss, compute_logprobs
torchtitan.takes(compute_logprobs, "logits", "labels", "return_entropy")

ADVICE = "Let rollouts be older than the weights: async_loop.target_offpolicy_steps above 0."


class R2VPOLoss(BaseLoss):
    """Takes and returns what the trainer's own losses do."""

    @dataclass(kw_only=True, slots=True)
    class Config(Settings, BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        check_choice("ratio_level", config.ratio_level, ("token",))
        check_settings(config)
        self.settings = settings(config)
        # All ranks call the loss: those of one tensor-parallel group with the same tokens, which
        # leaves means as they are, and there are no pipeline stages.
        self.steps = optimizer_steps(config, advice=ADVICE)

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
        """pred: logits (B, L, V) or (T, V); the others like it without V, labels shifted."""
        logps, entropy = compute_logprobs(pred, labels, return_entropy=True)
        old = required("generator_logprobs", generator_logprobs, logps)
        mask = loss_mask & torch.isfinite(old)
        out = token_losses(
            logps, old, advantages, mask, "generator_logprobs", self.steps, **self.settings
        )
        denominator = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        loss = out.loss.sum() / denominator
        share, means = mask.sum() / denominator, metrics(out, self.steps)
        difference = torch.where(mask, logps.detach() - old, 0.0)
        shares = (name for name in ("ratio/clamped", "clip/low", "clip/high") if name in means)
        by_step = (name for name in means if name.startswith(("step/", "variance_coef")))
        return loss, {
            **{f"loss/{name.replace('/', '_')}_frac": means[name] * share for name in shares},
            **{f"loss/{name}/max": means[name] for name in by_step},
            "loss/mean": loss.detach(),
            "loss/ratio_mean": (out.stats.weight + out.stats.d_sum).sum() / denominator,
            "loss/ratio_second_moment_mean": out.stats.d_sq_sum.sum() / denominator,
            "loss/kl_old_mean": means["kl/old"] * share,
            "loss/ratio/max": means["ratio/max"],
            "bit_wise/logprob_diff/mean": difference.sum() / denominator,
            "bit_wise/logprob_diff/max": difference.abs().max(),
            "trainer/entropy/mean": (entropy * mask).sum() / denominator,
        }
