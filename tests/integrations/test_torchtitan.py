"""torchtitan: its real `BaseLoss`, `ChunkedLossWrapper` and DAPO loss."""

import importlib

import pytest
import torch
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
            ratio = "loss/ratio_mean"
            torch.testing.assert_close(logged[ratio], metrics[ratio], **close)


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


def test_torchtitan_bad_input(titan):
    ours, _ = titan
    logits, labels, batch, _ = titan_case()
    with pytest.raises(ValueError, match="generator_logprobs: got None"):
        ours.Config().build()(logits, labels, **batch | {"generator_logprobs": None})
    with pytest.raises(ValueError, match="center: got 'group'"):
        ours.Config(center="group").build()(logits, labels, **batch)
    with pytest.raises(ValueError, match="ratio_level: got 'sequence', expected one of 'token'"):
        ours.Config(ratio_level="sequence").build()
