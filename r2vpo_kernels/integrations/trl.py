"""R²VPO in TRL 1.16: a GRPOTrainer whose loss is this package's.

    from r2vpo_kernels.integrations.trl import R2VPOConfig, R2VPOTrainer

    args = R2VPOConfig(variance_coef_mode="dual", variance_target=0.02)
    R2VPOTrainer(model, reward_funcs, args, train_dataset=dataset).train()

Sampling, rewards, advantages, old and reference log-probs and the training loop stay TRL's. Of its
private methods four are overridden: `_generate_and_score_completions` (to add group ids, and λ by
its closed form), `_compute_loss`, and the two that save and restore λ with a checkpoint.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import (
    R2VPOOutput,
    RatioStats,
    VarianceConstraint,
    fenchel_coef,
    linear_r2vpo_loss,
    linear_token_logps,
    r2vpo_loss_from_logps,
    token_logps,
)
from ..batch import check_choice, check_number, check_positive, invalid
from ..objective import CENTERS, RATIO_LEVELS
from . import check_version

check_version("trl", "1.16", "1.17")

from accelerate.utils import is_peft_model  # noqa: E402
from transformers import PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
CONSTRAINT_FILE = "variance_constraint.pt"

# Which options each mode of setting λ reads.
_MODES: dict[str, tuple[str, ...]] = {
    "fixed": ("variance_coef",),
    "dual": (
        "variance_coef",
        "variance_target",
        "variance_coef_lr",
        "variance_coef_min",
        "variance_coef_max",
    ),
    "fenchel": ("variance_target",),
}

# Options of GRPO that this loss has no place for, and why.
_WITHOUT_MEANING = {
    "epsilon": "nothing is clipped, the penalty takes the place of the clip",
    "epsilon_high": "nothing is clipped, the penalty takes the place of the clip",
    "delta": "nothing is clipped, log_ratio_clamp bounds the ratio",
    "off_policy_mask_threshold": "no sequence is left out for its divergence",
    "top_entropy_quantile": "no token is left out for its entropy",
    "use_bias_correction_kl": "the KL term is not multiplied by the ratio",
    "use_liger_kernel": "the loss is not Liger's",
}
_WITHOUT_MEANING |= dict.fromkeys(
    (
        "use_adaptive_entropy",
        "entropy_target",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
    ),
    "entropy_coef stays what it is",
)
_WITHOUT_MEANING |= {
    f.name: "loss_type is neither 'sapo' nor 'vespo'"
    for f in fields(GRPOConfig)
    if f.name.startswith(("sapo_", "vespo_"))
}


@dataclass
class R2VPOConfig(GRPOConfig):
    """GRPOConfig with the options of the R²VPO loss.

    loss_type chooses how tokens are averaged, among "grpo", "bnpo", "dr_grpo", "dapo" and "luspo",
    each with TRL's own denominator. beta is the coefficient of the KL term (k3), entropy_coef that
    of the bonus (the mean over a micro-batch's tokens, whatever the loss type),
    importance_sampling_level the level of the ratio, and the options of vLLM's
    importance-sampling correction set the weights on the advantages. Options of GRPO that would
    have no effect raise a ValueError.
    """

    variance_coef: float = field(
        default=0.5,
        metadata={
            "help": "λ, the coefficient of the penalty λ(ρ - c)² on the importance ratio ρ; where "
            "it starts with `variance_coef_mode='dual'`. The gradient of a token vanishes at "
            "ρ = 1 + A/(2λ)."
        },
    )
    variance_coef_mode: str = field(
        default="fixed",
        metadata={
            "help": "How λ is set. 'fixed': `variance_coef`. 'dual': moved once per optimizer step "
            "so that the ratio variance approaches `variance_target`; saved in checkpoints. "
            "'fenchel': computed in closed form from the advantages of each generation batch, for "
            "`variance_target`."
        },
    )
    variance_target: float | None = field(
        default=None,
        metadata={
            "help": "The ratio variance to hold, above 0: E[(ρ - 1)²] for `center='one'`, the "
            "variance of ρ within groups for `center='group'`. Needed by the modes 'dual' and "
            "'fenchel'."
        },
    )
    variance_coef_lr: float = field(
        default=0.1,
        metadata={
            "help": "Step size of the dual: log λ moves by it times (variance / target - 1), of "
            "which at most 1 counts."
        },
    )
    variance_coef_min: float = field(
        default=1e-3, metadata={"help": "Lower bound of λ in the mode 'dual'."}
    )
    variance_coef_max: float = field(
        default=100.0, metadata={"help": "Upper bound of λ in the mode 'dual'."}
    )
    center: str = field(
        default="one",
        metadata={
            "help": "c in the penalty λ(ρ - c)². 'one': 1, the ratio's mean under the policy that "
            "sampled. 'group': the mean of ρ over those completions of the same prompt that are in "
            "the current micro-batch, on all ranks."
        },
    )
    log_ratio_clamp: float = field(
        default=20.0,
        metadata={"help": "Bound on |log ρ| and on the exponent of the KL term, in nats."},
    )
    use_linear_loss: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute log-probabilities and loss from hidden states and LM head "
            "by this package's kernels, in place of TRL's. Text models with a plain linear head; "
            "no DeepSpeed ZeRO-3, no FSDP1."
        },
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Not supported: the KL term is not multiplied by the importance ratio."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, RATIO_LEVELS)
        check_choice("center", self.center, CENTERS)
        check_choice("variance_coef_mode", self.variance_coef_mode, tuple(_MODES))
        for name, reason in _WITHOUT_MEANING.items():
            self._expect_default(name, reason)
        mode = self.variance_coef_mode
        for name in _MODES["dual"]:
            if name not in _MODES[mode]:
                self._expect_default(name, f"variance_coef_mode {mode!r} does not read it")
        check_number("variance_coef", self.variance_coef, 0.0)
        if "variance_target" in _MODES[mode]:
            if self.variance_target is None:
                raise invalid(
                    "variance_target", None, f"a number above 0 for variance_coef_mode {mode!r}"
                )
            check_positive("variance_target", self.variance_target)
        if self.use_linear_loss:
            self._expect_default("cast_lm_head_to_fp32", "use_linear_loss has no cast of its own")
            if self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3:
                raise invalid("use_linear_loss", True, "False under DeepSpeed ZeRO-3")

    def _expect_default(self, name: str, reason: str) -> None:
        value, default = getattr(self, name), self.__dataclass_fields__[name].default
        if value != default:
            raise invalid(name, repr(value), f"{default!r}: {reason}")


class R2VPOTrainer(GRPOTrainer):
    """A GRPOTrainer that optimises the R²VPO loss (Eq. 5), with the w of the loss type:

        L = Σ w·(-s·A·ρ) + Σ w·λ·(ρ - c)² + β·Σ w·KL(logp, ref) - η·mean(H),    ρ = exp(logp - old)

    In torch, for loss_type "bnpo" without the last two terms and without accumulation:

        ratio = (logps - old_logps).exp()
        loss = ((-advantages[:, None] * ratio + variance_coef * (ratio - 1) ** 2) * mask).sum()
        loss = loss / mask.sum()

    A is TRL's advantage, s its importance-sampling correction for vLLM (on the advantage alone, not
    on the penalty), old the log-probs that TRL records. Where each batch of completions serves one
    optimizer step TRL records none: then ρ = 1, with its gradient, and the penalty is 0.

    Center "group": TRL shuffles completions over micro-batches, so the members of a group may be
    spread over several of them and over ranks. c is the mean, with the weights w, over the group's
    valid tokens in the current micro-batch on all ranks; members in other micro-batches of the same
    optimizer step are not in it. A group that has one completion in a micro-batch is centred on
    that completion alone. The whole group is in the mean if a micro-batch holds the whole
    generation batch (steps_per_generation 1).

    λ, by variance_coef_mode:
    - "fixed": variance_coef.
    - "dual": a `VarianceConstraint` steps once per optimizer step, on the statistics of all
      micro-batches of that step on all ranks; λ is saved in a checkpoint and restored from it.
    - "fenchel": `fenchel_coef` of s·A over the whole generation batch on all ranks, with the loss
      type's token weights; the same λ for all micro-batches that it is split into.

    In the log, beside TRL's own metrics: r2vpo/variance_coef, r2vpo/ratio/mean, /var, /min, /max,
    /ess, /clamped, r2vpo/kl/old, r2vpo/loss/policy, r2vpo/loss/penalty (`R2VPOOutput.metrics`), and
    TRL's kl and entropy; not its clip_ratio/*, policy_loss and entropy_coef. Each is of one
    micro-batch over all ranks; as TRL does, what is logged is the mean over micro-batches, also of
    minima and maxima.

    Args: those of GRPOTrainer, with `args` an R2VPOConfig.

    Raises: ValueError or TypeError naming the option or the key of a batch, what came and what was
        expected; ImportError for another version of TRL.
    """

    _tag_names = ["trl", "r2vpo"]  # noqa: RUF012, as TRL declares it
    _name = "R2VPO"
    # GRPO's own would be cited in the model card.
    _paper: dict[str, str] = {}  # noqa: RUF012

    # Declared optional, and never None once the configuration is complete.
    args: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: R2VPOConfig | None = None,
        *others: Any,
        **keywords: Any,
    ) -> None:
        args = R2VPOConfig() if args is None else args
        if not isinstance(args, R2VPOConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected an R2VPOConfig")
        super().__init__(model, reward_funcs, args, *others, **keywords)
        self._constraint: VarianceConstraint | None = None
        if args.variance_coef_mode == "dual":
            assert args.variance_target is not None
            self._constraint = VarianceConstraint(
                args.variance_target,
                center=args.center,
                coef=args.variance_coef,
                lr=args.variance_coef_lr,
                min_coef=args.variance_coef_min,
                max_coef=args.variance_coef_max,
                device=self.accelerator.device,
            )
        # The statistics of the current optimizer step, by the generation batch they are of: group
        # ids count from 0 in each.
        self._window: dict[int, RatioStats] = {}
        self._generation = 0
        if args.use_linear_loss:
            self._check_linear()
            policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
            _add_linear_head(policy, self.temperature)
            if self.ref_model is not None:
                _add_linear_head(self.accelerator.unwrap_model(self.ref_model), self.temperature)

    def _check_linear(self) -> None:
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise invalid("use_linear_loss", True, f"False where the head is a {type(head)}")
        if self._is_vlm:
            raise invalid("use_linear_loss", True, "False for a model that takes images")
        if self.aux_loss_enabled:
            expected = "False, or router_aux_loss_coef=0.0: it leaves out the auxiliary loss"
            raise invalid("use_linear_loss", True, expected)
        if self._dist.fsdp_version == 1:
            raise invalid("use_linear_loss", True, "False under FSDP1, or FSDP2")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        sequences = len(inputs) * self.accelerator.num_processes
        if sequences % size:
            name = "num_generations" if training else "num_generations_eval"
            raise invalid(name, size, f"a divisor of the {sequences} sequences generated at once")
        output = super()._generate_and_score_completions(inputs)
        # TRL's advantages take consecutive completions, over the ranks in order, as a group.
        first = self.accelerator.process_index * len(inputs)
        places = torch.arange(first, first + len(inputs), device=output["completion_ids"].device)
        output["group_ids"] = places // size
        if self.args.variance_coef_mode == "fenchel":
            output["variance_coef"] = self._fenchel_coef(output, sequences // size)
        self._generation += 1
        return output

    def _fenchel_coef(self, output: dict[str, Any], num_groups: int) -> Tensor:
        """λ* (Eq. 18) over the generation batch of all ranks, with the loss's token weights."""
        weight = _valid(output).float()
        if self.loss_type == "grpo":
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
        s_a = output["advantages"]
        s_a = s_a.unsqueeze(1) if s_a.dim() == 1 else s_a
        if self._corrects_rollouts:
            s_a = s_a * output["importance_sampling_ratio"]
        if s_a.shape[1] == 1:
            weight = weight.sum(1, keepdim=True)
        ids = output["group_ids"].unsqueeze(1).expand_as(s_a)

        def of_all_ranks(x: Tensor) -> Tensor:
            padded = self.accelerator.pad_across_processes(x.contiguous(), dim=1)
            return self.accelerator.gather(padded)

        return fenchel_coef(
            of_all_ranks(s_a),
            self.args.variance_target,
            weight=of_all_ranks(weight),
            center=self.args.center,
            group_ids=of_all_ranks(ids),
            num_groups=num_groups,
        )

    @property
    def _corrects_rollouts(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        # TRL's loss is to be divided by the number of micro-batches here, and evaluation has one.
        steps = self.current_gradient_accumulation_steps if training else 1
        mask = _valid(inputs)
        terms = self._terms(inputs, mask, steps)
        entropy = aux_loss = None
        by_group, with_bonus = self.args.center == "group", self.entropy_coef != 0.0
        # The means, and TRL's denominator of the bonus, are known only once log-probs are.
        if self.args.use_linear_loss and not (by_group or with_bonus):
            loss, out = self._linear_loss(model, inputs, terms)
        else:
            logps, entropy, aux_loss = self._logps(model, inputs)
            if by_group:
                terms["center"] = self._group_means(logps, terms)
            out = r2vpo_loss_from_logps(logps, entropy=entropy.detach(), **terms)
            loss = out.loss
        if with_bonus:
            assert entropy is not None
            mean = (entropy * mask).sum() / mask.sum().clamp(min=1)
            loss = loss - self.entropy_coef * mean / steps
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            self._log_value("aux_loss", self.accelerator.gather(aux_loss.detach()).mean().item())
        self._log_metrics(out, mask, terms["variance_coef"], steps)
        if training and self._constraint is not None:
            self._follow(out.stats, self._constraint)
        return loss

    def _terms(self, inputs: dict[str, Any], mask: Tensor, steps: int) -> dict[str, Any]:
        """The arguments of the loss, but for the log-probs."""
        old_logps = inputs.get("old_per_token_logps")
        rollouts = self.args.steps_per_generation * self.num_iterations
        accumulation = self.args.gradient_accumulation_steps
        if old_logps is None and self.model.training and accumulation % rollouts:
            reason = (
                f"for completions that serve {rollouts} micro-batches where an optimizer step "
                f"takes {accumulation}"
            )
            _require(inputs, "old_per_token_logps", reason)
        reduction, normalizer = self._aggregation(inputs, mask, steps)
        terms = {
            "old_logps": old_logps,
            "advantages": inputs["advantages"],
            "variance_coef": self._variance_coef(inputs),
            "center": "one",
            "mask": mask,
            "reduction": reduction,
            "normalizer": normalizer,
            "ratio_level": self.importance_sampling_level,
            "kl_coef": self.beta,
            "log_ratio_clamp": self.args.log_ratio_clamp,
        }
        if self.beta != 0.0:
            terms["ref_logps"] = _require(inputs, "ref_per_token_logps", f"for beta {self.beta}")
        if self._corrects_rollouts:
            reason = "for vllm_importance_sampling_correction"
            weights = _require(inputs, "importance_sampling_ratio", reason)
            # One per sequence comes as a column.
            terms["importance_weights"] = weights.squeeze(1) if weights.shape[1] == 1 else weights
        if self.args.center == "group":
            terms["group_ids"] = _require(inputs, "group_ids", "for center 'group'")
            terms["num_groups"] = self._num_groups(mask.shape[0])
        return terms

    def _variance_coef(self, inputs: dict[str, Any]) -> float | Tensor:
        if self.args.variance_coef_mode == "fenchel":
            return _require(inputs, "variance_coef", "for variance_coef_mode 'fenchel'")
        return self.args.variance_coef if self._constraint is None else self._constraint.coef

    def _num_groups(self, sequences: int) -> int:
        """How many groups a generation batch has; one of evaluation is not split."""
        if self.model.training:
            return self.args.generation_batch_size // self.num_generations
        return sequences * self.accelerator.num_processes // self.num_generations_eval

    def _aggregation(
        self, inputs: dict[str, Any], mask: Tensor, steps: int
    ) -> tuple[str, float | Tensor]:
        """The reduction and the denominator that TRL gives each loss type."""
        sequences = mask.shape[0] * steps
        if self.loss_type == "grpo":
            return "seq-mean-token-mean", sequences
        if self.loss_type == "luspo":
            return "seq-mean-token-sum", sequences
        if self.loss_type == "dr_grpo":
            return "token-mean", sequences * self.max_completion_length
        if self.loss_type == "bnpo":
            return "token-mean", mask.sum().clamp(min=1) * steps
        # "dapo": the share of this rank and step in the tokens of the generation batch.
        tokens = _require(inputs, "num_items_in_batch", "for loss_type 'dapo'").clamp(min=1)
        tokens = tokens / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * steps / self.args.steps_per_generation
        return "token-mean", tokens

    def _logps(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log-probs, entropies, auxiliary loss), by TRL's way to the model."""
        tokens, attention = _sequences(inputs)
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

    def _linear_loss(
        self, model: nn.Module, inputs: dict[str, Any], terms: dict[str, Any]
    ) -> tuple[Tensor, R2VPOOutput]:
        """The loss within the forward of the wrapped model, where its hooks see it."""
        tokens, attention = _sequences(inputs)

        # A function, for FSDP2 casts the tensors among the arguments of a forward.
        def score(
            hidden: Tensor, head: nn.Module, labels: Tensor, **options: Any
        ) -> dict[str, Any]:
            length = terms["mask"].shape[1]
            out = linear_r2vpo_loss(
                hidden[:, -length:],
                head,
                labels[:, -length:],
                return_entropy=True,
                **options,
                **terms,
            )
            return {"loss": out.loss, "out": out}

        with self.accelerator.autocast():
            result = model(
                input_ids=tokens,
                attention_mask=attention,
                labels=tokens,
                fused_lm_head=True,
                score=score,
            )
        return result["loss"], result["out"]

    def _group_means(self, logps: Tensor, terms: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            stats = r2vpo_loss_from_logps(logps.detach(), **terms).stats
        return self._over_ranks(stats).mean

    def _over_ranks(self, stats: RatioStats) -> RatioStats:
        return stats.all_reduce() if self.accelerator.num_processes > 1 else stats

    def _follow(self, stats: RatioStats, constraint: VarianceConstraint) -> None:
        """Add a micro-batch to the statistics of its optimizer step, whose end moves λ."""
        key = self._generation
        self._window[key] = self._window[key] + stats if key in self._window else stats
        if not self.accelerator.sync_gradients:
            return
        parts = self._window.values()
        names = ("weight", "d_sum", "d_sq_sum")
        whole = RatioStats(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
        constraint.step(self._over_ranks(whole))
        self._window = {}

    def _log_value(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_metrics(
        self, out: R2VPOOutput, mask: Tensor, variance_coef: float | Tensor, steps: int
    ) -> None:
        local = out.metrics() | {"tokens": mask.sum()}
        values = self.accelerator.gather(torch.stack([x.float() for x in local.values()]))
        rows = values.view(-1, len(local)).tolist()
        pooled = pool_metrics([dict(zip(local, row, strict=True)) for row in rows])
        self._log_value("r2vpo/variance_coef", float(variance_coef))
        for name, value in pooled.items():
            if name in ("kl/ref", "entropy"):
                self._log_value("kl" if name == "kl/ref" else name, value)
            elif name.startswith("loss/"):
                # TRL logs the mean over micro-batches, of which these are shares.
                self._log_value(f"r2vpo/{name}", value * steps)
            else:
                self._log_value(f"r2vpo/{name}", value)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._constraint is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            path = Path(self._get_output_dir(trial=trial), folder, CONSTRAINT_FILE)
            torch.save(self._constraint.state_dict(), path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._constraint is None or checkpoint is None:
            return
        path = Path(checkpoint, CONSTRAINT_FILE)
        if path.exists():
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self._constraint.load_state_dict(state)
        else:
            coef = self.args.variance_coef
            warnings.warn(f"{path} does not exist: λ starts anew at {coef}", stacklevel=2)


def _valid(inputs: dict[str, Any]) -> Tensor:
    """(B, T): the tokens that the policy wrote, not padding and not a tool's answer."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _sequences(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts and completions as (tokens, attention mask)."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return tokens, attention


def _require(inputs: dict[str, Any], name: str, reason: str) -> Tensor:
    if inputs.get(name) is None:
        raise ValueError(f"inputs: got {', '.join(inputs)}, expected {name} among them {reason}")
    return inputs[name]


def pool_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of one batch from those of its parts (`R2VPOOutput.metrics`, and "tokens").

    Means are weighted by tokens; what is a share of the loss is averaged, as its gradient is.
    """
    filled = [rank for rank in ranks if rank["tokens"] > 0] or ranks
    tokens = [rank["tokens"] or 1.0 for rank in filled]

    def mean(values: list[float]) -> float:
        return sum(n * x for n, x in zip(tokens, values, strict=True)) / sum(tokens)

    pooled: dict[str, float] = {}
    for name in ranks[0]:
        values = [rank[name] for rank in filled]
        if name == "ratio/min":
            pooled[name] = min(values)
        elif name == "ratio/max":
            pooled[name] = max(values)
        elif name.startswith("loss/"):
            pooled[name] = sum(rank[name] for rank in ranks) / len(ranks)
        elif name != "tokens":
            pooled[name] = mean(values)
    # Variance within the parts and between them.
    center = pooled["ratio/mean"]
    pooled["ratio/var"] += mean([(rank["ratio/mean"] - center) ** 2 for rank in filled])
    both = center**2 + pooled["ratio/var"]
    pooled["ratio/ess"] = center**2 / both if both else 1.0
    return pooled


def _logit_scale(config: PretrainedConfig) -> float:
    """What a text model multiplies its logits by, under the names that configurations have."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1.0 / scaling


def _add_linear_head(model: PreTrainedModel, temperature: float) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` score by this package's linear route.

    That is how TRL asks for log-probs; it gets those of `linear_token_logps`. With `score=` the
    forward returns `score(hidden, head, labels, **options)` instead: hidden states (B, T - 1, H),
    the head, and the labels that they score.
    """
    config = model.config.get_text_config()
    options: dict[str, Any] = {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": _logit_scale(config),
        "temperature": temperature,
    }
    others = model.forward

    # The signature stays the model's own, by which `generate` checks its arguments.
    @functools.wraps(others)
    def forward(
        self: PreTrainedModel,
        *arguments: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        score: Callable[..., Any] | None = None,
        **keywords: Any,
    ) -> Any:
        if not fused_lm_head:
            return others(*arguments, **keywords, **({} if labels is None else {"labels": labels}))
        assert labels is not None
        states = self.base_model(*arguments, use_cache=False, **keywords)
        given = states.last_hidden_state[:, :-1], self.get_output_embeddings(), labels[:, 1:]
        if score is not None:
            return score(*given, **options)
        logps, entropy = linear_token_logps(*given, **options, return_entropy=True)
        return FusedCausalLMOutput(log_probs=logps, entropy=entropy)

    model.forward = types.MethodType(forward, model)
    _compare_with_logits(model, temperature)


@torch.no_grad()
def _compare_with_logits(model: PreTrainedModel, temperature: float) -> None:
    """Raise if the model makes more of its hidden states than head, scale and softcap do."""
    if any(x.is_meta for x in model.parameters()):
        return  # FSDP2 has yet to load them, and its first rank compares
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(8, device=model.device)[None] % vocabulary
    training = model.training
    model.eval()
    logits = model(input_ids=tokens).logits[:, :-1]
    expected = token_logps(logits, tokens[:, 1:], temperature=temperature)
    found = model(input_ids=tokens, labels=tokens, fused_lm_head=True)["log_probs"]
    model.train(training)
    # Logits of size z, rounded on two ways of a few steps each, and differences of two of them.
    bound = 8 * torch.finfo(logits.dtype).eps * (1 + logits.float().abs().max()) / temperature
    error = (found - expected).abs().max().item()
    if not error <= bound:
        raise invalid(
            "use_linear_loss",
            True,
            f"False for a {type(model).__name__}: its logits are not those of hidden states and "
            f"head alone (log-probs differ by {error:.2g})",
        )
