"""torchtitan: its real `BaseLoss`, `ChunkedLossWrapper`, DAPO loss and sum over micro-batches."""

import importlib
import math
import sys
from unittest.mock import MagicMock

import pytest
import torch
import torchtitan.components.loss
from support.trainers import CLIP, NAN, formula, wheel_file


@pytest.fixture(scope="module")
def titan():
    adapter = importlib.import_module("r2vpo_kernels.integrations.torchtitan")
    return adapter.R2VPOLoss, wheel_file("torchtitan", "rl/losses/dapo.py", "dapo").DAPOLoss


def titan_case():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, 9, generator=g).requires_grad_()
    labels = torch.randint(0, 9, (2, 6), generator=g)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    labels[~mask] = -100
    old = -2.0 + 0.3 * torch.randn(2, 6, generator=g)
    old[0, 2], old[1, 3] = NAN, -torch.inf
    advantages = torch.randn(2, 6, generator=g) * mask
    batch = {"generator_logprobs": old, "advantages": advantages, "loss_mask": mask}
    return logits, labels, batch, mask & old.isfinite()


@pytest.mark.parametrize("tokens", [None, 0, 17])
def test_torchtitan(titan, tokens):
    ours, real = titan
    logits, labels, batch, mask = titan_case()
    wide = ours.Config(variance_coef=0.0).build()
    # Logs of ratios stay below the real loss's own clamp.
    unclipped = real.Config(ratio_clip_low=1e9, ratio_clip_high=1e9).build()
    coefs = (wide, 0.0, unclipped), (ours.Config(variance_coef=1.5).build(), 1.5, None)
    for loss_fn, coef, theirs in coefs:
        loss, logged = loss_fn(logits, labels, tokens, **batch)
        log_p = logits.double().log_softmax(-1)
        logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        old, advantages = batch["generator_logprobs"].double(), batch["advantages"].double()
        expected = formula(logps, old, advantages, mask, coef=coef).sum() / max(tokens or 1, 1)
        (gradient,) = torch.autograd.grad(loss, logits)
        (truth,) = torch.autograd.grad(expected, logits)
        # float32: ten terms below 10, each of some ten roundings.
        close = {"rtol": 0, "atol": 1000 * 2**-24}
        torch.testing.assert_close(loss, expected.float(), **close)
        torch.testing.assert_close(gradient, truth, **close)
        assert truth.abs().max() > 100 * close["atol"]
        assert all(x.dim() == 0 and x.isfinite() for x in logged.values())
        assert logged["loss/mean"] == loss
        if theirs is not None:
            loss, metrics = theirs(logits, labels, tokens, **batch)
            torch.testing.assert_close(loss, expected.float(), **close)
            shared = set(logged) & set(metrics)
            assert {"loss/ratio_mean", "trainer/entropy/mean", "bit_wise/logprob_diff/max"} < shared
            for name in shared:
                torch.testing.assert_close(logged[name], metrics[name], **close)


def test_torchtitan_clipped_is_dapo(titan):
    ours, real = titan
    logits, labels, batch, _ = titan_case()
    theirs = real.Config(ratio_clip_low=0.1, ratio_clip_high=0.2).build()
    results = [f(logits, labels, 17, **batch) for f in (ours.Config(**CLIP).build(), theirs)]
    (loss, logged), (expected, _) = results
    close = {"rtol": 0, "atol": 1000 * 2**-24}
    torch.testing.assert_close(loss, expected, **close)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, **close)
    assert logged["loss/clip_low_frac"] + logged["loss/clip_high_frac"] > 0


def test_torchtitan_in_chunks(titan):
    """The trainer's ChunkedLossWrapper cuts all inputs along the sequence and sums."""
    from torchtitan.components.loss import ChunkedLossWrapper

    loss_fn = titan[0].Config(variance_coef=1.5, log_ratio_clamp=0.3)
    logits, labels, batch, _ = titan_case()
    torch.manual_seed(0)
    head = torch.nn.Linear(9, 9, bias=False)
    wrapper = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=loss_fn).build()
    wrapper.set_lm_head(head)
    hidden = logits.detach().requires_grad_()
    loss, logged = wrapper(hidden, labels, 8, **batch)
    loss.backward()
    grads = hidden.grad.clone(), head.weight.grad.clone()
    whole, expected = loss_fn.build()(head(logits), labels, 8, **batch)
    truth = torch.autograd.grad(whole, [logits, head.weight])
    close = {"rtol": 0, "atol": 1000 * 2**-24}
    torch.testing.assert_close(loss, whole, **close)
    torch.testing.assert_close(grads, truth, **close)
    torch.testing.assert_close(logged, expected, **close)
    assert 0 < expected["loss/ratio_clamped_frac"] < 1


def test_torchtitan_in_one_packed_row(titan, monkeypatch):
    """As after 0.3.0: logits (T, V), whose log-probs its own function gives as (T,)."""
    logits, labels, batch, _ = titan_case()
    loss_fn = titan[0].Config(variance_coef=1.5).build()
    loss, logged = loss_fn(logits, labels, 17, **batch)
    by_rows = torchtitan.components.loss.compute_logprobs

    def by_token(logits, labels, *, return_entropy=False):
        assert logits.dim() == 2 and labels.dim() == 1
        found = by_rows(logits[None], labels[None], return_entropy=return_entropy)
        return tuple(x[0] for x in found)

    monkeypatch.setattr(sys.modules[titan[0].__module__], "compute_logprobs", by_token)
    flat = {name: x.flatten() for name, x in batch.items()}
    packed, logged_packed = loss_fn(logits.flatten(0, 1), labels.flatten(), 17, **flat)
    torch.testing.assert_close(packed, loss)
    torch.testing.assert_close(logged_packed, logged)
    (gradient,) = torch.autograd.grad(loss, logits)
    (gradient_packed,) = torch.autograd.grad(packed, logits)
    torch.testing.assert_close(gradient_packed, gradient)


@pytest.fixture
def combine(monkeypatch):
    """The controller's sum over micro-batches; its package imports the engine."""
    for name in ("rl", "rl.observability", "rl.rollout", "rl.rollout.types"):
        monkeypatch.setitem(sys.modules, f"torchtitan.experiments.{name}", MagicMock())
    file = wheel_file("torchtitan", "rl/controller_metrics.py", "controller_metrics")
    return file.combine_microbatch_metrics


def test_torchtitan_dual(titan, combine):
    """Two steps of two micro-batches in chunks, and a validation between: λ moves once a step, by
    all chunks, and arrives unscaled in what the controller logs."""
    from torchtitan.components.loss import ChunkedLossWrapper

    logits, labels, batch, mask = titan_case()
    loss_fn = titan[0].Config(variance_coef=0.7, variance_target=0.3, variance_coef_lr=0.2)
    torch.manual_seed(0)
    head = torch.nn.Linear(9, 9, bias=False)
    wrapper = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=loss_fn).build()
    wrapper.set_lm_head(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    coef = 0.7
    for _ in range(2):
        log_p = head(logits).log_softmax(-1).detach().double()
        logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        d = torch.where(mask, logps - batch["generator_logprobs"], 0.0).expm1()
        v = (d.square().sum() / mask.sum()).item()
        assert 0.05 < abs(v / 0.3 - 1) < 0.9
        found = []
        for row in (slice(0, 1), slice(1, 2)):
            rows = {name: x[row] for name, x in batch.items()}
            loss, logged = wrapper(logits[row], labels[row], 8, **rows)
            loss.backward()
            found.append({name: x.item() for name, x in logged.items()})
        with torch.no_grad():
            wrapper(logits[row].detach(), labels[row], 8, **rows)
        combined = combine(found)
        assert combined["loss/variance_coef/max"] == pytest.approx(coef, rel=1e-6)
        optimizer.step()
        coef *= math.exp(0.2 * min(v / 0.3 - 1, 1))
        assert wrapper.loss_fn.steps.constraint.coef.item() == pytest.approx(coef, rel=1e-5)
    assert combined["loss/step/ratio_var/max"] > 0


def test_torchtitan_names_what_it_lacks(titan, monkeypatch, forget):
    name = "r2vpo_kernels.integrations.torchtitan"
    forget(name)
    monkeypatch.setattr(torchtitan.components.loss, "compute_logprobs", lambda logits, labels: None)
    with pytest.raises(ImportError, match=r"without the parameter return_entropy; .* tested with"):
        importlib.import_module(name)


def test_torchtitan_bad_input(titan):
    ours, _ = titan
    logits, labels, batch, _ = titan_case()
    with pytest.raises(ValueError, match="generator_logprobs: got None"):
        ours.Config().build()(logits, labels, **batch | {"generator_logprobs": None})
    with pytest.raises(ValueError, match="center: got 'group'"):
        ours.Config(center="group").build()
    with pytest.raises(ValueError, match="ratio_level: got 'sequence', expected one of 'token'"):
        ours.Config(ratio_level="sequence").build()
    with pytest.raises(ValueError, match="clip_range: got None, expected ε"):
        ours.Config(policy_loss="clip").build()
    with pytest.raises(ValueError, match="variance_coef_min: got 0"):
        ours.Config(variance_target=0.1, variance_coef_min=0.0).build()
