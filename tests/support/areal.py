"""AReaL's own modules, from its wheel, without the packages of a GPU machine; its FSDP engine on
CPUs."""

import importlib
import importlib.metadata
import os
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist

from .trainers import Stubs

# Packages whose own files import most of AReaL, and what its files import beyond torch's world.
BARE = ("areal", "areal.infra", "areal.trainer", "areal.trainer.ppo")
STUBS = (
    "areal.utils.logging", "areal.utils.stats_logger", "areal.experimental",
    "einops", "lark", "numba", "pybase64", "tenacity", "uvloop",
)  # fmt: skip


def load():
    """The adapter on AReaL's modules, which stay in sys.modules. Its logger is a stub."""
    root = importlib.metadata.distribution("areal").locate_file("")
    for name in BARE:
        module = types.ModuleType(name)
        module.__path__ = [str(root / name.replace(".", "/"))]
        module.__getattr__ = mock.MagicMock()
        sys.modules[name] = module
    sys.meta_path.insert(0, Stubs(*STUBS))
    return importlib.import_module("r2vpo_kernels.integrations.areal")


def trajectories(sampled, seed=0, prompt=3, version=5):
    """Samples as AReaL's workflows give them, with so many tokens each, of versions up to five."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for tokens in sampled:
        length = prompt + tokens
        generated = torch.arange(length) >= prompt
        versions = version - torch.randint(0, 3, (length,), generator=g, dtype=torch.int32)
        sample = {
            "input_ids": torch.randint(0, 50, (length,), generator=g),
            "attention_mask": torch.ones(length, dtype=torch.bool),
            "loss_mask": generated.int(),
            "logprobs": -torch.rand(length, generator=g) - 3.5,
            "versions": torch.where(generated, versions, -1),
        }
        samples.append({name: x[None] for name, x in sample.items()})
        samples[-1]["rewards"] = torch.randn(1, generator=g)
    return samples


def fsdp_engine(adapter, folder, version=5, **options):
    """The adapter's FSDP engine with a tiny model from `folder`, on the ranks there are."""
    from areal.api.alloc_mode import ParallelStrategy
    from areal.api.cli_args import OptimizerConfig
    from areal.api.io_struct import FinetuneSpec
    from areal.engine import fsdp_engine

    os.environ |= {"LOCAL_RANK": "0"}
    fsdp_engine.load_hf_tokenizer = lambda path: None
    config = adapter.R2VPOActorConfig(
        experiment_name="e", trial_name="t", path=str(folder), backend="fsdp:d2", dtype="float32",
        attn_impl="sdpa", optimizer=OptimizerConfig(lr=1e-2, warmup_steps_proportion=0.0),
        kl_ctl=0.0, **options,
    )  # fmt: skip
    engine = adapter.FSDPR2VPOActor(config)
    engine.create_process_group(ParallelStrategy(data_parallel_size=dist.get_world_size()))
    engine.initialize(None, FinetuneSpec(1, 64, 4))
    engine.set_version(version)
    return engine
