"""Who is measured: ours by backend and route, eager torch, torch.compile, and two peers on a GPU.

Each contender is a function from logits (B, T, V) and a `Task` to a scalar loss, or to log-probs
where it has no backward, with the objective that it is held to and the bytes that it must move.
The function reads the objective from the task: one serves R²VPO, PPO's clip and CISPO.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2vpo_kernels import r2vpo_loss, r2vpo_loss_from_logps, token_logps
from r2vpo_kernels.backends import registry
from r2vpo_kernels.checks import PolicyLoss

# Bytes per logit beside the logits: eager torch needs 14 at its peak.
SCRATCH = 20
# Ours needs the gradient.
OUR_SCRATCH = 5
# What is compared, and what tables call it: R²VPO has no name there.
POLICY_LOSSES: dict[PolicyLoss, str] = {"ratio": "", "clip": ", clip", "cispo": ", CISPO"}
CLIP = 0.2


@dataclass(frozen=True)
class Task:
    """What comes with the logits. L is T, or T - 1 where last positions have no label."""

    labels: Tensor  # (B, L)
    old_logps: Tensor  # (B, L)
    advantages: Tensor  # (B,)
    variance_coef: float
    policy_loss: PolicyLoss = dataclasses.field(default="ratio", kw_only=True)

    @property
    def objective(self) -> dict[str, Any]:
        """Keywords of `r2vpo_loss`."""
        return {
            "policy_loss": self.policy_loss,
            "clip_range": None if self.policy_loss == "ratio" else CLIP,
            "variance_coef": self.variance_coef,
        }


@dataclass(frozen=True)
class Sizes:
    """What decides how many bytes move: rows with and without a label, V, bytes per logit."""

    scored: int
    unscored: int
    vocabulary: int
    itemsize: int

    @property
    def read(self) -> int:
        """All logits that count, once."""
        return self.scored * self.vocabulary * self.itemsize

    @property
    def written(self) -> int:
        """The gradient, once: of a row without a label it is zeros."""
        return (self.scored + self.unscored) * self.vocabulary * self.itemsize


Function = Callable[[Tensor, Task], Tensor]
# (forward, backward)
Bytes = Callable[[Sizes], tuple[int, int]]


@dataclass(frozen=True)
class Contender:
    """One way to the loss and its gradient.

    name: what tables call it.
    make: returns the function; called once, after `why_not` said nothing.
    bytes_moved: traffic with main memory by formula.
    why_not: why it cannot take these logits, or None.
    ours: held to the error budget of the tests; others to a multiple of eager torch's error.
    variance_coef, policy_loss: of the objective that it computes.
    forward_only: returns log-probs, without a gradient.
    overwrites: the logits' memory holds the gradient afterwards.
    scratch: bytes per logit that must be free beside the logits.
    skips_last: gives the last position of a sequence no label.
    """

    name: str
    make: Callable[[], Function]
    bytes_moved: Bytes
    why_not: Callable[[Tensor], str | None] = lambda logits: None
    ours: bool = False
    variance_coef: float = 2.5
    policy_loss: PolicyLoss = "ratio"
    forward_only: bool = False
    overwrites: bool = False
    scratch: int = SCRATCH
    skips_last: bool = False

    def with_policy_loss(self, policy_loss: PolicyLoss) -> Contender:
        """The same function, given tasks with another loss and no penalty."""
        name = self.name + POLICY_LOSSES[policy_loss]
        return dataclasses.replace(self, name=name, policy_loss=policy_loss, variance_coef=0.0)


# Plain torch.


def plain_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]


def plain_terms(logps: Tensor, task: Task) -> Tensor:
    """(B, L): the loss of each token."""
    advantages = task.advantages[:, None]
    ratio = (logps - task.old_logps).exp()
    if task.policy_loss == "ratio":
        policy = -advantages * ratio
    elif task.policy_loss == "clip":
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    else:
        policy = -advantages * ratio.detach().clamp(1 - CLIP, 1 + CLIP) * logps
    # Eager PPO computes no penalty of 0 either.
    return policy + task.variance_coef * (ratio - 1) ** 2 if task.variance_coef else policy


def plain_objective(logps: Tensor, task: Task) -> Tensor:
    return plain_terms(logps, task).mean()


def plain_loss(logits: Tensor, task: Task) -> Tensor:
    return plain_objective(plain_logps(logits, task.labels), task)


def compiled_loss() -> Function:
    # dynamic=False: each shape of the grid gets code of its own, as a fixed shape in training does.
    compiled = torch.compile(_plain_loss_of_tensors, dynamic=False)

    def loss(logits: Tensor, task: Task) -> Tensor:
        return compiled(
            logits, task.labels, task.old_logps, task.advantages, task.variance_coef,
            task.policy_loss,
        )  # fmt: skip

    return loss


def _plain_loss_of_tensors(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    variance_coef: float,
    policy_loss: PolicyLoss,
) -> Tensor:
    task = Task(labels, old_logps, advantages, variance_coef, policy_loss=policy_loss)
    return plain_loss(logits, task)


def plain_logps_bytes(sizes: Sizes) -> tuple[int, int]:
    """Each op reads and writes a tensor once; what is per token is left out.

    To float32: e + 4 per logit, nothing where they are. Log-softmax: 4 + 4.
    """
    count = sizes.scored * sizes.vocabulary
    cast = sizes.itemsize + 4 if sizes.itemsize != 4 else 0
    return count * (cast + 8), 0


def plain_bytes(sizes: Sizes) -> tuple[int, int]:
    """Backward: gather fills a float32 tensor of zeros (4), log-softmax reads it and its own output
    and writes (12), and from float32 back (4 + e).
    """
    count = sizes.scored * sizes.vocabulary
    cast = 4 + sizes.itemsize if sizes.itemsize != 4 else 0
    return plain_logps_bytes(sizes)[0], count * (16 + cast)


def compiled_bytes(sizes: Sizes) -> tuple[int, int]:
    """Read off the C++ that torch 2.13 generates; a later release, or a GPU, may do better.

    Forward: the logits for the maximum, and once more for the sum. Backward: float32 zeros for
    gather's gradient (4), read again (4) with the logits, and the gradient written.
    """
    count = sizes.scored * sizes.vocabulary
    return 2 * sizes.read, 8 * count + sizes.read + sizes.written


# Ours: Eq. 15 of docs/derivation.


def no_grad_bytes(sizes: Sizes) -> tuple[int, int]:
    return sizes.read, 0


def one_pass_bytes(sizes: Sizes) -> tuple[int, int]:
    return sizes.read + sizes.written, 0


def general_bytes(sizes: Sizes) -> tuple[int, int]:
    """Also of the peers, whose backward finds the softmax again from the logits."""
    return sizes.read, sizes.read + sizes.written


def ours(backend: str) -> list[Contender]:
    """The routes of one backend. The general one is reached by way of the log-probs."""

    def one_pass(logits: Tensor, task: Task, inplace: bool = False) -> Tensor:
        return r2vpo_loss(
            logits, task.labels, task.old_logps, task.advantages, backend=backend,
            inplace=inplace, **task.objective,
        ).loss  # fmt: skip

    def in_place(logits: Tensor, task: Task) -> Tensor:
        return one_pass(logits, task, inplace=True)

    def general(logits: Tensor, task: Task) -> Tensor:
        logps = token_logps(logits, task.labels, backend=backend)
        return r2vpo_loss_from_logps(
            logps, task.old_logps, task.advantages, backend=backend, **task.objective
        ).loss

    def log_probs(logits: Tensor, task: Task) -> Tensor:
        return token_logps(logits, task.labels, backend=backend)

    def why_not(logits: Tensor) -> str | None:
        reason = registry.why_not(backend, logits)
        if reason is None and getattr(registry.load(backend), "SIMULATED", False):
            return "times of kernels that are simulated mean nothing"
        return reason

    def why_not_one_pass(logits: Tensor) -> str | None:
        if logits.dtype == torch.float16:
            return "float16 takes the general route"
        return why_not(logits)

    contender = functools.partial(Contender, ours=True, scratch=OUR_SCRATCH)
    return [
        contender(f"{backend} one-pass", lambda: one_pass, one_pass_bytes, why_not_one_pass),
        contender(
            f"{backend} in place", lambda: in_place, one_pass_bytes, why_not_one_pass,
            overwrites=True,
        ),
        contender(f"{backend} general", lambda: general, general_bytes, why_not),
        contender(
            f"{backend} log-probs", lambda: log_probs, no_grad_bytes, why_not, forward_only=True
        ),
    ]  # fmt: skip


# Peers.


def _needs(*packages: str) -> Callable[[Tensor], str | None]:
    def why_not(logits: Tensor) -> str | None:
        if not logits.is_cuda:
            return f"it runs on a GPU, and logits are on {logits.device}"
        for package in packages:
            # find_spec of a top-level name imports nothing.
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed (benchmarks/requirements.txt)"
        return None

    return why_not


def liger_loss() -> Function:
    """Liger's `triton_grpo_loss`: PPO's clip, here with bounds that no ratio reaches and β = 0.

    It wants one advantage per sequence and (B, T, V) logits whose last position has no label;
    `inplace` is its own default. Imports torch, triton and packaging, not transformers.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(logits: Tensor, task: Task) -> Tensor:
        value, _ = triton_grpo_loss(
            logits, task.old_logps, None, task.labels, task.advantages,
            temperature=1.0, beta=0.0, eps_low=1.0, eps_high=1e9, loss_type="dapo", inplace=True,
            reduce=True,
        )  # fmt: skip
        return value

    return loss


def trl_loss() -> Function:
    """TRL's `selective_log_softmax_and_entropy`, the plain objective on top of its log-probs."""
    kernel = _trl_kernels().selective_log_softmax_and_entropy

    def loss(logits: Tensor, task: Task) -> Tensor:
        logps, _ = kernel(logits, task.labels)
        return plain_objective(logps, task)

    return loss


@functools.cache
def _trl_kernels() -> Any:
    """The file that holds the kernels, by itself: it needs torch and triton, where the package
    around it imports transformers.
    """
    package = importlib.util.find_spec("trl")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "kernels" / "logprob_entropy.py"
    spec = importlib.util.spec_from_file_location("trl_logprob_entropy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def contenders() -> list[Contender]:
    """All of them, whether or not they can run here."""
    r2vpo = [
        *(contender for backend in registry.TABLE for contender in ours(backend)),
        Contender("eager", lambda: plain_loss, plain_bytes),
        Contender(
            "eager log-probs",
            lambda: lambda logits, task: plain_logps(logits, task.labels),
            plain_logps_bytes,
            forward_only=True,
        ),
        Contender("torch.compile", compiled_loss, compiled_bytes),
        Contender("TRL log-probs + loss", trl_loss, general_bytes, _needs("trl")),
    ]
    liger = Contender(
        "Liger GRPO", liger_loss, general_bytes, _needs("liger_kernel", "packaging"),
        variance_coef=0.0, overwrites=True, skips_last=True,
    )  # fmt: skip
    losses = [contender for contender in r2vpo if not contender.forward_only]
    others = [name for name in POLICY_LOSSES if name != "ratio"]
    return [*r2vpo, liger, *(c.with_policy_loss(name) for name in others for c in losses)]
