"""What users of other losses of this kind have reported as bugs, one test or more each.

The number in a test's name is that of this list, with one report of each:

 1. a second copy of the loss drifts (Liger#1082)
 2. the loss depends on the split into micro-batches (verl#7913): in test_laws.py
 3. temperature omitted or applied twice (trl#3029)
 4. V not a multiple of the block (verl#2656)
 5. an expanded upstream gradient read as contiguous (verl#6960)
 6. -inf logits give NaN (flash-attention#1930)
 7. overflowing ratios, inf - inf, 0 * inf (OpenRLHF#1293)
 8. Python floats reach the kernel as float64 (Liger#1366): in test_ops.py
 9. an in-place gradient destroys logits that are still needed (unsloth#5002)
10. an entropy gradient silently dropped (trl#6625)
11. int32 overflow of N·V, limits of a second grid dimension (fla#1080)
12. a fixed warp size on AMD (Liger#231): in test_aot.py
15. advantages, masks and labels misread
16. an output in which tools do not find the loss
17. a result changed in place, of which backward reads
18. an undefined upstream gradient
19. sizes that an export makes constants of
20. upstream gradients in a batch (is_grads_batched)
21. NumPy's numbers refused: in test_errors.py
22. jagged tensors: in test_errors.py
23. a torch that was built without distributed
24. DTensors, and a rank without words: in tests/distributed

13 and 14, compiled extensions and unwrapped DDP models, do not apply to what is here.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.harness import check_case, truth_of
from support.tolerance import U, assert_within
from torch.utils import _pytree as pytree

import r2vpo_kernels
from r2vpo_kernels import (
    R2VPOOutput,
    linear_r2vpo_loss,
    linear_token_logps,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    token_logps,
)
from r2vpo_kernels.backends import triton

INF = float("inf")


def batch(device, vocabulary=40, dtype=torch.float32, shape=(3, 4)):
    torch.manual_seed(0)
    logits = (2 * torch.randn(*shape, vocabulary, device=device)).to(dtype)
    labels = torch.randint(0, vocabulary, shape, device=device)
    logps = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    return logits, labels, logps + 0.2, torch.randn(shape[0], device=device)


def test_1_at_coefficient_zero_it_is_the_plain_policy_gradient(backend, device):
    logits, labels, old_logps, advantages = batch(device)
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    r2vpo_loss(
        ours, labels, old_logps, advantages, variance_coef=0.0, backend=backend
    ).loss.backward()
    logps = torch.log_softmax(plain, -1).gather(-1, labels[..., None])[..., 0]
    (-advantages[:, None] * (logps - old_logps).exp()).mean().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=100 * U, atol=100 * U)
    assert (ours.grad.norm() / plain.grad.norm()).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_3_temperature_applies_once(backend, device, temperature):
    logits, labels, old_logps, advantages = batch(device)
    leaf, divided = logits.clone().requires_grad_(), (logits / temperature).requires_grad_()
    out = r2vpo_loss(leaf, labels, old_logps, advantages, temperature=temperature, backend=backend)
    same = r2vpo_loss(divided, labels, old_logps, advantages, backend=backend)
    torch.testing.assert_close(out.loss, same.loss, rtol=100 * U, atol=100 * U)
    out.loss.backward()
    same.loss.backward()
    torch.testing.assert_close(leaf.grad * temperature, divided.grad, rtol=1e-4, atol=1e-5)
    logps = token_logps(logits, labels, temperature=temperature, backend=backend)
    assert torch.equal(logps, out.logps)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 31, 32, 33, 63, 65, 127, 128, 129, 257])
def test_4_any_vocabulary_gives_probabilities(backend, device, vocabulary):
    logits, labels, old_logps, advantages = batch(device, vocabulary)
    every = torch.arange(vocabulary, device=device)
    row = logits[:1, :1].expand(1, vocabulary, vocabulary)
    logps = token_logps(row, every[None], backend=backend)
    assert (logps <= 1e-6).all()
    assert logps.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    keywords = {"old_logps": old_logps, "advantages": advantages}
    check_case(logits, labels, keywords, backend)


@pytest.mark.slow_in_interpreter
def test_5_the_upstream_gradient_may_be_expanded_or_strided(backend, device):
    logits, labels, old_logps, advantages = batch(device)
    whole = torch.randn(4, 3, device=device)
    one = torch.ones((), device=device)
    for upstream in (whole.t(), one.expand(3, 4), whole[:1].t().expand(3, 4)):
        leaf, same = (logits.clone().requires_grad_() for _ in range(2))
        for z, up in ((leaf, upstream), (same, upstream.contiguous())):
            out = r2vpo_loss(z, labels, old_logps, advantages, reduction="none", backend=backend)
            out.loss.backward(up)
        assert torch.equal(leaf.grad, same.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_6_minus_infinity_is_a_legal_logit(backend, device, dtype):
    """A first block, a last block, all but the label, and the label itself."""
    logits, labels, old_logps, advantages = batch(device, 200, dtype)
    columns = torch.arange(200, device=device)
    logits[0, :, :130] = -INF
    labels[0] = 150
    logits[1, :, 20:] = -INF
    labels[1] = 3
    logits[2, :2] = torch.where(columns == labels[2, :2, None], logits[2, :2], -INF)
    keywords = {
        "old_logps": old_logps, "advantages": advantages, "entropy_coef": 0.1,
        "kl_coef": 0.1, "ref_logps": old_logps - 0.3,
    }  # fmt: skip
    check_case(logits, labels, keywords, backend)
    logits[2, 2, labels[2, 2]] = -INF
    check_case(logits, labels, keywords, backend)
    out = r2vpo_loss(logits, labels, **keywords, backend=backend)
    assert out.logps[2, 2] == -INF and out.loss.isfinite()
    assert out.metrics()["ratio/clamped"] > 0


def test_6_on_policy_the_log_ratio_is_zero_even_at_a_label_of_minus_infinity(backend, device):
    logits, labels, _, advantages = batch(device)
    logits[0, 0, labels[0, 0]] = -INF
    leaf = logits.requires_grad_()
    out = r2vpo_loss(leaf, labels, None, advantages, backend=backend)
    out.loss.backward()
    assert out.stats.variance == 0 and out.loss.isfinite()
    # dL/dlogp = -w·A, and 1 - p is 1 there.
    expected = -advantages[0] / labels.numel()
    torch.testing.assert_close(leaf.grad[0, 0, labels[0, 0]], expected)


@pytest.mark.parametrize("bad", ["all -inf", "nan", "+inf"])
def test_6_a_row_without_a_softmax_gives_a_nan_loss(backend, device, bad):
    logits, labels, old_logps, advantages = batch(device)
    if bad == "all -inf":
        logits[1, 2] = -INF
    else:
        logits[1, 2, 5] = float(bad)
    for old in (old_logps, None):
        for grad in (False, True):
            out = r2vpo_loss(
                logits.clone().requires_grad_(grad), labels, old, advantages, backend=backend
            )
            assert out.loss.isnan() and out.logps[1, 2].isnan()
            assert out.logps.isnan().sum() == 1


@pytest.mark.parametrize(
    "huge, temperature",
    [(1e38, 1.0), (-1e38, 1.0), (3e38, 1e6), (1e8, 1e-6), (1e8, 1.0), (1e3, 1e-6), (1e3, 1e-3)],
)
def test_6_only_distances_from_the_maximum_count(kernels, device, huge, temperature):
    """All of a row huge, so that z / temperature overflows or has no digits left for its size."""
    logits, labels, old_logps, advantages = batch(device)
    logits[1] += huge
    logits[2, :, :7] = huge
    keywords = {"old_logps": old_logps, "advantages": advantages, "temperature": temperature}
    check_case(logits, labels, keywords | {"entropy_coef": 0.1}, kernels)


@pytest.mark.slow_in_interpreter
def test_7_ratios_that_overflow_stay_finite(backend, device):
    logits, labels, old_logps, advantages = batch(device)
    advantages[0] = 0.0
    for shift in (-1e4, -90.0, 90.0, 1e4, INF, -INF):
        keywords = {
            "old_logps": old_logps + shift, "advantages": advantages, "kl_coef": 0.1,
            "ref_logps": old_logps - shift,
        }  # fmt: skip
        for kl_estimator in ("k1", "k2", "k3"):
            leaf = logits.clone().requires_grad_()
            out = r2vpo_loss(leaf, labels, **keywords, kl_estimator=kl_estimator, backend=backend)
            out.loss.backward()
            assert out.loss.isfinite() and out.stats.variance.isfinite().all()
            # Clamped: no gradient at all.
            assert not leaf.grad.any()
            assert out.metrics()["ratio/clamped"] == 1
    limit = {"old_logps": old_logps, "advantages": advantages, "log_ratio_clamp": 0.1}
    check_case(logits, labels, limit, backend)


def test_near_on_policy_the_penalty_keeps_its_digits(backend, device):
    """Eq. 13: with δ exactly 2⁻¹² and no advantage, the gradient is 2λ·w·ρ·d/2 to a few u; exp - 1
    would be off by 2¹² times as much."""
    logits = torch.zeros(1, 1, 2, device=device, requires_grad=True)
    labels = torch.zeros(1, 1, dtype=torch.long, device=device)
    logps = token_logps(logits.detach(), labels, backend=backend)
    out = r2vpo_loss(logits, labels, logps - 2**-12, torch.zeros(1, device=device), backend=backend)
    out.loss.backward()
    d = math.expm1(2**-12)
    expected = 2 * 0.5 * (1 + d) * d * 0.5
    assert logits.grad[0, 0, 0].item() == pytest.approx(expected, rel=16 * U)
    assert out.loss.item() == pytest.approx(0.5 * d**2, rel=16 * U)


@pytest.mark.parametrize("entry", ["loss", "logps"])
def test_near_certainty_the_labels_gradient_keeps_its_digits(kernels, device, entry):
    """Eq. 8: at p = 1 / (1 + 2⁻¹⁴), whose logp float32 has in full, the gradient is -expm1(logp);
    of 1 - p what is below 2⁻²⁴ would be lost, 2⁵ times as much as is allowed."""
    logits = torch.tensor([[[14 * math.log(2), 0.0]]], device=device, requires_grad=True)
    labels = torch.zeros(1, 1, dtype=torch.long, device=device)
    if entry == "loss":
        advantages = -torch.ones(1, device=device)
        r2vpo_loss(logits, labels, None, advantages, backend=kernels).loss.backward()
    else:
        token_logps(logits, labels, backend=kernels).sum().backward()
    other = math.exp(-logits[0, 0, 0].item())
    # The distance 14·ln 2 is rounded twice in the exponent.
    assert logits.grad[0, 0, 0].item() == pytest.approx(other / (1 + other), rel=32 * U)


def test_9_in_place_is_refused_where_it_would_destroy(backend, device):
    logits, labels, old_logps, advantages = batch(device)
    leaf = logits.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"inplace.*leaf"):
        r2vpo_loss(leaf, labels, old_logps, advantages, inplace=True, backend=backend)
    packed = logits[0].clone().requires_grad_()
    for view in (leaf.view(3, 4, 40), leaf[:, :-1], leaf[0], packed):
        with pytest.raises(ValueError, match=r"inplace.*leaf"):
            r2vpo_loss(
                view, labels[: view.shape[0], : view.shape[1]] if view.dim() == 3 else labels[0],
                None, torch.ones(view.shape[0], device=device), inplace=True, backend=backend,
            )  # fmt: skip
    whole = leaf * 1
    for shared in (whole[:1].expand(3, 4, 40), whole.as_strided((3, 4, 40), (40, 40, 1))):
        with pytest.raises(ValueError, match=r"inplace.*share"):
            r2vpo_loss(shared, labels, old_logps, advantages, inplace=True, backend=backend)
    turned = whole.transpose(0, 1).contiguous().transpose(0, 1)
    r2vpo_loss(turned, labels, old_logps, advantages, inplace=True, backend=backend)


@pytest.mark.parametrize("center", ["one", "group"])
def test_9_logits_survive_unless_in_place_was_asked_for(backend, device, center):
    logits, labels, old_logps, advantages = batch(device)
    seen = logits.clone().requires_grad_() * 1
    before = seen.detach().clone()
    out = r2vpo_loss(seen, labels, old_logps, advantages, center=center, backend=backend)
    (out.loss * 2).backward()
    assert torch.equal(seen.detach(), before)


@pytest.mark.parametrize("center", ["one", "group"])
def test_9_autograd_notices_logits_overwritten_that_it_still_needs(kernels, device, center):
    logits, labels, old_logps, advantages = batch(device)
    leaf = logits.requires_grad_()
    # exp saves its result for its own backward.
    seen = leaf.exp()
    out = r2vpo_loss(
        seen, labels, old_logps, advantages, center=center, inplace=True, backend=kernels
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss * 2).backward()


@pytest.mark.slow_in_interpreter
def test_9_in_place_takes_no_second_buffer(kernels, device):
    """The gradient of the logits lies where the logits lay."""
    logits, labels, old_logps, advantages = batch(device)
    for center in ("one", "group"):
        seen = logits.clone().requires_grad_() * 1
        out = r2vpo_loss(
            seen, labels, old_logps, advantages, center=center, inplace=True, backend=kernels
        )
        (gradient,) = torch.autograd.grad(out.loss, seen)
        assert gradient.data_ptr() == seen.data_ptr()


@pytest.mark.slow_in_interpreter
def test_10_entropy_reaches_the_logits_on_every_route(backend, device):
    logits, labels, old_logps, advantages = batch(device)
    for keywords in ({}, {"center": "group"}, {"ratio_level": "sequence"}, {"reduction": "none"}):
        gradients = []
        for entropy_coef in (0.0, 0.5):
            leaf = logits.clone().requires_grad_()
            out = r2vpo_loss(
                leaf, labels, old_logps, advantages, entropy_coef=entropy_coef, backend=backend,
                **keywords,
            )  # fmt: skip
            out.loss.sum().backward()
            gradients.append(leaf.grad)
        assert (gradients[0] - gradients[1]).abs().max() > 1e-3
        assert not out.entropy.requires_grad and not out.logps.requires_grad
        assert not any(value.requires_grad for value in out.metrics().values())


def test_11_offsets_past_two_to_the_31_are_reached(kernels, device):
    """A second row beyond 2³¹ elements, in memory that is never touched in between."""
    stride = 2**31 + 64
    try:
        storage = torch.empty(0, dtype=torch.bfloat16, device=device)
        if device.type == "cpu":
            # Address space alone: a file with a hole, mapped.
            import tempfile

            with tempfile.NamedTemporaryFile() as file:
                file.truncate(2 * (stride + 64))
                storage = torch.from_file(
                    file.name, shared=True, size=stride + 64, dtype=torch.bfloat16
                )
        else:
            storage = torch.empty(stride + 64, dtype=torch.bfloat16, device=device)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no address space for {2 * stride} bytes: {error}")
    torch.manual_seed(0)
    logits = storage.as_strided((2, 1, 64), (stride, 64, 1))
    logits.copy_(torch.randn(2, 1, 64))
    labels = torch.tensor([[3], [40]], device=device)
    ours = token_logps(logits, labels, backend=kernels)
    keywords = {"old_logps": None, "advantages": torch.ones(2, device=device)}
    truth = truth_of(logits.clone(), labels, keywords, kernels)
    assert_within("logps", ours, truth.logps, truth.logps_bound)


def test_memory_that_begins_off_a_16_byte_boundary_is_refused(device):
    """As numpy or a file may hand it over; Triton's wide accesses would fault on it."""
    if device.type != "cpu":
        pytest.skip("a GPU's allocator begins at such boundaries")
    memory = bytearray(4 * 200)
    start = next(n for n in range(4, 20, 4) if (torch.frombuffer(memory, dtype=torch.float32)
                 .data_ptr() + n) % 16)  # fmt: skip
    logits = torch.frombuffer(memory, dtype=torch.float32, offset=start, count=120)
    logits, labels = logits.reshape(1, 3, 40), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"logits: .*16-byte boundary"):
        token_logps(logits, labels, backend="triton")
    # The C++ kernels take it as it comes.
    here, copied = (token_logps(z, labels, backend="cpp") for z in (logits, logits.clone()))
    assert torch.equal(here, copied)


def test_11_grids_are_one_dimensional():
    for source in Path(triton.__file__).parent.glob("*.py"):
        text = source.read_text()
        assert "program_id(1)" not in text and "program_id(2)" not in text


def test_15_advantages_per_sequence_and_per_token_are_told_apart(backend, device):
    logits, labels, old_logps, advantages = batch(device, shape=(4, 4))
    old_logps = old_logps + torch.randn_like(old_logps)
    per_token = advantages[:, None].expand(4, 4)
    losses = [
        r2vpo_loss(logits, labels, old_logps, a, backend=backend).loss
        for a in (advantages, per_token, per_token.contiguous())
    ]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    transposed = r2vpo_loss(logits, labels, old_logps, per_token.t(), backend=backend).loss
    assert transposed != losses[0]


def test_15_masks_of_any_dtype_and_ignored_labels_agree(backend, device):
    logits, labels, old_logps, advantages = batch(device)
    keep = torch.rand(3, 4, device=device) < 0.5
    ignored = torch.where(keep, labels, -100)
    reference = r2vpo_loss(logits, ignored, old_logps, advantages, backend=backend).loss
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        out = r2vpo_loss(
            logits, labels, old_logps, advantages, mask=keep.to(dtype), backend=backend
        )
        assert torch.equal(out.loss, reference)
    labelled = torch.where(keep, labels, 7)
    out = r2vpo_loss(
        logits, labelled, old_logps, advantages, ignore_index=7, backend=backend,
        mask=(keep | (labels != 7)).int() * keep,
    )  # fmt: skip
    assert torch.equal(out.logps[~keep], torch.zeros_like(out.logps[~keep]))


def test_15_the_entry_from_logps_reads_the_same_mask(device):
    _, _, old_logps, advantages = batch(device)
    logps = (old_logps - 0.1).requires_grad_()
    keep = torch.zeros(3, 4, dtype=torch.uint8, device=device)
    keep[1] = 2
    old_logps[0] = float("nan")
    out = r2vpo_loss_from_logps(logps, old_logps, advantages, mask=keep)
    out.loss.backward()
    assert out.loss.isfinite() and not logps.grad[0].any() and logps.grad[1].all()


def test_the_public_names_are_the_contracts():
    assert set(r2vpo_kernels.__all__) == {
        "r2vpo_loss", "linear_r2vpo_loss", "r2vpo_loss_from_logps", "token_logps",
        "linear_token_logps", "SamplingMask", "RatioStats", "VarianceConstraint", "fenchel_coef",
        "R2VPOOutput",
    }  # fmt: skip


@pytest.mark.parametrize("with_entropy", [False, True])
def test_16_an_output_is_a_tree_of_tensors(backend, device, with_entropy):
    logits, labels, old_logps, advantages = batch(device)
    out = r2vpo_loss(
        logits, labels, old_logps, advantages, ref_logps=old_logps, return_entropy=with_entropy,
        backend=backend,
    )  # fmt: skip
    leaves, structure = pytree.tree_flatten(out)
    assert any(leaf is out.loss for leaf in leaves)
    assert all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, R2VPOOutput)
    assert torch.equal(again.stats.variance, out.stats.variance)
    for (name, one), (same, other) in zip(
        again.metrics().items(), out.metrics().items(), strict=True
    ):
        assert name == same and torch.equal(one, other)


class Unused(torch.autograd.Function):
    """Its input's gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


def identity(z):
    """A head whose logits are its hidden states."""
    return torch.eye(z.shape[-1], device=z.device)


LOSSES = {
    "one pass": lambda z, *rest, **k: r2vpo_loss(z, *rest, **k).loss,
    "group": lambda z, *rest, **k: r2vpo_loss(z, *rest, center="group", **k).loss,
    "none": lambda z, *rest, **k: r2vpo_loss(z, *rest, reduction="none", **k).loss,
    "from log-probs": lambda z, labels, *rest, **k: r2vpo_loss_from_logps(
        z[..., 0] * 1, *rest, **k
    ).loss,
    "log-probs": lambda z, labels, *_, **k: token_logps(z, labels, **k),
    "linear": lambda z, *rest, **k: linear_r2vpo_loss(z, identity(z), *rest, **k).loss,
    "linear, group": lambda z, *rest, **k: linear_r2vpo_loss(
        z, identity(z), *rest, center="group", **k
    ).loss,
    "linear log-probs": lambda z, labels, *_, **k: linear_token_logps(z, identity(z), labels, **k),
}


OUTPUTS = {
    "one pass": lambda z, *rest, **k: r2vpo_loss(z, *rest, return_entropy=True, **k),
    "group": lambda z, *rest, **k: r2vpo_loss(z, *rest, center="group", entropy_coef=0.1, **k),
    "none": lambda z, *rest, **k: r2vpo_loss(z, *rest, reduction="none", entropy_coef=0.1, **k),
    "from log-probs": lambda z, labels, *rest, **k: r2vpo_loss_from_logps(
        z[..., 0], *rest, entropy=z[..., 1], entropy_coef=0.1, reduction="none", **k
    ),
    "linear": lambda z, *rest, **k: linear_r2vpo_loss(z, identity(z), *rest, **k),
    "linear, group": lambda z, *rest, **k: linear_r2vpo_loss(
        z, identity(z), *rest, center="group", entropy_coef=0.1, **k
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_17_what_came_with_the_loss_may_be_changed(backend, device, name):
    """Also where autograd does not see it."""
    logits, *rest = batch(device)
    gradients = []
    for changes in (False, True):
        leaf = logits.clone().requires_grad_()
        out = OUTPUTS[name](leaf, *rest, backend=backend)
        if changes:
            for result in (out.logps, out.entropy, *pytree.tree_leaves(out.stats), out._metrics):
                if result is not None:
                    result.data.fill_(7.0)
        out.loss.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("linear", [False, True])
def test_17_log_probs_may_be_changed_in_place(backend, device, linear):
    logits, labels, *_ = batch(device)
    keep = torch.rand(labels.shape, device=device) < 0.5
    gradients = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        if linear:
            found = linear_token_logps(
                leaf, identity(leaf), labels, return_entropy=True, backend=backend
            )
        else:
            found = token_logps(leaf, labels, return_entropy=True, backend=backend)
        for x in found if in_place else ():
            x.masked_fill_(~keep, 0.0)
            x *= 2
        logps, entropy = found if in_place else (2 * keep * x for x in found)
        (logps + entropy).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_18_without_an_upstream_gradient_there_is_none(backend, device, name):
    logits, *rest = batch(device)
    leaf, other = logits.requires_grad_(), torch.ones((), device=device, requires_grad=True)
    loss = LOSSES[name](leaf, *rest, backend=backend)
    (Unused.apply(loss).sum() + other).backward()
    # An op of torch on the way may make zeros of it.
    assert leaf.grad is None or (backend == "eager" and not leaf.grad.any())
    assert other.grad == 1


@pytest.mark.parametrize("name", LOSSES)
def test_20_upstream_gradients_in_a_batch_are_refused_or_work(backend, device, name):
    logits, *rest = batch(device)
    loss = LOSSES[name](logits.requires_grad_(), *rest, backend=backend).reshape(-1)
    upstream = torch.eye(loss.numel(), device=device)

    def gradients():
        return torch.autograd.grad(loss, logits, upstream, is_grads_batched=True)[0]

    if backend == "eager":
        each = [torch.autograd.grad(loss, logits, u, retain_graph=True)[0] for u in upstream]
        torch.testing.assert_close(gradients(), torch.stack(each))
    else:
        with pytest.raises(RuntimeError, match="is_grads_batched"):
            gradients()


WITHOUT_DISTRIBUTED = """
import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.distributed":
            for what in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
                delattr(sys.modules["torch._C"], what)
            sys.meta_path.remove(self)

sys.meta_path.insert(0, Finder())
import torch
import r2vpo_kernels as r

assert not torch.distributed.is_available()
z, w = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
labels, advantages = torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
rest = labels, torch.zeros(2, 3), advantages
for center in ("one", "group"):
    r.r2vpo_loss(z, *rest, center=center).loss.backward()
    r.linear_r2vpo_loss(z, w, *rest, center=center).loss.backward()
r.r2vpo_loss_from_logps(z[..., 0], *rest[1:]).loss.backward()
r.token_logps(z, labels).sum().backward()
r.linear_token_logps(z, w, labels).sum().backward()
try:
    r.r2vpo_loss(z, *rest, tp_group=object())
except TypeError as error:
    assert str(error).startswith("tp_group: got object, expected")
"""


@pytest.mark.slow
def test_23_a_torch_without_distributed():
    """As USE_DISTRIBUTED=0 builds it."""
    subprocess.run([sys.executable, "-c", WITHOUT_DISTRIBUTED], check=True)
