"""slime 0.3.1: a custom loss of its Megatron trainer.

    --loss-type custom_loss --custom-config-path r2vpo.yaml  # r2vpo_variance_coef: 0.5, ...
    --custom-loss-function-path r2vpo_kernels.integrations.slime.r2vpo_loss_function

It replaces slime's policy loss; --entropy-coef, --use-kl-loss, --kl-loss-coef, --kl-loss-type,
--use-unbiased-kl and --use-rollout-logprobs keep their meaning. The clip ranges are not read: see
r2vpo_policy_loss and r2vpo_clip_range. Other corrections, a custom reducer, and the estimators
"gspo" and "cispo" are refused (r2vpo_ratio_level: sequence is gspo's ratio, r2vpo_policy_loss:
cispo the other's loss). Log-probs, under tensor and context parallelism too, and the sum over
tokens are slime's own; under context parallelism r2vpo_ratio_level must be token. The trainer
passes no group ids and does not mark optimizer steps: center is "one" and λ a number.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import invalid
from . import check_version
from .hook import LossKeywords, refuse, required, settings, token_losses

check_version("slime", "0.3.1", "0.4")

from slime.backends.megatron_utils import cp_utils, loss  # noqa: E402


def r2vpo_loss_function(
    args: Namespace,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """logits (1, T, V) float32; the batch holds lists of tensors (response length,), by sample."""
    refuse(
        args, "use_tis", "use_opsm", "get_mismatch_metrics", "custom_pg_loss_reducer_function_path"
    )
    if args.advantage_estimator in ("gspo", "cispo"):
        raise invalid("advantage_estimator", args.advantage_estimator, "one without its own loss")
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    _, totals, lengths = (batch[name] for name in names)
    samples = {name: batch[name] for name in names}
    samples |= loss.get_rollout_top_p_logprob_kwargs(args, batch)
    _, scored = loss.get_log_probs_and_entropy(logits, args=args, with_entropy=True, **samples)

    def packed(name: str) -> Tensor | None:
        return torch.cat(batch[name]) if batch.get(name) else None

    keywords: LossKeywords = {
        **settings(args, prefix="r2vpo_"),
        "entropy": torch.cat(scored["entropy"]),
        "entropy_coef": args.entropy_coef,
    }
    logps = torch.cat(scored["log_probs"])
    if keywords.get("ratio_level") == "sequence":
        if [len(x) for x in scored["log_probs"]] != list(lengths):
            raise invalid("r2vpo_ratio_level", "'sequence'", "'token' under context parallelism")
        keywords["cu_seqlens"] = torch.tensor([0, *lengths], device=logps.device).cumsum(0)
    mask = torch.cat([*map(cp_utils.slice_log_prob_with_cp, batch["loss_masks"], totals, lengths)])
    name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    old, advantages = required(name, packed(name), logps), torch.cat(batch["advantages"])
    out = token_losses(logps, old, advantages, mask, name, **keywords)
    terms = out.loss
    if args.use_kl_loss:
        ref = required("ref_log_probs", packed("ref_log_probs"), logps)
        new, base, behaviour = (torch.where(mask != 0, x, 0.0) for x in (logps, ref, old))
        factor = (new - behaviour).exp() if args.use_unbiased_kl else None
        kl = loss.compute_approx_kl(
            new, base, kl_loss_type=args.kl_loss_type, importance_ratio=factor
        )
        terms = terms + args.kl_loss_coef * kl
    # A rank without tokens still takes part in the backward's collectives.
    total = sum_of_sample_mean(terms) + (0 * logits.sum() if logps.numel() == 0 else 0)
    ratio = torch.where(mask != 0, out.logps - old, 0.0).clamp(max=20.0).exp()
    logged = {"ratio": sum_of_sample_mean(ratio), "ratio_d2": sum_of_sample_mean((ratio - 1) ** 2)}
    return total, {"loss": total.detach().clone()} | logged
