"""prime-rl 0.8: a custom loss of the trainer, called once for each sample.

    [trainer.loss]
    type = "custom"
    import_path = "r2vpo_kernels.integrations.prime_rl.r2vpo_loss_fn"
    kwargs = { variance_coef = 0.5 }

kwargs are keywords of `r2vpo_loss_from_logps`; kl_coef and kl_unbiased need an algorithm that
provides ref_logprobs. The old log-probs are the inference engine's. prime-rl divides the sum over
samples by its global count of tokens. The trainer passes no group ids and does not mark optimizer
steps: center is "one" and λ a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import check_version
from .hook import LossOptions, metrics, token_losses

if TYPE_CHECKING:
    from typing_extensions import Unpack

check_version("prime-rl", "0.8", "0.9")

from prime_rl.trainer.rl.loss import LossInputs, LossOutputs  # noqa: E402


def r2vpo_loss_fn(inputs: LossInputs, **kwargs: Unpack[LossOptions]) -> LossOutputs:
    """All tensors (tokens,), one sequence; loss_weights multiply the token losses."""
    old, ref = inputs.inference_logprobs, inputs.ref_logprobs
    out = token_losses(
        inputs.trainer_logprobs[None],
        None if old is None else old[None],
        inputs.advantages[None],
        inputs.loss_mask[None],
        "inference_logprobs",
        ref_logps=None if ref is None else ref[None],
        **kwargs,
    )
    loss = out.loss if inputs.loss_weights is None else out.loss * inputs.loss_weights
    return LossOutputs(loss=loss.sum(), metrics=metrics(out))
