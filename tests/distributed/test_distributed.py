"""Processes over gloo that share out a batch: together they get what one process would."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from support.harness import check_gradient, truth_of
from support.ranks import run_on
from support.strategies import IGNORE, cases, drawn, sampling_mask_of
from support.tolerance import assert_within
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from r2vpo_kernels import VarianceConstraint, linear_r2vpo_loss, r2vpo_loss
from r2vpo_kernels.sources.sparse import SparseHead

RANKS, B, T, H, V = 2, 4, 3, 8, 41


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("processes over gloo, on a CPU")


def denominator(reduction, valid):
    if reduction == "token-mean":
        return valid.sum()
    sequences = valid.any(1).sum()
    return sequences * valid.shape[1] if reduction.endswith("norm") else sequences


def check_parts(rank, jobs):
    """Each rank has some of the sequences ("data"), or some places of them all ("context")."""
    ranks = dist.get_world_size()
    for case, parallel in jobs:
        logits, labels, keywords = case.tensors(torch.device("cpu"))
        valid = labels != IGNORE
        if keywords["mask"] is not None:
            valid = valid & (keywords["mask"] != 0)
        truth = truth_of(logits, labels, keywords, "cpp")

        def part(x, parallel=parallel, shape=labels.shape):
            if not isinstance(x, torch.Tensor) or x.dim() == 0:
                return x
            if parallel == "data":
                return x.tensor_split(ranks)[rank]
            return x.tensor_split(ranks, 1)[rank] if x.shape[:2] == shape else x

        own = {name: part(x) for name, x in keywords.items()}
        if "sampling_mask" in own:
            tokens = part(torch.arange(labels.numel()).view(labels.shape))
            own["sampling_mask"] = keywords["sampling_mask"][tokens.reshape(-1)]
        own["normalizer"] = denominator(case.reduction, valid)
        leaf = part(logits).detach().requires_grad_()
        if case.center == "group":
            with torch.no_grad():
                stats = r2vpo_loss(leaf, part(labels), backend="cpp", **own).stats
            own["center"] = stats.all_reduce().mean
        out = r2vpo_loss(leaf, part(labels), backend="cpp", **own)
        out.loss.backward()

        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        assert_within("loss", loss, truth.loss.sum(), truth.loss_bound.sum(), ulps=0.5 * ranks)
        whole = logits.shape
        for name in ("gradient", "gradient_bound", "outside"):
            setattr(truth, name, part(getattr(truth, name).reshape(whole)))
        check_gradient(leaf.grad, truth, "cpp")
        stats = out.stats.all_reduce()
        for name, value, bound in zip(
            ("weight", "d_sum", "d_sq_sum"), truth.stats, truth.stats_bound, strict=True
        ):
            assert_within(name, getattr(stats, name), value, bound, ulps=0.5 * ranks)


def check_dual(rank):
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    logits = torch.randn(8, 5, V, dtype=torch.float64)
    labels = torch.randint(0, V, (8, 5))
    old_logps = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    old_logps = old_logps + 0.3 * torch.randn(8, 5)
    ids = torch.randint(0, 3, (8,))
    for center in ("one", "group"):

        def stats_of(rows, center=center):
            return r2vpo_loss(
                logits[rows], labels[rows], old_logps[rows], torch.zeros(len(labels[rows])),
                center=center, group_ids=ids[rows], num_groups=3,
            ).stats  # fmt: skip

        alone, together = (VarianceConstraint(0.02, center=center) for _ in range(2))
        alone.step(stats_of(slice(None)))
        # Two micro-batches on each rank.
        rows = torch.arange(8).tensor_split(ranks)[rank]
        first, second = (stats_of(r) for r in rows.tensor_split(2))
        together.step((first + second).all_reduce())
        assert alone.coef != 0.5
        # float64 sums, rounded to λ in float32.
        assert (together.coef - alone.coef).abs() <= torch.finfo(torch.float32).eps * alone.coef


def check_together(rank, jobs):
    check_parts(rank, jobs)
    check_dual(rank)


@pytest.mark.parametrize("ranks", [2, 4])
def test_data_and_context_parallel_are_within_the_budget(ranks, tmp_path):
    def jobs(count, reductions, levels, parallel):
        fixed = st.fixed_dictionaries(
            {
                "reduction": st.sampled_from(reductions),
                "center": st.sampled_from(["one", "group"]),
                "level": st.sampled_from(levels),
                "groups": st.sampled_from(["none", "ids"]),
                "variance_coef": st.sampled_from(["number", "scalar"]),
            }
        )
        shape = {"batch": 5, "length": 4, "packed": False, "layout": "plain"}
        return [
            (case, parallel) for case in drawn(fixed.flatmap(lambda f: cases(**f, **shape)), count)
        ]

    sums = ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
    means = [*sums, "seq-mean-token-mean"]
    both = [*jobs(30, means, ["token", "sequence"], "data"), *jobs(20, sums, ["token"], "context")]
    run_on(ranks, tmp_path, check_together, both)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V)

    def forward(self, tokens):
        return torch.tanh(self.layer(self.embedding(tokens)))


def loss_of(hidden, head, rows, share, support="none", **keywords):
    """Of some of the batch's sequences; `share`: of the whole denominator."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (B, T), generator=generator)
    mask = sampling_mask_of(support, labels, V, generator)
    if mask is not None:
        mask = mask[torch.arange(B * T).view(B, T)[rows].flatten()]
    labels[0, 0] = labels[3, 1] = -100
    old_logps = -3.7 + 0.2 * torch.randn(B, T, generator=generator)
    advantages = torch.randn(B, generator=generator)
    return linear_r2vpo_loss(
        hidden(labels[rows].clamp(min=0)), head(), labels[rows], old_logps[rows],
        advantages[rows], normalizer=(B * T - 2) * share, sampling_mask=mask, **keywords,
    ).loss  # fmt: skip


def with_ddp(model):
    wrapped = DistributedDataParallel(model)
    return wrapped, lambda: model.head


def with_fsdp(model):
    """The root's parameters, the head's among them, stay gathered until its backward."""
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    return model, lambda: model.head


def with_fsdp_of_the_head(model):
    """The head, in a group of its own whose forward never runs, is a DTensor."""
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.head.weight, DTensor)
    return model, lambda: model.head


def with_fsdp_in_halves(model):
    """float32 parameters, bfloat16 hidden states: the head is cast as it is gathered."""
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.head, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, lambda: model.head


WRAPPERS = {
    with_ddp: 1e-4, with_fsdp: 1e-4, with_fsdp_of_the_head: 1e-4, with_fsdp_in_halves: 0.1
}  # fmt: skip


def check_models(rank):
    rows = torch.arange(B).chunk(RANKS)[rank]
    grouped, some = {"center": "group", "group_size": 2}, {"support": "some empty"}
    for wrap, rtol in WRAPPERS.items():
        for keywords in ({}, {"chunk_tokens": 2}, grouped, some, {**some, **grouped}):
            alone = Model()
            loss_of(
                alone, lambda alone=alone: alone.head, torch.arange(B), 1, **keywords
            ).backward()
            model = Model()
            hidden, head = wrap(model)
            # Gradients are averaged over ranks.
            with patch.object(SparseHead, "logits", autospec=True, side_effect=SparseHead.logits):
                loss_of(hidden, head, rows, 1 / RANKS, **keywords).backward()
                assert SparseHead.logits.called == ("support" in keywords)
            for (what, ours), theirs in zip(
                model.named_parameters(), alone.parameters(), strict=True
            ):
                gradient = ours.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                error = (gradient - theirs.grad).norm() / theirs.grad.norm()
                assert gradient.dtype == torch.float32, (wrap.__name__, what)
                assert error <= rtol, (wrap.__name__, keywords, what, error)


def test_models_get_the_gradient_of_the_batch(tmp_path):
    run_on(RANKS, tmp_path, check_models)


class WithLoss(nn.Module):
    """A model whose output is that of the loss."""

    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, rows, share):
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, V, (B, T), generator=generator)
        hidden = self.model(labels)
        return r2vpo_loss(
            self.model.head(hidden)[rows], labels[rows], torch.full((B, T), -3.7)[rows],
            torch.randn(B, generator=generator)[rows], normalizer=B * T * share,
        )  # fmt: skip


def check_static_graph(rank):
    alone = WithLoss()
    alone(torch.arange(B), 1).loss.backward()
    model = WithLoss()
    wrapped = DistributedDataParallel(model, static_graph=True)
    for _ in range(2):
        model.zero_grad()
        wrapped(torch.arange(B).chunk(RANKS)[rank], 1 / RANKS).loss.backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_static_graph_finds_the_loss_in_an_output(tmp_path):
    run_on(RANKS, tmp_path, check_static_graph)
