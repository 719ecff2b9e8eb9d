"""use_linear_loss: log-probs and loss from hidden states and LM head, in the model's forward."""

from __future__ import annotations

import functools
import types
from typing import Any, Protocol, TypedDict

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ... import R2VPOOutput, linear_r2vpo_loss, linear_token_logps, token_logps
from ...checks import invalid
from .arguments import LossArguments, prompts_and_completions


class HeadOptions(TypedDict):
    """What a model does to hidden states @ head, as keywords of the linear entries."""

    softcap: float | None
    logit_scale: float
    temperature: float


class Score(Protocol):
    """What a patched forward calls and returns if it is given `score=`."""

    def __call__(
        self, hidden: Tensor, head: nn.Module, labels: Tensor, options: HeadOptions
    ) -> dict[str, Any]: ...


def linear_loss(
    model: nn.Module, inputs: dict[str, Any], arguments: LossArguments
) -> tuple[Tensor, R2VPOOutput]:
    """The loss, computed within the forward of the wrapped model, so that its hooks run."""
    tokens, attention = prompts_and_completions(inputs)
    length = arguments["mask"].shape[1]

    # The arguments come by closure: FSDP2 would cast tensors that are passed to the forward.
    def score(
        hidden: Tensor, head: nn.Module, labels: Tensor, options: HeadOptions
    ) -> dict[str, Any]:
        out = linear_r2vpo_loss(
            hidden[:, -length:],
            head,
            labels[:, -length:],
            return_entropy=True,
            **options,
            **arguments,
        )
        return {"loss": out.loss, "out": out}

    result = model(
        input_ids=tokens,
        attention_mask=attention,
        labels=tokens,
        fused_lm_head=True,
        score=score,
    )
    return result["loss"], result["out"]


def add_linear_heads(trainer: GRPOTrainer) -> None:
    """Let the trainer's policy and reference model score by this package's linear route."""
    model = trainer.model
    _check_support(trainer)
    policy = model.get_base_model() if is_peft_model(model) else model
    _add_linear_head(policy, trainer.temperature)
    if trainer.ref_model is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        _add_linear_head(reference, trainer.temperature)


def _check_support(trainer: GRPOTrainer) -> None:
    head = trainer.model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise invalid("use_linear_loss", True, f"False where the head is a {type(head)}")
    if trainer._is_vlm:
        raise invalid("use_linear_loss", True, "False for a model that takes images")
    if trainer.aux_loss_enabled:
        expected = "False, or router_aux_loss_coef=0.0: it leaves out the auxiliary loss"
        raise invalid("use_linear_loss", True, expected)
    if trainer._dist.fsdp_version == 1:
        raise invalid("use_linear_loss", True, "False under FSDP1, or FSDP2")


def _add_linear_head(model: PreTrainedModel, temperature: float) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` compute `linear_token_logps`.

    TRL asks for log-probs by that call. With `score=` the forward returns
    `score(hidden, head, labels, options)` instead: hidden states (B, T - 1, H), the head, the
    labels that they score, and the head's options.
    """
    config = model.config.get_text_config()
    options: HeadOptions = {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": _logit_scale(config),
        "temperature": temperature,
    }
    original_forward = model.forward

    # `generate` checks its arguments by the signature of forward: it must stay the model's own.
    @functools.wraps(original_forward)
    def forward(
        self: PreTrainedModel,
        *arguments: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        score: Score | None = None,
        **keywords: Any,
    ) -> Any:
        if not fused_lm_head:
            if labels is not None:
                keywords["labels"] = labels
            return original_forward(*arguments, **keywords)
        assert labels is not None
        states = self.base_model(*arguments, use_cache=False, **keywords)
        hidden, head = states.last_hidden_state[:, :-1], self.get_output_embeddings()
        labels = labels[:, 1:]
        if score is not None:
            return score(hidden, head, labels, options)
        logps, entropy = linear_token_logps(hidden, head, labels, **options, return_entropy=True)
        return FusedCausalLMOutput(log_probs=logps, entropy=entropy)

    model.forward = types.MethodType(forward, model)
    _compare_with_logits(model, temperature)


def _logit_scale(config: PretrainedConfig) -> float:
    """What a text model multiplies its logits by, under the names that configurations have."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scale = getattr(config, "logits_scaling", None)
    if scale is None:
        return 1.0
    return float(scale) if config.model_type == "hyperclovax" else 1.0 / float(scale)


@torch.no_grad()
def _compare_with_logits(model: PreTrainedModel, temperature: float) -> None:
    """Raise unless the model's logits are its head applied to hidden states, scaled and capped."""
    if any(x.is_meta for x in model.parameters()):
        return  # FSDP2 has not loaded these weights yet; the first rank has, and compares
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(8, device=model.device)[None] % vocabulary
    training = model.training
    model.eval()
    logits = model(input_ids=tokens).logits[:, :-1]
    expected = token_logps(logits, tokens[:, 1:], temperature=temperature)
    found = model(input_ids=tokens, labels=tokens, fused_lm_head=True)["log_probs"]
    model.train(training)
    # Each side rounds logits a few times, and a log-prob is a difference of two of them.
    bound = 8 * torch.finfo(logits.dtype).eps * (1 + logits.float().abs().max()) / temperature
    error = (found - expected).abs().max().item()
    if not error <= bound:
        raise invalid(
            "use_linear_loss",
            True,
            f"False for a {type(model).__name__}: its logits are not those of hidden states and "
            f"head alone (log-probs differ by {error:.2g})",
        )
