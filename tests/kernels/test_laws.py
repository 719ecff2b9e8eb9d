"""Laws that hold whatever the values: shifts, splits, slices, masks, repetition."""

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.harness import check_case, check_gradient, check_values, truth_of
from support.strategies import IGNORE, SUPPORTS, cases, sampling_mask_of
from support.tolerance import U

from r2vpo_kernels import (
    RatioStats,
    SamplingMask,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    token_logps,
)
from r2vpo_kernels.checks import REDUCTIONS
from r2vpo_kernels.reference import Support

PER_TOKEN = (
    "old_logps", "advantages", "importance_weights", "ref_logps", "variance_coef", "temperature",
)  # fmt: skip
AGGREGATED = [r for r in REDUCTIONS if r != "none"]


def run(logits, labels, backend, **keywords):
    leaf = logits.detach().clone().requires_grad_()
    out = r2vpo_loss(leaf, labels, backend=backend, **keywords)
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    return out, gradient


def draw(device, batch=4, length=5, vocabulary=64, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(batch, length, vocabulary, generator=g)).to(dtype)
    labels = torch.randint(0, vocabulary, (batch, length), generator=g)
    logps = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    old_logps = logps + 0.3 * torch.randn(batch, length, generator=g)
    advantages = torch.randn(batch, generator=g)
    mask = torch.rand(batch, length, generator=g) < 0.7
    return tuple(x.to(device) for x in (logits, labels, old_logps, advantages, mask))


@given(cases(dtype=torch.float32), st.sampled_from([-8.0, 0.5, 1024.0]))
def test_shifting_a_row_of_logits_changes_nothing(backend, device, case, shift):
    """The truth stays, and both results are within the budget of it; kernels keep every bit."""
    logits, labels, keywords = case.tensors(device)
    # A coarse grid: the shift itself is exact in float32.
    logits = (logits * 256).round() / 256
    before, after = (truth_of(z, labels, keywords, backend) for z in (logits, logits + shift))
    torch.testing.assert_close(after.gradient, before.gradient, rtol=1e-8, atol=1e-10)
    for z in (logits, logits + shift):
        check_case(z, labels, keywords, backend)
    if backend != "eager":
        # One layout for both, as rows that are not whole words are peeled by it.
        results = [run(z.clone(), labels, backend, **keywords) for z in (logits, logits + shift)]
        (out, gradient), (shifted, same) = results
        assert torch.equal(out.logps, shifted.logps) and torch.equal(gradient, same)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("reduction", AGGREGATED)
@pytest.mark.parametrize("center", ["one", "group", "given"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_sum_to_the_batch(backend, device, reduction, center, level):
    """Loss, gradient and statistics; groups may be split too where their means are given."""
    logits, labels, old_logps, advantages, mask = draw(device, batch=6)
    logits = logits.double() if backend == "eager" else logits
    group_ids = torch.tensor([0, 1, 0, 1, 1, 0], device=device)
    valid = mask.sum(1)
    normalizer = {"token-mean": valid.sum(), "seq-mean-token-sum-norm": 5 * (valid > 0).sum()}
    common = {
        "reduction": reduction,
        "ratio_level": level,
        "num_groups": 2,
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
        "normalizer": normalizer.get(reduction, (valid > 0).sum()).float(),
    }

    def on(rows, center):
        return run(
            logits[rows], labels[rows], backend, old_logps=old_logps[rows],
            advantages=advantages[rows], mask=mask[rows], group_ids=group_ids[rows],
            ref_logps=old_logps[rows] - 0.1, center=center, **common,
        )  # fmt: skip

    everything = torch.arange(6)
    whole, gradient = on(everything, "one" if center == "one" else "group")
    if center == "one":
        parts, given_ = [[0, 3], [1], [2, 4, 5]], "one"
    elif center == "group":
        parts, given_ = [[0, 2, 5], [1, 3, 4]], "group"
    else:
        parts, given_ = [[0, 3], [1], [2, 4, 5]], whole.stats.mean
    results = [on(torch.tensor(rows), given_) for rows in parts]

    scale = 1e-12 if backend == "eager" else 100 * U
    torch.testing.assert_close(
        sum(out.loss for out, _ in results), whole.loss, rtol=0, atol=scale * 10
    )
    for rows, (_, part) in zip(parts, results, strict=True):
        torch.testing.assert_close(part, gradient[rows], rtol=0, atol=scale)
    total = results[0][0].stats
    for out, _ in results[1:]:
        total = total + out.stats
    for name in ("weight", "d_sum", "d_sq_sum"):
        ours, theirs = getattr(total, name), getattr(whole.stats, name)
        torch.testing.assert_close(ours, theirs, rtol=scale, atol=scale)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("center", ["one", "group"])
def test_a_clip_that_no_ratio_reaches_is_none(backend, device, center, level):
    logits, labels, old_logps, advantages, mask = draw(device)
    common = {
        "old_logps": old_logps, "advantages": advantages, "mask": mask, "variance_coef": 0.5,
        "center": center, "ratio_level": level,
    }  # fmt: skip
    plain, gradient = run(logits, labels, backend, **common)
    for dual_clip in None, 1e9:
        clip = {"policy_loss": "clip", "clip_range": (1.0, 1e9), "dual_clip": dual_clip}
        out, same = run(logits, labels, backend, **common, **clip)
        assert torch.equal(out.loss, plain.loss) and torch.equal(same, gradient)
        assert out.metrics()["clip/low"] == out.metrics()["clip/high"] == 0


def test_on_policy_all_policy_losses_have_the_same_gradient(backend, device):
    logits, labels, _, advantages, mask = draw(device)
    common = {"old_logps": None, "advantages": advantages, "mask": mask, "variance_coef": 0.5}
    _, gradient = run(logits, labels, backend, **common)
    for policy_loss in "clip", "cispo":
        clip = {"policy_loss": policy_loss, "clip_range": 0.2}
        assert torch.equal(run(logits, labels, backend, **common, **clip)[1], gradient)


# Of a token with an advantage of ±1 and this ratio, with ε = (0.2, 0.3) and c = 2: "clip" and
# "cispo" scale the gradient of the log-prob by these, and the metrics count the token as clipped.
CLIPPED = [
    # advantage, ratio, factor of "clip", of "cispo", low and high of "clip", and of "cispo"
    (1, 0.5, 0.5, 0.8, (0, 0), (1, 0)),
    (1, 0.9, 0.9, 0.9, (0, 0), (0, 0)),
    (1, 1.2, 1.2, 1.2, (0, 0), (0, 0)),
    (1, 1.5, 0.0, 1.3, (0, 1), (0, 1)),
    (-1, 0.5, 0.0, 0.8, (1, 0), (1, 0)),
    (-1, 0.9, 0.9, 0.9, (0, 0), (0, 0)),
    (-1, 1.5, 1.5, 1.3, (0, 0), (0, 1)),
    (-1, 2.5, 0.0, 1.3, (0, 1), (0, 1)),
    (0, 2.5, 0.0, 0.0, (0, 0), (0, 1)),
]


@pytest.mark.parametrize("case", CLIPPED)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_what_each_clip_does_to_a_token(backend, device, case, reduction):
    advantage, ratio, *factors = case[:4]
    logits, labels, *_ = draw(device, batch=1, length=1)
    logps = token_logps(logits, labels, backend="eager")
    common = {
        "old_logps": logps - math.log(ratio), "reduction": reduction,
        "advantages": torch.full((1, 1), float(advantage), device=device),
    }  # fmt: skip
    scores = torch.nn.functional.one_hot(labels, logits.shape[-1]) - logits.softmax(-1)
    kinds = ("clip", {"dual_clip": 2.0}), ("cispo", {})
    for (policy_loss, dual), factor, shares in zip(kinds, factors, case[4:], strict=True):
        clip = {"policy_loss": policy_loss, "clip_range": (0.2, 0.3), **dual}
        out, gradient = run(logits, labels, backend, **common, **clip)
        torch.testing.assert_close(gradient, -advantage * factor * scores, rtol=1e-5, atol=1e-6)
        assert (out.metrics()["clip/low"], out.metrics()["clip/high"]) == shares


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_the_unbiased_kl_has_the_gradient_of_the_kl(backend, device, kl_estimator):
    """Of KL(new ‖ ref) itself, in the mean over labels that the behaviour policy drew."""
    generator = torch.Generator().manual_seed(0)
    new, old, ref = torch.randn(3, 16, generator=generator).to(device)
    every = torch.arange(16, device=device)
    leaf = new.expand(16, -1).clone().requires_grad_()
    out = r2vpo_loss(
        leaf, every, old.log_softmax(-1), torch.zeros(16, device=device), variance_coef=0.0,
        ref_logps=ref.log_softmax(-1), kl_coef=1.0, kl_estimator=kl_estimator, kl_unbiased=True,
        reduction="none", backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, leaf, old.softmax(-1))
    exact = new.double().requires_grad_()
    log_p = exact.log_softmax(-1)
    kl = (log_p.exp() * (log_p - ref.double().log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(kl, exact)
    # Sums of 16 numbers of the size of p·KL, each off by a few roundings of float32.
    torch.testing.assert_close(gradient.sum(0), expected.float(), rtol=0, atol=100 * U)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [64, 72, 33])
def test_a_row_does_not_depend_on_its_batch(backend, device, dtype, vocabulary):
    logits, labels, old_logps, advantages, _ = draw(device, vocabulary=vocabulary, dtype=dtype)
    # Rows of 16-byte words give the same bits wherever they lie; others where they lie alike.
    aligned = vocabulary * logits.element_size() % 16 == 0
    keywords = {"reduction": "seq-mean-token-sum", "normalizer": 3.0}
    leaf = logits.requires_grad_()

    def on(rows):
        z = leaf[rows] if not aligned else leaf[rows].clone()
        out = r2vpo_loss(
            z, labels[rows], old_logps[rows], advantages[rows], backend=backend, **keywords
        )
        return out.logps, torch.autograd.grad(out.loss, leaf)[0][rows]

    logps, gradient = on(slice(None))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part_logps, part_gradient = on(rows)
        assert torch.equal(part_logps, logps[rows])
        assert torch.equal(part_gradient, gradient[rows])


def test_groups_by_age_only_say_how_statistics_are_kept(backend, device):
    logits, labels, old_logps, advantages, _ = draw(device)
    age = torch.tensor([2, 0, 2, 0], device=device)
    arguments = logits, labels, backend
    keywords = {"old_logps": old_logps, "advantages": advantages}
    _, gradient = run(*arguments, **keywords)
    by_age, same_gradient = run(*arguments, group_ids=age, num_groups=3, **keywords)
    assert torch.equal(gradient, same_gradient)
    for group in (0, 2):
        alone, _ = run(
            logits[age == group], labels[age == group], backend,
            old_logps=old_logps[age == group], advantages=advantages[age == group],
        )  # fmt: skip
        for name in ("mean", "variance", "ess"):
            # Of three sums, each once rounded.
            torch.testing.assert_close(
                getattr(by_age.stats, name)[group], getattr(alone.stats, name)[0],
                rtol=1e-6, atol=0,
            )  # fmt: skip
    assert by_age.stats.variance[1] == 0 and by_age.stats.ess[1] == 1


@given(cases())
def test_repetition_gives_the_same_bits(backend, device, case):
    logits, labels, keywords = case.tensors(device)
    first, gradient = run(logits, labels, backend, **keywords)
    again, gradient_again = run(logits, labels, backend, **keywords)
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(gradient, gradient_again)
    assert torch.equal(first.stats.d_sq_sum, again.stats.d_sq_sum)


@given(cases(masking="bool"))
def test_nothing_at_a_masked_token_matters(backend, device, case):
    """NaN in every input there, labels out of range: the same bits, a gradient of exact zeros."""
    logits, labels, keywords = case.tensors(device)
    # One layout for both: rows that are not whole words may differ in the last bits between two.
    logits = logits.clone()
    masked = keywords["mask"] == 0
    clean, gradient = run(logits, labels, backend, **keywords)
    poisoned = {
        name: torch.where(masked, torch.nan, value)
        if name in PER_TOKEN and isinstance(value, torch.Tensor) and value.shape == labels.shape
        else value
        for name, value in keywords.items()
    }
    bad_logits = logits.clone().masked_fill_(masked[..., None], torch.nan)
    bad_labels = torch.where(masked, 10**6, labels)
    same, bad_gradient = run(bad_logits, bad_labels, backend, **poisoned)
    assert torch.equal(clean.loss, same.loss)
    assert torch.equal(clean.logps, same.logps)
    assert torch.equal(gradient, bad_gradient)
    assert not bad_gradient[masked].any()
    assert not same.logps[masked].any()
    metrics = same.metrics()
    assert all(torch.equal(value, metrics[name]) for name, value in clean.metrics().items())


UNREADABLE = """
import ctypes, mmap, sys, torch
if sys.argv[1] == "cuda":
    from support.emulator.build import emulate_cuda
    emulate_cuda()
from r2vpo_kernels import SamplingMask, r2vpo_loss, token_logps

ROW = mmap.PAGESIZE // 4
memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
logits = torch.frombuffer(memory, dtype=torch.float32).view(1, 3, ROW).normal_()
page = logits.data_ptr() + mmap.PAGESIZE
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
labels, mask, sets = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), None
if sys.argv[2] == "sets":
    # The same memory as one row, which keeps words of the first and the last page.
    logits, labels, mask = logits.view(1, 1, -1), labels[:, :1], mask[:, :1]
    sets = SamplingMask.from_lists([[0, 1, ROW - 1, 2 * ROW, 3 * ROW - 1]])
shared = {"mask": mask, "sampling_mask": sets, "backend": sys.argv[1]}
old_logps = token_logps(logits, labels, **shared)
for keywords in ({}, {"center": "group"}):
    leaf = logits.requires_grad_()
    out = r2vpo_loss(leaf, labels, old_logps, torch.ones(1), **shared, **keywords)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    first, unread, last = gradient.view(3, ROW)
    assert first.any() and last.any() and not unread.any()
print("read nothing")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rows", "sets"])
def test_a_row_of_weight_zero_and_a_word_that_is_not_kept_are_not_read(kernels, device, what):
    """Their memory may not even be readable: a look at it would end the process."""
    if device.type != "cpu":
        pytest.skip("of a GPU's memory no page can be made unreadable")
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    run = subprocess.run(
        [sys.executable, "-c", UNREADABLE, kernels, what], cwd=root,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip() == "read nothing", run.stderr


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 4)])
def test_nothing_valid_is_a_loss_of_exactly_zero(backend, device, reduction, center, level, shape):
    logits = torch.randn(*shape, 17, device=device, requires_grad=True)
    labels = torch.full(shape, IGNORE, device=device)
    out = r2vpo_loss(
        logits, labels, torch.zeros(shape, device=device), torch.randn(shape[0], device=device),
        reduction=reduction, center=center, ratio_level=level, entropy_coef=0.1, backend=backend,
    )  # fmt: skip
    out.loss.sum().backward()
    assert not out.loss.any() and out.loss.sum().isfinite()
    assert logits.grad.shape == logits.shape and not logits.grad.any()
    assert out.stats.mean.tolist() == [1.0] and out.stats.variance.tolist() == [0.0]
    assert out.stats.ess.tolist() == [1.0]
    metrics = out.metrics()
    assert metrics["ratio/min"] == metrics["ratio/max"] == metrics["ratio/mean"] == 1
    assert all(value.isfinite() for value in metrics.values())


def test_an_empty_packed_batch_is_legal(backend, device):
    logits = torch.randn(0, 17, device=device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long, device=device)
    for cu_seqlens in (None, torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        out = r2vpo_loss(
            logits, labels, None, torch.zeros(0, device=device),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device), backend=backend,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss == 0


def test_an_empty_packed_batch_has_offsets_too(backend, device, monkeypatch):
    monkeypatch.setenv("R2VPO_KERNELS_VALIDATE", "1")
    logits, labels = torch.randn(0, 17, device=device), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^cu_seqlens: "):
        r2vpo_loss(
            logits, labels.to(device), None, torch.zeros(0, device=device),
            cu_seqlens=torch.tensor([5], device=device), backend=backend,
        )  # fmt: skip


def test_a_vocabulary_of_one_word_has_no_gradient(backend, device):
    logits = torch.randn(2, 3, 1, device=device, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.long, device=device)
    out = r2vpo_loss(logits, labels, None, torch.ones(2, device=device), backend=backend)
    out.loss.backward()
    assert not out.logps.any() and not logits.grad.any()


@pytest.mark.slow_in_interpreter
def test_packed_and_padded_batches_agree(backend, device):
    """Sequences of different lengths, one of them empty, with and without padding."""
    logits, labels, old_logps, advantages, _ = draw(device, batch=4, length=5)
    lengths = torch.tensor([5, 0, 2, 3], device=device)
    mask = torch.arange(5, device=device) < lengths[:, None]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    for reduction in AGGREGATED[:3]:
        for level in ("token", "sequence"):
            keywords = {"reduction": reduction, "ratio_level": level, "group_size": 2}
            padded, gradient = run(
                logits, labels, backend, old_logps=old_logps, advantages=advantages, mask=mask,
                center="group", **keywords,
            )  # fmt: skip
            packed, packed_gradient = run(
                logits[mask], labels[mask], backend, old_logps=old_logps[mask],
                advantages=advantages, cu_seqlens=cu_seqlens, center="group", **keywords,
            )  # fmt: skip
            torch.testing.assert_close(packed.loss, padded.loss, rtol=8 * U, atol=8 * U)
            torch.testing.assert_close(packed_gradient, gradient[mask], rtol=64 * U, atol=64 * U)
            torch.testing.assert_close(packed.stats.variance, padded.stats.variance)


def test_a_packed_batch_without_sequences_takes_groups_per_token(backend, device):
    logits, labels, old_logps, _, _ = draw(device, batch=1, length=6)
    ids = torch.tensor([0, 1, 1, 0, 2, 1], device=device)
    advantages = torch.randn(6, device=device)
    out, _ = run(
        logits[0], labels[0], backend, old_logps=old_logps[0], advantages=advantages,
        group_ids=ids, num_groups=4, center="group",
    )  # fmt: skip
    assert out.stats.weight.tolist() == [2, 3, 1, 0]


@pytest.mark.slow_in_interpreter
def test_a_second_backward_gives_the_same_bits(backend, device):
    for inplace, center, sampled in product((False, True), ("one", "group"), (False, True)):
        logits, labels, old_logps, advantages, _, sets = draw_sampled(device)
        leaf = logits.requires_grad_()
        out = r2vpo_loss(
            leaf * 1, labels, old_logps, advantages, center=center, inplace=inplace,
            sampling_mask=sets if sampled else None, backend=backend,
        )  # fmt: skip
        loss = out.loss / 3
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
        last = torch.autograd.grad(loss, leaf)[0]
        assert torch.equal(first, second) and torch.equal(first, last)


def test_on_policy_is_old_logps_equal_to_logps(backend, device):
    logits, labels, _, advantages, mask = draw(device)
    logps = token_logps(logits, labels, backend=backend)
    explicit, gradient = run(
        logits, labels, backend, old_logps=logps, advantages=advantages, mask=mask
    )
    implicit, same = run(logits, labels, backend, old_logps=None, advantages=advantages, mask=mask)
    assert torch.equal(explicit.loss, implicit.loss) and torch.equal(gradient, same)
    assert implicit.stats.variance == 0 and implicit.stats.mean == 1


def test_gradients_of_token_logps_and_entropy(backend, device):
    """Both are differentiable, together and apart, with a strided upstream."""
    logits, labels, _, _, mask = draw(device, vocabulary=33)
    leaf = logits.double().requires_grad_()
    expected_logps, expected_entropy = token_logps(
        leaf, labels, mask=mask, temperature=0.7, return_entropy=True, backend="eager"
    )
    seen = logits.requires_grad_()
    logps, entropy = token_logps(
        seen, labels, mask=mask, temperature=0.7, return_entropy=True, backend=backend
    )
    up = torch.randn(2, 5, 4, device=device).transpose(1, 2)
    for first, second in ((1, 0), (0, 1), (1, 1)):
        (ours,) = torch.autograd.grad(
            [logps, entropy], seen, [up[0] * first, up[1] * second], retain_graph=True
        )
        (truth,) = torch.autograd.grad(
            [expected_logps, expected_entropy], leaf, [up[0] * first, up[1] * second],
            retain_graph=True,
        )  # fmt: skip
        torch.testing.assert_close(ours.double(), truth, rtol=200 * U, atol=200 * U)


def test_statistics_of_one_group_add_up(device):
    a = RatioStats(*(torch.tensor([x], device=device) for x in (2.0, 0.4, 0.2)))
    b = RatioStats(*(torch.tensor([x], device=device) for x in (1.0, -0.1, 0.05)))
    total = a + b
    assert total.mean.item() == pytest.approx(1.1)
    assert total.second_moment.item() == pytest.approx(0.25 / 3)
    assert total.variance.item() == pytest.approx(0.25 / 3 - 0.01)
    assert total.ess.item() == pytest.approx(1.21 / (1.21 + 0.25 / 3 - 0.01))


def test_metrics_are_those_of_the_specification_by_name(backend, device):
    _, _, logps, advantages, mask = draw(device)
    generator = torch.Generator().manual_seed(2)
    drift, gap, entropy = (0.4 * torch.randn(3, *mask.shape, generator=generator)).to(device)

    def metrics(backend, dtype):
        given = (x.to(dtype) for x in (logps + drift, logps, advantages))
        return r2vpo_loss_from_logps(
            *given, mask=mask, entropy=entropy.to(dtype), entropy_coef=0.1,
            ref_logps=(logps + gap).to(dtype), kl_coef=0.1, policy_loss="clip", clip_range=0.2,
            variance_coef=0.5, log_ratio_clamp=0.6, backend=backend,
        ).metrics()  # fmt: skip

    exact, found = metrics("eager", torch.float64), metrics(backend, torch.float32)
    assert found.keys() == exact.keys()
    # No two are alike, and one in the place of another would show.
    assert len({x.item() for x in exact.values()}) == len(exact)
    for name, value in exact.items():
        # Sums and means of numbers below 4, each with a few roundings of float32.
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=100 * U)


def test_per_token_coefficients_express_spo(device):
    """λ = |A| / (2ε) puts the stationary ratio at 1 ± ε for every token."""
    advantages = torch.tensor([[2.0, -0.5, 1.0]], device=device)
    epsilon = 0.2
    at = 1 + epsilon * advantages.sign()
    logps = at.log().requires_grad_()
    r2vpo_loss_from_logps(
        logps, torch.zeros_like(at), advantages, variance_coef=advantages.abs() / (2 * epsilon)
    ).loss.backward()
    assert logps.grad.abs().max() <= 16 * U


# Of sampling masks.

MASKED = [kind for kind in SUPPORTS if kind != "none"]
masked_cases = st.sampled_from(MASKED).flatmap(lambda kind: cases(support=kind))


def same_results(ours, theirs):
    """To the bit; of two calls of `run`."""
    (out, gradient), (other, other_gradient) = ours, theirs
    assert torch.equal(out.loss, other.loss) and torch.equal(out.logps, other.logps)
    assert torch.equal(gradient, other_gradient)
    assert (out.entropy is None) == (other.entropy is None)
    assert out.entropy is None or torch.equal(out.entropy, other.entropy)
    metrics = other.metrics()
    assert all(torch.equal(value, metrics[name]) for name, value in out.metrics().items())


def words_of(mask, labels, vocabulary):
    """Where a logit counts, like logits."""
    support, _ = Support.of(mask, labels.reshape(-1))
    return support.words(vocabulary).reshape(*labels.shape, vocabulary)


def lists_of(mask):
    return [x.tolist() for x in mask.token_ids.tensor_split(mask.offsets[1:-1].cpu())]


def draw_sampled(device, kind="some empty", dtype=torch.float32, vocabulary=64):
    """As `draw`, with a sampling mask and old_logps of its policy."""
    logits, labels, _, advantages, mask = draw(device, vocabulary=vocabulary, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    sets = sampling_mask_of(kind, labels.cpu(), vocabulary, generator).to(device)
    logps = token_logps(logits, labels, sampling_mask=sets, backend="eager")
    old_logps = logps + 0.3 * torch.randn(labels.shape, generator=generator).to(device)
    return logits, labels, old_logps, advantages, mask, sets


@given(cases(support="all words"))
def test_a_set_of_all_words_is_no_set(backend, device, case):
    """Within the budget of the same truth; the specification keeps every bit."""
    logits, labels, keywords = case.tensors(device)
    without = {name: x for name, x in keywords.items() if name != "sampling_mask"}
    each = torch.ones(labels.shape if case.reduction == "none" else (), device=device)
    truth = truth_of(logits, labels, without, backend)
    out, gradient = run(logits, labels, backend, **keywords)
    check_values(out, truth, each)
    check_gradient(gradient, truth, backend)
    if backend == "eager":
        plain, same = run(logits, labels, backend, **without)
        assert torch.equal(plain.loss, out.loss) and torch.equal(gradient, same)


@given(masked_cases)
def test_the_order_of_ids_changes_nothing(backend, device, case):
    logits, labels, keywords = case.tensors(device)
    mask = keywords["sampling_mask"]
    backwards = [words[::-1] for words in lists_of(mask)]
    other = SamplingMask.from_lists(backwards, device=device, missing_label=mask.missing_label)
    results = (
        run(logits, labels, backend, **keywords | {"sampling_mask": m}) for m in (mask, other)
    )
    same_results(*results)


@given(masked_cases, st.booleans())
def test_what_stands_outside_of_the_sets_is_harmless(backend, device, case, inplace):
    logits, labels, keywords = case.tensors(device)
    # One layout for both, with rows of their own.
    logits, keywords = logits.clone(), keywords | {"return_entropy": True}
    inside = words_of(keywords["sampling_mask"], labels, case.vocabulary)
    filling = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e4], device=device)
    filling = filling.to(logits.dtype)[torch.arange(logits.numel(), device=device) % 4]
    poisoned = torch.where(inside, logits, filling.view_as(logits))
    results = []
    for values in (logits, poisoned):
        leaf = values.requires_grad_()
        seen = leaf * 1 if inplace else leaf
        out = r2vpo_loss(seen, labels, backend=backend, inplace=inplace, **keywords)
        results.append((out, torch.autograd.grad(out.loss.sum(), leaf)[0]))
    same_results(*results)
    assert not results[1][1][~inside].any()


@given(st.sampled_from(MASKED).flatmap(lambda kind: cases(support=kind, masking="bool")))
def test_the_sets_of_masked_tokens_are_harmless(backend, device, case):
    logits, labels, keywords = case.tensors(device)
    mask = keywords["sampling_mask"]
    valid = (keywords["mask"] != 0).reshape(-1).tolist()
    for other in ([], [0], list(range(case.vocabulary))):
        sets = [words if ok else other for ok, words in zip(valid, lists_of(mask), strict=True)]
        changed = SamplingMask.from_lists(sets, device=device, missing_label=mask.missing_label)
        same_results(
            run(logits, labels, backend, **keywords),
            run(logits, labels, backend, **keywords | {"sampling_mask": changed}),
        )


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "route", [{}, {"entropy_coef": 0.1}, {"center": "group"}, {"reduction": "none"}]
)
def test_a_set_of_one_is_certain(backend, device, dtype, route):
    """Nothing about it depends on its logit; in the loss it is a constant of its weight."""
    logits, labels, old_logps, advantages, _, sets = draw_sampled(device, dtype=dtype)
    lists = lists_of(sets)
    alone = torch.zeros(labels.shape, dtype=torch.bool, device=device)
    alone[0], alone[2, 1:3] = True, True
    for i in alone.reshape(-1).nonzero()[:, 0].tolist():
        lists[i] = [labels.reshape(-1)[i].item()]
    old_logps = torch.where(alone, 0.0, old_logps)
    keywords = {
        "old_logps": old_logps, "advantages": advantages, "return_entropy": True,
        "sampling_mask": SamplingMask.from_lists(lists, device=device), **route,
    }  # fmt: skip
    out, gradient = run(logits, labels, backend, **keywords)
    assert not out.logps[alone].any() and not out.entropy[alone].any()
    assert not gradient[alone].any() and gradient[~alone].any()
    other = torch.where(alone[..., None], -3 * logits, logits)
    same_results((out, gradient), run(other, labels, backend, **keywords))
    assert out.metrics()["support/single"] == alone.float().mean()
    if route.get("reduction") == "none":
        assert torch.equal(out.loss[alone], -advantages[:, None].expand_as(out.loss)[alone])
        without, _ = run(logits, labels, backend, mask=~alone, **keywords)
        assert torch.equal(out.loss[~alone], without.loss[~alone])


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MASKED)
def test_parts_of_a_mask_go_with_parts_of_the_batch(backend, device, dtype, kind):
    """A slice of it, or tokens in another order: the same bits."""
    logits, labels, old_logps, advantages, _, sets = draw_sampled(device, kind, dtype)
    keywords = {"reduction": "seq-mean-token-sum", "normalizer": 3.0, "entropy_coef": 0.1}

    def on(rows, sets):
        return run(
            logits[rows], labels[rows], backend, old_logps=old_logps[rows],
            advantages=advantages[rows], sampling_mask=sets, **keywords,
        )  # fmt: skip

    out, gradient = on(slice(None), sets)
    length = labels.shape[1]
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4), torch.tensor([3, 1, 1])):
        if isinstance(rows, slice):
            part = sets[rows.start * length : rows.stop * length]
        else:
            rows = rows.to(device)
            place = torch.arange(length, device=device)
            part = sets[(rows[:, None] * length + place).reshape(-1)]
        found, found_gradient = on(rows, part)
        assert torch.equal(found.logps, out.logps[rows])
        assert torch.equal(found.entropy, out.entropy[rows])
        assert torch.equal(found_gradient, gradient[rows])


@pytest.mark.slow_in_interpreter
def test_calls_that_share_a_mask_do_not_disturb_each_other(backend, device):
    """Two forward passes, then their backward passes; and both graphs once more."""
    logits, labels, old_logps, advantages, _, sets = draw_sampled(device)
    for route in ({}, {"center": "group"}):
        keywords = {"sampling_mask": sets, "backend": backend, **route}
        leaves = [z.clone().requires_grad_() for z in (logits, -logits)]
        losses = [r2vpo_loss(z, labels, old_logps, advantages, **keywords).loss for z in leaves]
        found = [
            [
                torch.autograd.grad(x, z, retain_graph=True)[0]
                for x, z in zip(losses, leaves, strict=True)
            ]
            for _ in range(2)
        ]
        for k, leaf in enumerate(leaves):
            alone = r2vpo_loss(leaf, labels, old_logps, advantages, **keywords)
            (expected,) = torch.autograd.grad(alone.loss, leaf)
            assert torch.equal(found[0][k], expected) and torch.equal(found[1][k], expected)
            assert torch.equal(losses[k], alone.loss)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("kind", MASKED)
def test_log_probs_recorded_over_the_sets_are_on_policy(kernels, device, kind):
    logits, labels, _, advantages, mask, sets = draw_sampled(device, kind, torch.bfloat16, 72)
    for entropy in (False, True):
        recorded = token_logps(logits, labels, sampling_mask=sets, backend=kernels)
        keywords = {
            "advantages": advantages, "mask": mask, "sampling_mask": sets,
            "entropy_coef": 0.1 if entropy else 0.0,
        }  # fmt: skip
        explicit = run(logits, labels, kernels, old_logps=recorded, **keywords)
        same_results(explicit, run(logits, labels, kernels, old_logps=None, **keywords))
        assert explicit[0].stats.variance == 0 and explicit[0].stats.mean == 1


@pytest.mark.parametrize("center", ["one", "given"])
def test_micro_batches_of_a_sampled_batch_sum_to_it(backend, device, center):
    """Sequences to either micro-batch, with their parts of the mask."""
    logits, labels, old_logps, advantages, mask, sets = draw_sampled(device)
    logits = logits.double() if backend == "eager" else logits
    places = torch.arange(labels.numel(), device=device).view_as(labels)

    def on(rows, center):
        return run(
            logits[rows], labels[rows], backend, old_logps=old_logps[rows],
            advantages=advantages[rows], mask=mask[rows], normalizer=mask.sum().float(),
            sampling_mask=sets[places[rows].reshape(-1)], center=center,
        )  # fmt: skip

    whole, gradient = on(torch.arange(4), "group" if center == "given" else "one")
    parts = [torch.tensor(rows) for rows in ([0, 3], [2, 1])]
    results = [on(rows, whole.stats.mean if center == "given" else "one") for rows in parts]
    scale = 1e-12 if backend == "eager" else 100 * U
    total = sum(out.loss for out, _ in results)
    torch.testing.assert_close(total, whole.loss, rtol=0, atol=10 * scale)
    for rows, (_, part) in zip(parts, results, strict=True):
        torch.testing.assert_close(part, gradient[rows], rtol=0, atol=scale)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("kind", MASKED)
def test_the_gradients_of_log_probs_are_those_of_plain_torch(backend, device, kind):
    """In float64, where it can: logits outside are -inf, and log_softmax is torch's."""
    logits, labels, _, _, _, sets = draw_sampled(device, kind)
    exact = logits.double().requires_grad_()
    inside = words_of(sets, labels, logits.shape[-1])
    log_p = torch.log_softmax((exact / 0.7).masked_fill(~inside, -torch.inf), -1)
    expected = log_p.gather(-1, labels[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(~inside, 0.0)).sum(-1)
    leaf = (logits.double() if backend == "eager" else logits).requires_grad_()
    found = token_logps(
        leaf, labels, temperature=0.7, sampling_mask=sets, return_entropy=True, backend=backend
    )
    scale = 1e-12 if backend == "eager" else 200 * U
    close = {"rtol": scale, "atol": scale}
    up = torch.randn(2, 5, 4, device=device).transpose(1, 2)
    for first, second in ((1, 0), (0, 1), (1, 1)):
        upstream = [up[0] * first, up[1] * second]
        (ours,) = torch.autograd.grad(found, leaf, upstream, retain_graph=True)
        (theirs,) = torch.autograd.grad([expected, entropy], exact, upstream, retain_graph=True)
        torch.testing.assert_close(ours.double(), theirs, **close)
        assert not ours[~inside].any()
    for ours, theirs in zip(found, (expected, entropy), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **close)


def test_metrics_tell_of_the_sets(backend, device):
    """Of valid tokens; and of nothing where there is no mask."""
    logits, labels, old_logps, advantages, _, _ = draw_sampled(device, vocabulary=33)
    lists = [[int(y)] for y in labels.reshape(-1)]
    lists[3], lists[4], lists[5], lists[19] = [], None, list(range(33)), list(range(8))
    labels[3, 4] = 40  # masked
    sets = SamplingMask.from_lists(lists, device=device)
    keywords = {"old_logps": old_logps, "advantages": advantages, "backend": backend}
    out = r2vpo_loss(logits, labels, sampling_mask=sets, ignore_index=40, **keywords)
    assert out.metrics()["support/single"].item() == pytest.approx(16 / 19)
    assert out.metrics()["support/size"].item() == pytest.approx((16 + 33) / 17)
    nobody = SamplingMask.from_lists([[]] * 20, device=device)
    metrics = r2vpo_loss(
        logits, labels, sampling_mask=nobody, ignore_index=40, **keywords
    ).metrics()
    assert metrics["support/single"] == 0 and metrics["support/size"] == 0
    names = r2vpo_loss(logits, labels, ignore_index=40, **keywords).metrics()
    assert not any(name.startswith("support") for name in names)
