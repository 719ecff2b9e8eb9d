"""slime: a custom loss of its Megatron trainer.

    --loss-type custom_loss --custom-config-path r2vpo.yaml  # r2vpo_variance_coef: 0.5, ...
    --custom-loss-function-path r2vpo_kernels.integrations.slime.r2vpo_loss_function
    --custom-megatron-init-path r2vpo_kernels.integrations.slime.check_arguments

The last line is optional: with it a bad option is refused before the first rollout. The loss
replaces slime's policy loss, whose options keep their meaning: --entropy-coef, --use-kl-loss and
its kin, --use-rollout-logprobs, --use-tis and --get-mismatch-metrics with slime's correction or
--custom-tis-function-path, --custom-pg-loss-reducer-function-path. Weights of a correction multiply
the advantage, not the penalty; tokens that it masks or gives weight 0 carry no penalty. With
--use-rollout-logprobs, whose ratio corrects already, it gives metrics alone. The clip
ranges are not read: see r2vpo_policy_loss and r2vpo_clip_range. --use-opsm and the estimators
"gspo" and "cispo" are refused (r2vpo_ratio_level: sequence is gspo's ratio, r2vpo_policy_loss:
cispo the other's loss), under context parallelism r2vpo_ratio_level: sequence too. The trainer
passes no group ids: center is "one".

The old log-probs are recomputed, always, for a custom loss; with one optimizer step per rollout
every ratio is then 1. --use-rollout-logprobs takes the engine's, and the penalty sees how old the
data are. With --rollout-top-p all log-probs are slime's, renormalised over the sets that it
replays; its entropy is that of the full vocabulary.

λ by the dual, r2vpo_variance_target, is kept beside slime's checkpoints, in r2vpo/ of --save, with

    --custom-megatron-before-train-step-hook-path r2vpo_kernels.integrations.slime.before_train_step

and taken from --load where a run resumes; call it from your own hook if you have one. Without it
there is r2vpo_variance_coef_file.

Metrics keep slime's names. pg_loss has the penalty in it; pg_clipfrac is the share of a
micro-batch's tokens whose policy gradient a clip removes, 0 without a clip. Those of this package
are means over the micro-batches of a step (ratio/min and ratio/max too); step/* are those of the
optimizer step before, not averaged.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import invalid
from . import Trainer
from .hook import (
    Settings,
    check_settings,
    megatron_group,
    metrics,
    optimizer_steps,
    refuse,
    required,
    settings,
    token_losses,
)
from .steps import OptimizerSteps

slime = Trainer("slime", tested="0.3.1")
with slime.imports():
    from megatron.core import mpu
    from slime.backends.megatron_utils import cp_utils, loss
    from slime.utils.misc import load_function
slime.has(
    loss, "get_log_probs_and_entropy", "get_rollout_top_p_logprob_kwargs", "compute_approx_kl",
    "vanilla_tis_function",
)  # fmt: skip
slime.has(cp_utils, "slice_log_prob_with_cp")
slime.takes(loss.get_log_probs_and_entropy, "unconcat_tokens", "with_entropy")
slime.takes(loss.compute_approx_kl, "kl_loss_type", "importance_ratio")

PREFIX = "r2vpo_"
ADVICE = (
    "Set --use-rollout-logprobs, or take several optimizer steps per rollout "
    "(--num-steps-per-rollout)."
)

Reducer = Callable[[Tensor], Tensor]


def steps_of(args: Namespace) -> OptimizerSteps:
    return optimizer_steps(args, PREFIX, advice=ADVICE, group=megatron_group)


def refuse_arguments(args: Namespace) -> None:
    """What this loss cannot follow."""
    refuse(args, "use_opsm")
    if args.advantage_estimator in ("gspo", "cispo"):
        raise invalid("advantage_estimator", args.advantage_estimator, "one without its own loss")
    if args.use_rollout_logprobs and args.use_tis:
        raise invalid("use_tis", True, "it unset with use_rollout_logprobs: it would count twice")
    known = [PREFIX + field.name for field in fields(Settings)]
    for name in vars(args):
        if name.startswith(PREFIX) and name not in known:
            raise invalid(name, repr(getattr(args, name)), "one of " + ", ".join(known))
    level = getattr(args, PREFIX + "ratio_level", "token")
    if level == "sequence" and args.context_parallel_size > 1:
        raise invalid(PREFIX + "ratio_level", repr(level), "'token' under context parallelism")


def check_arguments(args: Namespace) -> None:
    """slime's hook after Megatron's initialisation: every option, before the first rollout."""
    refuse_arguments(args)
    check_settings(args, PREFIX)


def r2vpo_loss_function(
    args: Namespace,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Reducer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """logits (1, T, V) float32; the batch holds lists of tensors (response length,), by sample.

    --recompute-loss-function calls it twice per micro-batch, for all micro-batches alike: means
    over an optimizer step, and so λ, stay what they are.
    """
    refuse_arguments(args)
    steps, keywords = steps_of(args), settings(args, PREFIX)
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    samples = {name: batch[name] for name in names}
    samples |= loss.get_rollout_top_p_logprob_kwargs(args, batch)
    _, scored = loss.get_log_probs_and_entropy(logits, args=args, with_entropy=True, **samples)
    logps, entropy = (torch.cat(scored[name]) for name in ("log_probs", "entropy"))
    if logps.numel() == 0:
        # A rank without tokens still takes part in the collectives of backward and step.
        logps = logps + 0 * logits.sum()
    fixed = logps.detach()

    def packed(name: str) -> Tensor:
        return required(name, torch.cat(batch[name]) if batch.get(name) else None, fixed)

    old_name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    old, advantages = packed(old_name), torch.cat(batch["advantages"])
    mask = kept = trained = local(batch["loss_masks"], batch)
    masks = batch["loss_masks"]
    mismatch: dict[str, Tensor] = {}
    if args.use_tis or args.get_mismatch_metrics:
        weights, masks, mismatch = correction(args, batch, packed)
        if args.use_rollout_logprobs:
            # The ratio corrects already; the metrics alone are wanted.
            weights, masks = torch.ones_like(weights), batch["loss_masks"]
        mismatch["ois"] = (fixed - old).exp()
        kept = local(masks, batch)
        trained = kept * (weights != 0)
        keywords["importance_weights"] = weights
    if keywords.get("ratio_level") == "sequence":
        lengths = [0, *batch["response_lengths"]]
        keywords["cu_seqlens"] = torch.tensor(lengths, device=fixed.device).cumsum(0)
    out = token_losses(logps, old, advantages, trained, old_name, steps, **keywords)

    def mean(values: Tensor, among: Tensor) -> Tensor:
        # Dropped tokens leave the sum, not slime's denominator.
        return sum_of_sample_mean(torch.where(among != 0, values, 0.0))

    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    reducer: Reducer = sum_of_sample_mean
    if path is not None:
        sizes = batch["total_lengths"], batch["response_lengths"]
        reducer = load_function(path)(*sizes, masks, args.calculate_per_token_loss)
    pg_loss = reducer(out.loss)
    logged = {"pg_loss": pg_loss, "entropy_loss": mean(entropy, kept)}
    total = pg_loss - args.entropy_coef * logged["entropy_loss"]
    if args.use_kl_loss:
        new, ref, behaviour = (
            torch.where(kept != 0, x, 0.0) for x in (logps, packed("ref_log_probs"), old)
        )
        factor = (new - behaviour).exp() if args.use_unbiased_kl else None
        kl = loss.compute_approx_kl(
            new, ref, kl_loss_type=args.kl_loss_type, importance_ratio=factor
        )
        logged["kl_loss"] = mean(kl, kept)
        total = total + args.kl_loss_coef * logged["kl_loss"]
    logged |= {"loss": total, "ppo_kl": mean(old - fixed, kept)}
    if batch.get("rollout_log_probs"):
        trainer = fixed if args.use_rollout_logprobs else old
        difference = (trainer - packed("rollout_log_probs")).abs()
        logged["train_rollout_logprob_abs_diff"] = mean(difference, kept)
    for name, values in mismatch.items():
        logged[name] = mean(values, mask)
    ours, share = metrics(out, steps), metric_share(args, batch)
    ours["ratio/second_moment"] = out.stats.second_moment.sum()
    logged |= {name: share * value for name, value in ours.items()}
    clipped = sum(value for name, value in ours.items() if name.startswith("clip/"))
    logged["pg_clipfrac"] = mean(clipped * torch.ones_like(fixed), kept)
    return total, {name: value.detach() for name, value in logged.items()}


def local(masks: list[Tensor], batch: dict[str, Any]) -> Tensor:
    """This rank's part of masks of whole responses."""
    sizes = batch["total_lengths"], batch["response_lengths"]
    return torch.cat([*map(cp_utils.slice_log_prob_with_cp, masks, *sizes)])


def correction(
    args: Namespace, batch: dict[str, Any], packed: Callable[[str], Tensor]
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """slime's correction for the mismatch of engine and trainer: weights, masks, metrics."""
    path = args.custom_tis_function_path
    correct = loss.vanilla_tis_function if path is None else load_function(path)
    packed("rollout_log_probs")
    # It multiplies a loss by its weights: applied to ones, they are the result.
    corrected: tuple[Tensor, list[Tensor], dict[str, Tensor]] = correct(
        args=args,
        pg_loss=torch.ones_like(packed("log_probs")),
        train_log_probs=batch["log_probs"],
        rollout_log_probs=batch["rollout_log_probs"],
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    return corrected


def metric_share(args: Namespace, batch: dict[str, Any]) -> Tensor:
    """This rank's and micro-batch's part of the number by which slime divides a step's metrics.

    slime sums a metric over ranks and micro-batches, then divides by the step's rollouts, or tokens
    with --calculate-per-token-loss: a number times this share comes out as its mean. A rollout of
    several samples that are masked throughout counts as so many.
    """
    tokens = torch.stack([mask.sum() for mask in batch["loss_masks"]])
    if args.calculate_per_token_loss:
        part: Tensor = tokens.clamp(min=1).sum()
    else:
        of_rollout = torch.stack(list(batch["rollout_mask_sums"]))
        part = torch.where(of_rollout == 0, 1.0, tokens / of_rollout).sum()
    return part / float(args.context_parallel_size)


def before_train_step(
    args: Namespace, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any
) -> None:
    """slime's hook before each step: where λ is kept, a file per rollout as checkpoints are.

    It is written after each step, so that it is there before the checkpoint is, the last one's too.
    """
    # A critic's process, and those of other pipeline stages, have no λ.
    if args.loss_type != "custom_loss" or not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    steps = steps_of(args)
    if steps.constraint is None:
        return
    name = PREFIX + "variance_coef_file"
    if getattr(args, name, None) is not None:
        raise invalid(name, repr(getattr(args, name)), "it unset: λ is kept beside checkpoints")
    if steps.last is None and rollout_id > 0 and not args.finetune:
        # The process trains for the first time, from the checkpoint of the rollout before.
        steps.restore(kept_beside(args.load, rollout_id - 1))
    if args.save is not None and args.save_interval is not None:
        steps.file = kept_beside(args.save, rollout_id)


def kept_beside(checkpoints: str, rollout_id: int) -> Path:
    return Path(checkpoints) / "r2vpo" / f"variance_coef_{rollout_id}.json"
