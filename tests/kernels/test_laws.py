"""Laws that hold whatever the values: shifts, splits, slices, masks, repetition."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.harness import check_case, truth_of
from support.strategies import IGNORE, cases
from support.tolerance import U

from r2vpo_kernels import RatioStats, r2vpo_loss, r2vpo_loss_from_logps, token_logps
from r2vpo_kernels.checks import REDUCTIONS

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


@settings(max_examples=15)
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


@settings(max_examples=25)
@given(cases())
def test_repetition_gives_the_same_bits(backend, device, case):
    logits, labels, keywords = case.tensors(device)
    first, gradient = run(logits, labels, backend, **keywords)
    again, gradient_again = run(logits, labels, backend, **keywords)
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(gradient, gradient_again)
    assert torch.equal(first.stats.d_sq_sum, again.stats.d_sq_sum)


@settings(max_examples=30)
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
from r2vpo_kernels import r2vpo_loss, token_logps

ROW = mmap.PAGESIZE // 4
memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
logits = torch.frombuffer(memory, dtype=torch.float32).view(1, 3, ROW).normal_()
page = logits.data_ptr() + mmap.PAGESIZE
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
labels, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]])
old_logps = token_logps(logits, labels, mask=mask, backend=sys.argv[1])
for keywords in ({}, {"center": "group"}):
    leaf = logits.requires_grad_()
    out = r2vpo_loss(
        leaf, labels, old_logps, torch.ones(1), mask=mask, backend=sys.argv[1], **keywords
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert gradient[0, 0].any() and gradient[0, 2].any() and not gradient[0, 1].any()
print("read nothing")
"""


def test_a_row_of_weight_zero_is_not_read(kernels):
    """Its memory may not even be readable: a look at it would end the process."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    run = subprocess.run(
        [sys.executable, "-c", UNREADABLE, kernels], cwd=root,
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


def test_an_empty_packed_batch_has_offsets_too(backend, device):
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


def test_a_second_backward_gives_the_same_bits(backend, device):
    for inplace in (False, True):
        for center in ("one", "group"):
            logits, labels, old_logps, advantages, _ = draw(device)
            leaf = logits.requires_grad_()
            out = r2vpo_loss(
                leaf * 1, labels, old_logps, advantages, center=center, inplace=inplace,
                backend=backend,
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
