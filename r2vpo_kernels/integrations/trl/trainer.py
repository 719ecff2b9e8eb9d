"""R2VPOTrainer: the methods of TRL's GRPOTrainer that make its loss R²VPO."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ... import R2VPOOutput, RatioStats, r2vpo_loss_from_logps
from ...checks import invalid
from ..steps import OptimizerSteps
from .arguments import LossArguments, loss_arguments, prompts_and_completions, require
from .coefficient import (
    closed_form,
    load_constraint,
    save_constraint,
)
from .config import R2VPOConfig
from .linear import add_linear_heads, linear_loss
from .metrics import gather_metrics

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

# The metrics that TRL has too, by its names.
TRL_METRICS = {
    "kl/ref": "kl",
    "entropy": "entropy",
    "clip/low": "clip_ratio/low_mean",
    "clip/high": "clip_ratio/high_mean",
    "clip/region": "clip_ratio/region_mean",
}

ADVICE = (
    "Let a batch of completions serve several optimizer steps (num_iterations, "
    "steps_per_generation), or with vLLM set anchor='rollout'."
)


class R2VPOTrainer(GRPOTrainer):
    """A GRPOTrainer that optimises the R²VPO loss (Eq. 5), with the token weights w of loss_type:

        L = Σ w·P + Σ w·λ·(ρ - c)² + β·Σ w·m·KL(logp, ref) - η·mean(H),    ρ = exp(logp - old)

    where P is -s·A·ρ, or as policy_loss says (`r2vpo_loss`), and m is ρ, with its gradient, or 1
    without use_bias_correction_kl.

    In torch, for loss_type "bnpo" without the last two terms and without accumulation:

        ratio = (logps - old_logps).exp()
        loss = ((-advantages[:, None] * ratio + variance_coef * (ratio - 1) ** 2) * mask).sum()
        loss = loss / mask.sum()

    A is TRL's advantage, s its importance-sampling correction for vLLM (on the advantage alone, not
    on the penalty), old the log-probs that TRL records. Where each batch of completions serves one
    optimizer step, TRL records none: then ρ = 1, with its gradient, and the penalty is 0.

    Center "group": TRL shuffles completions over micro-batches, so a group may be spread over
    several micro-batches and ranks. c is the group's w-weighted mean over the valid tokens of the
    current micro-batch on all ranks, without the group's members in other micro-batches of the same
    optimizer step. A completion that is alone of its group in a micro-batch is centred on itself.
    The mean is the whole group's if a micro-batch is a whole generation batch
    (steps_per_generation 1).

    λ, by variance_coef_mode:
    - "fixed": variance_coef.
    - "dual": a `VarianceConstraint` steps once per optimizer step, on the statistics of all its
      micro-batches on all ranks; λ is saved in checkpoints and restored from them.
    - "fenchel": `fenchel_coef` of s·A over the whole generation batch on all ranks, with the token
      weights of loss_type; the same λ for all micro-batches of that generation batch.

    Logged beside TRL's own metrics: r2vpo/variance_coef, r2vpo/ratio/mean, /var, /min, /max, /ess,
    /clamped, r2vpo/kl/old, r2vpo/loss/policy, r2vpo/loss/penalty (`R2VPOOutput.metrics`), TRL's kl
    and entropy, and with policy_loss "clip" or "cispo" clip_ratio/low_mean, /high_mean and
    /region_mean, shares of tokens (what delta clips is in high_mean); TRL's policy_loss and
    entropy_coef are not. Each value is of one micro-batch over all ranks; TRL logs the mean over
    micro-batches, of minima and maxima too.

    Args: those of GRPOTrainer, with `args` an R2VPOConfig.

    Raises: ValueError or TypeError naming the option or the key of a batch, what came and what was
        expected; ImportError for another version of TRL.
    """

    _tag_names = ["trl", "r2vpo"]  # noqa: RUF012, as TRL declares it
    _name = "R2VPO"
    # Empty, or the model card would cite GRPO's paper.
    _paper: dict[str, str] = {}  # noqa: RUF012

    args: R2VPOConfig
    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: R2VPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase
        | list[PreTrainedTokenizerBase]
        | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
    ) -> None:
        args = R2VPOConfig() if args is None else args
        if not isinstance(args, R2VPOConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected an R2VPOConfig")
        if args.anchor == "rollout" and not args.use_vllm and rollout_func is None:
            expected = "'old': without use_vllm or a rollout_func there are no others"
            raise invalid("anchor", "'rollout'", expected)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self._constraint = args.constraint(self.accelerator.device)
        penalised = self._constraint is not None or args.variance_coef != 0
        self._optimizer_steps = OptimizerSteps(
            self._constraint, advice=ADVICE if penalised else None
        )
        # Group ids count from 0 in each generation batch.
        self._generation = 0
        if args.use_linear_loss:
            add_linear_heads(self)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        sequences = len(inputs) * self.accelerator.num_processes
        if sequences % size:
            name = "num_generations" if training else "num_generations_eval"
            raise invalid(name, size, f"a divisor of the {sequences} sequences generated at once")
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # In TRL a group is `size` consecutive completions, counted over the ranks in order.
        first = self.accelerator.process_index * len(inputs)
        places = torch.arange(first, first + len(inputs), device=output["completion_ids"].device)
        output["group_ids"] = places // size
        if self.args.variance_coef_mode == "fenchel":
            output["variance_coef"] = self._fenchel_coef(output, sequences // size)
        self._generation += 1
        return output

    def _fenchel_coef(self, generated: dict[str, Any], num_groups: int) -> Tensor:
        return closed_form(self, generated, num_groups)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        # TRL expects the loss divided by the micro-batches of a step; an evaluation has one.
        steps = self.current_gradient_accumulation_steps if training else 1
        variance_coef = self._variance_coef(inputs)
        arguments = loss_arguments(self, inputs, variance_coef, steps)
        mask = arguments["mask"]
        entropy = aux_loss = None
        by_group, with_bonus = self.args.center == "group", self.entropy_coef != 0.0
        # Group means, and TRL's denominator of the bonus, need the log-probs first.
        if self.args.use_linear_loss and not (by_group or with_bonus):
            with self.accelerator.autocast():
                loss, out = linear_loss(model, inputs, arguments)
        else:
            logps, entropy, aux_loss = self._logps(model, inputs)
            if by_group:
                arguments["center"] = self._group_means(logps, arguments)
            out = r2vpo_loss_from_logps(logps, entropy=entropy.detach(), **arguments)
            loss = out.loss
        if with_bonus:
            assert entropy is not None
            mean = (entropy * mask).sum() / mask.sum().clamp(min=1)
            loss = loss - self.entropy_coef * mean / steps
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            self._log_value("aux_loss", self.accelerator.gather(aux_loss.detach()).mean().item())
        self._log_metrics(out, mask, variance_coef, steps)
        if training:
            self._optimizer_steps.follow(out.stats, batch=self._generation)
        return loss

    def _variance_coef(self, inputs: dict[str, Any]) -> float | Tensor:
        if self.args.variance_coef_mode == "fenchel":
            return require(inputs, "variance_coef", "for variance_coef_mode 'fenchel'")
        if self._constraint is not None:
            return self._constraint.coef
        assert self.args.variance_coef is not None
        return self.args.variance_coef

    def _logps(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log-probs, entropies, auxiliary loss), from TRL's own method."""
        tokens, attention = prompts_and_completions(inputs)
        method: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
        method = self._get_per_token_logps_and_entropies
        images = {k: v for k, v in inputs.items() if k in inspect.signature(method).parameters}
        return method(
            model,
            tokens,
            attention,
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **images,
        )

    def _group_means(self, logps: Tensor, arguments: LossArguments) -> Tensor:
        with torch.no_grad():
            stats = r2vpo_loss_from_logps(logps.detach(), **arguments).stats
        return self._over_ranks(stats).mean

    def _over_ranks(self, stats: RatioStats) -> RatioStats:
        return stats.all_reduce() if self.accelerator.num_processes > 1 else stats

    def _log_value(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_metrics(
        self, out: R2VPOOutput, mask: Tensor, variance_coef: float | Tensor, steps: int
    ) -> None:
        self._log_value("r2vpo/variance_coef", float(variance_coef))
        by_step = self._optimizer_steps.metrics() if self.model.training else {}
        for name in by_step.keys() - {"variance_coef"}:
            self._log_value(f"r2vpo/{name}", by_step[name].item())
        metrics = gather_metrics(self.accelerator, out, mask)
        if "clip/low" in metrics:
            metrics["clip/region"] = metrics["clip/low"] + metrics["clip/high"]
        for name, value in metrics.items():
            if name in TRL_METRICS:
                self._log_value(TRL_METRICS[name], value)
            elif name.startswith("loss/"):
                # These were divided by `steps`, and TRL logs the mean over micro-batches.
                self._log_value(f"r2vpo/{name}", value * steps)
            else:
                self._log_value(f"r2vpo/{name}", value)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        if self._constraint is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_constraint(self._constraint, Path(self._get_output_dir(trial=trial), folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._constraint is not None and checkpoint is not None:
            load_constraint(self._constraint, Path(checkpoint))
