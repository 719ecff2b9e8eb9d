"""What `gpu.py` runs in processes of their own, some of them under a tool.

    python benchmarks/gpu_work.py recompilations|syncs|graphs|sanitize|traffic

The first three print a JSON object as their last line; the others are watched from outside.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from r2vpo_kernels import VarianceConstraint, linear_r2vpo_loss, ops, r2vpo_loss, token_logps

DEVICE = "cuda"
# The backends of a GPU that are installed.
BACKENDS = [name for name in ("triton", "cuda") if name in ops.KERNELS]
ROUTES: dict[str, dict[str, Any]] = {
    "one-pass": {},
    "in place": {"inplace": True},
    "entropy and KL": {"entropy_coef": 0.1, "kl_coef": 0.1},
    "group": {"center": "group", "group_size": 2},
    "sequence": {"ratio_level": "sequence", "reduction": "seq-mean-token-mean"},
    "none": {"reduction": "none"},
}
# The linear route by its keywords, and how often it waits for the device: once to find which tokens
# are masked, and once in a backward to find which have a gradient.
LINEAR_ROUTES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({}, 1),
    "linear, group": ({"center": "group"}, 2),
    "linear, compact=False": ({"compact": False}, 0),
    "linear, group, compact=False": ({"center": "group", "compact": False}, 0),
}
# Tokens and vocabulary whose DRAM bytes are counted, and the launches of a backend in their order:
# Triton's kernel, and the bytes per bfloat16 logit that Eq. 15 gives. CUDA's kernels are instances
# of one.
TRAFFIC_SHAPE = (8, 512, 151936)
TRAFFIC = [
    ("log-probs without grad", "logps_forward_kernel", 2.0),
    ("one-pass", "one_pass_kernel", 4.0),
    ("one-pass, backward", "scale_kernel", 0.0),
    ("in place", "one_pass_kernel", 4.0),
    ("in place, backward", "scale_kernel", 0.0),
    ("general, forward", "logps_forward_kernel", 2.0),
    ("general, backward", "logps_backward_kernel", 4.0),
]


CUDA_KERNEL = "row_kernel"


def draw(batch: int, length: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(logits, labels, old_logps, advantages), with a masked token where there are several."""
    logits = torch.empty(batch, length, vocabulary, dtype=dtype, device=DEVICE).normal_(0, 3)
    labels = torch.randint(0, vocabulary, (batch, length), device=DEVICE)
    if labels.numel() > 1:
        labels[0, 0] = -100
    old_logps = torch.full((batch, length), -12.0, device=DEVICE)
    return logits, labels, old_logps, torch.randn(batch, device=DEVICE)


def call(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    backend: str = "triton",
    **keywords: Any,
) -> Any:
    """Forward, and backward with an upstream gradient other than 1."""
    out = r2vpo_loss(
        logits, labels, old_logps, advantages, backend=backend,
        ref_logps=old_logps - 0.1 if "kl_coef" in keywords else None, **keywords,
    )  # fmt: skip
    (out.loss.sum() * 0.5).backward()
    return out


def linear_call(hidden: Tensor, *arguments: Any, head: Tensor, **keywords: Any) -> Any:
    """The same from hidden states."""
    out = linear_r2vpo_loss(hidden, head, *arguments, **keywords)
    (out.loss.sum() * 0.5).backward()
    return out


def recompilations() -> dict[str, Any]:
    """What each variant compiled at its first call, and what anything after that added."""
    from r2vpo_kernels.backends import triton_kernels

    kernels = [k for name, k in vars(triton_kernels).items() if name.endswith("_kernel")]

    def compiled() -> int:
        device = torch.cuda.current_device()
        # Of a device's entry in Triton's cache, the first part is what was compiled.
        return sum(len(k.device_caches[device][0]) for k in kernels if hasattr(k, "device_caches"))

    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for vocabulary in (151936, 50257):
            for route, keywords in ROUTES.items():
                counts = [compiled()]
                for step, (batch, length) in enumerate(((2, 3), (1, 1), (1, 16), (4, 17))):
                    logits, *rest = draw(batch, length, vocabulary, dtype)
                    number = 1 + step / 4
                    varied = {k: x * number for k, x in keywords.items() if k.endswith("_coef")}
                    grouped = {"group_size": 1} if "group_size" in keywords else {}
                    call(
                        logits.requires_grad_() * 1, *rest,
                        **(keywords | varied | grouped), temperature=number, variance_coef=number,
                    )  # fmt: skip
                    counts.append(compiled())
                name = f"{str(dtype).removeprefix('torch.')} {vocabulary} {route}"
                found[name] = {"first": counts[1] - counts[0], "later": counts[-1] - counts[1]}
    later = sum(x["later"] for x in found.values())
    note = f"{later} in {len(found)} variants after the first call of each"
    return {"ok": later == 0, "note": note, "variants": found}


def syncs() -> dict[str, Any]:
    """Host synchronisations in loss, backward, metrics and a step of the dual, by route."""
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16):
        constraint = VarianceConstraint(0.02, device=DEVICE)
        logits, *rest = draw(4, 8, 50257, dtype)
        hidden = torch.randn(4, 8, 64, dtype=dtype, device=DEVICE, requires_grad=True)
        head = torch.randn(50257, 64, dtype=dtype, device=DEVICE, requires_grad=True)
        steps: dict[str, tuple[Callable[..., Any], Tensor, dict[str, Any], int]] = {}
        for backend in BACKENDS:
            by = {"backend": backend}
            for route, keywords in ROUTES.items():
                leaf = logits.requires_grad_()
                steps[f"{backend} {route}"] = call, leaf, keywords | by, 0
            for route, (keywords, expected) in LINEAR_ROUTES.items():
                # float16 recomputes on every route.
                again = dtype == torch.float16 and expected == 1
                with_head = keywords | by | {"head": head}
                steps[f"{backend} {route}"] = linear_call, hidden, with_head, expected + again
        for route, (function, leaf, keywords, expected) in steps.items():

            def once(
                function: Callable[..., Any] = function,
                leaf: Tensor = leaf,
                rest: list[Tensor] = rest,
                constraint: VarianceConstraint = constraint,
                keywords: dict[str, Any] = keywords,
            ) -> None:
                out = function(leaf * 1, *rest, variance_coef=constraint.coef, **keywords)
                out.metrics()
                constraint.step(out.stats)

            once()
            torch.cuda.synchronize()
            # One mode counts; the other stops at the first, which no warning filter can hide.
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                once()
            count = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
            error = ""
            torch.cuda.set_sync_debug_mode("error")
            try:
                once()
            except RuntimeError as raised:
                error = str(raised).partition("\n")[0]
            torch.cuda.set_sync_debug_mode("default")
            ok = count == expected and bool(error) == (expected > 0)
            name = f"{str(dtype).removeprefix('torch.')} {route}"
            found[name] = {"count": count, "expected": expected, "error": error, "ok": ok}
    note = f"{sum(x['count'] for x in found.values())} on {len(found)} routes, "
    note += f"{sum(x['expected'] for x in found.values())} expected"
    return {"ok": all(x["ok"] for x in found.values()), "note": note, "routes": found}


def graphs() -> dict[str, Any]:
    """A captured forward and backward, replayed on other logits: the bits of the same call."""
    found = {}
    for backend in BACKENDS:
        for dtype in (torch.bfloat16, torch.float16):
            logits, *rest = draw(2, 8, 151936, dtype)
            other = torch.randn_like(logits)

            def once(
                logits: Tensor = logits, rest: list[Tensor] = rest, backend: str = backend
            ) -> tuple[Tensor, Tensor]:
                leaf = logits.detach().requires_grad_()
                out = r2vpo_loss(leaf, *rest, backend=backend)
                return out.logps, torch.autograd.grad(out.loss, leaf)[0]

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                once()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = once()
            logits.copy_(other)
            graph.replay()
            same = all(torch.equal(a, b) for a, b in zip(captured, once(), strict=True))
            found[f"{backend} {str(dtype).removeprefix('torch.')}"] = same
    note = f"{sum(found.values())} of {len(found)} replays gave the same bits"
    return {"ok": all(found.values()), "note": note, "replays": found}


def sanitize() -> None:
    """Each kernel on rows of one block and of several, aligned or not, strided, in place."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        # The last is shared out between blocks of a cluster.
        for vocabulary in (333, 20016, 90007):
            for route in ("one-pass", "in place", "entropy and KL", "group"):
                if dtype == torch.float16 and route != "group":
                    continue
                for strided, backend in itertools.product((False, True), BACKENDS):
                    logits, labels, old_logps, advantages = draw(2, 4, vocabulary, dtype)
                    logits = logits.requires_grad_() * 1
                    if strided:
                        logits, labels, old_logps = (x[:, :-1] for x in (logits, labels, old_logps))
                    call(logits, labels, old_logps, advantages, backend, **ROUTES[route])
    torch.cuda.synchronize()


def traffic() -> None:
    """The launches of TRAFFIC by each backend, in that order."""
    logits, labels, old_logps, advantages = draw(*TRAFFIC_SHAPE, torch.bfloat16)
    labels[0, 0] = 0
    leaf = logits.requires_grad_()
    for backend in BACKENDS:
        with torch.no_grad():
            token_logps(leaf, labels, backend=backend)
        for keywords in ROUTES["one-pass"], ROUTES["in place"], ROUTES["group"]:
            logits = leaf * 1
            out = r2vpo_loss(logits, labels, old_logps, advantages, backend=backend, **keywords)
            torch.autograd.grad(out.loss, logits)
    torch.cuda.synchronize()


WORK = {
    "recompilations": recompilations, "syncs": syncs, "graphs": graphs, "sanitize": sanitize,
    "traffic": traffic,
}  # fmt: skip

if __name__ == "__main__":
    result = WORK[sys.argv[1]]()
    if result is not None:
        print(json.dumps(result))
