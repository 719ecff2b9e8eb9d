"""One call of `r2vpo_loss` held to the float64 truth under the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import r2vpo_kernels
from r2vpo_kernels.backends import registry, triton
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective
from r2vpo_kernels.reference import Tokens

from .tolerance import (
    Linear,
    Truth,
    assert_no_lean,
    assert_within,
    find_truth,
    output_rounding,
)

BATCH_KEYWORDS = (
    "mask", "ignore_index", "cu_seqlens", "group_ids", "num_groups", "group_size", "reduction",
    "normalizer", "sampling_mask",
)  # fmt: skip
OBJECTIVE_DEFAULTS: dict[str, Any] = {
    "policy_loss": "ratio", "clip_range": None, "dual_clip": None, "variance_coef": None,
    "center": "one", "ratio_level": "token", "importance_weights": None,
    "ref_logps": None, "kl_coef": 0.0, "kl_estimator": "k3", "kl_unbiased": False,
    "entropy_coef": 0.0,
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
    logits_error: Tensor | None = None,
    sharded: bool = False,
) -> Truth:
    """The float64 truth, and the bounds for a backend; `upstream` (N,) defaults to ones."""
    keywords = {"reduction": "token-mean"} | keywords
    geometry = {k: v for k, v in keywords.items() if k in BATCH_KEYWORDS}
    logits = logits.detach().double()
    given = {k: keywords.get(k, v) for k, v in OBJECTIVE_DEFAULTS.items()}
    batch = Batch.build(
        labels.shape, logits.device, labels=labels, center=given["center"], **geometry
    )
    objective = Objective.build(
        batch, logits.device, old_logps=keywords["old_logps"], advantages=keywords["advantages"],
        **given,
    )  # fmt: skip
    tokens = Tokens.of(batch, objective, logits, logits.shape[-1])
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    if upstream is None:
        upstream = torch.ones_like(tokens.weight)
    with_entropy = keywords.get("return_entropy", False) or given["entropy_coef"] != 0
    rounds_x = backend == "eager"
    return find_truth(
        logits, tokens, upstream.double(), with_entropy, rounds_x, logits_error, sharded
    )


def truncates(backend: str, dtype: torch.dtype) -> bool:
    """The interpreter truncates to bfloat16 where hardware rounds to nearest."""
    return backend == "triton" and triton.SIMULATED and dtype == torch.bfloat16


def check_gradient(
    gradient: Tensor,
    truth: Truth,
    backend: str,
    roundings: int = 1,
    dtype: torch.dtype | None = None,
) -> float:
    """Each element within its bound and the output's rounding, and all together without a lean."""
    dtype = dtype or gradient.dtype
    truncated = truncates(backend, dtype)
    ulps = roundings * (1.0 if truncated else 0.5)
    exact, bound = truth.gradient, truth.gradient_bound
    used = assert_within("gradient", gradient, exact, bound, dtype=dtype, ulps=ulps)
    rounding = output_rounding(exact, bound, dtype, ulps)
    assert_no_lean("gradient", gradient, exact, bound, rounding, truncated)
    outside = gradient.reshape(truth.outside.shape)[truth.outside]
    assert not outside.any(), "gradient: not 0 outside of the support"
    return used


def upstream_of(labels: Tensor, keywords: dict[str, Any], factor: float) -> Tensor:
    """What to differentiate the loss with."""
    if keywords.get("reduction") != "none":
        return torch.full((), factor, device=labels.device)
    # Different for each token, and not contiguous.
    tokens = torch.linspace(-1.0, 2.0, labels.numel(), device=labels.device)
    return torch.stack([tokens, tokens], -1)[:, 0].reshape(labels.shape) * factor


def check_values(out: Any, truth: Truth, each: Tensor) -> dict[str, float]:
    """Everything but the gradient held to the truth: {name: the worst share of its budget}."""
    used = {"logps": assert_within("logps", out.logps, truth.logps, truth.logps_bound)}
    if out.entropy is not None:
        used["entropy"] = assert_within("entropy", out.entropy, truth.entropy, truth.entropy_bound)
    loss, bound = truth.loss, truth.loss_bound
    if out.loss.dim() == 0:
        loss, bound = loss.sum(), bound.sum()
    used["loss"] = assert_within("loss", out.loss * each, loss, bound)
    names = ("weight", "d_sum", "d_sq_sum")
    for name, value, bound in zip(names, truth.stats, truth.stats_bound, strict=True):
        used[f"stats.{name}"] = assert_within(name, getattr(out.stats, name), value, bound)
    return used


def record(backend: str, dtype: torch.dtype, used: dict[str, float]) -> None:
    for name, share in used.items():
        key = (backend, str(dtype).removeprefix("torch."), name)
        USED[key] = max(USED.get(key, 0.0), share)


@dataclass
class Shard:
    """What a rank of a tensor-parallel group has of the vocabulary."""

    group: dist.ProcessGroup
    words: slice


def check_case(
    logits: Tensor,
    labels: Tensor,
    keywords: dict[str, Any],
    backend: str,
    upstream: float = 1.0,
    shard: Shard | None = None,
) -> None:
    """Run forward and backward, and hold every output to the truth."""
    leaf = logits.detach()
    if shard is not None:
        leaf = leaf[..., shard.words]
        keywords = keywords | {"tp_group": shard.group}
    leaf = leaf.requires_grad_()
    seen = leaf
    if keywords.get("inplace"):
        seen = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        seen = seen.copy_(leaf)
    out = r2vpo_kernels.r2vpo_loss(seen, labels, backend=backend, **keywords)
    each = upstream_of(labels, keywords, upstream)
    (gradient,) = torch.autograd.grad(out.loss, leaf, each)
    tokens = each.expand(labels.shape).reshape(-1)
    truth = truth_of(logits, labels, keywords, backend, tokens, sharded=shard is not None)
    used = check_values(out, truth, each)
    if shard is not None:
        truth.gradient = truth.gradient[:, shard.words]
        truth.gradient_bound = truth.gradient_bound[:, shard.words]
        truth.outside = truth.outside[:, shard.words]
    # What the one-pass route has rounded, an upstream gradient other than 1 rounds again.
    roundings = 2 if upstream != 1.0 and out.loss.dim() == 0 else 1
    used["gradient"] = check_gradient(gradient, truth, backend, roundings)
    record(backend, logits.dtype, used)


@dataclass
class Adapted:
    """How to make a head with LoRA around it, of leaves weight, bias, lora_a and lora_b."""

    head: Callable[[dict[str, nn.Parameter]], nn.Module]
    scaling: float


def check_linear_case(
    inputs: dict[str, Tensor],
    labels: Tensor,
    head: dict[str, Any],
    keywords: dict[str, Any],
    backend: str,
    upstream: float = 1.0,
    dtype: torch.dtype | None = None,
    shard: Shard | None = None,
    adapted: Adapted | None = None,
) -> None:
    """As `check_case`, from hidden, weight and perhaps bias; `dtype`: of the products.

    adapted: makes a module of weight and bias and of inputs lora_a and lora_b.
    """
    autocast, dtype = dtype is not None, dtype or inputs["hidden"].dtype
    logits_dtype = head.get("logits_dtype") or dtype
    backend = registry.choose_backend(backend, inputs["hidden"])
    leaves = {name: x.detach() for name, x in inputs.items()}
    if shard is not None:
        words = {name: leaves[name][shard.words] for name in leaves if name != "hidden"}
        leaves, keywords = leaves | words, keywords | {"tp_group": shard.group}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    weight, bias = leaves["weight"], leaves.get("bias")
    if adapted is not None:
        leaves = {name: nn.Parameter(x) for name, x in leaves.items()}
        weight, bias = adapted.head(leaves), None
    out = r2vpo_kernels.linear_r2vpo_loss(
        leaves["hidden"], weight, labels, bias=bias, backend=backend, **head, **keywords
    )
    each = upstream_of(labels, keywords, upstream)
    gradients = torch.autograd.grad(out.loss, list(leaves.values()), each)

    valid = labels != keywords.get("ignore_index", -100)
    if keywords.get("mask") is not None:
        valid = valid & (keywords["mask"] != 0)
    exact = {name: x.detach().to(dtype).double() for name, x in inputs.items()}
    lora: dict[str, Any] = {}
    if adapted is not None:
        lora_dtype = torch.promote_types(inputs["lora_a"].dtype, dtype)
        lora_dtype = dtype if autocast else lora_dtype
        lora = {name: inputs[name].to(lora_dtype).double() for name in ("lora_a", "lora_b")}
        lora["lora_a"] = lora["lora_a"] * adapted.scaling
        lora["lora_dtype"] = lora_dtype
    width = exact["hidden"].shape[-1]
    hidden = torch.where(valid[..., None], exact["hidden"], 0.0).reshape(-1, width)
    linear = Linear(
        hidden, exact["weight"], exact.get("bias"), head.get("softcap"),
        head.get("logit_scale", 1.0), dtype, logits_dtype, **lora,
    )  # fmt: skip
    logits = linear.logits().reshape(*labels.shape, -1)
    truth = truth_of(
        logits, labels, keywords, backend, each.expand(labels.shape).reshape(-1),
        linear.logits_error(), shard is not None,
    )  # fmt: skip
    used = check_values(out, truth, each)
    truncated = truncates(backend, logits_dtype)
    found = linear.gradients(
        truth.gradient, truth.gradient_bound, truth.outside, truncated, shard is not None
    )
    # What is rounded to the dtype of the products, an upstream gradient other than 1 rounds again.
    ulps = 1.0 if upstream != 1.0 else 0.5
    for (name, x), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == x.dtype
        true, bound = found[name]
        if shard is not None and name != "hidden":
            true, bound = true[shard.words], bound[shard.words]
        if name == "lora_a":
            true, bound = true * adapted.scaling, bound * abs(adapted.scaling)
        # Casts of adapters are outside: their gradients pass through both dtypes.
        kinds = (x.dtype, lora["lora_dtype"]) if name.startswith("lora") else (dtype,)
        kind = max(kinds, key=lambda kind: torch.finfo(kind).eps)
        used[f"d{name}"] = assert_within(name, gradient, true, bound, dtype=kind, ulps=ulps)
        rounding = output_rounding(true, bound, kind, ulps)
        assert_no_lean(name, gradient, true, bound, rounding, truncated)
    shown = ["logps", *(f"d{name}" for name in leaves)]
    record(backend, dtype, {f"linear {name}": used[name] for name in shown})
