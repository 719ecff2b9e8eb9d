"""The options: GRPOConfig's, those of R²VPO, and which of GRPO's are refused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch
from trl import GRPOConfig

from ... import VarianceConstraint
from ...checks import (
    CENTERS,
    POLICY_LOSSES,
    RATIO_LEVELS,
    Center,
    PolicyLoss,
    check_choice,
    check_number,
    check_positive,
    invalid,
)
from ...objective import default_variance_coef
from ..hook import ANCHORS, Anchor, constraint_of

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
VarianceCoefMode = Literal["fixed", "dual", "fenchel"]
VARIANCE_COEF_MODES: tuple[str, ...] = get_args(VarianceCoefMode)

# The options that each mode reads.
_OPTIONS_OF_MODE: dict[str, tuple[str, ...]] = {
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

# The options of GRPO that each policy loss reads.
_OPTIONS_OF_POLICY_LOSS: dict[str, tuple[str, ...]] = {
    "ratio": (),
    "clip": ("epsilon", "epsilon_high", "delta"),
    "cispo": ("epsilon_high",),
}

# The options of GRPO that would have no effect, and why.
_REFUSED = {
    "off_policy_mask_threshold": "no sequence is left out for its divergence",
    "top_entropy_quantile": "no token is left out for its entropy",
    "use_liger_kernel": "the loss is not Liger's",
}
_REFUSED |= dict.fromkeys(
    (
        "use_adaptive_entropy",
        "entropy_target",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
    ),
    "entropy_coef stays what it is",
)
_REFUSED |= {
    f.name: "loss_type is neither 'sapo' nor 'vespo'"
    for f in fields(GRPOConfig)
    if f.name.startswith(("sapo_", "vespo_"))
}


@dataclass
class R2VPOConfig(GRPOConfig):
    """GRPOConfig with the options of the R²VPO loss.

    loss_type chooses how tokens are averaged, among "grpo", "bnpo", "dr_grpo", "dapo" and "luspo",
    each with TRL's own denominator. policy_loss chooses what the advantage multiplies: with "clip"
    the loss is GRPO's, by epsilon, epsilon_high and delta, and TRL's loss type "cispo" is
    policy_loss "cispo" with loss_type "dapo". beta is the coefficient of the KL term (k3),
    use_bias_correction_kl multiplies that by the ratio, entropy_coef is the coefficient of the
    bonus (the mean over a micro-batch's tokens, whatever the loss type), importance_sampling_level
    the level of the ratio, and the options of vLLM's importance-sampling correction set the weights
    on the advantages. Options of GRPO that would have no effect raise a ValueError.
    """

    policy_loss: PolicyLoss = field(
        default="ratio",
        metadata={
            "help": "What the advantage multiplies. 'ratio': the importance ratio ρ, not clipped. "
            "'clip': ρ clipped as by GRPO, by `epsilon`, `epsilon_high` and `delta`. 'cispo': the "
            "log-probability, weighted by the constant min(ρ, `epsilon_high`)."
        },
    )
    anchor: Anchor = field(
        default="old",
        metadata={
            "help": "Whose log-probabilities the importance ratio is taken to. 'old': the "
            "trainer's, before the first update on a batch of completions. 'rollout': those of "
            "vLLM, the policy that sampled; needs `vllm_importance_sampling_correction=False`."
        },
    )
    variance_coef: float | None = field(
        default=None,
        metadata={
            "help": "λ, the coefficient of the penalty λ(ρ - c)² on the importance ratio ρ; where "
            "it starts with `variance_coef_mode='dual'`. With `policy_loss='ratio'` the gradient "
            "of a token vanishes at ρ = 1 + A/(2λ). If `None`, 0.5 with `policy_loss='ratio'` or "
            "`variance_coef_mode='dual'`, else 0."
        },
    )
    variance_coef_mode: VarianceCoefMode = field(
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
    center: Center = field(
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, RATIO_LEVELS)
        check_choice("policy_loss", self.policy_loss, POLICY_LOSSES)
        check_choice("center", self.center, CENTERS)
        check_choice("variance_coef_mode", self.variance_coef_mode, VARIANCE_COEF_MODES)
        for name, reason in _REFUSED.items():
            self._expect_default(name, reason)
        check_choice("anchor", self.anchor, ANCHORS)
        if self.anchor == "rollout" and self.use_vllm and self.vllm_importance_sampling_correction:
            expected = "False with anchor 'rollout', whose ratio holds that correction already"
            raise invalid("vllm_importance_sampling_correction", True, expected)
        self._check_clip()
        mode = self.variance_coef_mode
        for name in _OPTIONS_OF_MODE["dual"]:
            if name not in _OPTIONS_OF_MODE[mode]:
                self._expect_default(name, f"variance_coef_mode {mode!r} does not read it")
        if self.variance_coef is None and "variance_coef" in _OPTIONS_OF_MODE[mode]:
            # The dual moves λ by factors and cannot start from 0: with it a clip has a penalty too.
            dual = mode == "dual"
            self.variance_coef = default_variance_coef("ratio" if dual else self.policy_loss)
        if self.variance_coef is not None:
            check_number("variance_coef", self.variance_coef, 0.0)
        if "variance_target" in _OPTIONS_OF_MODE[mode]:
            if self.variance_target is None:
                raise invalid(
                    "variance_target", None, f"a number above 0 for variance_coef_mode {mode!r}"
                )
            check_positive("variance_target", self.variance_target)
        self.constraint()
        if self.use_linear_loss:
            self._expect_default("cast_lm_head_to_fp32", "use_linear_loss has no cast of its own")
            if self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3:
                raise invalid("use_linear_loss", True, "False under DeepSpeed ZeRO-3")

    def constraint(self, device: torch.device | None = None) -> VarianceConstraint | None:
        """The dual of variance_coef_mode "dual", None in the other modes."""
        if self.variance_coef_mode != "dual":
            return None
        return constraint_of(self, center=self.center, device=device)

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """That of the loss: (ε_low, ε_high), or None with policy_loss "ratio"."""
        if self.policy_loss == "ratio":
            return None
        if self.policy_loss == "cispo":
            # TRL takes the highest weight itself, and has no lowest.
            assert self.epsilon_high is not None
            return 1.0, self.epsilon_high - 1.0
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _check_clip(self) -> None:
        for name in _OPTIONS_OF_POLICY_LOSS["clip"]:
            if name not in _OPTIONS_OF_POLICY_LOSS[self.policy_loss]:
                self._expect_default(name, f"policy_loss {self.policy_loss!r} does not read it")
        if self.policy_loss == "cispo" and not (self.epsilon_high or 0) >= 1:
            expected = "at least 1: with policy_loss 'cispo' it is the highest weight, as in TRL"
            raise invalid("epsilon_high", self.epsilon_high, expected)
        if self.policy_loss == "clip":
            assert self.clip_range is not None
            low, high = self.clip_range
            check_number("epsilon", low, 0.0, 1.0)
            check_number("epsilon_high", high, 0.0)
            if self.delta is not None and not self.delta >= 1 + high:
                expected = "at least 1 + epsilon_high: below, TRL clips gains at delta too"
                raise invalid("delta", self.delta, expected)

    def _expect_default(self, name: str, reason: str) -> None:
        value, default = getattr(self, name), self.__dataclass_fields__[name].default
        if value != default:
            raise invalid(name, repr(value), f"{default!r}: {reason}")
