"""The sparse head: products of the words that sampling kept, alone and beside dense products."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.harness import check_linear_case, check_values, truth_of
from support.launches import count_launches
from support.strategies import DTYPES, Case, LinearCase, linear_cases, sets_of
from support.tolerance import Linear
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from r2vpo_kernels import SamplingMask, linear_r2vpo_loss, linear_token_logps, sampling
from r2vpo_kernels.sources import sparse

# Sets that are not all words, so that something is left out.
KINDS = ("single", "small", "some empty", "some missing")


@pytest.fixture(scope="module")
def takes_every_set():
    """The sparse head, however large a set is."""
    with patch.object(sparse, "DENSE_SPEED", {"elsewhere": 1e-9}):
        yield


@pytest.fixture(scope="module")
def always(kernels, takes_every_set):
    """The backend, whose sparse head takes every set."""
    return kernels


def draw(device, n=40, width=24, vocabulary=50, dtype=torch.float32, kind="small", seed=0):
    """(hidden, weight), labels and keywords of a packed batch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    sets = sets_of(kind, labels.tolist(), vocabulary, generator)
    labels[::7] = -100
    mask = SamplingMask.from_lists(sets, device=device, missing_label="full")
    leaves = [normal(n, width).to(dtype), (normal(vocabulary, width) / width**0.5).to(dtype)]
    keywords = {"sampling_mask": mask, "advantages": normal(n), "old_logps": normal(n) / 4 - 1}
    return [x.requires_grad_() for x in leaves], labels.to(device), keywords


def gradients(leaves, labels, keywords, backend, **more):
    out = linear_r2vpo_loss(*leaves, labels, backend=backend, **keywords, **more)
    wanted = [x for x in (*leaves, more.get("bias")) if x is not None and x.requires_grad]
    return out, torch.autograd.grad(out.loss.sum(), wanted)


@given(case=linear_cases(), kind=st.sampled_from(KINDS))
def test_any_call_is_within_the_budget(always, device, case, kind):
    case.case.support, case.head["compact"] = kind, True
    check_linear_case(*case.tensors(device), always)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_words_of_several_steps_are_within_the_budget(always, device, dtype):
    """More columns than a step has, a number that no step divides, and more words than a block."""
    case = Case(
        batch=2, length=9, vocabulary=200, dtype=dtype, layout="plain", packed=False,
        masking="bool", groups="none", reduction="token-mean", center="one", level="token",
        policy_loss="ratio", dual_clip=False, variance_coef="number", advantages="token",
        temperature="number", kl="k3", kl_unbiased=False, entropy=True, on_policy=False,
        support="some empty", seed=3,
    )  # fmt: skip
    head = {"softcap": 4.0, "logit_scale": 0.5, "chunk_tokens": None, "compact": True}
    # Not where small_steps.py makes them small.
    wide = 1030 if always == "cpp" or device.type != "cpu" else 40
    check_linear_case(*LinearCase(case, wide, True, (), head).tensors(device), always)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_head_are_float32(always, device, dtype):
    leaves, labels, keywords = draw(device, dtype=dtype)
    out = linear_r2vpo_loss(*leaves, labels, backend=always, **keywords)
    hidden, weight = (x.detach().double() for x in leaves)
    linear = Linear(hidden * (labels >= 0)[:, None], weight, None, None, 1.0, torch.float32)
    truth = truth_of(linear.logits(), labels, keywords, always, logits_error=linear.logits_error())
    check_values(out, truth, torch.ones(()))
    same = linear_r2vpo_loss(
        *leaves, labels, backend=always, logits_dtype=torch.float32, **keywords
    )
    assert torch.equal(same.logps, out.logps)


@pytest.mark.parametrize("center", ["one", "group"])
def test_it_agrees_with_dense_products(always, device, center, monkeypatch):
    leaves, labels, keywords = draw(device, kind="some empty")
    out, found = gradients(leaves, labels, keywords, always, center=center)
    monkeypatch.setattr(sparse, "DENSE_SPEED", {"elsewhere": 1e9})
    dense, expected = gradients(leaves, labels, keywords, always, center=center)
    torch.testing.assert_close(out.logps, dense.logps, rtol=1e-5, atol=1e-5)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time_and_with_any_threads(always, device, dtype):
    leaves, labels, keywords = draw(device, dtype=dtype, kind="some empty")
    threads = torch.get_num_threads()
    try:
        results = []
        # Only C++ shares its work out among threads.
        for number in (1, 2, 3) if always == "cpp" else (1, 1):
            torch.set_num_threads(number)
            out, found = gradients(leaves, labels, keywords, always)
            results.append((out.loss, out.logps, *found))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.slow_in_interpreter
def test_the_order_of_ids_changes_nothing(always, device):
    leaves, labels, keywords = draw(device)
    mask = keywords["sampling_mask"]
    sets = [x.flip(0).tolist() for x in mask.token_ids.split(mask.offsets.diff().tolist())]
    turned = SamplingMask.from_lists(sets, device=device)
    _, found = gradients(leaves, labels, keywords, always)
    _, again = gradients(leaves, labels, keywords | {"sampling_mask": turned}, always)
    assert all(map(torch.equal, found, again))


def test_a_token_does_not_depend_on_its_batch(always, device):
    (hidden, weight), labels, keywords = draw(device)
    whole = linear_token_logps(
        hidden, weight, labels, sampling_mask=keywords["sampling_mask"], backend=always
    )
    part = linear_token_logps(
        hidden[5:9], weight, labels[5:9], sampling_mask=keywords["sampling_mask"][5:9],
        backend=always,
    )  # fmt: skip
    assert torch.equal(whole[5:9], part)


@pytest.mark.usefixtures("takes_every_set")
@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit_of_a_gradient(device, center, use_reentrant):
    """Of the loss, with its mask as an argument or by closure, and of the layer below it."""
    (hidden, weight), labels, keywords = draw(device, n=12, kind="some empty")
    mask = keywords.pop("sampling_mask")

    def loss(x, weight, mask=mask):
        return linear_r2vpo_loss(
            x, weight, labels, sampling_mask=mask, center=center, **keywords
        ).loss

    def again(*arguments):
        return checkpoint(*arguments, use_reentrant=use_reentrant)

    def found(call):
        """(gradients, how often kept words' logits were formed)"""
        hidden.grad = weight.grad = None
        launches = count_launches(lambda: (call() * 3).backward())
        return (hidden.grad, weight.grad), launches["head_logits"]

    expected, launches = found(lambda: loss(hidden.tanh(), weight))
    assert launches == (1 if center == "one" else 2)
    for more, call in (
        (0, lambda: loss(again(torch.tanh, hidden), weight)),
        (1, lambda: again(loss, hidden.tanh(), weight)),
        (1, lambda: again(loss, hidden.tanh(), weight, mask)),
    ):
        gradients, formed = found(call)
        assert formed == launches + more
        assert all(map(torch.equal, gradients, expected))


@pytest.mark.usefixtures("takes_every_set")
def test_a_mask_that_was_used_before_changes_no_bit(device):
    """Once in the order of words it stays so, whatever calls it serves."""
    leaves, labels, keywords = draw(device, n=12, kind="some empty")
    used = keywords["sampling_mask"]

    def results(mask):
        with torch.no_grad():
            old_logps = linear_token_logps(*leaves, labels, sampling_mask=mask)
        logps = linear_token_logps(*leaves, labels, sampling_mask=mask)
        given = keywords | {"old_logps": old_logps, "sampling_mask": mask}
        out, found = gradients(leaves, labels, given, "auto")
        return old_logps, logps, out.logps, *found, *torch.autograd.grad(logps.sum(), leaves)

    expected = results(SamplingMask.of(*used.tensors(), used.missing_label))
    assert torch.equal(*expected[:2])
    with patch.object(sampling, "order_by_word", wraps=sampling.order_by_word) as order_by_word:
        for _ in range(2):
            assert all(map(torch.equal, results(used), expected))
    assert order_by_word.call_count == 1


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "nothing"])
def test_only_what_requires_grad_is_computed(always, device, wanted):
    (hidden, weight), labels, keywords = draw(device, kind="some empty")
    bias = torch.linspace(-1, 1, weight.shape[0], device=device)
    leaves = {"hidden": hidden.detach(), "weight": weight.detach(), "bias": bias}
    _, (_, _, expected) = gradients(
        [hidden, weight], labels, keywords, always, bias=bias.clone().requires_grad_()
    )
    if wanted == "nothing":
        out = linear_r2vpo_loss(**leaves, labels=labels, backend=always, **keywords)
        assert not out.loss.requires_grad
        return
    leaves[wanted].requires_grad_()
    out = linear_r2vpo_loss(**leaves, labels=labels, backend=always, **keywords)
    (found,) = torch.autograd.grad(out.loss, leaves[wanted])
    if wanted == "bias":
        assert torch.equal(found, expected)


def test_what_nobody_kept_is_not_read(always, device):
    """Not the rows of other words, those of sets of one, or a masked token's hidden state."""
    (hidden, weight), labels, keywords = draw(device)
    mask = keywords["sampling_mask"]
    counts = mask.offsets.diff()
    used = mask.token_of()[mask.token_ids.long() >= 0]
    kept = torch.zeros(weight.shape[0], dtype=torch.bool, device=device)
    kept[mask.token_ids.long()[(counts[used] > 1) & (labels[used] >= 0)]] = True
    hidden = hidden.detach().clone()
    hidden[labels < 0] = torch.nan
    weight = weight.detach().clone()
    weight[~kept] = torch.nan
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out, found = gradients(leaves, labels, keywords, always)
    assert out.loss.isfinite()
    assert all(x.isfinite().all() for x in found)
    single = (counts == 1) & (labels >= 0)
    assert single.any() and not (~kept).all()
    assert not found[0][single].any() and not out.logps[single].any()
    assert not found[1][~kept].any()


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_head_that_lies_by_columns(always, device, name):
    leaves, labels, keywords = draw(device)
    _, expected = gradients(leaves, labels, keywords, always)
    turned = [
        x.detach().t().contiguous().t().requires_grad_() if is_it else x
        for x, is_it in zip(leaves, (name == "hidden", name == "weight"), strict=True)
    ]
    _, found = gradients(turned, labels, keywords, always)
    assert all(map(torch.equal, found, expected))


@pytest.mark.slow_in_interpreter
def test_under_autocast_gradients_have_the_dtypes_of_their_leaves(always, device):
    leaves, labels, keywords = draw(device, kind="some empty")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _, found = gradients(leaves, labels, keywords, always)
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in leaves]
    keywords["sampling_mask"] = keywords["sampling_mask"].to(device)
    _, expected = gradients(rounded, labels, keywords, always)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05 * y.abs().max().item())


def test_launches(always, device):
    leaves, labels, keywords = draw(device)

    def step():
        out = linear_r2vpo_loss(*leaves, labels, backend=always, **keywords)
        out.loss.backward(torch.ones_like(out.loss))
        out.metrics()

    step()
    counts = count_launches(step)
    ours = {name: n for name, n in counts.items() if "." not in name}
    assert ours == {
        "prepare": 1, "head_logits": 1, "one_pass": 1, "head_dhidden": 1, "head_dweight": 1,
        "finish": 1, "scale": 2,
    }  # fmt: skip
    assert not any(name.startswith(("aten.mm", "aten.addmm", "aten.bmm")) for name in counts)


def test_no_temporary_is_as_large_as_the_kept_rows_of_the_head(always, device):
    if always == "triton" and device.type == "cpu":
        pytest.skip("an interpreter's own temporaries are larger")
    sizes = {"n": 200, "width": 64, "vocabulary": 300}
    # What a first call compiles, or a library keeps, is none.
    gradients(*draw(device, **sizes), always)
    leaves, labels, keywords = draw(device, **sizes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        gradients(leaves, labels, keywords, always)
    kind = "cpu_memory_usage" if device.type == "cpu" else "device_memory_usage"
    largest = max(getattr(event, kind) for event in seen.events())
    ids = keywords["sampling_mask"].token_ids.shape[0]
    # What is returned: the gradient of the head.
    assert leaves[1].nbytes <= largest < ids * 64 * 4
    assert leaves[1].nbytes < ids * 64 * 4


@pytest.mark.slow
def test_fullgraph_and_any_number_of_ids(always, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(hidden, weight, labels, mask, old_logps, advantages):
        return linear_r2vpo_loss(
            hidden * 1, weight, labels, old_logps, advantages, sampling_mask=mask, backend=always
        ).loss

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for n in (5, 8, 11):
        leaves, labels, keywords = draw(device, n=n, vocabulary=20, seed=n)
        rest = keywords["sampling_mask"], keywords["old_logps"], keywords["advantages"]
        found = torch.autograd.grad(compiled(*leaves, labels, *rest), leaves)
        expected = torch.autograd.grad(call(*leaves, labels, *rest), leaves)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[-2] <= 2


def test_large_sets_take_dense_products(monkeypatch):
    """By their mean size, as documented; without `compact` nobody knows which tokens are dense."""
    monkeypatch.setattr(sparse, "DENSE_SPEED", {"elsewhere": 64})
    tokens, vocabulary = 10, 100 * 64
    hidden = torch.zeros(tokens, 3)

    def worthwhile(size, compact=True):
        mask = SamplingMask.from_counts(
            torch.arange(size).repeat(tokens), torch.full((tokens,), size)
        )
        return sparse.is_worthwhile(mask, hidden, vocabulary, compact)

    assert worthwhile(100) and not worthwhile(101)
    assert not worthwhile(0)
    assert not worthwhile(100, compact=False)
    assert not sparse.is_worthwhile(None, hidden, vocabulary, True)
