"""What `gpu.py` runs in processes of their own, some of them under a tool.

    python benchmarks/gpu_work.py launches|syncs|recompilations|graphs|sanitize|traffic

Each check prints a line of JSON when it is done: a run that is cut short keeps what it has. The
exit status is 1 where one failed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import pkgutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# From the checkout, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from from_tests import count_launches  # noqa: E402
from routes import GROUPS, ROUTES, Inputs, Route, draw  # noqa: E402

from r2vpo_kernels import VarianceConstraint, r2vpo_loss, token_logps  # noqa: E402
from r2vpo_kernels.backends import registry  # noqa: E402

# Without a GPU there is no use for this file but to try its calls, on simulated backends.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Those of a GPU that are installed and can run on this one.
BACKENDS = [
    name
    for name in ("triton", "cuda")
    if registry.why_not(name, torch.empty(0, device=DEVICE)) is None
]
# Routes that need no wait of the host, which a graph cannot hold; in place there is no leaf.
GRAPHED = [name for name, route in ROUTES.items() if not route.waits and name != "in place"]
# Tokens and vocabulary whose DRAM bytes are counted, and the launches of a backend in their order:
# Triton's kernel, and the bytes per bfloat16 logit that Eq. 15 gives. CUDA's kernels are instances
# of one.
TRAFFIC_SHAPE = (8, 512, 151936)
TRAFFIC = [
    ("log-probs without grad", "logps_forward_kernel", 2.0),
    ("one pass", "one_pass_kernel", 4.0),
    ("one pass, backward", "scale_kernel", 0.0),
    ("in place", "one_pass_kernel", 4.0),
    ("in place, backward", "scale_kernel", 0.0),
    ("group, forward", "logps_forward_kernel", 2.0),
    ("group, backward", "logps_backward_kernel", 4.0),
]
CUDA_KERNEL = "row_kernel"

# What a check found: "ok", and whatever else is worth recording.
Findings = dict[str, Any]
Checks = Iterator[tuple[str, Callable[[], Findings]]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launches() -> Checks:
    """What a call launches, counted by its calls and by the device's own record."""
    inputs = draw(4, 256, 4096, torch.bfloat16, DEVICE)

    def check(route: Route, backend: str) -> Findings:
        step = functools.partial(route.step, inputs, backend)
        step()
        counts = count_launches(step)
        recorded = recorded_launches(step)
        most = route.most_launches
        found = max(counts.total(), len(recorded))
        return {
            "ok": most is None or found <= most, "value": found, "limit": most,
            "counted": counts.total(), "counts": counts, "recorded": recorded,
        }  # fmt: skip

    for backend, (name, route) in itertools.product(BACKENDS, ROUTES.items()):
        yield f"{backend} {name}", functools.partial(check, route, backend)


def recorded_launches(step: Callable[[], Any]) -> list[str]:
    """Kernels, copies and fills that the profiler saw on the device; none where it sees nothing."""
    device = torch.profiler.ProfilerActivity.CUDA
    if device not in torch.profiler.supported_activities():
        return []
    with torch.profiler.profile(activities=[device]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() or () if event.device_type == on_gpu]


def syncs() -> Checks:
    """Host synchronisations in loss, backward, metrics and a step of the dual."""

    def check(route: Route, backend: str, inputs: Inputs, expected: int) -> Findings:
        constraint = VarianceConstraint(0.02, device=DEVICE)

        def once() -> None:
            out = route.step(inputs, backend, variance_coef=constraint.coef)
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
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ok = count == expected and bool(error) == (expected > 0)
        return {"ok": ok, "value": count, "limit": expected, "error": error}

    for dtype in (torch.bfloat16, torch.float16):
        inputs = draw(4, 8, 50257, dtype, DEVICE)
        for backend, (name, route) in itertools.product(BACKENDS, ROUTES.items()):
            # float16 recomputes in every backward.
            waits = 2 if dtype == torch.float16 and route.waits else route.waits
            yield (
                f"{name_of(dtype)} {backend} {name}",
                functools.partial(check, route, backend, inputs, waits),
            )


def recompilations() -> Checks:
    """What each variant of Triton's kernels compiled at first, and what later calls added.

    A variant has its route, dtype, and a vocabulary that is aligned or not; one token masked or
    none, and sequences of one token or of several: the first three calls. Later ones differ in
    batch, length, number of groups, temperature, λ and the other coefficients.
    """
    if "triton" not in BACKENDS:
        return
    package = registry.load("triton")
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
    kernel_class = importlib.import_module(f"{package.__name__}.launch").Kernel
    # A set, for a module may import what another defines.
    kernels = {
        x for module in modules for x in vars(module).values() if isinstance(x, kernel_class)
    }

    def compiled() -> Counter[str]:
        return Counter({kernel.jit.__name__: len(kernel.variants) for kernel in kernels})

    def check(route: Route, dtype: torch.dtype, vocabulary: int) -> Findings:
        counts = [compiled()]
        shapes = [(2, 3), (2, 1), (1, 1), (1, 16), (4, 17), (5, 1)]
        first = 3  # calls
        for step, (batch, length) in enumerate(shapes):
            number = 1 + step / 4
            varied = {k: x * number for k, x in route.keywords.items() if k.endswith("_coef")}
            if route.source != "log-probs":
                varied["temperature"] = number
            inputs = draw(batch, length, vocabulary, dtype, DEVICE)
            route.step(inputs, "triton", variance_coef=number, num_groups=GROUPS + step, **varied)
            counts.append(compiled())
        # A Counter's difference leaves out what is 0.
        later, at_first = counts[-1] - counts[first], counts[first] - counts[0]
        return {
            "ok": not later, "value": later.total(), "limit": 0, "first": at_first.total(),
            "kernels": later,
        }  # fmt: skip

    # Of other dtypes only logits are, and so the kernels over them.
    few = {name: ROUTES[name] for name in ("one pass", "group")}
    routes = {torch.bfloat16: ROUTES, torch.float32: few, torch.float16: few}
    for dtype, vocabulary in itertools.product(routes, (151936, 50257)):
        for name, route in routes[dtype].items():
            yield (
                f"{name_of(dtype)} {vocabulary} {name}",
                functools.partial(check, route, dtype, vocabulary),
            )


def graphs() -> Checks:
    """A captured step, replayed on other inputs: the bits of the same call."""

    def check(route: Route, backend: str, dtype: torch.dtype) -> Findings:
        inputs = draw(4, 8, 50264, dtype, DEVICE)

        def once() -> list[Tensor]:
            out = route.forward(inputs, backend)
            upstream = inputs.upstream if out.loss.dim() else None
            # Not into leaves: that would be the work of the stream that first saw them.
            found = torch.autograd.grad(out.loss, inputs.leaves, upstream, allow_unused=True)
            gradients = [gradient for gradient in found if gradient is not None]
            return [out.loss.detach(), out.logps, *out.metrics().values(), *gradients]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = once()
        with torch.no_grad():
            for leaf in inputs.leaves:
                leaf.copy_(leaf.roll(1, 0))
        # Twice: what a replay leaves behind must not be in the way of the next.
        for _ in range(2):
            graph.replay()
        pairs = zip(captured, once(), strict=True)
        same = [torch.equal(a, b) for a, b in pairs]
        return {"ok": all(same), "value": sum(same), "limit": len(same)}

    for backend, dtype in itertools.product(BACKENDS, (torch.bfloat16, torch.float16)):
        for name in GRAPHED:
            yield (
                f"{name_of(dtype)} {backend} {name}",
                functools.partial(check, ROUTES[name], backend, dtype),
            )


def sanitize() -> Checks:
    """Each kernel: rows of one block and of several, aligned or not, strided; kinds of batches."""

    def finished(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Findings:
        call(*arguments, **keywords)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return {"ok": True}

    half = torch.full((), 0.5, device=DEVICE)
    dtypes = torch.bfloat16, torch.float32, torch.float16
    # The last is shared out between blocks of a cluster.
    for dtype, vocabulary in itertools.product(dtypes, SANITIZED):
        inputs = draw(2, 4, vocabulary, dtype, DEVICE)
        kinds = {"": inputs, " strided": without_last(inputs)}
        names = ["one pass", "in place", "entropy and KL", "group", "linear, group"]
        if dtype == torch.float16:
            names = names[-2:]
        for (kind, drawn), name, backend in itertools.product(kinds.items(), names, BACKENDS):
            yield (
                f"{name_of(dtype)} {vocabulary} {backend} {name}{kind}",
                functools.partial(finished, ROUTES[name].step, drawn, backend, half),
            )
    for (kind, call), backend in itertools.product(batches().items(), BACKENDS):
        yield f"{backend} {kind}", functools.partial(finished, call, backend=backend)


SANITIZED = (333, 20016, 90007)


def without_last(inputs: Inputs) -> Inputs:
    """The last position of each sequence left out, of tensors that keep their strides."""
    cut = {
        name: getattr(inputs, name).detach()[:, :-1]
        for name in ("logits", "logps", "hidden", "labels", "old_logps", "mask")
    }
    for name in ("logits", "logps", "hidden"):
        cut[name].requires_grad_()
    return dataclasses.replace(inputs, **cut)


def batches() -> dict[str, Callable[..., Any]]:
    """Calls by the kind of their batch: what the token kernels tell apart."""

    def call(tokens: int, backend: str, **keywords: Any) -> None:
        drawn = draw(1, tokens, 40, torch.float32, DEVICE)
        logits = drawn.logits.detach()[0].requires_grad_()
        advantages = torch.randn(tokens, device=DEVICE)
        for more in ({}, {"center": "group"}, {"center": "group", "reduction": "none"}):
            out = r2vpo_loss(
                logits, drawn.labels[0], drawn.old_logps[0], advantages, mask=drawn.mask[0],
                ref_logps=drawn.old_logps[0] - 0.1, kl_coef=0.1, backend=backend,
                **keywords, **more,
            )  # fmt: skip
            out.loss.backward(torch.ones_like(out.loss))

    def sharded(backend: str) -> None:
        """All of the vocabulary in one shard."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        inputs = draw(2, 4, 40, torch.float32, DEVICE)
        ROUTES["entropy and KL"].step(inputs, backend, tp_group=dist.group.WORLD)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, device=DEVICE)

    ids = torch.arange(70, device=DEVICE) % 37
    return {
        "tiles of tokens": functools.partial(call, 2100),
        "one token": functools.partial(call, 1),
        "groups by token": functools.partial(call, 70, group_ids=ids, num_groups=37),
        "packed sequences": functools.partial(
            call, 70, cu_seqlens=integers(0, 3, 3, 40, 70), ratio_level="sequence",
            group_ids=integers(0, 1, 0, 1), num_groups=2,
        ),
        "one sequence per token": functools.partial(call, 5, cu_seqlens=integers(*range(6))),
        "from log-probs": functools.partial(
            ROUTES["from log-probs"].step, draw(2, 4, 8, torch.float32, DEVICE)
        ),
        "a shard": sharded,
    }  # fmt: skip


def traffic() -> Checks:
    """The launches of TRAFFIC by each backend, in that order."""

    def check() -> Findings:
        inputs = draw(*TRAFFIC_SHAPE, torch.bfloat16, DEVICE)
        for backend in BACKENDS:
            with torch.no_grad():
                token_logps(inputs.logits, inputs.labels, backend=backend)
            for name in ("one pass", "in place", "group"):
                ROUTES[name].step(inputs, backend, mask=None)
        torch.cuda.synchronize()
        return {"ok": True, "backends": BACKENDS}

    yield "launched", check


WORK: dict[str, Callable[[], Checks]] = {
    "launches": launches, "syncs": syncs, "recompilations": recompilations, "graphs": graphs,
    "sanitize": sanitize, "traffic": traffic,
}  # fmt: skip


def main(name: str) -> int:
    failed = False
    for check, function in WORK[name]():
        try:
            found = function()
        except Exception as error:
            found = {"ok": False, "note": f"{type(error).__name__}: {error}"}
        failed = failed or not found["ok"]
        print(json.dumps({"check": check} | found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
