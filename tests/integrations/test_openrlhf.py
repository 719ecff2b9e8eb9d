"""OpenRLHF: the real `PolicyLoss`, and the real ppo_actor.py with the lines of the docstring."""

import importlib
import inspect
import sys
import types
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.trainers import ADAPTERS, Stubs, assert_same, case, formula, wheel_file

from r2vpo_kernels import RatioStats, VarianceConstraint


@pytest.fixture
def openrlhf(stand_in, monkeypatch):
    for name in ("openrlhf", "openrlhf.models", "openrlhf.models.utils", "openrlhf.models.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["openrlhf"].__path__ = sys.modules["openrlhf.models"].__path__ = []
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    wheel_file("openrlhf", "openrlhf/models/utils.py", "openrlhf.models.utils")
    real = wheel_file("openrlhf", "openrlhf/models/loss.py", "openrlhf.models.loss")
    return real.PolicyLoss, stand_in("openrlhf").R2VPOPolicyLoss


OPENRLHF = {
    "token mean": ({}, {}),
    "sample mean": ({"token_level_loss": False}, {}),
    "gspo": ({"policy_loss_type": "gspo"}, {}),
    "a global token mean": ({}, {"dp_size": 2, "batch_num_tokens": 40.0}),
    "a global sample mean": ({"token_level_loss": False}, {"dp_size": 2, "global_batch_size": 9}),
    "tokens clipped": ({"is_correction_level": "token", "is_correction_mode": "clip"}, {}),
    "tokens dropped": ({"is_correction_level": "token"}, {}),
    "sequences dropped": ({"is_correction_level": "seq"}, {}),
    "gspo corrected": ({"policy_loss_type": "gspo", "is_correction_level": "token"}, {}),
}


@pytest.mark.parametrize("name", OPENRLHF)
def test_openrlhf_without_penalty_and_clip_is_openrlhf(openrlhf, name):
    real, ours = openrlhf
    arguments, batch_info = OPENRLHF[name]
    arguments = arguments | {"is_correction_threshold": [0.9, 1.15]}
    # Not masked NaN: the real class cannot have that.
    logps, old, advantages, mask, rollout = (x.detach().nan_to_num() for x in case(6, 7))
    logps.requires_grad_()
    given = (logps, old, advantages, mask.double(), rollout)
    expected = real(clip_eps_low=1e9, clip_eps_high=1e9, **arguments)(*given, **batch_info)
    out = ours(variance_coef=0.0, **arguments)(*given, **batch_info)
    assert_same(out[0], expected[0], logps)
    assert out[1] == expected[1] == 0
    clip = {"clip_eps_low": 0.1, "clip_eps_high": 0.2}
    for options in (clip, clip | {"dual_clip": 1.3}):
        clipped = real(**options, **arguments)(*given, **batch_info)
        got = ours(policy_loss="clip", **options, **arguments)(*given, **batch_info)
        assert_same(got[0], clipped[0], logps)
        # OpenRLHF's share leaves out the dual clip, and has dropped tokens in it.
        if "dual_clip" not in options and "dropped" not in name:
            assert got[1] > 0
            torch.testing.assert_close(got[1], clipped[1], rtol=0, atol=1e-6, check_dtype=False)
    for mine, theirs in zip(out[2:], expected[2:], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    signature = inspect.signature(real.forward).parameters
    assert list(inspect.signature(ours.forward).parameters)[:6] == list(signature)[:6]


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_openrlhf_with_penalty_and_masked_nan(openrlhf, kind, correction):
    logps, old, advantages, mask, rollout = case()
    arguments = {"policy_loss_type": kind, "variance_coef": 1.5}
    weight, kept, behaviour = 1.0, mask, old
    if correction:
        low, high = 0.9, 1.2
        arguments |= {"is_correction_level": "token", "is_correction_threshold": [low, high]}
        if kind == "gspo":
            behaviour = rollout
        else:
            weight = torch.where(mask, (old - rollout).exp(), 0.0)
            kept = mask & (weight >= low) & (weight <= high)
            assert 0 < kept.sum() < mask.sum()
    loss, *rest = openrlhf[1](**arguments)(
        logps, old, advantages, mask.double(), rollout, dp_size=2, batch_num_tokens=11.0,
        global_batch_size=7,
    )  # fmt: skip
    if kind == "gspo":
        terms = formula(logps, behaviour, advantages, mask, coef=1.5, level="sequence")
        expected = (terms.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / 7 * 2
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)  # OpenRLHF's 1e-8 in it
        loss, expected = loss - loss.detach(), loss - loss.detach()
    else:
        terms = formula(logps, old, advantages, kept, coef=1.5, weight=weight)
        expected = terms.sum() / 11 * 2
    assert_same(loss, expected, logps)
    assert all(x is None or x.isfinite() for x in rest)


def test_openrlhf_bad_input(openrlhf):
    _, ours = openrlhf
    logps, old, advantages, mask, _ = case()
    with pytest.raises(ValueError, match=r"old_log_probs: got None, expected .*\(3, 5\)"):
        ours()(logps, None, advantages, mask)
    with pytest.raises(ValueError, match="rollout_log_probs: got None"):
        ours(is_correction_level="token")(logps, old, advantages, mask)
    with pytest.raises(ValueError, match="center: got 'group', expected 'one'"):
        ours(center="group")
    with pytest.raises(ValueError, match="anchor: got 'new', expected one of 'old', 'rollout'"):
        ours(anchor="new")
    with pytest.raises(ValueError, match="is_correction_level: got 'off', expected 'token' or"):
        ours(anchor="rollout")
    with pytest.raises(ValueError, match="is_correction_mode: got 'clip', expected 'mask'"):
        ours(anchor="rollout", is_correction_level="token", is_correction_mode="clip")
    with pytest.raises(ValueError, match="variance_target: got -1"):
        ours(variance_target=-1.0)
    with pytest.raises(ValueError, match=r"dual_clip: got 3\.0, expected None with policy_loss"):
        ours(dual_clip=3.0)
    with pytest.raises(ValueError, match="is_correction_gating: got 'tv'"):
        ours(is_correction_level="token", is_correction_gating="tv",
             is_correction_threshold=[0, 0.1])  # fmt: skip
    with pytest.raises(TypeError, match="variance_coeff"):
        ours(variance_coeff=1.0)


def test_an_unmet_need_is_named(openrlhf, monkeypatch, forget):
    monkeypatch.setattr(openrlhf[0], "__init__", lambda self, clip_eps_low=0.2: None)
    forget("r2vpo_kernels.integrations.openrlhf")
    found = r"openrlhf: got version 0.11.2, .* without the parameter clip_eps_high; .*tested with"
    with pytest.raises(ImportError, match=found):
        importlib.import_module("r2vpo_kernels.integrations.openrlhf")


@pytest.mark.parametrize("level", ["token", "seq"])
def test_the_anchor_may_be_the_rollout(openrlhf, level):
    """The correction's filter stays, its weight does not count twice."""
    logps, old, advantages, mask, rollout = case(6, 7)
    low, high = 0.98, 1.02
    loss, *rest = openrlhf[1](
        anchor="rollout", is_correction_level=level, is_correction_threshold=[low, high]
    )(logps, old, advantages, mask.double(), rollout, batch_num_tokens=11.0)
    log_ratio = torch.where(mask, old - rollout, 0.0)
    if level == "seq":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    kept = mask & (log_ratio.exp() >= low) & (log_ratio.exp() <= high)
    assert 0 < kept.sum() < mask.sum()
    terms = formula(logps, rollout, advantages, kept)
    assert_same(loss, terms.sum() / 11, logps)
    assert all(x.isfinite() for x in rest)


# In ppo_actor.py: what is there, and what the docstring adds after it.
LINES = {
    "from .utils import get_physical_gpu_id\n":
        "from r2vpo_kernels.integrations.openrlhf import R2VPOPolicyLoss as PolicyLoss",
    '        experience.info["ppo_kl"] = ppo_kl.detach()\n':
        "        experience.info |= self.actor_loss_fn.metrics()",
    "        client_states = client_states or {}\n":
        '        client_states["r2vpo"] = self.trainer.actor_loss_fn.state_dict()',
    "            vllm_engines=self.vllm_engines,\n        )\n":
        "        self.trainer.actor_loss_fn.load_state_dict("
        'self.checkpoint_states.get("r2vpo", {}), False)',
}  # fmt: skip


@pytest.fixture
def ppo_actor(monkeypatch, forget):
    """The real ppo_actor.py with these lines, and the adapter."""
    ours = "r2vpo_kernels.integrations."
    forget("openrlhf", "deepspeed", "flash_attn", "vllm", *(ours + name for name in ADAPTERS))
    stubs = Stubs("deepspeed", "flash_attn", "vllm")
    monkeypatch.setattr(sys, "meta_path", [stubs, *sys.meta_path])
    monkeypatch.setattr("ray.remote", lambda *args, **kw: args[0] if args else lambda c: c)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    real = importlib.import_module("openrlhf.trainer.ray.ppo_actor")
    adapter = importlib.import_module(ours + "openrlhf")
    source = Path(real.__file__).read_text()
    for after, line in LINES.items():
        assert source.count(after) == 1
        assert line in adapter.__doc__
        source = source.replace(after, f"{after}{line}\n")
    exec(compile(source, real.__file__, "exec"), vars(real))
    assert real.PolicyLoss is adapter.R2VPOPolicyLoss
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(real, "torch_dist_barrier_and_cuda_sync", lambda: None)
    return real


ACCUMULATED = 2


class Strategy:
    """One rank; two inner steps of the optimizer to each of the engine, as ZeRO's."""

    ring_attn_group = ds_device_mesh = None
    accumulated_gradient = ACCUMULATED

    def __init__(self, table, lr, args):
        self.optimizer = torch.optim.SGD([table], lr=lr)
        self.args = args
        self.calls, self.gradients = 0, []

    def backward(self, loss, model, optimizer):
        (loss / ACCUMULATED).backward()

    def optimizer_step(self, optimizer, model, scheduler, name):
        self.calls += 1
        if self.calls % ACCUMULATED == 0:
            table = self.optimizer.param_groups[0]["params"][0]
            self.gradients.append(table.grad.clone())
            self.optimizer.step()
            table.grad.zero_()
            self.optimizer.step()

    def is_rank_0(self):
        return True

    def all_reduce(self, status):
        return dict(status)

    def get_grad_norm(self, model):
        return 0.0


class Actor:
    def __init__(self, table):
        self.table = table

    def train(self):
        pass

    def __call__(self, sequences, action_mask, **kwargs):
        return self.table[sequences[:, 0]], Namespace()


def trainer_of(ppo_actor, loss, table, lr):
    args = Namespace(
        train=Namespace(dynamic_batch_enable=False),
        ds=Namespace(tensor_parallel_size=2),  # unshuffled
        algo=Namespace(kl=Namespace(use_loss=False)), actor=Namespace(entropy_coef=None),
    )  # fmt: skip
    trainer = object.__new__(ppo_actor.ActorPPOTrainer)
    scheduler = Namespace(get_last_lr=lambda: [lr])
    vars(trainer).update(
        args=args, actor=Actor(table), strategy=Strategy(table, lr, args), actor_loss_fn=loss,
        actor_optim=None, actor_scheduler=scheduler, ema_model=None, aux_loss=False, max_epochs=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return trainer


def test_the_dual_in_the_trainer(ppo_actor):
    """Real training steps, with accumulation: two optimizer steps over four micro-batches."""
    logps, old, advantages, mask, _ = (x.detach().nan_to_num() for x in case(8, 6))
    lr = 0.5
    loss = ppo_actor.PolicyLoss(variance_target=0.02)
    trainer = trainer_of(ppo_actor, loss, logps.clone().requires_grad_(), lr)
    experiences = [
        ppo_actor.Experience(
            sequences=torch.arange(8)[rows, None], action_mask=mask[rows],
            action_log_probs=old[rows], advantages=advantages[rows],
        )
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 8))
    ]  # fmt: skip
    trainer.replay_buffer = mock.MagicMock(sample_batch_size=1, collate_fn=lambda items: items[0])
    trainer.replay_buffer.__len__.return_value = len(experiences)
    trainer.replay_buffer.__getitem__.side_effect = experiences.__getitem__
    status = trainer.ppo_train(0.0)

    table, dual = logps, VarianceConstraint(0.02)
    for rows, gradient in zip((slice(0, 4), slice(4, 8)), trainer.strategy.gradients, strict=True):
        leaf = table.clone().requires_grad_()
        terms = formula(leaf, old, advantages, mask, coef=dual.coef.item())[rows]
        (expected,) = torch.autograd.grad(terms.sum() / mask[rows].sum(), leaf)
        # OpenRLHF's number of tokens is float32, divided by a power of two.
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
        d = ((table - old).exp() - 1)[rows][mask[rows]]
        sums = (mask[rows].sum().double(), d.sum(), (d**2).sum())
        dual.step(RatioStats(*(x.reshape(1) for x in sums)))
        table = table - lr * expected
    assert len(trainer.strategy.gradients) == 2
    assert loss.steps.constraint.coef.item() == pytest.approx(dual.coef.item(), rel=1e-6)
    assert loss.metrics()["step/ratio_var"].item() > 0
    assert {"ratio/var", "step/ratio_var", "variance_coef", "ppo_kl", "policy_loss"} <= set(status)


def test_a_penalty_without_effect_warns(ppo_actor):
    loss = ppo_actor.PolicyLoss()
    logps, _, advantages, mask, _ = (x.detach().nan_to_num() for x in case())
    logps.requires_grad_()
    optimizer = torch.optim.SGD([logps], lr=0.0)
    with pytest.warns(UserWarning, match=r"no effect. Pass anchor=\"rollout\""):
        for _ in range(4):
            loss(logps, logps.detach(), advantages, mask)[0].backward()
            optimizer.step()


def test_checkpoints_hold_the_dual(ppo_actor, tmp_path, monkeypatch):
    """The trainer's own save_checkpoint and init_model_from_pretrained."""
    adapter = sys.modules["r2vpo_kernels.integrations.openrlhf"]
    saved = ppo_actor.PolicyLoss(variance_target=0.02)
    saved.steps.constraint.load_state_dict({"coef": torch.tensor(0.7)})
    kept = []
    args = mock.MagicMock()
    args.ckpt.path = str(tmp_path)
    args.vllm.sync_backend = "gloo"
    (tmp_path / "_actor").mkdir()

    def actor(loss, **changes):
        result = object.__new__(ppo_actor.PolicyModelActor)
        vars(result).update(
            strategy=mock.MagicMock(args=args), disable_ds_ckpt=False, save_hf_ckpt=False,
            actor=mock.MagicMock(), trainer=Namespace(actor_loss_fn=loss), **changes,
        )  # fmt: skip
        return result

    saving = actor(saved)
    saving.strategy.save_ckpt = lambda *args, **kw: kept.append(args[5])
    saving.save_checkpoint("tag", {"episode": 3})
    assert kept[0]["episode"] == 3
    for states, coef in ((kept[0], 0.7), ({"episode": 3}, 0.5)):
        sys.modules["r2vpo_kernels.integrations.hook"]._steps.clear()
        loss = adapter.R2VPOPolicyLoss(variance_target=0.02)
        for name in ("Actor", "get_tokenizer"):
            monkeypatch.setattr(ppo_actor, name, mock.MagicMock())
        monkeypatch.setattr(
            ppo_actor,
            "ActorPPOTrainer",
            lambda *args, loss=loss, **kw: Namespace(actor_loss_fn=loss),
        )
        loading = actor(None, _setup_distributed=lambda strategy: None)
        loading.strategy.load_ckpt.return_value = ("path", states)
        loading.strategy.prepare.return_value = (loading.actor, None, None)
        args.train.enable_ema = args.ds.enable_sleep = False
        loading.init_model_from_pretrained(loading.strategy, "model")
        assert loss.steps.constraint.coef.item() == pytest.approx(coef)
