"""NeMo-RL: its policy loss without clip, plus the penalty. In a copy of examples/run_grpo.py add,
before setup(...), which builds the loss by this name before it starts any worker,

    import nemo_rl.algorithms.grpo
    from r2vpo_kernels.integrations.nemo_rl import R2VPOLossFn
    nemo_rl.algorithms.grpo.ClippedPGLossFn = R2VPOLossFn

and in the YAML, beside the keys of loss_fn:

    variance_coef: 0.5
    anchor: rollout

for the dual variance_target: 0.02 and variance_coef_file: /shared/run/lambda.json (NeMo-RL's
checkpoints have no place for λ). The workers have environments of their own: add r2vpo_kernels to
the dependencies in NeMo-RL's pyproject.toml, run `uv lock`, and start once with
NRL_FORCE_REBUILD_VENVS=true.

anchor says what the ratio is to: "old" (default) are prev_logprobs, which NeMo-RL recomputes with
the weights of the step. With one optimizer step per batch, as in its grpo_math_1B.yaml, they are
the log-probs of the policy itself, all ratios are 1 and the penalty is 0. "rollout" are
generation_logprobs, the engine's, so that the penalty sees how old the data are; they take the
place of prev_logprobs in the surrogate too. The importance-sampling correction between the two,
which asynchronous runs must set, is then exactly 1 and counts nothing twice; truncating it is
refused, NeMo-RL's metrics of prev against generation read as no mismatch, and
force_on_policy_ratio only saves the pass that recomputes prev_logprobs.

The surrogate, its importance weights, KL and the metrics that the trainer requires are NeMo-RL's,
so policy_loss and its options are refused, as is any key that neither side knows. The clip ranges
are not read. sequence_level_importance_ratios and token_level_loss apply to the penalty too. Tokens
that NeMo-RL's corrections drop from the surrogate keep their penalty, and log_ratio_clamp bounds
the penalty alone. Where policy.generation has top_k or top_p, log-probs reach the loss renormalised
over the kept words, and nothing is to be added; but NeMo-RL gives a sampled word that the trainer's
own filter drops the log-prob 0, with a warning, and its ratio is then wrong. The trainer passes no
group ids: center is "one".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_choice, invalid
from . import Trainer
from .hook import (
    ANCHORS,
    Settings,
    check_settings,
    megatron_group,
    optimizer_steps,
    refuse,
    required,
    settings,
    token_losses,
)
from .steps import OptimizerSteps

if TYPE_CHECKING:
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig

nemo_rl = Trainer("nemo-rl", tested="0.7.0")
with nemo_rl.imports():
    from nemo_rl.algorithms.loss import interfaces
    from nemo_rl.algorithms.loss.interfaces import LossType
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
    from nemo_rl.algorithms.utils import masked_mean
nemo_rl.takes(
    ClippedPGLossFn.__call__,
    "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks",
)  # fmt: skip
nemo_rl.takes(masked_mean, "dim", "global_normalization_factor")

ADVICE = (
    "Set loss_fn.anchor: rollout, or take several optimizer steps per batch "
    "(policy.train_global_batch_size below grpo.num_prompts_per_step * "
    "grpo.num_generations_per_prompt)."
)
BY_STEP = ("variance_coef", "step/ratio_mean", "step/ratio_var", "step/ratio_ess")
OPTIONS = {"anchor", *(field.name for field in fields(Settings))}


class R2VPOLossFn(ClippedPGLossFn):
    """Takes and returns what ClippedPGLossFn does."""

    def __init__(self, cfg: ClippedPGLossConfig, **keywords: Any) -> None:
        refuse_unknown(cfg)
        refuse(
            cfg, "disable_ppo_ratio", "ratio_clip_c", "use_cispo", "policy_loss", "clip_range",
            "dual_clip", "ratio_level",
        )  # fmt: skip
        super().__init__(cfg, **keywords)
        nemo_rl.has(
            self, "ratio_clip_min", "ratio_clip_max", "force_on_policy_ratio", "loss_type",
            "sequence_level_importance_ratios",
        )  # fmt: skip
        self.ratio_clip_min = self.ratio_clip_max = float("inf")
        self.anchor = getattr(cfg, "anchor", "old")
        check_choice("anchor", self.anchor, ANCHORS)
        if self.anchor == "rollout":
            refuse(cfg, "truncated_importance_sampling_type")
            self.force_on_policy_ratio = False
        self.cfg = cfg
        self.settings = settings(cfg)
        by_sequence = self.sequence_level_importance_ratios
        self.settings["ratio_level"] = "sequence" if by_sequence else "token"
        check_settings(cfg)
        has_penalty = self.steps.constraint is not None or self.settings.get("variance_coef") != 0
        if self.force_on_policy_ratio and has_penalty:
            expected = "False, or anchor 'rollout': with every ratio 1 the penalty is 0"
            raise invalid("force_on_policy_ratio", True, expected)
        # After 0.7 a trainer may call with denominators of 1, and divide each metric's sum later.
        if hasattr(self, "metric_normalizations"):
            tokens = interfaces.MetricNormalizer.TOKENS
            self.metric_normalizations |= {
                **dict.fromkeys(("ratio_second_moment", *BY_STEP), tokens),
                "variance_penalty": self.metric_normalizations["loss"],
            }

    @property
    def steps(self) -> OptimizerSteps:
        """Those of this process: the loss is built in the driver, and pickled to the workers."""
        return optimizer_steps(self.cfg, advice=ADVICE, group=megatron_group)

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        **keywords: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """data's tensors (B, S), each log-prob at its token; sample_mask (B,)."""
        logps, steps, token_mask = next_token_logprobs, self.steps, data["token_mask"]
        if self.anchor == "rollout":
            rollout = required("generation_logprobs", data.get("generation_logprobs"), token_mask)
            data = {**data, "prev_logprobs": rollout}
        old = logps.detach()
        if not self.force_on_policy_ratio:
            old = required("prev_logprobs", data.get("prev_logprobs"), token_mask)[:, 1:]
        token_mask, sample_mask = token_mask[:, 1:], data["sample_mask"]
        mask, no_advantage = token_mask * sample_mask[:, None], torch.zeros_like(logps)
        out = token_losses(
            logps, old, no_advantage, mask, "prev_logprobs", steps, follow=False, **self.settings
        )
        surrogate, logged = super().__call__(
            logps, data, global_valid_seqs, global_valid_toks, **keywords
        )
        if self.loss_type is LossType.TOKEN_LEVEL:
            penalty = masked_mean(out.loss, mask, None, global_valid_toks)
        else:
            by_sample = masked_mean(out.loss, token_mask, -1)
            penalty = masked_mean(by_sample, sample_mask, None, global_valid_seqs)
        loss, moment = surrogate + penalty, out.stats.d_sq_sum.sum() / global_valid_toks
        # The workers repeat micro-batches to fill ranks.
        steps.follow_backward(loss, out.stats)
        # The trainer logs the sum over micro-batches and ranks.
        share = mask.sum() / global_valid_toks
        by_step = {name: value * share for name, value in steps.metrics().items()}
        ours = {"loss": loss, "variance_penalty": penalty, "ratio_second_moment": moment, **by_step}
        return loss, logged | {name: value.item() for name, value in ours.items()}


def refuse_unknown(cfg: ClippedPGLossConfig) -> None:
    """NeMo-RL's configuration takes any key: a misspelt one would leave its default in silence."""
    for name in cfg.model_extra or ():
        if name not in OPTIONS:
            expected = "one of NeMo-RL's, or of " + ", ".join(sorted(OPTIONS))
            raise TypeError(f"loss_fn.{name}: got an unknown key, expected {expected}")
