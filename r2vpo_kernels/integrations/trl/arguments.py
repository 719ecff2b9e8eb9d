"""What a micro-batch of TRL means to the loss: its arguments besides the log-probs."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor
from trl import GRPOTrainer

from ...checks import Center, PolicyLoss, RatioLevel, Reduction
from .config import R2VPOConfig


class LossArguments(TypedDict):
    """The arguments that `r2vpo_loss_from_logps` and `linear_r2vpo_loss` share."""

    old_logps: Tensor | None
    advantages: Tensor
    policy_loss: PolicyLoss
    clip_range: tuple[float, float] | None
    dual_clip: float | None
    variance_coef: float | Tensor
    center: Center | Tensor
    group_ids: Tensor | None
    num_groups: int | None
    mask: Tensor
    reduction: Reduction
    normalizer: float | Tensor
    ratio_level: RatioLevel
    importance_weights: Tensor | None
    ref_logps: Tensor | None
    kl_coef: float
    kl_unbiased: bool
    log_ratio_clamp: float


def loss_arguments(
    trainer: GRPOTrainer, inputs: dict[str, Any], variance_coef: float | Tensor, steps: int
) -> LossArguments:
    """The arguments of the loss, from what TRL's generation recorded.

    steps: how many micro-batches the loss is to be divided by. center is "one"; for the option
    "group" the caller replaces it by the means of the groups that group_ids name.
    """
    config: R2VPOConfig = trainer.args
    mask = valid_tokens(inputs)
    old_logps = _old_logps(trainer, inputs)
    reduction, normalizer = _aggregation(trainer, inputs, mask, steps)
    arguments: LossArguments = {
        "old_logps": old_logps,
        "advantages": inputs["advantages"],
        "policy_loss": config.policy_loss,
        "clip_range": config.clip_range,
        "dual_clip": config.delta,
        "variance_coef": variance_coef,
        "center": "one",
        "group_ids": None,
        "num_groups": None,
        "mask": mask,
        "reduction": reduction,
        "normalizer": normalizer,
        "ratio_level": trainer.importance_sampling_level,
        "importance_weights": None,
        "ref_logps": None,
        "kl_coef": trainer.beta,
        "kl_unbiased": config.use_bias_correction_kl and trainer.beta != 0.0,
        "log_ratio_clamp": config.log_ratio_clamp,
    }
    if trainer.beta != 0.0:
        reason = f"for beta {trainer.beta}"
        arguments["ref_logps"] = require(inputs, "ref_per_token_logps", reason)
    if corrects_rollouts(trainer):
        reason = "for vllm_importance_sampling_correction"
        weights = require(inputs, "importance_sampling_ratio", reason)
        # TRL gives one weight per sequence as a column.
        one_per_sequence = weights.shape[1] == 1
        arguments["importance_weights"] = weights.squeeze(1) if one_per_sequence else weights
    if config.center == "group":
        arguments["group_ids"] = require(inputs, "group_ids", "for center 'group'")
        arguments["num_groups"] = _num_groups(trainer, mask.shape[0])
    return arguments


def _old_logps(trainer: GRPOTrainer, inputs: dict[str, Any]) -> Tensor | None:
    """None where the current policy sampled these completions: on-policy."""
    if trainer.args.anchor == "rollout":
        return require(inputs, "sampling_per_token_logps", "for anchor 'rollout'")
    old_logps: Tensor | None = inputs.get("old_per_token_logps")
    if old_logps is not None or not trainer.model.training:
        return old_logps
    served = trainer.args.steps_per_generation * trainer.num_iterations
    accumulation = trainer.args.gradient_accumulation_steps
    if accumulation % served == 0:
        return None
    reason = (
        f"for completions that serve {served} micro-batches where an optimizer step "
        f"takes {accumulation}"
    )
    return require(inputs, "old_per_token_logps", reason)


def _num_groups(trainer: GRPOTrainer, sequences: int) -> int:
    """The groups of a generation batch; in evaluation a batch is not split into micro-batches."""
    total: int = sequences * trainer.accelerator.num_processes
    size: int = trainer.num_generations_eval
    if trainer.model.training:
        total, size = trainer.args.generation_batch_size, trainer.num_generations
    return total // size


def _aggregation(
    trainer: GRPOTrainer, inputs: dict[str, Any], mask: Tensor, steps: int
) -> tuple[Reduction, float | Tensor]:
    """The reduction and the denominator that TRL gives each loss type."""
    sequences = mask.shape[0] * steps
    if trainer.loss_type == "grpo":
        return "seq-mean-token-mean", sequences
    if trainer.loss_type == "luspo":
        return "seq-mean-token-sum", sequences
    if trainer.loss_type == "dr_grpo":
        return "token-mean", sequences * trainer.max_completion_length
    if trainer.loss_type == "bnpo":
        return "token-mean", mask.sum().clamp(min=1) * steps
    # "dapo": this rank's and this micro-batch's share of the generation batch's tokens.
    tokens = require(inputs, "num_items_in_batch", "for loss_type 'dapo'").clamp(min=1)
    tokens = tokens / trainer.accelerator.num_processes
    if trainer.model.training:
        tokens = tokens * steps / trainer.args.steps_per_generation
    return "token-mean", tokens


def corrects_rollouts(trainer: GRPOTrainer) -> bool:
    """Whether vLLM's log-probs are corrected by importance weights."""
    return bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def valid_tokens(inputs: dict[str, Any]) -> Tensor:
    """(B, T), nonzero at the tokens that the policy sampled: no padding, no tool output."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def prompts_and_completions(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(tokens, attention mask), each (B, prompt + completion)."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return tokens, attention


def require(inputs: dict[str, Any], name: str, reason: str) -> Tensor:
    """inputs[name], or an error that says what needs it."""
    value: Tensor | None = inputs.get(name)
    if value is None:
        raise ValueError(f"inputs: got {', '.join(inputs)}, expected {name} among them {reason}")
    return value
