"""SkyRL: its contract, what a registered policy loss is given and calls."""

import dataclasses
import math
from argparse import Namespace

import pytest
import torch
from support.trainers import CLIP, assert_same, case, formula


@dataclasses.dataclass
class AlgorithmConfig:
    policy_loss_type: str = "regular"
    loss_reduction: str = "token_mean"
    max_seq_len: int | None = None
    off_policy_correction: object = None


@pytest.fixture
def skyrl(stand_in):
    registry = {}

    def apply_off_policy_correction(loss, old, rollout, mask, config):
        if config is None or rollout is None:
            return loss, mask, {}
        weight = (old - rollout).exp()
        keep = mask * (weight < config)
        return loss * weight, keep, {"is_ratio_mean": 1.0}

    ppo_utils = {
        "apply_off_policy_correction": apply_off_policy_correction,
        "PolicyLossRegistry": Namespace(register=registry.__setitem__),
    }
    adapter = stand_in(
        "skyrl",
        skyrl__backends__skyrl_train__utils__ppo_utils=ppo_utils,
        skyrl__train__config={"AlgorithmConfig": AlgorithmConfig},
    )
    return adapter.R2VPOAlgorithmConfig, registry["r2vpo"]


@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "seq_mean_token_sum_norm"])
def test_skyrl(skyrl, reduction, level, cap):
    """Advantages come divided by the mini-batch's denominator; micro-batches sum to the whole."""
    config_class, loss_fn = skyrl
    logps, old, advantages, mask, rollout = case(4, 6, seed=5)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    denominator = 4 * (lengths if reduction == "sequence_mean" else 50)
    config = config_class(
        loss_reduction=reduction, max_seq_len=50, mini_batch_size=4, variance_coef=1.5,
        ratio_level=level, off_policy_correction=cap,
    )  # fmt: skip
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        loss, logged = loss_fn(
            logps[rows], old[rows], (advantages / denominator)[rows], config=config,
            loss_mask=mask[rows].double(), rollout_logprobs=rollout[rows],
        )  # fmt: skip
        total = total + loss
        assert all(isinstance(x, float) and math.isfinite(x) for x in logged.values())
        assert {"ratio_min", "ratio_max", "ratio_var"} <= set(logged)
    kept, weight = mask, 1.0
    if cap:
        weight = torch.where(mask, (old - rollout).exp(), 0.0)
        kept = mask & (weight < cap)
        assert kept.sum() < mask.sum()
    terms = formula(logps, old, advantages, kept, coef=1.5, level=level, weight=weight)
    assert_same(total, (terms / denominator).sum(), logps)


@pytest.mark.parametrize(("options", "coef"), [({}, 0.5), (CLIP, 0.0)], ids=["ratio", "clip"])
def test_skyrl_by_default(skyrl, options, coef):
    config_class, loss_fn = skyrl
    logps, old, advantages, mask, _ = case(4, 6, seed=5)
    denominator = 4 * mask.sum(-1, keepdim=True).clamp(min=1)
    loss, _ = loss_fn(
        logps, old, advantages / denominator, config=config_class(mini_batch_size=4, **options),
        loss_mask=mask.double(),
    )  # fmt: skip
    terms = formula(logps, old, advantages, mask, coef=coef, clip=options.get("clip_range"))
    assert_same(loss, (terms / denominator).sum(), logps)


def test_skyrl_bad_input(skyrl):
    config_class, loss_fn = skyrl
    logps, old, advantages, mask, _ = case()
    assert config_class().policy_loss_type == "r2vpo"

    def error(match, old=old, **changes):
        config = config_class(**{"mini_batch_size": 3} | changes)
        with pytest.raises(ValueError, match=match):
            loss_fn(logps, old, advantages, config=config, loss_mask=mask)

    error("old_log_probs: got None", old=None)
    error("center: got 'group'", center="group")
    error("mini_batch_size: got 0", mini_batch_size=0)
    error("loss_reduction: got 'token_mean', expected one of 'sequence_mean'",
          loss_reduction="token_mean")  # fmt: skip
