"""prime-rl 0.8: a custom loss of the trainer, called once for each sample.

    [trainer.loss]
    type = "custom"
    import_path = "r2vpo_kernels.integrations.prime_rl.r2vpo_loss_fn"
    kwargs = { variance_coef = 0.5 }

kwargs are keywords of `r2vpo_loss_from_logps`; kl_coef needs an algorithm that ships ref_logprobs.
The old log-probs are the inference engine's. prime-rl divides the sum over samples by its global
count of tokens. No group ids and no sign of an optimizer step come: no centre "group", λ is a
number.
"""

from __future__ import annotations

from typing import Any

from . import check_version
from .hook import metrics, token_losses

check_version("prime-rl", "0.8", "0.9")

from prime_rl.trainer.rl.loss import LossInputs, LossOutputs  # noqa: E402


def r2vpo_loss_fn(inputs: LossInputs, **kwargs: Any) -> LossOutputs:
    """All tensors (tokens,), one sequence; loss_weights multiply the token losses."""
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "ref_logprobs")
    given = (getattr(inputs, name) for name in names)
    rows: list[Any] = [None if x is None else x[None] for x in given]
    logps, old, advantages, mask, ref = rows
    out = token_losses(logps, old, advantages, mask, names[1], ref_logps=ref, **kwargs)
    loss = out.loss if inputs.loss_weights is None else out.loss * inputs.loss_weights
    return LossOutputs(loss=loss.sum(), metrics=metrics(out))
