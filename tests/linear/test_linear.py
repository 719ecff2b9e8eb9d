"""From hidden states and the LM head: the truth, laws, what is computed, memory, bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from support.harness import check_linear_case, truth_of
from support.launches import count_launches
from support.ops import COMPILER, check_op
from support.strategies import DTYPES, linear_cases, sampling_mask_of
from support.tolerance import U, assert_within
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import r2vpo_kernels
from r2vpo_kernels import (
    checks,
    linear_r2vpo_loss,
    linear_token_logps,
    ops,
    r2vpo_loss,
    token_logps,
)
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective
from r2vpo_kernels.sources import products as module
from r2vpo_kernels.sources.linear import linear_logps_forward

H, V = 16, 40


@pytest.fixture(params=["auto", "eager"])
def route(request):
    """The device's kernels, or none. All that kernels could differ in, other tests see to."""
    return request.param


def draw(device, batch=4, length=5, dtype=torch.float32, seed=0, vocabulary=V):
    """(hidden, weight, labels, old_logps, advantages)"""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, H, generator=g)
    weight = 0.5 * torch.randn(vocabulary, H, generator=g)
    labels = torch.randint(0, vocabulary, (batch, length), generator=g)
    logps = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, labels[..., None])[..., 0]
    old_logps = logps + 0.3 * torch.randn(batch, length, generator=g)
    advantages = torch.randn(batch, generator=g)
    tensors = (hidden.to(dtype), weight.to(dtype), labels, old_logps, advantages)
    return tuple(x.to(device) for x in tensors)


def run(hidden, weight, *arguments, upstream=1.0, **keywords):
    """(out, dhidden, dweight)"""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear_r2vpo_loss(*leaves, *arguments, **keywords)
    return out, *torch.autograd.grad(out.loss.sum() * upstream, leaves)


@given(linear_cases())
def test_any_call_is_within_the_budget(backend, device, halves, linear):
    inputs, labels, head, keywords = linear.tensors(device)
    check_linear_case(inputs, labels, head, keywords, backend)


@pytest.mark.slow_in_interpreter
@given(linear_cases(center="one", level="token", reduction="token-mean"))
def test_the_one_pass_route_is_within_the_budget(kernels, device, halves, linear):
    inputs, labels, head, keywords = linear.tensors(device)
    check_linear_case(inputs, labels, head, keywords, kernels)


@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_an_upstream_gradient_scales(route, device, halves, center, dtype, chunk_tokens):
    hidden, weight, labels, old_logps, advantages = draw(device, dtype=dtype)
    keywords = {"old_logps": old_logps, "advantages": advantages, "center": center}
    head = {"chunk_tokens": chunk_tokens}
    inputs = {"hidden": hidden, "weight": weight}
    for upstream in (0.37, -3.0):
        check_linear_case(inputs, labels, head, keywords, route, upstream)


def test_rounding_is_no_worse_than_that_of_eager_torch(device, halves):
    """RMS errors in bfloat16, pooled: logits and their gradient are rounded in both."""
    errors = {}
    for backend in ("auto", "eager"):
        pooled = torch.zeros(2, dtype=torch.float64)
        for seed in range(3):
            inputs = draw(device, 6, 8, torch.bfloat16, seed, vocabulary=129)
            exact = run(*(x.double() for x in inputs[:2]), *inputs[2:], backend="eager")[1:]
            found = run(*inputs, backend=backend, chunk_tokens=17)[1:]
            for i, (x, truth) in enumerate(zip(found, exact, strict=True)):
                pooled[i] += ((x.double() - truth).square().sum() / truth.square().sum()).item()
        errors[backend] = pooled.sqrt()
    assert (errors["auto"] <= 2 * errors["eager"]).all(), errors


def test_sums_over_chunks_are_float32(device, halves):
    """Many equal parts: a sum in bfloat16 stops growing at some hundreds of them."""
    hidden, weight, labels, _, _ = draw(device, 1, 1, torch.bfloat16)
    many = hidden.expand(1, 600, H), weight, labels.expand(1, 600), None, torch.ones(1).to(device)
    _, _, whole = run(*many)
    _, _, parts = run(*many, chunk_tokens=1)
    torch.testing.assert_close(parts, whole, rtol=3 * 2.0**-8, atol=1e-6)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize(
    "dtype, logits_dtype", [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
)
def test_the_same_as_from_the_logits(kernels, device, halves, dtype, logits_dtype):
    """By a head that adds nothing up: the bits of whole logits; dweight to its own rounding."""
    hidden, _, labels, old_logps, advantages = draw(device)
    leaf = ((8 * hidden).round() / 8).to(dtype).requires_grad_()
    weight = torch.eye(V, H, device=device, dtype=dtype)
    logits = F.linear(leaf, weight).to(logits_dtype)
    whole = r2vpo_loss(logits, labels, old_logps, advantages, backend=kernels)
    (dlogits,) = torch.autograd.grad(whole.loss, logits)
    dlogits = dlogits.to(dtype)
    parts = dlogits.double().reshape(-1, V), leaf.detach().double().reshape(-1, H)
    exact, size = parts[0].t() @ parts[1], parts[0].abs().t() @ parts[1].abs()
    v = torch.finfo(dtype).eps / 2
    for chunk_tokens in (None, 1, 6, 20):
        out, dhidden, dweight = run(
            leaf, weight, labels, old_logps, advantages, backend=kernels,
            chunk_tokens=chunk_tokens, logits_dtype=logits_dtype,
        )  # fmt: skip
        assert torch.equal(out.loss, whole.loss) and torch.equal(out.logps, whole.logps)
        assert torch.equal(dhidden, dlogits[..., :H])
        # A chunk's part of a native product of halves is rounded before it is added.
        parts_are_rounded = halves == "native" and chunk_tokens not in (None, 20)
        bound = (22 * U + (v if parts_are_rounded else 0)) * size
        assert_within("dweight", dweight, exact, bound, dtype=dtype)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["single", "small", "some empty", "some missing"])
def test_sets_give_the_same_as_from_the_logits(kernels, device, halves, dtype, kind):
    """As above, with a sampling mask: whatever the chunks and the compaction."""
    if kernels != "cpp" and halves == "float32":
        pytest.skip("the products are torch's, whoever computes the rows")
    hidden, _, labels, _, advantages = draw(device)
    leaf = ((8 * hidden).round() / 8).to(dtype).requires_grad_()
    weight = torch.eye(V, H, device=device, dtype=dtype)
    sets = sampling_mask_of(kind, labels.cpu(), V, torch.Generator().manual_seed(0)).to(device)
    logits = F.linear(leaf, weight)
    old_logps = token_logps(logits, labels, sampling_mask=sets, backend="eager").detach() - 0.2
    labels[1, 2:] = -100
    keywords = {"sampling_mask": sets, "backend": kernels, "entropy_coef": 0.1}
    arguments = labels, old_logps, advantages
    for center in ("one", "group"):
        logits = F.linear(leaf, weight)
        whole = r2vpo_loss(logits, *arguments, center=center, **keywords)
        (dlogits,) = torch.autograd.grad(whole.loss, logits)
        for compact in (False, True):
            for chunk_tokens in (None, 1, 6):
                out, dhidden, _ = run(
                    leaf, weight, *arguments, center=center, compact=compact,
                    chunk_tokens=chunk_tokens, **keywords,
                )  # fmt: skip
                assert torch.equal(out.loss, whole.loss) and torch.equal(out.logps, whole.logps)
                assert torch.equal(dhidden, dlogits[..., :H])
                metrics = whole.metrics()
                assert all(torch.equal(x, metrics[name]) for name, x in out.metrics().items())


WRONG = {
    "zeroed": lambda x: 0 * x,
    "turned round": lambda x: -x,
    "scaled": lambda x: 1.001 * x,
    "half of it lost": lambda x: torch.cat([x[: len(x) // 2], 0 * x[len(x) // 2 :]]),
}


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("fault", WRONG)
def test_the_checker_rejects_wrong_gradients(device, monkeypatch, name, fault):
    hidden, weight, labels, old_logps, advantages = draw(device)
    inputs = {"hidden": hidden, "weight": weight, "bias": weight[:, 0].clone()}
    keywords = {"old_logps": old_logps, "advantages": advantages}
    right = linear_r2vpo_loss

    def wrong(hidden, weight, *arguments, bias, **keywords):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        tampered = given[name].clone()
        tampered.register_hook(WRONG[fault])
        given[name] = tampered
        return right(given["hidden"], given["weight"], *arguments, bias=given["bias"], **keywords)

    head = {"softcap": 6.0, "logit_scale": 0.7}
    check_linear_case(inputs, labels, head, keywords, "auto")
    monkeypatch.setattr(r2vpo_kernels, "linear_r2vpo_loss", wrong)
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        check_linear_case(inputs, labels, head, keywords, "auto")


@pytest.mark.parametrize("sampled", [False, True])
def test_token_logps_from_hidden_states(route, device, sampled):
    """Both outputs are differentiable, together and apart, with a strided upstream."""
    hidden, weight, labels, _, _ = draw(device)
    mask = torch.rand(labels.shape, device=device) < 0.7
    keywords = {"mask": mask, "temperature": 0.7, "return_entropy": True}
    if sampled:
        generator = torch.Generator().manual_seed(0)
        sets = sampling_mask_of("some empty", labels.cpu(), V, generator)
        keywords["sampling_mask"] = sets.to(device)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    truth = token_logps(3.0 * torch.tanh(F.linear(*exact) / 3.0), labels, **keywords)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    found = linear_token_logps(
        *leaves, labels, softcap=3.0, chunk_tokens=6, backend=route, **keywords
    )
    up = torch.randn(2, 5, 4, device=device).transpose(1, 2)
    for first, second in ((1, 0), (0, 1), (1, 1)):
        upstream = [up[0] * first, up[1] * second]
        ours = torch.autograd.grad(found, leaves, upstream, retain_graph=True)
        theirs = torch.autograd.grad(truth, exact, upstream, retain_graph=True)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    assert not found[0][~mask].any()


# Products of halves in float32.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(20, 16, 40), (1, 30, 1), (7, 3, 100), (33, 33, 33)])
def test_a_float32_product_of_halves(monkeypatch, dtype, sizes):
    """In any order of memory: every element to float32's rounding, and no tile over its size."""
    monkeypatch.setattr(module, "SIDE", 8)
    monkeypatch.setattr(module, "ALIGNED", 4)
    rows, inner, columns = sizes
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, inner, generator=g).to(dtype) for n in (rows, columns))
    bias, given = (torch.randn(n, columns, generator=g) for n in (1, rows))
    size = a.double().abs() @ b.double().abs().t() + bias.abs() + given.abs()
    exact = 0.7 * (a.double() @ b.double().t())
    multiply = module._MultiplyInFloat32(a)
    for left in (a, a.t().contiguous().t()):
        for right in (b.t(), b.t().contiguous()):
            total = given.clone()
            multiply(left, right, 0.7, total, add=True)
            assert_within("sum", total, exact + given, (inner + 3) * U * size)
            rounded = torch.empty(rows, columns, dtype=dtype)
            multiply(left, right, 0.7, rounded, bias=bias[0].to(dtype))
            truth = exact + 0.7 * bias.to(dtype).double()
            assert_within("rounded", rounded, truth, (inner + 3) * U * size, dtype=dtype, ulps=0.5)
            kept = rounded.double()
            multiply(left, right, 0.7, rounded, add=True)
            assert_within(
                "added", rounded, exact + kept, (inner + 3) * U * (size + kept.abs()), dtype=dtype
            )
    assert all(tile.numel() <= module.SIDE**2 for tile in multiply.tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 30), (1, 1), (0, 5), (40, 3)])
def test_a_gradient_is_rounded_where_it_lies(monkeypatch, dtype, shape):
    monkeypatch.setattr(module, "TILE", {"elsewhere": 64})
    x = torch.randn(shape)
    expected, place = x.to(dtype), x.data_ptr()
    rounded = module._rounded_in_place(x, dtype)
    assert torch.equal(rounded, expected) and rounded.data_ptr() == place
    assert module._rounded_in_place(rounded, dtype) is rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_two_dtypes(dtype, halves):
    """Of a head and an adapter: with each kind of sum, each within its own rounding."""
    g = torch.Generator().manual_seed(0)
    a, b, given_ = (torch.randn(n, m, generator=g) for n, m in ((20, 16), (16, 9), (20, 9)))
    x = torch.empty(1, dtype=dtype)
    for left, right in ((a.to(dtype), b), (a, b), (a.to(dtype), b.to(dtype))):
        for out in (given_, given_.to(dtype)):
            exact = 0.7 * left.double() @ right.double()
            size = left.double().abs() @ right.double().abs() + out.double().abs()
            for add in (False, True):
                total = out.clone()
                module._multiplier(x, dtype)(left, right, 0.7, total, add=add)
                # What halves make of halves is rounded on its way, by who has units for them.
                v = torch.finfo(dtype).eps / 2 if left.dtype == right.dtype == dtype else 0
                truth, bound = exact + out.double() * add, (19 * U + v) * size
                assert_within("sum", total, truth, bound, dtype=out.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_who_multiplies_halves(monkeypatch, dtype):
    """What torch says of the processor, or the environment; and neither for float32."""
    x, name = torch.ones(1), "R2VPO_KERNELS_HALF_PRODUCTS"

    def by_blocks(dtype):
        return module.multiplies_in_float32(x, dtype)

    monkeypatch.delenv(name, raising=False)
    for units in (True, False):
        monkeypatch.setattr(module, "_has_units", lambda dtype, units=units: units)
        assert by_blocks(dtype) != units and not by_blocks(torch.float32)
        for kind in ("native", "float32"):
            with monkeypatch.context() as patch:
                patch.setenv(name, kind)
                assert by_blocks(dtype) == (kind == "float32") and not by_blocks(torch.float32)
                # Torch rounds its own products on a CPU.
                exact = module._multiplier(x, dtype, exact=True)
                assert isinstance(exact, module._MultiplyInFloat32)
    monkeypatch.setenv(name, "float64")
    with pytest.raises(ValueError, match=rf"^{name}: got 'float64'"):
        by_blocks(dtype)


# What is computed.


@pytest.fixture
def products(monkeypatch):
    """How many tokens enter each product, in order."""
    seen = []
    original = module._multiplier

    def counting(x, dtype, exact=False):
        multiply = original(x, dtype, exact)

        def counted(a, b, scale, out, **options):
            # Tokens are rows of logits and of dhidden, and columns of the first factor of dweight.
            seen.append(a.shape[1] if out.shape[0] == V else a.shape[0])
            multiply(a, b, scale, out, **options)

        return counted

    monkeypatch.setattr(module, "_multiplier", counting)
    return seen


COUNTS = {
    "one pass": ({}, [20, 20, 20]),
    "with entropy": ({"entropy_coef": 0.1}, [20, 20, 20]),
    "a given center": ({"center": torch.ones(1)}, [20, 20, 20]),
    "group": ({"center": "group"}, [20, 20, 20, 20]),
    "sequence": ({"ratio_level": "sequence"}, [20, 20, 20, 20]),
    "none": ({"reduction": "none"}, [20, 20, 20, 20]),
    "two chunks": ({"chunk_tokens": 10}, [10] * 6),
    "balanced chunks": ({"chunk_tokens": 19}, [10] * 6),
    "a frozen head": ({"frozen": "weight"}, [20, 20]),
    "frozen hidden states": ({"frozen": "hidden"}, [20, 20]),
    "a frozen head, group": ({"frozen": "weight", "center": "group"}, [20, 20, 20]),
    "nothing wants a gradient": ({"frozen": "both"}, [20]),
    "float16": ({"dtype": torch.float16}, [20, 20, 20, 20]),
    "float16, float32 logits": (
        {"dtype": torch.float16, "logits_dtype": torch.float32}, [20, 20, 20, 20]
    ),
    "bfloat16, float32 logits": (
        {"dtype": torch.bfloat16, "logits_dtype": torch.float32}, [20, 20, 20]
    ),
    "half of it masked": ({"masked": 2}, [10, 10, 10]),
    "all masked": ({"masked": 4}, []),
    "all masked, group": ({"masked": 4, "center": "group"}, []),
    "no compaction": ({"masked": 2, "compact": False}, [20, 20, 20]),
    "known zeros": ({"zeros": 1, "on_policy": True}, [15, 15, 15, 5]),
    "known zeros, group": ({"zeros": 1, "on_policy": True, "center": "group"}, [20, 15, 15, 15]),
    "known zeros, no compaction": (
        {"zeros": 1, "on_policy": True, "compact": False}, [20, 20, 20]
    ),
    "nothing but zeros": ({"zeros": 4, "on_policy": True}, [20]),
    "zeros without a brake": ({"zeros": 1, "variance_coef": 0.0}, [15, 15, 15, 5]),
    "zeros that the brake moves": ({"zeros": 1}, [20, 20, 20]),
    "zeros that another center moves": (
        {"zeros": 1, "on_policy": True, "center": torch.full((1,), 1.5)}, [20, 20, 20]
    ),
    "zeros that entropy moves": (
        {"zeros": 1, "on_policy": True, "entropy_coef": 0.1}, [20, 20, 20]
    ),
    "zeros that KL moves": (
        {"zeros": 1, "on_policy": True, "kl_coef": 0.1, "ref": True}, [20, 20, 20]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_only_what_is_asked_for_is_computed(device, products, name):
    """Tokens per product; and the results are those of computing everything."""
    keywords, expected = COUNTS[name]
    keywords = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    frozen, masked = keywords.pop("frozen", ""), keywords.pop("masked", 0)
    dtype, zeros = keywords.pop("dtype", torch.float32), keywords.pop("zeros", 0)
    hidden, weight, labels, old_logps, advantages = draw(device, dtype=dtype)
    labels[:masked] = -100
    advantages[:zeros] = 0.0
    if keywords.pop("on_policy", False):
        old_logps = None
    if keywords.pop("ref", False):
        keywords["ref_logps"] = torch.full(labels.shape, -3.0, device=device)
    leaves = [hidden.requires_grad_(frozen not in ("hidden", "both"))]
    leaves.append(weight.requires_grad_(frozen not in ("weight", "both")))
    wanted = [x for x in leaves if x.requires_grad]
    out = linear_r2vpo_loss(*leaves, labels, old_logps, advantages, **keywords)
    gradients = torch.autograd.grad(out.loss.sum(), wanted) if wanted else ()
    assert products == expected

    everything = keywords | {"chunk_tokens": None, "compact": True, "logits_dtype": None}
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    truth = linear_r2vpo_loss(*exact, labels, old_logps, advantages, backend="eager", **everything)
    scale = torch.finfo(dtype).eps * 100
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=scale, atol=scale)
    if wanted:
        theirs = torch.autograd.grad(truth.loss.sum(), [x for x in exact if x.requires_grad])
        for ours, true in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=scale, atol=scale)
    if frozen != "hidden" and gradients:
        assert not gradients[0][:masked].any() and (out.logps[:masked] == 0).all()


@pytest.mark.parametrize("masked, most", [(0, 12), (1, 15)])
def test_launches(kernels, device, masked, most):
    """Five kernels, three products, and what finds the tokens, gathers them and puts them back."""
    hidden, weight, labels, old_logps, advantages = draw(device)
    labels[:masked] = -100
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    upstream = torch.ones((), device=device)

    def call():
        out = linear_r2vpo_loss(*leaves, labels, old_logps, advantages, backend=kernels)
        torch.autograd.grad(out.loss, leaves, upstream)
        out.metrics()

    counts = count_launches(call)
    assert counts["aten.addmm"] == 3 and counts.total() <= most, counts


def test_without_grad_one_product(device, products):
    hidden, weight, *rest = draw(device)
    with torch.no_grad():
        linear_r2vpo_loss(hidden.requires_grad_(), weight.requires_grad_(), *rest)
        linear_token_logps(hidden, weight, rest[0])
    assert products == [20, 20]


def test_one_chunk_wherever_its_logits_need_no_more_than_it_saves(device, products, monkeypatch):
    hidden, weight, *rest = draw(device, dtype=torch.bfloat16)

    def chunks(budget, dtype, **keywords):
        monkeypatch.setattr(module, "CHUNK_BYTES", {"elsewhere": budget})
        products.clear()
        run(hidden.to(dtype), weight.to(dtype), *rest, **keywords)
        return products[::3]

    token, accumulator = 2 * V, 4 * V * H
    assert 20 * token < accumulator
    assert chunks(1, torch.bfloat16) == [20]
    # A slope takes as much as the logits.
    budget = 2 * 20 * token - accumulator
    assert chunks(budget, torch.bfloat16, softcap=3.0) == [20]
    assert len(chunks(budget - 1, torch.bfloat16, softcap=3.0)) > 1
    # So do float32 logits.
    wide = {"logits_dtype": torch.float32}
    assert chunks(budget, torch.bfloat16, **wide) == [20]
    assert len(chunks(budget - 1, torch.bfloat16, **wide)) > 1
    # The gradient of a float32 head is float32 in any case: nothing is saved.
    assert chunks(9 * 4 * V, torch.float32) == [7, 7, 6]
    assert chunks(9 * 4 * V, torch.float32, softcap=3.0) == [4] * 5
    assert chunks(1, torch.float32) == [1] * 20
    with torch.no_grad():
        products.clear()
        linear_token_logps(hidden, weight, rest[0])
        assert products == [1] * 20


def test_gradients_come_in_the_dtypes_of_the_parameters(device, halves):
    """Under autocast products are bfloat16, and the gradient of a float32 head is float32."""
    hidden, weight, labels, old_logps, advantages = draw(device)
    keywords = {"old_logps": old_logps, "advantages": advantages}
    inputs = {"hidden": hidden, "weight": weight, "bias": torch.randn(V, device=device)}
    for head in ({}, {"chunk_tokens": 6}, {"logits_dtype": torch.float32}):
        for center in ("one", "group"):
            for backend in ("auto", "eager"):
                with torch.autocast(device.type, torch.bfloat16):
                    check_linear_case(
                        inputs, labels, head, keywords | {"center": center}, backend,
                        dtype=torch.bfloat16,
                    )  # fmt: skip
    with torch.autocast(device.type, torch.bfloat16):
        mixed = run(hidden.bfloat16(), weight, labels, old_logps, advantages)
    assert mixed[1].dtype == torch.bfloat16 and mixed[2].dtype == torch.float32
    halves = run(hidden.bfloat16(), weight.bfloat16(), labels, old_logps, advantages)
    assert torch.equal(mixed[0].logps, halves[0].logps)


# Laws.


@pytest.mark.slow_in_interpreter
@given(linear_cases(masking="bool"))
def test_nothing_at_a_masked_token_matters(backend, device, halves, linear):
    """NaN in the hidden states there: the same bits, a gradient of exact zeros."""
    inputs, labels, head, keywords = linear.tensors(device)
    masked = keywords["mask"] == 0
    names = list(inputs)

    def once(inputs, labels):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        given = dict(zip(names, leaves, strict=True))
        out = linear_r2vpo_loss(
            given["hidden"], given["weight"], labels, bias=given.get("bias"), backend=backend,
            **head, **keywords,
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss.sum(), leaves)

    clean, gradients = once(inputs, labels)
    # In the same layout: products of another may add in another order.
    hidden = inputs["hidden"].clone()
    hidden[masked] = torch.nan
    same, bad = once(inputs | {"hidden": hidden}, torch.where(masked, 10**6, labels))
    assert torch.equal(clean.loss, same.loss) and torch.equal(clean.logps, same.logps)
    assert all(torch.equal(x, y) for x, y in zip(gradients, bad, strict=True))
    assert not bad[0][masked].any()


@pytest.mark.parametrize("center", ["one", "group", "given"])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_micro_batches_sum_to_the_batch(route, device, center, chunk_tokens):
    hidden, weight, labels, old_logps, advantages = draw(device, batch=6)
    if route == "eager":
        hidden, weight = hidden.double(), weight.double()
    group_ids = torch.tensor([0, 1, 0, 1, 1, 0], device=device)
    labels[2, 3:] = -100
    normalizer = (labels != -100).sum()

    def on(rows, center):
        return run(
            hidden[rows], weight, labels[rows], old_logps[rows], advantages[rows],
            backend=route, group_ids=group_ids[rows], num_groups=2, center=center,
            normalizer=normalizer, chunk_tokens=chunk_tokens,
        )  # fmt: skip

    whole, dhidden, dweight = on(torch.arange(6), "one" if center == "one" else "group")
    parts = [[0, 2, 5], [1, 3, 4]] if center == "group" else [[0, 3], [1], [2, 4, 5]]
    given_ = whole.stats.mean if center == "given" else center
    results = [on(torch.tensor(rows), given_) for rows in parts]
    keywords = {
        "old_logps": old_logps, "advantages": advantages, "group_ids": group_ids, "num_groups": 2,
        "center": "one" if center == "one" else "group",
    }  # fmt: skip
    # Each part and the whole are within the bound of the logits' gradient, and so of its sums.
    logits = hidden.double() @ weight.double().t()
    error = (H + 3) * 2.0**-24 * (hidden.double().abs() @ weight.double().abs().t())
    truth = truth_of(logits, labels, keywords, route, logits_error=error.reshape(-1, V))
    bound = truth.gradient_bound + (V + 30) * 2.0**-24 * truth.gradient.abs()
    bounds = bound @ weight.double().abs(), bound.t() @ hidden.double().abs().reshape(-1, H)
    for rows, (_, part, _) in zip(parts, results, strict=True):
        assert ((part - dhidden[rows]).abs() <= 2 * bounds[0].view(6, 5, H)[rows]).all()
    difference = sum(part for _, _, part in results) - dweight
    assert (difference.abs() <= 2 * bounds[1]).all()
    assert abs(sum(out.loss for out, _, _ in results) - whole.loss) <= 2 * truth.loss_bound.sum()


def test_repetition_and_a_kept_graph_give_the_same_bits(route, device, halves):
    hidden, weight, *rest = draw(device, dtype=torch.bfloat16)
    for center in ("one", "group"):
        keywords = {"backend": route, "center": center, "chunk_tokens": 6}
        first = run(hidden, weight, *rest, upstream=0.7, **keywords)
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        out = linear_r2vpo_loss(*leaves, *rest, **keywords)
        kept = torch.autograd.grad(out.loss * 0.7, leaves, retain_graph=True)
        again = torch.autograd.grad(out.loss * 0.7, leaves)
        for a, b, c in zip(first[1:], kept, again, strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)


def test_on_policy_against_what_was_recorded(kernels, device, halves):
    """Log-probs recorded by linear_token_logps, chunk by chunk, give a log-ratio of exactly 0."""
    hidden, weight, labels, _, advantages = draw(device, dtype=torch.bfloat16)
    for chunk_tokens in (None, 7):
        keywords = {"chunk_tokens": chunk_tokens, "backend": kernels}
        old_logps = linear_token_logps(hidden, weight, labels, **keywords).detach()
        out, dhidden, _ = run(hidden, weight, labels, old_logps, advantages, **keywords)
        implicit, same, _ = run(hidden, weight, labels, None, advantages, **keywords)
        assert out.stats.variance == 0 and torch.equal(out.loss, implicit.loss)
        assert torch.equal(dhidden, same)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_float16_gradients_survive_a_loss_scale(device, halves, logits_dtype):
    """A gradient under float16's smallest number, but for the loss scale."""
    hidden, weight, labels, old_logps, advantages = draw(device, dtype=torch.float16)
    keywords = {"normalizer": 1e9, "backend": "auto", "logits_dtype": logits_dtype}
    scale = 2.0**28
    _, dhidden, dweight = run(
        hidden, weight, labels, old_logps, advantages, upstream=scale, **keywords
    )
    keywords |= {"backend": "eager", "logits_dtype": None}
    _, *truth = run(
        hidden.double(), weight.double(), labels, old_logps, advantages, upstream=scale, **keywords
    )
    for x, y in zip((dhidden, dweight), truth, strict=True):
        assert (x.double() - y).norm() <= 0.01 * y.norm()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (1, 1)])
def test_few_tokens_or_none(route, device, shape):
    hidden, weight, labels, old_logps, advantages = draw(device, *shape)
    for center in ("one", "group"):
        for chunk_tokens in (None, 1):
            out, dhidden, dweight = run(
                hidden, weight, labels, old_logps, advantages, center=center, backend=route,
                chunk_tokens=chunk_tokens,
            )  # fmt: skip
            assert out.logps.shape == labels.shape and out.loss.isfinite()
            assert dhidden.shape == hidden.shape and dweight.isfinite().all()


def test_a_second_derivative_raises(device):
    hidden, weight, *rest = draw(device)
    for center in ("one", "group"):
        leaf = hidden.detach().requires_grad_()
        loss = linear_r2vpo_loss(leaf, weight, *rest, center=center).loss
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, leaf, create_graph=True)


# In a model.


class Model(nn.Module):
    def __init__(self, tied=False, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layers = nn.ModuleList([nn.Linear(H, H) for _ in range(2)])
        self.head = nn.Linear(H, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def hidden(self, tokens, checkpointed=False):
        x = self.embedding(tokens)
        for layer in self.layers:
            step = lambda x, layer=layer: torch.tanh(layer(x)) + x  # noqa: E731
            x = checkpoint(step, x, use_reentrant=False) if checkpointed else step(x)
        return x


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_gets_the_gradients_of_its_logits(device, tied, checkpointed):
    model = Model(tied, bias=True).to(device)
    _, _, labels, old_logps, advantages = draw(device)
    rest = (labels, old_logps, advantages)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    hidden = model.hidden(labels, checkpointed)
    ours = gradients(linear_r2vpo_loss(hidden, model.head, *rest).loss)
    logits = model.head(model.hidden(labels))
    theirs = gradients(r2vpo_loss(logits, *rest).loss)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize(
    "name", ["linear_logps_forward", "linear_logps_backward", "linear_one_pass"]
)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    "kind, sparse, lora",
    [("none", False, True), ("small", False, False), ("some empty", True, False)],
)
def test_opcheck(kernels, device, name, with_entropy, kind, sparse, lora):
    """Of hidden states that lie the other way round, and in another dtype than the products."""
    hidden, weight, labels, old_logps, advantages = draw(device)
    labels[0, 0] = -100
    columns = hidden.reshape(-1, H).t().contiguous().t()
    adapter = (torch.randn(3, H, device=device), weight[:, :3].clone()) if lora else (None, None)
    dtypes = torch.bfloat16, torch.float32
    head = (columns, weight, weight[:, 0].clone(), *adapter, 3.0, 0.5, *dtypes, 7, True)
    generator = torch.Generator().manual_seed(0)
    sets = sampling_mask_of(kind, labels.clamp(min=0), V, generator)
    batch = Batch(
        labels.shape, labels, reduction="token-mean",
        sampling_mask=None if sets is None else sets.to(device),
    )  # fmt: skip
    objective = Objective(
        advantages=advantages, old_logps=old_logps, ref_logps=old_logps - 0.1, kl_coef=0.1
    )
    call = ops.Call(batch, objective, with_entropy, kernels)
    flat = call.flat(hidden)
    forward = (*head, [False] * 5, sparse, None, *flat)
    saved = linear_logps_forward(*forward)
    entropy = saved[-1]
    gradients = (saved[1], entropy, None, call.token_ids, None, with_entropy, kernels, call.offsets)
    arguments = {
        "linear_logps_forward": forward,
        "linear_logps_backward": (
            *head, [True, False, True, lora, lora], sparse, *(x.clone() for x in saved), *gradients,
        ),
        "linear_one_pass": (*head, [True, True, False, lora, False], sparse, *flat),
    }[name]  # fmt: skip
    check_op(name, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend, center", [("auto", "one"), ("auto", "group"), ("eager", "one")])
def test_fullgraph_with_at_most_one_extra_compilation(device, backend, center):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(hidden, weight, labels, old_logps, advantages, coef):
        out = linear_r2vpo_loss(
            hidden * 1, weight, labels, old_logps, advantages, variance_coef=coef, center=center,
            softcap=5.0, backend=backend,
        )  # fmt: skip
        return out.loss, out.stats

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for batch, length, coef in ((3, 4, 2.5), (4, 5, 0.5), (5, 7, 1.5)):
        results = []
        for function in (compiled, call):
            hidden, weight, *rest = draw(device, batch, length)
            leaves = [hidden.requires_grad_(), weight.requires_grad_()]
            loss, stats = function(*leaves, *(x.clone() for x in rest), coef)
            (loss * 1.5).backward()
            results.append((loss, stats.variance, [x.grad for x in leaves]))
        counts.append(counter.frame_count)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert counts[0] == 1 and counts[-1] <= 2, counts


@pytest.mark.slow
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_a_model_compiles_with_its_head(device, logits_dtype):
    """The head as a module, under autocast, with what its gradient needs found in forward."""
    model = Model().to(device)
    _, _, labels, _, advantages = draw(device)

    def loss(labels):
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.hidden(labels)
            return linear_r2vpo_loss(
                hidden, model.head, labels, None, advantages, logits_dtype=logits_dtype
            ).loss

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=COMPILER)):
        model.zero_grad()
        function(labels).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    # Inductor may leave out roundings to bfloat16.
    torch.testing.assert_close(*results, rtol=0.02, atol=1e-3)


MEMORY = """
import sys
import torch
from measure import peak_memory
from r2vpo_kernels import linear_r2vpo_loss

# Each tensor of the head's or a chunk's size is large enough for the allocator to give back.
tokens, vocabulary, width, chunk = 640, 150_000, 128, 128
device = torch.device(sys.argv[1])
hidden = torch.randn(tokens, width, device=device).bfloat16()
weight = torch.randn(vocabulary, width, device=device).bfloat16()
labels = torch.randint(0, vocabulary, (tokens,), device=device)
advantages = torch.ones(tokens, device=device)
dtype = getattr(torch, sys.argv[3])

def step():
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    out = linear_r2vpo_loss(
        *leaves, labels, None, advantages, chunk_tokens=chunk, center=sys.argv[2],
        logits_dtype=dtype,
    )
    out.loss.backward()

step()
print(peak_memory(step, device), dtype.itemsize * chunk * vocabulary, 4 * weight.numel())
"""


@pytest.mark.slow
@pytest.mark.parametrize("halves", [{}, {"R2VPO_KERNELS_HALF_PRODUCTS": "float32"}])
@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_a_chunk_and_a_float32_sum(device, center, halves, dtype):
    """By measurement, above the inputs, in a process of its own."""
    if halves and device.type != "cpu":
        pytest.skip("a GPU has units for halves")
    folder = Path(__file__).parents[2]
    path = os.pathsep.join([str(folder), str(folder / "benchmarks")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, device.type, center, dtype], capture_output=True, text=True,
        # Left to itself, glibc keeps ever larger blocks that were freed.
        env=environment | halves | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak, logits, total = run.stdout.split()
    if peak == "None":
        pytest.skip("nobody counts")
    peak, logits, total = int(peak), int(logits), int(total)
    # At the last the logits are gone, and beside the sum is what is returned.
    buffers = max(logits + total, total + total // 2)
    if device.type == "cpu":
        # A block of a product, it in float32 (or the tiles of a float32 product), what the product
        # copies, and what the allocator keeps.
        blocks = 14 * module.TILE["cpu"]
    else:
        # What rounds float32 logits in place, and a megabyte for each of the large tensors: the
        # allocator splits off no less.
        blocks = (logits // 2 if dtype == "float32" else 0) + 4 * 2**20
    # It would be seen if a chunk's logits were there twice.
    assert blocks < logits
    assert peak <= buffers + blocks


# Bad input.


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(H, V)
        self.weight, self.bias = self.base_layer.weight, None

    def forward(self, x):
        return 2 * self.base_layer(x)


class Lora(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched():
    head = nn.Linear(H, V)
    head.forward = lambda x: 2 * x
    return head


def pruned():
    return prune.random_unstructured(nn.Linear(H, V), "weight", 0.5)


class Wrapping(torch.Tensor):
    def __tensor_flatten__(self):
        raise NotImplementedError


BAD = {
    "hidden of integers": ({"hidden": torch.ones(4, 5, H).long()}, "hidden", "int64"),
    "hidden of no width": ({"hidden": torch.ones(4, 5, 0)}, "hidden", "H at least 1"),
    "hidden of one dimension": ({"hidden": torch.ones(H)}, "hidden", r"\(16,\).*\(B, T, H\)"),
    "labels of another shape": ({"labels": torch.zeros(4, 4).long()}, "labels", r"\(4, 5\)"),
    "a weight of another width": ({"weight": torch.ones(V, H + 1)}, "weight", r"17.*\(V, 16\)"),
    "a weight the wrong way round": ({"weight": torch.ones(H, V)}, "weight", r"\(16, 40\)"),
    "a weight of no words": ({"weight": torch.ones(0, H)}, "weight", r"\(0, 16\)"),
    "a weight of three dimensions": ({"weight": torch.ones(1, V, H)}, "weight", r"\(V, 16\)"),
    "a sparse weight": ({"weight": torch.ones(V, H).to_sparse()}, "weight", "sparse.*dense"),
    "a weight of bytes": ({"weight": torch.ones(V, H).byte()}, "weight", "uint8.*floats"),
    "a weight of float8": (
        {"weight": torch.ones(V, H).to(torch.float8_e4m3fn)}, "weight", "float8.*float32"
    ),
    "a quantised weight": (
        {"weight": torch.ones(V, H).as_subclass(Wrapping)}, "weight", "Wrapping.*dense"
    ),
    "a weight of another dtype": ({"weight": torch.ones(V, H).bfloat16()}, "weight",
                                  "bfloat16.*float32, the dtype of hidden"),
    "a weight on another device": ({"weight": torch.ones(V, H, device="meta")}, "weight", "meta"),
    "not a tensor": ({"weight": [1.0]}, "weight", "list"),
    "an adapter": ({"weight": Adapter()}, "weight", "Adapter.*merge"),
    "a layer that does more": ({"weight": Lora(H, V)}, "weight", "Lora.*merge"),
    "a weight that a hook makes": ({"weight": pruned()}, "weight", "Linear.*merge"),
    "chunks of a truth": ({"chunk_tokens": True}, "chunk_tokens", "True.*whole number"),
    "sparse hidden states": ({"hidden": torch.ones(4, 5, H).to_sparse()}, "hidden", "sparse"),
    "a patched head": ({"weight": patched()}, "weight", "Linear.*merge"),
    "two biases": ({"weight": nn.Linear(H, V), "bias": torch.ones(V)}, "bias", "None where"),
    "a bias of another length": ({"bias": torch.ones(V + 1)}, "bias", r"\(41,\).*\(40,\)"),
    "a bias of another dtype": ({"bias": torch.ones(V).half()}, "bias", "float16.*float32"),
    "a softcap of 0": ({"softcap": 0.0}, "softcap", "0.0.*above 0"),
    "a softcap of a string": ({"softcap": "big"}, "softcap", "str"),
    "an infinite scale": ({"logit_scale": float("inf")}, "logit_scale", "inf"),
    "logits of a name": ({"logits_dtype": "float32"}, "logits_dtype", "str.*torch.dtype, or None"),
    "narrower logits": ({"logits_dtype": torch.bfloat16}, "logits_dtype",
                        "bfloat16.*float32, that of hidden"),
    "wider logits": ({"logits_dtype": torch.float64}, "logits_dtype", "float64.*float32"),
    "chunks of nothing": ({"chunk_tokens": 0}, "chunk_tokens", "0.*at least 1"),
    "chunks of a half": ({"chunk_tokens": 0.5}, "chunk_tokens", "0.5.*whole number"),
    "compact of a string": ({"compact": "no"}, "compact", "str.*True or False"),
    "a backend for a GPU": ({"backend": "tpu"}, "backend", "'tpu'"),
    "a label of V": ({"labels": torch.full((4, 5), V)}, "labels", "got 40 at 0"),
}  # fmt: skip


@pytest.mark.parametrize("entry", [linear_r2vpo_loss, linear_token_logps])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, entry):
    changes, argument, words = BAD[name]
    names = ("hidden", "weight", "labels", "old_logps", "advantages")
    arguments = dict(zip(names, draw(torch.device("cpu")), strict=True)) | changes
    if entry is linear_token_logps:
        del arguments["old_logps"], arguments["advantages"]
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: (?s:.*){words}"):
        entry(**arguments)


def test_where_nobody_looks_a_bad_label_makes_the_loss_nan(backend, device, monkeypatch):
    """A GPU without R2VPO_KERNELS_VALIDATE=1, by pretending."""
    for looking in (checks, ops):
        monkeypatch.setattr(looking, "may_synchronise", lambda value: False)
    hidden, weight, labels, *rest = draw(device)
    labels[1, 2] = V
    for center in ("one", "group"):
        out, *_ = run(hidden, weight, labels, *rest, backend=backend, center=center)
        assert out.loss.isnan() and out.logps.isnan().sum() == 1


def test_keywords_are_those_of_the_other_entries():
    with pytest.raises(
        TypeError, match=r"^inplace: got an unknown keyword, expected one of hidden"
    ):
        linear_r2vpo_loss(*draw(torch.device("cpu")), inplace=True)
    arguments = dict(zip(("hidden", "weight", "labels", "old_logps"), draw("cpu")[:4], strict=True))
    with pytest.raises(ValueError, match=r"^variance_coef: got -1\.0"):
        linear_r2vpo_loss(**arguments, advantages=torch.ones(4), variance_coef=-1.0)
