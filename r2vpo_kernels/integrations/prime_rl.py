"""prime-rl: a custom loss of the trainer, called once for each sample.

    [trainer.loss]
    type = "custom"
    import_path = "r2vpo_kernels.integrations.prime_rl.r2vpo_loss_fn"
    kwargs = { variance_coef = 0.5 }

kwargs are the options of `Settings`; for the dual variance_target = 0.02 and variance_coef_file =
"/shared/run/lambda.json" (prime-rl's checkpoints have no place for λ). prime-rl looks at them when
it calls the loss: what is wrong with them is an error of the first training step.

The old log-probs are the inference engine's, so the penalty sees how old the data are. prime-rl
divides the sum over samples by its global count of RL tokens. Of what it does before the loss:

- filter_zero_advantages (orchestrator.train, on by default; in 0.8.0 the filter "zero_advantage")
  drops tokens without advantage. They carry no penalty then, and count in no statistic.
- In batches with distillation the ref_logprobs of RL samples are zeros: kl_coef, kl_estimator and
  kl_unbiased are refused.
- A batch with distillation or cross-entropy may leave a rank without RL tokens in a step. With a
  number as λ, statistics are therefore those of each rank. The dual's are summed over ranks: where
  one has no RL token the others wait for it without end, so give such runs a number.
- The CPU optimizers of model.full_offload (after 0.8.0) are not torch's, whose hook sees no step of
  theirs: the dual does not move.
- Where it samples by top-p or top-k (after 0.8.0, by a replay of sampling masks) the trainer's
  log-probs reach the loss renormalised over the sets, as the engine's are: nothing is to be added.

The trainer passes no group ids: center is "one".
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..checks import invalid
from . import Trainer
from .hook import Settings, metrics, optimizer_steps, settings, token_losses
from .steps import all_ranks

prime_rl = Trainer("prime-rl", tested="0.8.0")
with prime_rl.imports():
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs
prime_rl.has(
    LossInputs, "trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "loss_weights"
)
prime_rl.takes(LossOutputs, "loss", "metrics")

ADVICE = "Let rollouts be older than the weights: orchestrator.max_off_policy_steps above 0."
OPTIONS = tuple(field.name for field in fields(Settings))


def r2vpo_loss_fn(inputs: LossInputs, **kwargs: Any) -> LossOutputs:
    """All tensors (tokens,), one sequence; loss_weights multiply the token losses."""
    config = checked(kwargs)
    group = None if config.variance_target is None else all_ranks
    steps = optimizer_steps(config, advice=ADVICE, group=group)
    old = inputs.inference_logprobs
    out = token_losses(
        inputs.trainer_logprobs[None],
        None if old is None else old[None],
        inputs.advantages[None],
        inputs.loss_mask[None],
        "inference_logprobs",
        steps,
        **settings(config),
    )
    loss = out.loss if inputs.loss_weights is None else out.loss * inputs.loss_weights
    return LossOutputs(loss=loss.sum(), metrics=metrics(out, steps))


def checked(kwargs: dict[str, Any]) -> Settings:
    for name, value in kwargs.items():
        if name in ("kl_coef", "kl_estimator", "kl_unbiased"):
            expected = "it unset: prime-rl has no reference log-probs for RL samples"
            raise invalid(name, repr(value), expected)
        if name not in OPTIONS:
            expected = "one of " + ", ".join(OPTIONS)
            raise TypeError(f"{name}: got an unknown keyword, expected {expected}")
    return Settings(**kwargs)
