"""The specification: each equation of the loss once, in eager torch, for any float dtype.

This is what every kernel is held to (in float64), and what runs where no kernel does. Everything
per token is flat, (N,); `batch` and `objective` have been checked where they were built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batch import Batch
    from .objective import Objective


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """Eq. 27: the logits (N, V) of hidden states (N, H) by a head (V, H)."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(compute_dtype(logits.dtype)) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logps(
    logits: Tensor, labels: Tensor, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 and Eq. 3: (logps, entropy or None), each (N,), 0 where the label is negative.

    `logits` (B, T, V); `labels` (N,) with -1 where masked and V where out of range (logp NaN).
    """
    vocabulary = logits.shape[-1]
    valid = labels >= 0
    x = logits.reshape(-1, vocabulary).to(temperature.dtype)
    x = torch.where(valid[:, None], x, 0.0) / temperature[:, None]
    log_p = torch.log_softmax(x, dim=-1)
    logps = log_p.gather(-1, labels.clamp(0, vocabulary - 1)[:, None]).squeeze(-1)
    logps = torch.where(labels < vocabulary, logps, torch.nan)
    entropy = None
    if with_entropy:
        # Eq. 12: p·log p is 0 at p = 0, where log p is -inf.
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
        entropy = torch.where(valid, -(log_p.exp() * finite).sum(-1), 0.0)
    return torch.where(valid, logps, 0.0), entropy


class _Difference(torch.autograd.Function):
    """a - b with b constant; 0 where they are equal, two infinities too (Eq. 2)."""

    @staticmethod
    def forward(ctx, a, b):
        return torch.where(a == b, 0.0, a - b)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class TokenTerms(NamedTuple):
    """Eq. 5, one entry per token, before aggregation."""

    ratio_minus_one: Tensor
    log_ratio: Tensor
    clamped: Tensor
    policy: Tensor
    penalty: Tensor
    kl: Tensor | None
    loss: Tensor

    def detach(self) -> TokenTerms:
        return TokenTerms._make(None if x is None else x.detach() for x in self)


def token_terms(
    logps: Tensor, entropy: Tensor | None, batch: Batch, objective: Objective
) -> TokenTerms:
    """Eq. 5: what each token adds to the loss, from its log-prob; autograd gives Eq. 7."""
    clamp = objective.log_ratio_clamp
    old_logps = logps.detach() if objective.old_logps is None else objective.old_logps
    raw = _Difference.apply(logps, old_logps)
    if objective.ratio_level == "sequence":
        assert batch.sequences is not None
        mean = batch.sequences.mean(raw, batch.valid.to(raw.dtype))
        raw = torch.where(batch.valid, batch.sequences.spread(mean), 0.0)
    delta = raw.clamp(-clamp, clamp)
    ratio, d = delta.exp(), delta.expm1()

    center = objective.center
    if center is None:
        # Eq. 9: the empirical mean, as a distance from one, like every mean here.
        center = batch.groups.spread(batch.groups.mean(d, batch.token_weight))

    policy = -objective.advantages * ratio
    penalty = objective.variance_coef * (d - center) ** 2
    loss = policy + penalty
    kl = None
    if objective.ref_logps is not None:
        kl = _kl(logps, objective.ref_logps, objective.kl_estimator, clamp)
        loss = loss + objective.kl_coef * kl
    if entropy is not None:
        loss = loss - objective.entropy_coef * entropy
    return TokenTerms(d, delta, raw.abs() > clamp, policy, penalty, kl, batch.weight * loss)


def _kl(logps: Tensor, ref_logps: Tensor, estimator: str, clamp: Tensor) -> Tensor:
    """Eq. 6: an estimate of KL(new ‖ ref) per token."""
    gap = -_Difference.apply(logps, ref_logps).clamp(-clamp, clamp)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return 0.5 * gap**2
    return gap.expm1() - gap
