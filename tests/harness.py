"""One call of `r2vpo_loss` held to the float64 truth under the budget."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import Truth, assert_no_lean, assert_within, find_truth, output_rounding
from torch import Tensor

import r2vpo_kernels
from r2vpo_kernels.backends import triton_kernels
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective

BATCH_KEYWORDS = (
    "mask", "ignore_index", "cu_seqlens", "group_ids", "num_groups", "group_size", "reduction",
    "normalizer",
)  # fmt: skip
OBJECTIVE_DEFAULTS: dict[str, Any] = {
    "variance_coef": 2.5, "center": "one", "ratio_level": "token", "importance_weights": None,
    "ref_logps": None, "kl_coef": 0.0, "kl_estimator": "k3", "entropy_coef": 0.0,
    "log_ratio_clamp": 20.0, "temperature": 1.0,
}  # fmt: skip


# The largest share of its budget that each quantity has used, for the summary of the run.
USED: dict[tuple[str, str, str], float] = {}


def truth_of(
    logits: Tensor,
    labels: Tensor,
    keywords: dict[str, Any],
    backend: str,
    upstream: Tensor | None = None,
) -> Truth:
    """The float64 truth, and the bounds for a backend; `upstream` (N,) defaults to ones."""
    keywords = {"reduction": "token-mean"} | keywords
    geometry = {k: v for k, v in keywords.items() if k in BATCH_KEYWORDS}
    logits = logits.detach().double()
    if isinstance(keywords.get("center"), Tensor) and "group_ids" in geometry:
        geometry.setdefault("num_groups", keywords["center"].numel())
    batch = Batch.build(
        labels.shape, logits, labels=labels, vocabulary=logits.shape[-1], **geometry
    )
    given = {k: keywords.get(k, v) for k, v in OBJECTIVE_DEFAULTS.items()}
    objective = Objective.build(
        batch, old_logps=keywords["old_logps"], advantages=keywords["advantages"], **given
    )
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    if upstream is None:
        upstream = torch.ones_like(batch.weight)
    with_entropy = keywords.get("return_entropy", False) or given["entropy_coef"] != 0
    rounds_x = backend == "eager"
    return find_truth(logits, batch, objective, upstream.double(), with_entropy, rounds_x)


def check_gradient(
    gradient: Tensor,
    truth: Truth,
    backend: str,
    roundings: int = 1,
    dtype: torch.dtype | None = None,
) -> float:
    """Each element within its bound and the output's rounding, and all together without a lean."""
    dtype = dtype or gradient.dtype
    # The interpreter truncates to bfloat16 where hardware rounds to nearest.
    truncates = backend == "triton" and triton_kernels.INTERPRETED and dtype == torch.bfloat16
    ulps = roundings * (1.0 if truncates else 0.5)
    exact, bound = truth.gradient, truth.gradient_bound
    used = assert_within("gradient", gradient, exact, bound, dtype=dtype, ulps=ulps)
    rounding = output_rounding(exact, bound, dtype, ulps)
    assert_no_lean("gradient", gradient, exact, bound, rounding, truncates)
    return used


def check_case(
    logits: Tensor, labels: Tensor, keywords: dict[str, Any], backend: str, upstream: float = 1.0
) -> None:
    """Run forward and backward, and hold every output to the truth."""
    leaf = logits.detach().requires_grad_()
    seen = leaf
    if keywords.get("inplace"):
        seen = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        seen = seen.copy_(leaf)
    out = r2vpo_kernels.r2vpo_loss(seen, labels, backend=backend, **keywords)
    if keywords.get("reduction") == "none":
        # Different for each token, and not contiguous.
        tokens = torch.linspace(-1.0, 2.0, labels.numel(), device=leaf.device)
        each = torch.stack([tokens, tokens], -1)[:, 0].reshape(labels.shape) * upstream
    else:
        each = torch.full((), upstream, device=leaf.device)
    (gradient,) = torch.autograd.grad(out.loss, leaf, each)
    truth = truth_of(logits, labels, keywords, backend, each.expand(labels.shape).reshape(-1))

    used = {}
    used["logps"] = assert_within("logps", out.logps, truth.logps, truth.logps_bound)
    if out.entropy is not None:
        used["entropy"] = assert_within("entropy", out.entropy, truth.entropy, truth.entropy_bound)
    loss, bound = truth.loss, truth.loss_bound
    actual = out.loss * each
    if out.loss.dim() == 0:
        loss, bound = loss.sum(), bound.sum()
    used["loss"] = assert_within("loss", actual, loss, bound)
    # What the one-pass route has rounded, an upstream gradient other than 1 rounds again.
    roundings = 2 if upstream != 1.0 and out.loss.dim() == 0 else 1
    used["gradient"] = check_gradient(gradient, truth, backend, roundings)
    names = ("weight", "d_sum", "d_sq_sum")
    for name, value, bound in zip(names, truth.stats, truth.stats_bound, strict=True):
        used[f"stats.{name}"] = assert_within(name, getattr(out.stats, name), value, bound)
    for name, share in used.items():
        key = (backend, str(logits.dtype).removeprefix("torch."), name)
        USED[key] = max(USED.get(key, 0.0), share)
