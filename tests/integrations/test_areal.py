"""AReaL: its own loss, helpers, configuration and FSDP engine, from its wheel, on CPUs."""

import functools
import importlib
import math
import sys
from argparse import Namespace
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from support import areal as support
from support.ranks import run_on
from support.trainers import assert_same

from r2vpo_kernels.checks import RATIO_LEVELS

OURS = "r2vpo_kernels.integrations."
VERSION = 5


@pytest.fixture(scope="module")
def areal():
    """The adapter and AReaL's modules by their last names."""
    before, meta_path = dict(sys.modules), list(sys.meta_path)
    for name in [n for n in sys.modules if n.startswith(OURS)]:
        del sys.modules[name]
    adapter = support.load()
    names = ["api.cli_args", "trainer.ppo.actor", "utils.stats_tracker", "infra.rpc.serialization"]
    found = {n.split(".")[-1]: importlib.import_module("areal." + n) for n in names}
    yield Namespace(
        adapter=adapter, hook=importlib.import_module(OURS + "hook"),
        steps=importlib.import_module(OURS + "steps"), **found,
    )  # fmt: skip
    sys.meta_path[:] = meta_path
    for name in [n for n in sys.modules if n.startswith((OURS, "areal", *support.STUBS))]:
        del sys.modules[name]
    sys.modules.update({n: m for n, m in before.items() if n.startswith(OURS)})


@pytest.fixture(autouse=True)
def _new_steps(areal):
    areal.hook._steps.clear()
    areal.stats_tracker.DEFAULT_TRACKER.export()


def packed(seed=0):
    """A micro-batch of AReaL's engines: (log-probs, entropy, data) of packed sequences, each
    with a prompt; log-probs and masks are those of the next token, versions of the token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 9, 2, 7])
    n = int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    place = torch.arange(n) - cu_seqlens[:-1].repeat_interleave(lengths)
    generated = place >= 2
    old = -torch.rand(n, generator=g, dtype=torch.float64) - 0.1
    versions = VERSION - torch.randint(0, 4, (n,), generator=g, dtype=torch.int32)
    data = {
        "logprobs": old + 0.3 * torch.randn(n, generator=g, dtype=torch.float64),
        "prox_logp": old,
        "advantages": torch.randn(n, generator=g, dtype=torch.float64),
        "loss_mask": generated.roll(-1).float(),
        "versions": torch.where(generated, versions, -1),
        "cu_seqlens": cu_seqlens,
    }
    logps = old + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    return logps.requires_grad_(), torch.rand(n, generator=g), data


def config(areal, **options):
    basics = {"experiment_name": "e", "trial_name": "t", "backend": "fsdp:d1"}
    return areal.adapter.R2VPOActorConfig(**(basics | options))


def ours(areal, batch, options, steps=None):
    chosen = config(areal, **options)
    return areal.adapter.r2vpo_loss_fn(
        *batch, config=chosen, steps=steps or areal.steps.OptimizerSteps(), current_version=VERSION
    )


def theirs(areal, batch, options, eps=(1e9, None), c_clip=None):
    chosen = areal.cli_args.PPOActorConfig(
        experiment_name="e", trial_name="t", backend="fsdp:d1", **options
    )
    return areal.actor.grpo_loss_fn(
        *batch, *eps, c_clip, rejection_sampling=chosen.rejection_sampling,
        m2_threshold=chosen.m2_threshold, prox_logp_method=chosen.prox_logp_method,
        importance_sampling_level=chosen.importance_sampling_level, current_version=VERSION,
    )  # fmt: skip


def rejection(areal, **options):
    return {"rejection_sampling": areal.cli_args.RejectionSamplingConfig(**options)}


CORRECTIONS = {
    "none": {},
    "masked tokens": {"level": "token", "action": "mask", "metric": "ratio", "upper": 1.2},
    "clamped tokens": {
        "level": "token", "action": "clamp", "metric": "ratio", "upper": 1.2, "lower": 0.9
    },
    "masked sequences": {
        "level": "sequence", "action": "mask", "metric": "ratio", "agg": "mean", "upper": 1.05
    },
    "clamped sequences": {
        "level": "sequence", "action": "clamp", "metric": "ratio", "agg": "mean", "upper": 1.05
    },
}  # fmt: skip


@pytest.fixture
def in_double(areal, monkeypatch):
    """AReaL's statistics take float32 alone."""
    for module in (areal.actor, areal.adapter):
        monkeypatch.setattr(module, "stats_tracker", mock.MagicMock())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("m2", [None, 1e-3])
@pytest.mark.parametrize("method", ["recompute", "loglinear"])
def test_without_penalty_and_clip_it_is_areals(areal, in_double, correction, m2, method):
    logps, entropy, data = packed()
    if method == "loglinear":
        data["prox_logp"] = None
    options = {"use_decoupled_loss": True, "m2_threshold": m2, "prox_logp_method": method}
    if CORRECTIONS[correction]:
        options |= rejection(areal, **CORRECTIONS[correction])
    expected = theirs(areal, (logps, entropy, data), options)
    loss = ours(areal, (logps, entropy, data), options | {"variance_coef": 0.0})
    assert_same(loss, expected, logps)
    if correction != "none" or m2:
        plain = {"use_decoupled_loss": True, "prox_logp_method": method}
        assert theirs(areal, (logps, entropy, data), plain) != expected


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_clip_is_that_of_areal(areal, in_double, level, dual_clip):
    logps, entropy, data = packed()
    # One advantage a sequence: AReaL's GSPO takes their mean.
    lengths = data["cu_seqlens"].diff()
    data["advantages"] = torch.tensor([-1.0, 0.5, 2.0, -0.3]).double().repeat_interleave(lengths)
    expected = theirs(
        areal, (logps, entropy, data), {"importance_sampling_level": level}, (0.05, 0.1), dual_clip
    )
    clip = {"policy_loss": "clip", "clip_range": [0.05, 0.1], "dual_clip": dual_clip}
    assert_same(ours(areal, (logps, entropy, data), clip | {"ratio_level": level}), expected, logps)
    free = {"variance_coef": 0.0, "ratio_level": level}
    assert ours(areal, (logps, entropy, data), free) != expected


def test_the_penalty_is_on_tokens_that_are_not_rejected(areal, in_double):
    logps, entropy, data = packed()
    masked = rejection(areal, **CORRECTIONS["masked tokens"])
    loss = ours(areal, (logps, entropy, data), masked | {"variance_coef": 1.5})
    mask = data["loss_mask"] > 0
    # In float32, as AReaL takes it.
    weight = (data["prox_logp"].float() - data["logprobs"].float()).exp()
    kept = mask & (weight <= 1.2)
    assert 0 < kept.sum() < mask.sum()
    ratio = (logps - data["prox_logp"]).exp()
    terms = -weight * data["advantages"] * ratio + 1.5 * (ratio - 1) ** 2
    assert_same(loss, torch.where(kept, terms, 0.0).sum() / mask.sum(), logps)


def next_ages(data, groups):
    return (VERSION - data["versions"].roll(-1)).clamp(max=groups - 1)


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_statistics_by_age(areal, in_double, level):
    logps, entropy, data = packed()
    steps = areal.steps.OptimizerSteps()
    ours(areal, (logps, entropy, data), {"age_groups": 3, "ratio_level": level}, steps)
    steps.close()
    mask, age = data["loss_mask"] > 0, next_ages(data, 3)
    delta = (logps - data["prox_logp"]).detach()
    if level == "sequence":
        parts = [data["cu_seqlens"].diff().tolist()] * 3
        zipped = zip(*(x.split(p) for x, p in zip((delta, age, mask), parts, strict=True)),
                     strict=True)  # fmt: skip
        rows = [(d[m].mean(), a[m].max(), len(d[m])) for d, a, m in zipped if m.any()]
        delta, age = (torch.stack(x).repeat_interleave(torch.tensor([r[2] for r in rows]))
                      for x in ([r[0] for r in rows], [r[1] for r in rows]))  # fmt: skip
    else:
        delta, age = delta[mask], age[mask]
    assert level == "sequence" or set(age.tolist()) == {0, 1, 2}
    metrics = areal.adapter.step_metrics(steps)
    for group in range(3):
        ratio, name = delta[age == group].exp(), f"step/age_{group}" + "+" * (group == 2)
        if len(ratio) == 0:
            assert f"{name}/share" not in metrics
            continue
        # Sums in float64 of numbers that are float64.
        assert metrics[f"{name}/share"] == pytest.approx(len(ratio) / len(delta), rel=1e-6)
        assert metrics[f"{name}/ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-6)
        assert metrics[f"{name}/ratio_var"] == pytest.approx(
            ratio.var(correction=0).item(), rel=1e-6, abs=1e-12
        )
    assert metrics["step/ratio_mean"] == pytest.approx(delta.exp().mean().item(), rel=1e-6)


def test_a_workflow_without_versions(areal, in_double):
    logps, entropy, data = packed()
    del data["versions"]
    with pytest.raises(ValueError, match=r"versions: got None, expected .*actor\.age_groups=1"):
        ours(areal, (logps, entropy, data), {})
    steps = areal.steps.OptimizerSteps()
    ours(areal, (logps, entropy, data), {"age_groups": 1}, steps)
    steps.close()
    assert set(areal.adapter.step_metrics(steps)) == {
        "step/ratio_mean", "step/ratio_var", "step/ratio_ess"
    }  # fmt: skip


def test_logged_as_by_areal(areal):
    logps, entropy, data = packed()
    data = {n: x.float() if x.dtype == torch.float64 else x for n, x in data.items()}
    batch = (logps.detach().float().requires_grad_(), entropy, data)
    options = {"use_decoupled_loss": True} | rejection(areal, **CORRECTIONS["masked tokens"])
    logits = {"vocab_min_logits": -entropy, "vocab_max_logits": entropy}
    loss_fn = functools.partial(areal.actor.grpo_loss_fn, eps_clip=0.2, eps_clip_higher=None,
                                c_clip=None, current_version=VERSION,
                                rejection_sampling=options["rejection_sampling"])  # fmt: skip
    loss_fn(*batch, **logits)
    expected = areal.stats_tracker.export()
    areal.adapter.r2vpo_loss_fn(
        *batch, **logits, config=config(areal, **options), steps=areal.steps.OptimizerSteps(),
        current_version=VERSION,
    )  # fmt: skip
    logged = areal.stats_tracker.export()
    missing = {n.split("/")[0] for n in set(expected) - set(logged)}
    # Of clips, and the ratio, which has another name.
    assert missing == {
        "clip_ratio", "clipped_new_logp", "clipped_old_logp", "clipped_tokens", "dual_clip_ratio",
        "dual_clipped_tokens", "importance_weight",
    }  # fmt: skip
    # The loss and, of rejected tokens, what AReaL counts before rejection.
    same = {"new_logp/max", "behave_imp_weight/avg", "rs_filtered_fraction", "n_tokens",
            "vocab_max_logits/max", "compute_logp/kl_div_dual/avg"}  # fmt: skip
    for name in same:
        assert logged[name] == expected[name]
    assert logged["ratio/mean"] == pytest.approx(expected_ratio(batch), rel=1e-5)


def expected_ratio(batch):
    logps, _, data = batch
    weight = (data["prox_logp"] - data["logprobs"]).exp()
    kept = (data["loss_mask"] > 0) & (weight <= 1.2)
    return (logps - data["prox_logp"]).exp()[kept].mean().item()


REFUSED = {
    "eps_clip_higher": 0.28, "c_clip": 3.0, "use_sapo_loss": True,
    "importance_sampling_level": "sequence", "age_groups": 0, "policy_loss": "ppo",
    "clip_range": [0.1, 0.2], "center": "group", "variance_coef": -1.0, "variance_target": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("option", REFUSED)
def test_bad_options_are_refused_where_they_are_read(areal, option):
    with pytest.raises(ValueError, match=f"{option}: got "):
        config(areal, **{option: REFUSED[option]})


def configured(areal, given):
    merged = areal.cli_args.to_structured_cfg(OmegaConf.create(given), areal.adapter.R2VPOConfig)
    for name in OmegaConf.missing_keys(merged):
        OmegaConf.update(merged, name, "needed")
    return OmegaConf.to_object(merged)


def test_options_come_by_areals_own_configuration(areal):
    """The YAML's `actor`, through OmegaConf, and to AReaL's workers and back."""
    given = {
        "experiment_name": "e", "trial_name": "t",
        "actor": {"backend": "fsdp:d1", "variance_target": 0.02, "clip_range": [0.1, 0.2],
                  "policy_loss": "clip", "age_groups": 4},
        "ref": {"backend": "fsdp:d1", "experiment_name": "e", "trial_name": "t"},
    }  # fmt: skip
    read = configured(areal, given)
    assert isinstance(read.actor, areal.adapter.R2VPOActorConfig)
    assert not isinstance(read.ref, areal.adapter.R2VPOActorConfig)
    sent = areal.serialization.serialize_value(read.actor)
    got = areal.serialization.deserialize_value(sent)
    assert isinstance(got, areal.adapter.R2VPOActorConfig)
    assert got.clip_range == [0.1, 0.2] and got.variance_target == 0.02 and got.age_groups == 4
    teacher = {"engine_type": "train", "train": given["ref"]}
    with pytest.raises(Exception, match="teacher: got "):
        configured(areal, given | {"teacher": teacher})


def test_the_trainer_makes_the_actor_by_its_engine(areal, monkeypatch):
    """AReaL's controller, which sends the engine's name to its workers; the reference stays."""
    alloc = Namespace(backend="fsdp", parallel="parallel")
    trainer = Namespace(scheduler="scheduler")
    make = functools.partial(areal.adapter.R2VPOTrainer._create_train_engine)
    controller = mock.MagicMock()
    monkeypatch.setattr(areal.actor, "PPOActorController", controller)
    actor = make(trainer, config(areal), alloc)
    engine = controller.call_args.kwargs["train_engine"]
    assert controller.call_args.kwargs["scheduler"] == "scheduler"
    actor.create_process_group.assert_called_once_with(parallel_strategy="parallel")
    from areal.engine.fsdp_engine import FSDPPPOActor
    from areal.utils.dynamic_import import import_from_string

    assert import_from_string(f"{engine.__module__}.{engine.__name__}") is engine
    assert issubclass(engine, FSDPPPOActor) and engine is not FSDPPPOActor
    with pytest.raises(ValueError, match=r"actor\.backend: got 'jax', expected one of fsdp, meg"):
        make(trainer, config(areal), Namespace(backend="jax"))
    with pytest.raises(TypeError, match="config: got object, expected an R2VPOConfig"):
        areal.adapter.R2VPOTrainer(object())
    with pytest.raises(AttributeError, match="no attribute 'JaxR2VPOActor'"):
        areal.adapter.JaxR2VPOActor  # noqa: B018


TARGET = 0.02


def train_with_fsdp(rank, folder):
    """Two ranks, micro-batches, one of the ranks at first without a token to train on."""
    adapter = support.load()
    options = {"variance_target": TARGET, "ppo_n_minibatches": 1}
    from areal.api.cli_args import MicroBatchSpec
    from areal.api.io_struct import SaveLoadMeta
    from areal.engine import fsdp_engine

    engine = support.fsdp_engine(adapter, folder, mb_spec=MicroBatchSpec(n_mbs=2), **options)
    coef, coefs = 0.5, []
    for step in range(3):
        samples = support.trajectories([5, 7] if rank else [6, 3], seed=2 * step + rank)
        if step == 0 and rank == 1:
            for sample in samples:
                sample["loss_mask"].zero_()
        # As the trainer does: the policy's log-probs now are those that the loss starts from.
        now = engine.actor.compute_logp(samples)
        batch = engine.actor.compute_advantages(samples)
        d = [
            (logp - x["logprobs"]).exp()[x["loss_mask"] > 0] - 1
            for logp, x in zip(now, batch, strict=True)
        ]
        sums = torch.stack([torch.stack([torch.ones_like(x), x, x**2]).sum(1) for x in d]).sum(0)
        torch.distributed.all_reduce(sums)
        n, mean, second = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        coef *= math.exp(0.1 * min(second / TARGET - 1, 1))
        if step == 2:
            # As one of AReaL's optimizers that torch knows nothing of.
            plain = Namespace(zero_grad=engine.optimizer.zero_grad, step=lambda: None)
            engine.optimizer = plain
        engine.ppo_update(batch)
        logged = exported()
        # Log-probs near -4 in float32, to some roundings of 2.4e-7, whose ratios vary by some 0.3.
        assert logged["step/ratio_mean"] == pytest.approx(1 + mean.item(), rel=1e-5)
        variance = (second - mean**2).item()
        assert logged["step/ratio_var"] == pytest.approx(variance, rel=1e-4)
        assert logged["variance_coef"] == pytest.approx(coef, rel=1e-4)
        assert logged["num_micro_batches"] == 2 and n > 0
        shares = [x for name, x in logged.items() if name.endswith("/share")]
        assert len(shares) > 1 and sum(shares) == pytest.approx(1, rel=1e-6)
        coefs.append(logged["variance_coef"])
        saved = SaveLoadMeta(str(folder / "saved"), "dcp", True, None, None)
        if step == 0:
            engine.save(saved)
        if step == 1:
            torch.distributed.barrier()
            engine.load(saved)
            coef = coefs[0]
    # A step that is skipped for its gradients moves nothing.
    fsdp_engine.fsdp2_clip_grad_norm = lambda *a, **k: math.inf
    samples = support.trajectories([4, 5], seed=9 + rank)
    engine.ppo_update(engine.actor.compute_advantages(samples))
    logged = exported()
    assert logged["update_successful"] == 0 and logged["variance_coef"] == coefs[-1]


def exported():
    from areal.utils import stats_tracker

    # Of this rank: AReaL's own sum over ranks fails where one of them has called no loss.
    prefix, logged = "ppo_actor/update/", stats_tracker.export_all()
    return {n.removeprefix(prefix): x for n, x in logged.items() if n.startswith(prefix)}


@pytest.mark.slow
def test_in_the_fsdp_engine(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=50, **sizes, **heads)).save_pretrained(tmp_path)
    run_on(2, tmp_path, train_with_fsdp, tmp_path)
