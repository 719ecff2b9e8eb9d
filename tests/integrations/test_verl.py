"""The policy loss "r2vpo" in the real verl: registry, `agg_loss`, `ppo_loss`, configuration."""

import importlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import verl.trainer.ppo.core_algos as core_algos
from hydra import compose, initialize_config_module
from support.trainers import NAN, assert_same, case, formula
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from r2vpo_kernels.integrations.verl import R2VPOPolicyLossConfig

MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)  # fmt: skip


def actor(policy_loss=None, mode="token-mean", **changes):
    loss = policy_loss or R2VPOPolicyLossConfig(variance_coef=1.5)
    return ActorConfig(
        strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, policy_loss=loss,
        loss_agg_mode=mode, **changes,
    )  # fmt: skip


def call(name, config, logps, old, advantages, mask, weights=None):
    return core_algos.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=logps,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )


def token_weights(mode, mask, tokens, sequences, scale):
    """What each token's loss is multiplied by."""
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return {
        "token-mean": 1 / tokens,
        "token-sum": 1.0,
        "seq-mean-token-sum": 1 / sequences,
        "seq-mean-token-mean": 1 / (sequences * lengths.double()),
        "seq-mean-token-sum-norm": 1 / (sequences * scale),
    }[mode]


@pytest.mark.parametrize("mode", MODES)
def test_without_penalty_and_clip_it_is_vanilla(mode):
    # Not masked NaN: vanilla cannot have that.
    logps, old, advantages, mask, rollout = (x.detach().nan_to_num() for x in case(5, 7))
    logps.requires_grad_()
    weights = (old - rollout).exp()
    unreachable = {"clip_ratio_low": 1e9, "clip_ratio_high": 1e9, "clip_ratio_c": 1e9}
    for info in ({}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9,
                      "loss_scale_factor": 100}):  # fmt: skip
        config = actor(R2VPOPolicyLossConfig(variance_coef=0.0), mode, **unreachable)
        config.global_batch_info.update(info)
        batch = (logps, old, advantages, mask.bool(), weights)
        assert_same(call("r2vpo", config, *batch)[0], call("vanilla", config, *batch)[0], logps)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_and_micro_batches_sum_to_the_formula(mode, level):
    """Two ranks with micro-batches of unequal size, NaN at masked tokens. verl averages the ranks'
    gradients, and multiplies each loss by their number."""
    logps, old, advantages, mask, rollout = case(7, 6, seed=1)
    weights = torch.where(mask, (old - rollout).exp(), NAN)
    config = actor(R2VPOPolicyLossConfig(variance_coef=1.5, ratio_level=level), mode)
    tokens, sequences, scale = int(mask.sum()), 6, 50
    config.global_batch_info.update(
        dp_size=2, batch_num_tokens=tokens, global_batch_size=sequences, loss_scale_factor=scale
    )
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 7)):
        batch = [x[rows] for x in (logps, old, advantages, mask, weights)]
        loss, metrics = call("r2vpo", config, *batch)
        total = total + loss / 2
        assert all(x.dim() == 0 and x.isfinite() for x in metrics.values())
    s = torch.where(mask, weights, 0.0)
    terms = formula(logps, old, advantages, mask, coef=1.5, level=level, weight=s)
    expected = (terms * token_weights(mode, mask, tokens, sequences, scale)).sum()
    assert_same(total, expected, logps)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vanilla", {"policy_loss": "clip", "dual_clip": 1.3}),
        ("gspo", {"policy_loss": "clip", "ratio_level": "sequence"}),
        ("cispo", {"policy_loss": "cispo"}),
    ],
)
def test_clip_is_that_of_verl(theirs, ours):
    logps, old, advantages, mask, rollout = (x.detach().nan_to_num() for x in case(9, 7))
    logps.requires_grad_()
    weights = (old - rollout).exp()
    # Ratios of whole sequences on both sides of one. Their tokens have one advantage and weight:
    # only then has verl's gspo the gradient of the sequence's ratio.
    old = old - torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)[:, None]
    advantages, weights = (x[:, :1].expand_as(x) for x in (advantages, weights))
    clip = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2, "clip_ratio_c": 1.3}
    loss = R2VPOPolicyLossConfig(clip_range=[0.1, 0.2], **ours)
    config = actor(loss, "seq-mean-token-mean", **clip)
    batch = (logps, old, advantages, mask.bool(), weights)
    (got, metrics), (expected, logged) = (call(n, config, *batch) for n in ("r2vpo", theirs))
    assert_same(got, expected, logps)
    low, high = metrics["actor/clip/low"].item(), metrics["actor/clip/high"].item()
    assert low > 0 and high > 0
    share = logged["actor/pg_clipfrac"] + logged["actor/pg_clipfrac_lower"]
    assert low + high == pytest.approx(share, rel=1e-6)


def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


@pytest.mark.parametrize("mode", MODES)
def test_ppo_loss_of_the_worker(mode):
    """As the engines call it: nested tensors, log-probs of prompt and response one token early."""
    prompts, responses = [2, 3, 1], [4, 2, 3]
    g = torch.Generator().manual_seed(2)

    def draw(sizes, scale=1.0):
        return [scale * torch.randn(n, generator=g, dtype=torch.float64) for n in sizes]

    old, advantages = draw(responses), draw(responses)
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1], [0, 1, 1])]
    totals = [p + r for p, r in zip(prompts, responses, strict=True)]
    scored = torch.cat(draw(totals, 0.5)).requires_grad_()
    starts = [sum(totals[: i + 1]) - r - 1 for i, r in enumerate(responses)]
    fields = {
        "prompts": nested(torch.zeros(n, dtype=torch.long) for n in prompts),
        "responses": nested(torch.zeros(n, dtype=torch.long) for n in responses),
        "response_mask": nested(masks),
        "old_log_probs": nested(old),
        "advantages": nested(advantages),
    }
    data = TensorDict(fields, batch_size=[3])
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=7, global_batch_size=3)
    config = actor(mode=mode, loss_scale_factor=50)
    log_probs = torch.nested.nested_tensor_from_jagged(
        scored, torch.tensor([0, *torch.tensor(totals).cumsum(0)])
    )
    loss, metrics = ppo_loss(config, {"log_probs": log_probs}, data)
    expected = 0.0
    for i, r in enumerate(responses):
        mask = masks[i][None] == 1
        logps = scored[starts[i] : starts[i] + r]
        terms = formula(logps[None], old[i][None], advantages[i][None], mask, coef=1.5)
        expected = expected + (terms * token_weights(mode, mask, 7, 3, 50)).sum()
    assert_same(loss, expected, scored)
    names = {"actor/pg_loss", "actor/ratio/mean", "actor/ratio/var", "actor/kl/old"}
    assert names <= set(metrics) and "actor/loss/policy" not in metrics


def test_settings_come_by_verls_own_configuration():
    """The trainer's YAML with the lines of the docstring; without them the defaults."""
    target = "r2vpo_kernels.integrations.verl.R2VPOPolicyLossConfig"
    prefix = "actor_rollout_ref.actor"
    basics = [f"{prefix}.policy_loss.loss_mode=r2vpo", f"{prefix}.ppo_micro_batch_size_per_gpu=1"]
    ours = [
        f"{prefix}.policy_loss._target_={target}",
        f"+{prefix}.policy_loss.variance_coef=0.75",
        f"+{prefix}.policy_loss.ratio_level=sequence",
    ]
    clip = [
        *ours[:2], f"+{prefix}.policy_loss.policy_loss=clip",
        f"+{prefix}.policy_loss.clip_range=[0.1,0.2]",
    ]  # fmt: skip
    case_ = [x.detach().nan_to_num() for x in case()]
    logps, old, advantages, mask = case_[0], *case_[1:3], case_[3].bool()
    losses = []
    with initialize_config_module("verl.trainer.config", version_base=None):
        for overrides in (basics, basics + ours, basics + clip):
            composed = compose("ppo_trainer", overrides=overrides)
            config = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
            losses.append(call("r2vpo", config, logps, old, advantages, mask)[0])
    assert isinstance(config.policy_loss, R2VPOPolicyLossConfig)
    assert config.policy_loss.clip_cov_ratio == PolicyLossConfig().clip_cov_ratio
    expected = [
        formula(logps, old, advantages, mask).sum() / mask.sum(),
        formula(logps, old, advantages, mask, coef=0.75, level="sequence").sum() / mask.sum(),
        formula(logps, old, advantages, mask, coef=0.75, clip=(0.1, 0.2)).sum() / mask.sum(),
    ]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_dual_and_step_metrics_by_verls_own_configuration(tmp_path):
    """Micro-batches of a mini-batch, then the optimizer's step: λ moves once, and is kept."""
    target = "r2vpo_kernels.integrations.verl.R2VPOPolicyLossConfig"
    prefix, file = "actor_rollout_ref.actor", tmp_path / "lambda.json"
    overrides = [
        f"{prefix}.policy_loss.loss_mode=r2vpo", f"{prefix}.ppo_micro_batch_size_per_gpu=1",
        f"{prefix}.policy_loss._target_={target}",
        f"+{prefix}.policy_loss.variance_target=0.05",
        f"+{prefix}.policy_loss.variance_coef_file={file}",
    ]  # fmt: skip
    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose("ppo_trainer", overrides=overrides)
    config = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    logps, old, advantages, mask, _ = case(6, 5)
    for rows in (slice(0, 2), slice(2, 6)):
        loss, metrics = call("r2vpo", config, *(x[rows] for x in (logps, old, advantages, mask)))
        terms = formula(logps[rows], old[rows], advantages[rows], mask[rows])
        assert_same(loss, terms.sum() / mask[rows].sum(), logps)
        assert metrics["actor/variance_coef"] == 0.5 and metrics["actor/step/ratio_var"] == 0
    d = (logps - old)[mask].expm1()
    # A loss that is not trained on, as in validation, does not count.
    with torch.no_grad():
        call("r2vpo", config, logps, old - 1, advantages, mask)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
    coef = 0.5 * torch.exp(0.1 * ((d**2).mean() / 0.05 - 1).clamp(max=1)).item()
    assert json.loads(file.read_text())["variance_coef"] == pytest.approx(coef, rel=1e-6)
    loss, metrics = call("r2vpo", config, logps, old, advantages, mask)
    assert metrics["actor/variance_coef"].item() == pytest.approx(coef, rel=1e-6)
    variance = metrics["actor/step/ratio_var"].item()
    assert variance == pytest.approx(d.var(unbiased=False).item(), rel=1e-6)
    terms = formula(logps, old, advantages, mask, coef=metrics["actor/variance_coef"].item())
    assert_same(loss, terms.sum() / mask.sum(), logps)


def test_a_penalty_without_effect_names_verls_settings():
    logps, _, advantages, mask, _ = case()
    config = actor(R2VPOPolicyLossConfig(variance_target=0.03))
    with pytest.warns(
        UserWarning, match=r"exactly 1.*rollout_correction\.bypass_mode=True.*ppo_epo"
    ):
        for _ in range(4):
            call("r2vpo", config, logps, logps.detach(), advantages, mask)
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()


def test_rejection_that_bypass_mode_ignores_is_refused():
    """By the lines of the docstring, in a worker too, whose configuration was pickled."""
    target = "r2vpo_kernels.integrations.verl.R2VPOPolicyLossConfig"
    prefix = "actor_rollout_ref.actor"
    lines = [
        f"{prefix}.policy_loss._target_={target}", f"{prefix}.ppo_micro_batch_size_per_gpu=1",
        "algorithm.rollout_correction.bypass_mode=True",
        f"+{prefix}.policy_loss.rollout_correction=${{algorithm.rollout_correction}}",
    ]  # fmt: skip
    rejecting = [*lines, "algorithm.rollout_correction.rollout_rs=token_k1"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config, refused = (compose("ppo_trainer", overrides=o) for o in (lines, rejecting))
    omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    in_worker = pickle.loads(pickle.dumps(refused.actor_rollout_ref))
    for actor_config in (refused.actor_rollout_ref.actor, in_worker.actor):
        with pytest.raises(Exception, match=r"rollout_correction\.rollout_rs: got 'token_k1'"):
            omega_conf_to_dataclass(actor_config)


def test_bad_input():
    logps, old, advantages, mask, _ = case()
    with pytest.raises(ValueError, match=r"old_log_prob: got None, expected .*\(3, 5\)"):
        call("r2vpo", actor(), logps, None, advantages, mask)
    for options, match in (
        ({"center": "group"}, "center: got 'group', expected 'one'"),
        ({"policy_loss": "clip"}, "clip_range: got None, expected ε"),
        ({"variance_coef": -1.0}, "variance_coef: got -1"),
        ({"variance_target": 0.02, "variance_coef_min": 0.0}, "variance_coef_min: got 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            R2VPOPolicyLossConfig(**options)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
        core_algos.get_policy_loss_fn("r2vpo")(
            old, logps, advantages, mask, loss_agg_mode="mean", config=actor()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{}, {"VERL_USE_EXTERNAL_PLUGINS": "none",
          "VERL_USE_EXTERNAL_MODULES": "r2vpo_kernels.integrations.verl"}],
    ids=["plugin", "external module"],
)  # fmt: skip
def test_verl_finds_it(environment):
    code = "from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('r2vpo'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "r2vpo_policy_loss" in done.stdout


def test_a_verl_that_lacks_something_is_named(monkeypatch, forget):
    forget("r2vpo_kernels.integrations.verl")
    monkeypatch.setattr(core_algos, "agg_loss", lambda loss_mat, loss_mask, loss_agg_mode: None)
    message = (
        r"verl: got version 0\.9\.1, which has .* without the parameter dp_size; .* with 0\.9\.1"
    )
    with pytest.raises(ImportError, match=message):
        importlib.import_module("r2vpo_kernels.integrations.verl")
