"""Right first: the float64 truth at the shape that is timed, and what it says of a contender.

Ours are held to the error budget that the tests derive (docs/derivation, Eq. 19 to 26); others to a
multiple of the error that plain torch makes on the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from contenders import Contender, Task, plain_logps, plain_terms
from from_tests import Truth, check_gradient, output_rounding, truth_of, worst
from torch import Tensor

from r2vpo_kernels.checks import PolicyLoss

# Rows whose whole gradient is looked at; the loss is that of all rows.
SAMPLED_ROWS = 8
# What others may take: of plain torch's RMS errors, and of the budget of a loss.
MULTIPLE = 4.0
# Elements that the truth takes at a time: it needs some two hundred bytes for each.
CHUNK = {"cpu": 2**22, "cuda": 2**25}


@dataclass(frozen=True)
class Exact:
    """The truth of one task."""

    loss: Tensor
    loss_bound: Tensor
    logps: Tensor  # (N,)
    logps_bound: Tensor
    rows: Tensor  # which rows the sample is
    sample: Truth
    # RMS errors of plain torch: of the gradient in these rows, and of all log-probs.
    eager_gradient_error: float
    eager_logps_error: float


@dataclass(frozen=True)
class Parity:
    """used: the largest share of the error budget that any number took; 1 uses it up.
    against_eager: RMS error of the gradient, or of the log-probs without one, over plain torch's.
    """

    used: float
    against_eager: float
    faults: list[str] = field(default_factory=list)


def make_task(
    logits: Tensor,
    variance_coef: float,
    skips_last: bool,
    seed: int = 0,
    policy_loss: PolicyLoss = "ratio",
) -> Task:
    """Labels drawn from the logits' own softmax, an old policy nearby, advantages of both signs."""
    device = logits.device
    generator = torch.Generator(device).manual_seed(seed)
    batch, length, vocabulary = logits.shape
    step = max(1, CHUNK[device.type] // vocabulary)
    labels, logps = [], []
    for rows in logits.reshape(-1, vocabulary).split(step):
        drawn = torch.multinomial(torch.softmax(rows.float(), -1), 1, generator=generator)[:, 0]
        labels.append(drawn)
        logps.append(plain_logps(rows, drawn))
    drift = torch.randn(batch * length, generator=generator, device=device)
    scored = length - 1 if skips_last else length

    def shaped(x: Tensor) -> Tensor:
        return x.reshape(batch, length)[:, :scored].contiguous()

    advantages = torch.randn(batch, generator=generator, device=device)
    return Task(
        shaped(torch.cat(labels)),
        shaped(torch.cat(logps) + 0.3 * drift),
        advantages,
        variance_coef,
        policy_loss=policy_loss,
    )


def find_exact(logits: Tensor, task: Task) -> Exact:
    """By the reference in float64, some rows at a time."""
    batch, length, vocabulary = logits.shape
    scored = task.labels.shape[1]
    tail = (0, length - scored)
    mask = F.pad(torch.ones_like(task.labels), tail).reshape(-1)
    labels = F.pad(task.labels, tail).reshape(-1)
    old_logps = F.pad(task.old_logps, tail).reshape(-1)
    advantages = task.advantages[:, None].expand(batch, length).reshape(-1)
    flat = logits.reshape(-1, vocabulary)

    def truth(rows: Tensor) -> Truth:
        keywords: dict[str, Any] = {
            "old_logps": old_logps[rows],
            "advantages": advantages[rows],
            "mask": mask[rows],
            "normalizer": float(task.labels.numel()),
            **task.objective,
        }
        # The bounds of our kernels: plain torch is held to a multiple of them.
        return truth_of(flat[rows], labels[rows], keywords, "kernels")

    count = batch * length
    everything = torch.arange(count, device=logits.device)
    step = max(1, CHUNK[logits.device.type] // vocabulary)
    parts = []
    for rows in everything.split(step):
        t = truth(rows)
        plain = torch.where(mask[rows] != 0, plain_logps(flat[rows], labels[rows]), 0.0)
        parts.append((t.loss, t.loss_bound, t.logps, t.logps_bound, plain))
    loss, loss_bound, logps, logps_bound, plain = (torch.cat(x) for x in zip(*parts, strict=True))

    sampled = torch.linspace(0, count - 1, min(count, SAMPLED_ROWS), device=logits.device).long()
    sample = truth(sampled)
    leaf = flat[sampled].requires_grad_()
    of_rows = replace(
        task, labels=labels[sampled, None], old_logps=old_logps[sampled, None],
        advantages=advantages[sampled],
    )  # fmt: skip
    terms = plain_terms(plain_logps(leaf[:, None], of_rows.labels), of_rows)[:, 0]
    (gradient,) = torch.autograd.grad((terms * mask[sampled]).sum() / task.labels.numel(), leaf)
    return Exact(
        loss.sum(),
        loss_bound.sum(),
        logps,
        logps_bound,
        sampled,
        sample,
        _rms(gradient, sample.gradient),
        _rms(plain, logps),
    )


def _rms(x: Tensor, truth: Tensor) -> float:
    return (x.reshape(truth.shape).double() - truth).square().mean().sqrt().item()


def check(contender: Contender, exact: Exact, value: Tensor, gradient: Tensor | None) -> Parity:
    """`value` is the loss, or the log-probs of a contender without a gradient."""
    faults = []
    if gradient is None:
        used = _share(value, exact.logps, exact.logps_bound)
        error, eager_error = _rms(value, exact.logps), exact.eager_logps_error
        if contender.ours and not used <= 1:
            faults.append(f"log-probs: {used:.3g} times the error budget")
        if not contender.ours and not error <= MULTIPLE * eager_error:
            faults.append(f"log-probs: RMS error {error:.3g}, plain torch's {eager_error:.3g}")
        return Parity(used, error / eager_error, faults)

    used = _share(value, exact.loss, exact.loss_bound)
    limit = 1.0 if contender.ours else MULTIPLE
    if not used <= limit:
        faults.append(f"loss: {used:.3g} times the error budget, allowed {limit:g}")
    rows = gradient.reshape(-1, gradient.shape[-1])[exact.rows]
    truth, bound = exact.sample.gradient, exact.sample.gradient_bound
    used = max(used, _share(rows, truth, bound))
    error, eager_error = _rms(rows, truth), exact.eager_gradient_error
    if contender.ours:
        try:
            check_gradient(rows, exact.sample, contender.name.split()[0])
        except AssertionError as fault:
            faults.append(str(fault))
    else:
        rounding = output_rounding(truth, torch.zeros_like(bound), rows.dtype, 0.5)
        if not error <= MULTIPLE * eager_error + rounding.square().mean().sqrt().item():
            faults.append(f"gradient: RMS error {error:.3g}, plain torch's {eager_error:.3g}")
    return Parity(used, error / eager_error, faults)


def _share(actual: Tensor, truth: Tensor, bound: Tensor) -> float:
    rounding = output_rounding(truth, bound, actual.dtype, 0.5)
    return worst(actual, truth, bound + rounding)
