"""Two processes over gloo: models under DDP and FSDP2 get the gradients of the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from r2vpo_kernels import linear_r2vpo_loss

RANKS, B, T, H, V = 2, 4, 3, 8, 41


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V)

    def forward(self, tokens):
        return torch.tanh(self.layer(self.embedding(tokens)))


def loss_of(hidden, head, rows, share, **keywords):
    """Of some of the batch's sequences; `share`: of the whole denominator."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 0] = labels[3, 1] = -100
    old_logps = -3.7 + 0.2 * torch.randn(B, T, generator=generator)
    advantages = torch.randn(B, generator=generator)
    return linear_r2vpo_loss(
        hidden(labels[rows].clamp(min=0)), head(), labels[rows], old_logps[rows],
        advantages[rows], normalizer=(B * T - 2) * share, **keywords,
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


def work(rank, meeting_point):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=RANKS)
    rows = torch.arange(B).chunk(RANKS)[rank]
    for wrap, rtol in WRAPPERS.items():
        for keywords in ({}, {"chunk_tokens": 2}, {"center": "group", "group_size": 2}):
            alone = Model()
            loss_of(
                alone, lambda alone=alone: alone.head, torch.arange(B), 1, **keywords
            ).backward()
            model = Model()
            hidden, head = wrap(model)
            # Gradients are averaged over ranks.
            loss_of(hidden, head, rows, 1 / RANKS, **keywords).backward()
            for (what, ours), theirs in zip(
                model.named_parameters(), alone.parameters(), strict=True
            ):
                gradient = ours.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                error = (gradient - theirs.grad).norm() / theirs.grad.norm()
                assert gradient.dtype == torch.float32, (wrap.__name__, what)
                assert error <= rtol, (wrap.__name__, keywords, what, error)
    dist.destroy_process_group()


def test_ranks_sum_to_the_batch(device, tmp_path):
    if device.type != "cpu":
        pytest.skip("processes over gloo, on a CPU")
    mp.spawn(work, (f"file://{tmp_path}/meeting",), RANKS)
