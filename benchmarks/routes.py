"""The routes of a call, and a batch for them: what is counted, timed on the host, checked on a GPU.

Every call has a mask, groups and, after its backward, its metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from r2vpo_kernels import (
    R2VPOOutput,
    linear_r2vpo_loss,
    r2vpo_loss,
    r2vpo_loss_from_logps,
)

Source = Literal["logits", "log-probs", "hidden states"]


class StandIn(torch.autograd.Function):
    """A model: logits that require grad and are no leaf, without a copy; it drops their gradient.

    The gradient is appended to `gradients`, to be freed by whoever called.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: list[Tensor], gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        # Not a tensor argument: autograd would make a view of it.
        return buffer[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(gradient)
        return None, None, None


@dataclass
class Inputs:
    """Leaves (logits, log-probs, hidden states and head), and what comes with them."""

    logits: Tensor  # (B, T, V)
    logps: Tensor  # (B, T), float32
    hidden: Tensor  # (B, T, H)
    head: Tensor  # (V, H)
    labels: Tensor  # (B, T)
    old_logps: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    mask: Tensor  # (B, T), one token masked where there are several
    group_ids: Tensor  # (B,), of GROUPS groups
    anchor: Tensor
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.logits, self.logps, self.hidden, self.head

    @property
    def upstream(self) -> Tensor:
        """Of one loss per token."""
        return self.old_logps


GROUPS = 2


def draw(
    batch: int, length: int, vocabulary: int, dtype: torch.dtype, device: str, width: int = 64
) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 3)

    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.numel() > 1:
        mask[0, 0] = False
    old_logps = torch.full((batch, length), -4.0, device=device)
    return Inputs(
        normal(batch, length, vocabulary).requires_grad_(),
        (old_logps + 0.1 * torch.randn_like(old_logps)).requires_grad_(),
        # Logits of unit variance: log-ratios that no clamp holds, whatever the words.
        (normal(batch, length, width) / 3).requires_grad_(),
        (normal(vocabulary, width) / (3 * width**0.5)).requires_grad_(),
        torch.randint(0, vocabulary, (batch, length), device=device),
        old_logps,
        torch.randn(batch, device=device),
        mask,
        torch.arange(batch, device=device) % GROUPS,
        torch.zeros((), device=device, requires_grad=True),
    )


@dataclass(frozen=True)
class Route:
    """most_launches: of forward, backward and metrics; None: products are no launches of ours.
    waits: how often the host waits for a GPU.
    """

    source: Source
    keywords: dict[str, Any]
    most_launches: int | None = None
    waits: int = 0

    def forward(self, inputs: Inputs, backend: str, **keywords: Any) -> R2VPOOutput:
        keywords = {
            "mask": inputs.mask, "group_ids": inputs.group_ids, "num_groups": GROUPS,
            "backend": backend,
        } | self.keywords | keywords  # fmt: skip
        if "kl_coef" in keywords:
            keywords["ref_logps"] = inputs.old_logps
        rest = inputs.old_logps, inputs.advantages
        if self.source == "log-probs":
            return r2vpo_loss_from_logps(inputs.logps, *rest, **keywords)
        if self.source == "hidden states":
            return linear_r2vpo_loss(inputs.hidden, inputs.head, inputs.labels, *rest, **keywords)
        logits = inputs.logits
        if keywords.get("inplace"):
            logits = StandIn.apply(inputs.anchor, [logits.detach()], inputs.gradients)
        return r2vpo_loss(logits, inputs.labels, *rest, **keywords)

    def step(
        self, inputs: Inputs, backend: str, upstream: Tensor | None = None, **keywords: Any
    ) -> R2VPOOutput:
        """Forward, backward and metrics; the leaves hold the gradients."""
        inputs.gradients.clear()
        for leaf in inputs.leaves:
            leaf.grad = None
        out = self.forward(inputs, backend, **keywords)
        out.loss.backward(inputs.upstream if out.loss.dim() else upstream)
        out.metrics()
        return out


ROUTES = {
    "one pass": Route("logits", {}, 5),
    "in place": Route("logits", {"inplace": True}, 5),
    "entropy and KL": Route("logits", {"entropy_coef": 0.1, "kl_coef": 0.1}, 5),
    "group": Route("logits", {"center": "group"}, 7),
    "sequence": Route(
        "logits", {"ratio_level": "sequence", "reduction": "seq-mean-token-mean"}, 7
    ),
    "none": Route("logits", {"reduction": "none"}, 7),
    "from log-probs": Route("log-probs", {}, 4),
    # It waits to know which tokens are masked, and in a backward which have a gradient.
    "linear": Route("hidden states", {}, waits=1),
    "linear, group": Route("hidden states", {"center": "group"}, waits=2),
    "linear, compact=False": Route("hidden states", {"compact": False}),
    "linear, group, compact=False": Route("hidden states", {"center": "group", "compact": False}),
}  # fmt: skip
