"""AReaL: a trainer whose actor's loss is this one. In a copy of its example script, for GRPOConfig
and PPOTrainer

    from r2vpo_kernels.integrations.areal import R2VPOConfig, R2VPOTrainer

    config, _ = load_expr_config(args, R2VPOConfig)
    with R2VPOTrainer(config, train_dataset=..., valid_dataset=...) as trainer:
        trainer.train(...)

where this package is installed on all workers. The options stand in the YAML's `actor`, or on the
command line: actor.variance_coef=1.0, for the dual actor.variance_target=0.02, for the clipped
losses actor.policy_loss=clip actor.clip_range=[0.2,0.28]. AReaL's eps_clip has no effect.

AReaL's own settings choose the old log-probs. With its defaults they are the rollout's, and the
penalty sees how old the data are. With recompute_logprob or use_decoupled_loss they are those of
the policy before the update (prox_logp, by prox_logp_method), and the penalty sees what the
ppo_n_minibatches move; rejection_sampling then gives importance weights or a mask as it does for
AReaL's loss, and m2_threshold a mask.

The denominator is that of AReaL's loss: the tokens of a micro-batch, of which its engines make the
mean over the mini-batch on all ranks. KL is in AReaL's rewards. Logged are, under ppo_actor/update,
what AReaL's loss logs, ratio/mean and so on of each micro-batch in place of importance_weight, and
of each optimizer step, over all ranks, step/ratio_mean, /ratio_var and /ratio_ess. The same by age
is in step/age_2/ratio_var and so on: of the tokens that were sampled two versions before the
present one, up to age_groups - 1 versions or more; share is theirs of all. At ratio_level
"sequence" the oldest token gives a sequence its age.

λ is in AReaL's checkpoints (recover.mode), beside the optimizer's state. AReaL passes no group ids:
center is "one". Its distillation (teacher), SAPO and GSPO options are refused: GSPO is
policy_loss "clip" with ratio_level "sequence".
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import RatioStats
from ..checks import invalid
from . import Trainer
from .hook import (
    LossKeywords,
    Settings,
    check_settings,
    metrics,
    optimizer_steps,
    refuse,
    settings,
    token_losses,
)
from .steps import OptimizerSteps

if TYPE_CHECKING:
    from areal.api import ModelAllocation, SaveLoadMeta

areal = Trainer("areal", tested="1.0.4")
with areal.imports():
    from areal.api.cli_args import GRPOConfig, PPOActorConfig
    from areal.trainer.ppo.actor import (
        _apply_m2po_masking,
        _log_proximal_approximation_stats,
        _log_version_staleness_stats,
        _resolve_proximal_logp,
        grpo_loss_fn,
    )
    from areal.trainer.ppo.stats import infer_token_denominator
    from areal.trainer.rl_trainer import PPOTrainer
    from areal.utils import stats_tracker
    from areal.utils.environ import is_single_controller
    from areal.utils.functional import apply_rejection_sampling
areal.has(PPOTrainer, "_create_train_engine")
areal.takes(grpo_loss_fn, "logprobs", "entropy", "input_data", "vocab_min_logits")
areal.takes(_resolve_proximal_logp, "prox_logp_gt", "prox_logp_method", "versions")
areal.takes(apply_rejection_sampling, "proximal_logprobs", "old_logprobs", "cu_seqlens", "config")

ADVICE = (
    "Leave actor.recompute_logprob and actor.use_decoupled_loss false, so that the old log-probs "
    "are the rollout's, or take several optimizer steps per batch (actor.ppo_n_minibatches)."
)
COEF_FILE = "r2vpo.json"
# The engine of each of AReaL's backends here, and the one that it extends. Each needs libraries of
# its own.
ENGINES = {
    "fsdp": ("FSDPR2VPOActor", "areal.engine", "FSDPPPOActor"),
    "megatron": ("MegatronR2VPOActor", "areal.engine", "MegatronPPOActor"),
    "archon": (
        "ArchonR2VPOActor",
        "areal.experimental.engine.archon_engine",
        "ArchonPPOActor",
    ),
}


@dataclass
class R2VPOActorConfig(Settings, PPOActorConfig):
    """AReaL's PPOActorConfig with the options of this loss."""

    age_groups: int = field(
        default=8,
        metadata={
            "help": "The ratio's statistics are divided by the age of tokens in versions, 0 to "
            "age_groups - 1 or more. 1: not divided."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        refuse(self, "eps_clip_higher", "c_clip", "use_sapo_loss")
        if self.importance_sampling_level != "token":
            got = repr(self.importance_sampling_level)
            raise invalid("importance_sampling_level", got, "'token': ratio_level takes its place")
        if self.age_groups < 1:
            raise invalid("age_groups", self.age_groups, "at least 1")


@dataclass
class R2VPOConfig(GRPOConfig):
    """AReaL's GRPOConfig whose actor has the options of this loss."""

    actor: R2VPOActorConfig = field(default_factory=R2VPOActorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, "teacher")


class R2VPOTrainer(PPOTrainer):
    """AReaL's PPOTrainer with an actor of this module."""

    def __init__(self, config: R2VPOConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, R2VPOConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected an R2VPOConfig")
        super().__init__(config, *args, **kwargs)

    def _create_train_engine(self, actor_config: PPOActorConfig, alloc: ModelAllocation) -> Any:
        # The reference model has AReaL's own engine.
        if not isinstance(actor_config, R2VPOActorConfig):
            return super()._create_train_engine(actor_config, alloc)
        if alloc.backend not in ENGINES:
            raise invalid("actor.backend", repr(alloc.backend), f"one of {', '.join(ENGINES)}")
        engine = getattr(sys.modules[__name__], ENGINES[alloc.backend][0])
        if is_single_controller():
            actor = engine.as_controller(actor_config, self.scheduler)
        else:
            actor = engine(config=actor_config)
        actor.create_process_group(parallel_strategy=alloc.parallel)
        return actor


class R2VPOEngine:
    """What makes an engine's actor train by this loss; the engine is the next base class."""

    config: R2VPOActorConfig
    device: torch.device
    get_version: Callable[[], int]

    def train_batch(
        self, input_: Any, loss_fn: object, loss_weight_fn: Callable[..., Tensor]
    ) -> dict[str, float]:
        """AReaL's: one optimizer step. loss_fn is that of PPO, which this one replaces."""
        steps = self._steps()
        # A rank without a valid token calls no loss, and takes part in the sums over ranks.
        groups = self.config.age_groups
        steps.follow(RatioStats(*torch.zeros(3, groups, device=self.device).unbind()))
        loss = functools.partial(
            r2vpo_loss_fn, config=self.config, steps=steps, current_version=self.get_version()
        )
        stats: dict[str, float]
        stats = super().train_batch(input_, loss, loss_weight_fn)  # type: ignore[misc]
        if stats["update_successful"]:
            # Not all of AReaL's optimizers are torch's.
            steps.close()
        return stats | step_metrics(steps)

    def save(self, meta: SaveLoadMeta) -> None:
        super().save(meta)  # type: ignore[misc]
        steps = self._steps()
        if meta.with_optim and steps.constraint is not None and dist.get_rank() == 0:
            steps.save(Path(meta.path) / COEF_FILE)

    def load(self, meta: SaveLoadMeta) -> None:
        super().load(meta)  # type: ignore[misc]
        steps = self._steps()
        if meta.with_optim and steps.constraint is not None:
            steps.restore(Path(meta.path) / COEF_FILE)

    def _steps(self) -> OptimizerSteps:
        # All ranks: those that share a sequence or a model add the same numbers, and as many times.
        return optimizer_steps(self.config, advice=ADVICE)


def __getattr__(name: str) -> Any:
    """An engine of ENGINES, which AReaL's workers import by its name."""
    for ours, module, theirs in ENGINES.values():
        if name == ours:
            with areal.imports():
                engine = getattr(importlib.import_module(module), theirs)
            areal.has(engine, "train_batch", "save", "load", "get_version")
            extended = type(name, (R2VPOEngine, engine), {"__module__": __name__})
            return globals().setdefault(name, extended)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def r2vpo_loss_fn(
    logprobs: Tensor,
    entropy: Tensor,
    input_data: dict[str, Any],
    vocab_min_logits: Tensor | None = None,
    vocab_max_logits: Tensor | None = None,
    *,
    config: R2VPOActorConfig,
    steps: OptimizerSteps,
    current_version: int,
) -> Tensor:
    """AReaL's grpo_loss_fn with this loss: tensors (tokens,), of a micro-batch, packed."""
    rollout_logps, versions = input_data["logprobs"], input_data.get("versions")
    mask = input_data["loss_mask"].bool()
    old_logps = _resolve_proximal_logp(
        prox_logp_gt=input_data.get("prox_logp"),
        prox_logp_method=config.prox_logp_method,
        old_logp=rollout_logps,
        logprobs=logprobs.detach(),
        versions=versions,
        current_version=current_version,
    )
    if config.m2_threshold is not None:
        mask = _apply_m2po_masking(rollout_logps, old_logps, mask, config.m2_threshold)
    # As AReaL has it: what is rejected stays in the denominator.
    tokens, valid = mask.count_nonzero().clamp(min=1), mask
    cu_seqlens = input_data.get("cu_seqlens")
    keywords: LossKeywords = settings(config)
    rejected = None
    if config.rejection_sampling is not None:
        rejected = apply_rejection_sampling(
            proximal_logprobs=old_logps,
            old_logprobs=rollout_logps,
            loss_mask=mask,
            cu_seqlens=cu_seqlens,
            config=config.rejection_sampling,
        )
        mask = rejected.loss_mask.bool()
        keywords["importance_weights"] = rejected.behave_imp_weight
    if config.ratio_level == "sequence":
        keywords["cu_seqlens"] = cu_seqlens
    if config.age_groups > 1:
        keywords["num_groups"] = config.age_groups
        keywords["group_ids"] = ages(
            versions, current_version, config.age_groups, mask, keywords.get("cu_seqlens")
        )
    out = token_losses(
        logprobs, old_logps, input_data["advantages"], mask, "prox_logp", steps, **keywords
    )

    stats_tracker.denominator(
        n_tokens=infer_token_denominator(input_data, valid), n_valid_tokens=valid
    )
    stats_tracker.stat(
        actor_loss=out.loss.detach().float(),
        approx_kl=(logprobs.detach() - old_logps).float(),
        new_logp=logprobs.detach().float(),
        old_logp=rollout_logps.float(),
        entropy=entropy.detach().float(),
        denominator="n_valid_tokens",
    )
    of_call = metrics(out)
    values = torch.stack([*of_call.values()]).tolist()
    stats_tracker.scalar(**dict(zip(of_call, values, strict=True)))
    if rejected is not None:
        stats_tracker.scalar(rs_filtered_fraction=rejected.filtered_fraction)
        stats_tracker.denominator(unclipped_behave_tokens=mask)
        stats_tracker.stat(
            behave_imp_weight=rejected.behave_imp_weight,
            behave_approx_kl=(old_logps - rollout_logps).float(),
            denominator="unclipped_behave_tokens",
        )
    if vocab_min_logits is not None and vocab_max_logits is not None:
        stats_tracker.stat(
            vocab_min_logits=vocab_min_logits,
            vocab_max_logits=vocab_max_logits,
            denominator="n_tokens",
        )
    _log_proximal_approximation_stats(
        prox_logp_method=config.prox_logp_method,
        prox_logp_gt=input_data.get("prox_logp"),
        old_logp=rollout_logps,
        logprobs=logprobs.detach(),
        versions=versions,
        current_version=current_version,
        compute_logp_mask=mask,
    )
    if versions is not None:
        _log_version_staleness_stats(
            versions=versions, current_version=current_version, version_metrics_mask=mask
        )
    loss: Tensor = out.loss.sum() / tokens
    return loss


def ages(
    versions: Tensor | None,
    current_version: int,
    groups: int,
    mask: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """How many versions ago each token was sampled, at most groups - 1.

    With cu_seqlens one age per sequence, that of its oldest token.
    """
    if versions is None:
        expected = "a tensor, which AReaL's workflows give; or set actor.age_groups=1"
        raise invalid("versions", None, expected)
    # Log-probs and masks are those of the next token, versions of the token itself.
    age = (current_version - versions.roll(-1, -1)).clamp(0, groups - 1)
    if cu_seqlens is None:
        return age
    sequences = len(cu_seqlens) - 1
    sequence = torch.arange(sequences, device=age.device).repeat_interleave(cu_seqlens.diff())
    return age.new_zeros(sequences).scatter_reduce(0, sequence, age * mask, "amax")


def step_metrics(steps: OptimizerSteps) -> dict[str, float]:
    """Those of the last optimizer step, in all and of each age that has tokens."""
    assert steps.last is not None
    last, values = steps.last, steps.metrics()
    shares = (last.weight / last.weight.sum()).tolist()
    for age, share in enumerate(shares if len(shares) > 1 else []):
        if share > 0:
            name = f"step/age_{age}" + ("+" if age == len(shares) - 1 else "")
            values |= {
                f"{name}/share": last.weight.new_tensor(share),
                f"{name}/ratio_mean": last.mean[age],
                f"{name}/ratio_var": last.variance[age],
                f"{name}/ratio_ess": last.ess[age],
            }
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True))
