"""ms-swift: a GRPOTrainer with the penalty of R²VPO, for `swift rlhf --rlhf_type grpo`. In a file,
r2vpo_plugin.py,

    from r2vpo_kernels.integrations.ms_swift import register

    register(variance_coef=0.5)

and to the command line added: --external_plugins r2vpo_plugin.py. The options are those of
`R2VPOSettings`: for the dual register(variance_target=0.02).

The policy loss, KL, masks, importance sampling, auxiliary losses and metrics are ms-swift's own;
with policy_loss "ratio", the default, its ratio is not clipped (epsilon has no effect), with
policy_loss "clip" it is as ever, and --loss_type cispo needs policy_loss "cispo". The penalty is
added with the token weights of --loss_type ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), at
--importance_sampling_level, on all tokens, as KL: neither top_entropy_quantile nor the weights of
rollout_importance_sampling_mode apply to it.

The old log-probs are recomputed when completions were sampled. Where each batch serves one
optimizer step they are those of the present policy, and the penalty is 0. With anchor="rollout"
they are vLLM's, for the policy loss and the penalty: stale data and the mismatch of the engines
count. rollout_importance_sampling_mode would count those twice and is refused then.

Logged, r2vpo/step/ratio_var and so on are of the last optimizer step over all ranks, and
r2vpo/variance_coef is λ of the dual, which is saved in checkpoints. Megatron (`megatron rlhf`, and
with Ray) has another trainer, which cannot be replaced.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..checks import POLICY_LOSSES, PolicyLoss, Reduction, check_choice, check_number, invalid
from ..dual import VarianceConstraint
from ..loss import r2vpo_loss_from_logps
from ..objective import default_variance_coef
from . import Trainer
from .hook import ANCHORS, Anchor, constraint_of, refuse, required
from .steps import OptimizerSteps

if TYPE_CHECKING:
    from swift.rl_core.data import GRPOBatch

swift = Trainer("ms-swift", tested="4.6.0")
with swift.imports():
    from swift.rlhf_trainers import GRPOTrainer
    from swift.trainers import TrainerFactory
swift.has(TrainerFactory, "TRAINER_MAPPING")
swift.has(GRPOTrainer, "_undo_gradient_accumulation_scaling")
swift.takes(GRPOTrainer._compute_loss_and_metrics, "model", "model_inputs", "grpo_batch")
swift.takes(GRPOTrainer._get_per_token_logps_and_entropies, "model", "model_inputs", "grpo_batch")

ADVICE = (
    'Give register() anchor="rollout", or let a batch serve several optimizer steps '
    "(--num_iterations, or --steps_per_generation above --gradient_accumulation_steps)."
)
COEF_FILE = "r2vpo.json"
# The loss types whose policy loss it is.
LOSS_TYPES = {
    "ratio": ("grpo", "bnpo", "dr_grpo", "dapo"),
    "clip": ("grpo", "bnpo", "dr_grpo", "dapo"),
    "cispo": ("cispo",),
}


@dataclasses.dataclass(kw_only=True)
class R2VPOSettings:
    """What `register` takes: the options of `r2vpo_loss` that are not ms-swift's.

    With variance_target λ follows the dual, `VarianceConstraint`, once per optimizer step: it
    starts at variance_coef (default 0.5), moves by variance_coef_lr, and stays within
    variance_coef_min and variance_coef_max. anchor: whose log-probs the old ones are.
    """

    policy_loss: PolicyLoss = "ratio"
    variance_coef: float | None = None
    variance_target: float | None = None
    variance_coef_lr: float = 0.1
    variance_coef_min: float = 1e-3
    variance_coef_max: float = 100.0
    anchor: Anchor = "old"

    def __post_init__(self) -> None:
        check_choice("policy_loss", self.policy_loss, POLICY_LOSSES)
        check_choice("anchor", self.anchor, ANCHORS)
        self.constraint()

    def coef(self) -> float:
        """λ without the dual."""
        if self.variance_coef is None:
            return default_variance_coef(self.policy_loss)
        return check_number("variance_coef", self.variance_coef, 0.0)

    def constraint(self, device: torch.device | None = None) -> VarianceConstraint | None:
        self.coef()
        return constraint_of(self, device=device)

    def check(self, args: Any) -> None:
        """Raise for options of ms-swift, a GRPOConfig, that do not go with these."""
        refuse(args, "use_liger_kernel", "chord_sft_dataset")
        if args.loss_type not in LOSS_TYPES[self.policy_loss]:
            expected = f"one of {', '.join(LOSS_TYPES[self.policy_loss])}"
            raise invalid(
                "loss_type", repr(args.loss_type), f"{expected}, by policy_loss {self.policy_loss}"
            )
        if self.policy_loss == "ratio":
            refuse(args, "epsilon_high", "delta")
        if self.anchor == "rollout":
            refuse(args, "rollout_importance_sampling_mode", "log_rollout_offpolicy_metrics")
            if not args.use_vllm:
                raise invalid("anchor", "'rollout'", "'old': without use_vllm there are no others")


class R2VPOTrainer(GRPOTrainer):
    """ms-swift's GRPOTrainer; its loss plus Σ w·λ·(ρ - 1)², w the weights of loss_type."""

    settings: ClassVar[R2VPOSettings] = R2VPOSettings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.settings.check(kwargs["args"])
        super().__init__(*args, **kwargs)
        if self.settings.policy_loss == "ratio":
            self.epsilon_low = self.epsilon_high = math.inf
        if self.settings.anchor == "rollout" and self.disable_rollout_importance_sampling:
            expected = "'old': before 0.10.2 vLLM's log-probs are those of another temperature"
            raise invalid("anchor", "'rollout'", expected)
        constraint = self.settings.constraint(self.accelerator.device)
        penalised = constraint is not None or self.settings.coef() != 0
        self._optimizer_steps = OptimizerSteps(constraint, advice=ADVICE if penalised else None)
        self._logps: Tensor | None = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = result[0]
        return result

    def _compute_loss_and_metrics(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: GRPOBatch
    ) -> tuple[Tensor, dict[str, Any]]:
        if self.settings.anchor == "rollout":
            name = "rollout_per_token_logps"
            rollout = required(name, getattr(grpo_batch, name), grpo_batch.completion_mask)
            grpo_batch = dataclasses.replace(grpo_batch, old_per_token_logps=rollout)
        loss, metrics = super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        logps, self._logps = self._logps, None
        assert logps is not None
        penalty = self._penalty(logps, grpo_batch, metrics["completion_mask"])
        return loss + self._undo_gradient_accumulation_scaling(penalty), metrics

    def _penalty(self, logps: Tensor, grpo_batch: GRPOBatch, mask: Tensor) -> Tensor:
        steps = self._optimizer_steps
        reduction, normalizer = self._aggregation(grpo_batch, mask)
        out = r2vpo_loss_from_logps(
            logps,
            grpo_batch.old_per_token_logps,
            # The policy loss is ms-swift's.
            logps.new_zeros(len(mask)),
            variance_coef=self.settings.coef()
            if steps.constraint is None
            else steps.constraint.coef,
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            ratio_level="token" if self.importance_sampling_level == "token" else "sequence",
        )
        # Where ranks have different numbers of chunks ms-swift repeats some, times 0.
        steps.follow_backward(out.loss, out.stats)
        return out.loss

    def _aggregation(
        self, grpo_batch: GRPOBatch, mask: Tensor
    ) -> tuple[Reduction, float | Tensor | None]:
        """The reduction and the denominator that ms-swift gives each loss type."""
        if self.loss_type == "grpo":
            return "seq-mean-token-mean", len(mask)
        if self.loss_type == "bnpo":
            return "token-mean", None
        if self.loss_type == "dr_grpo":
            return "token-mean", len(mask) * self.max_completion_length
        tokens: Tensor = grpo_batch.num_items_in_batch
        return "token-mean", tokens / self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training:
            values = self._optimizer_steps.metrics()
            logs.update({f"r2vpo/{name}": x.item() for name, x in values.items()})
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._save_checkpoint(*args, **kwargs)
        if self._optimizer_steps.constraint is not None and self.args.should_save:
            self._optimizer_steps.save(Path(self.state.last_model_checkpoint) / COEF_FILE)
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.args.resume_only_model:
            return
        if self._optimizer_steps.constraint is not None:
            self._optimizer_steps.restore(Path(checkpoint) / COEF_FILE)


def register(**options: Any) -> None:
    """Make ms-swift train GRPO by R2VPOTrainer, with the options of `R2VPOSettings`."""
    if any(name.startswith(("swift.megatron", "swift.ray.")) for name in sys.modules):
        raise RuntimeError("r2vpo: got Megatron's trainer, expected `swift rlhf` without Megatron")
    R2VPOTrainer.settings = R2VPOSettings(**options)
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{R2VPOTrainer.__name__}"
