"""What each route launches, counted (docs/derivation, "Launches")."""

import pytest
import torch
from support.launches import ROW_KERNELS, TOKEN_KERNELS, count_launches
from support.strategies import sampling_mask_of

from r2vpo_kernels import (
    VarianceConstraint,
    ops,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    token_logps,
)

B, T, V = 4, 6, 40
EVERYTHING = {"entropy_coef": 0.1, "kl_coef": 0.1}
# (keywords, dtype, the kernels of a call with backward and metrics, launches at most)
LOGITS = {
    "one pass": ({}, torch.bfloat16, ["prepare", "one_pass", "finish", "scale"], 5),
    "everything": (EVERYTHING, torch.float32, ["prepare", "one_pass", "finish", "scale"], 5),
    "given means": (
        {"center": torch.ones(2)}, torch.float32, ["prepare", "one_pass", "finish", "scale"], 5,
    ),
    "group": (
        {"center": "group"} | EVERYTHING, torch.bfloat16,
        ["prepare", "logps_forward", "means", "finish", "logps_backward"], 7,
    ),
    "sequence": (
        {"ratio_level": "sequence", "reduction": "seq-mean-token-mean"}, torch.float32,
        ["prepare", "logps_forward", "finish", "logps_backward"], 7,
    ),
    "none": (
        {"reduction": "none"}, torch.float32,
        ["prepare", "logps_forward", "finish", "finish", "logps_backward"], 7,
    ),
    "none, group": (
        {"reduction": "none", "center": "group"}, torch.float32,
        ["prepare", "logps_forward", "means", "finish", "means", "finish", "logps_backward"], 7,
    ),
    "sampled": (
        {"sampling_mask": "small"}, torch.bfloat16, ["prepare", "one_pass", "finish", "scale"], 5,
    ),
    "sampled, group": (
        {"sampling_mask": "some missing", "center": "group"} | EVERYTHING, torch.bfloat16,
        ["prepare", "logps_forward", "means", "finish", "logps_backward"], 7,
    ),
    "float16": ({}, torch.float16, ["prepare", "logps_forward", "finish", "logps_backward"], 7),
}  # fmt: skip
LOG_PROBS = {
    "one": ({}, ["prepare", "finish"]),
    "everything": (EVERYTHING, ["prepare", "finish"]),
    "group": ({"center": "group"} | EVERYTHING, ["prepare", "means", "finish"]),
    "sequence": ({"ratio_level": "sequence"}, ["prepare", "finish"]),
    "none": ({"reduction": "none"}, ["prepare", "finish", "finish"]),
}


def batch(device):
    torch.manual_seed(0)
    labels = torch.randint(0, V, (B, T), device=device)
    return {
        "labels": labels,
        "old_logps": torch.full((B, T), -3.0, device=device),
        "advantages": torch.randn(B, device=device),
        "mask": torch.rand(B, T, device=device) < 0.8,
        "group_ids": torch.arange(B, device=device) % 2,
        "num_groups": 2,
    }


def kernels_in(counts):
    return sorted(n for n in counts.elements() if n in (*ROW_KERNELS, *TOKEN_KERNELS))


@pytest.mark.parametrize("route", LOGITS)
def test_from_logits(kernels, device, route, monkeypatch):
    # As on a GPU; where the host may look, an op looks at the sets that it is given.
    monkeypatch.setattr(ops, "may_synchronise", lambda value: False)
    keywords, dtype, expected, most = LOGITS[route]
    given = batch(device) | keywords
    if "kl_coef" in given:
        given["ref_logps"] = given["old_logps"] - 0.1
    if "sampling_mask" in given:
        generator = torch.Generator().manual_seed(0)
        sets = sampling_mask_of(given["sampling_mask"], given["labels"].cpu(), V, generator)
        given["sampling_mask"] = sets.to(device)
    logits = torch.randn(B, T, V, device=device).to(dtype).requires_grad_()
    shape = (B, T) if given.get("reduction") == "none" else ()
    upstream = torch.full(shape, 0.5, device=device)

    def call():
        out = r2vpo_loss(logits, backend=kernels, **given)
        torch.autograd.grad(out.loss, logits, upstream)
        out.metrics()

    counts = count_launches(call)
    assert kernels_in(counts) == sorted(expected)
    assert counts.total() <= most, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", LOG_PROBS)
def test_from_logps(kernels, device, route, dtype):
    keywords, expected = LOG_PROBS[route]
    given = batch(device) | keywords
    if "kl_coef" in given:
        given |= {"ref_logps": given["old_logps"] - 0.1, "entropy": torch.ones(B, T, device=device)}
    del given["labels"]
    logps = (given["old_logps"] + 0.1).to(dtype).requires_grad_()
    shape = (B, T) if given.get("reduction") == "none" else ()
    upstream = torch.full(shape, 0.5, device=device)

    def call():
        out = r2vpo_loss_from_logps(logps, backend=kernels, **given)
        torch.autograd.grad(out.loss, logps, upstream)
        out.metrics()

    counts = count_launches(call)
    assert kernels_in(counts) == sorted(expected)
    assert counts.total() <= 4, counts


def test_token_logps_without_a_gradient(kernels, device):
    logits, labels = torch.randn(B, T, V, device=device), batch(device)["labels"]
    counts = count_launches(lambda: token_logps(logits, labels, backend=kernels))
    assert counts == {"prepare": 1, "logps_forward": 1}


@pytest.mark.parametrize("center", ["one", "group"])
def test_a_step_of_the_dual(device, center):
    given = batch(device)
    out = r2vpo_loss(torch.randn(B, T, V, device=device), **given)
    constraint = VarianceConstraint(0.1, center=center, device=device)
    assert count_launches(lambda: constraint.step(out.stats)).total() <= 3


def test_a_launch_more_is_seen(device):
    """The counter itself: operators, hidden ones too, and neither views nor allocations."""
    x = torch.ones(3, device=device)
    counts = count_launches(lambda: (x + 1, x.view(3, 1), torch.empty_like(x), x.clone()))
    assert counts == {"aten.add": 1, "aten.clone": 1}
    labels = torch.zeros(3, dtype=torch.long, device=device)
    logits = torch.randn(3, 5, device=device)

    def hidden():
        token_logps(logits, labels, mask=labels != 1)

    assert count_launches(hidden)["aten.ne"] == 1
