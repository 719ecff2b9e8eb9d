"""OpenRLHF: the real `PolicyLoss`, loaded as a file from its wheel."""

import inspect
import sys
import types

import pytest
import torch
from support.trainers import assert_same, case, formula, wheel_file


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
        ours(center="group")(logps, old, advantages, mask)
    with pytest.raises(ValueError, match=r"dual_clip: got 3.0, expected it unset"):
        ours(dual_clip=3.0)
    with pytest.raises(ValueError, match="is_correction_gating: got 'tv'"):
        ours(is_correction_level="token", is_correction_gating="tv",
             is_correction_threshold=[0, 0.1])  # fmt: skip
    with pytest.raises(TypeError, match="variance_coeff"):
        ours(variance_coeff=1.0)
