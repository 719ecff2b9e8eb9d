"""The registered ops: opcheck, torch.compile with fullgraph, recompilations, backward."""

import dataclasses

import pytest
import torch
from conftest import KERNELS
from support.ops import COMPILER, check_op
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from r2vpo_kernels import (
    RatioStats,
    SamplingMask,
    VarianceConstraint,
    checks,
    linear_r2vpo_loss,
    ops,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    token_logps,
)
from r2vpo_kernels.backends import registry, triton
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective

V = 40


def tensors(device, batch=3, length=4, dtype=torch.float32):
    torch.manual_seed(batch * length)
    logits = torch.randn(batch, length, V, device=device).to(dtype)
    labels = torch.randint(0, V, (batch, length), device=device)
    labels[0, 0] = -100
    # A copy: for a graph input whose stride alone is symbolic, torch 2.13's dynamo can fail to make
    # guards ("sources must not be empty"), depending on the hash seed.
    return (
        logits,
        labels,
        torch.full_like(labels, -3.0, dtype=torch.float32),
        logits[:, 0, 0].float().clone(),
    )


def sets_of(labels, size=3, missing_label="error"):
    """`size` words for each, and among them the label; of every fifth the full vocabulary."""
    sets = [
        None if i % 5 == 4 else [y % V, *(w for w in range(size) if w != y % V)]
        for i, y in enumerate(labels.reshape(-1).tolist())
    ]
    return SamplingMask.from_lists(sets, device=labels.device, missing_label=missing_label)


def op_arguments(device, kernels, dtype=torch.bfloat16, with_entropy=True, sampled=True):
    """Good arguments of each op of a call with everything, as an autograd Function gives them."""
    logits, labels, old_logps, advantages = tensors(device, dtype=dtype)
    mask = torch.ones_like(labels, dtype=torch.bool)
    number = torch.tensor(0.3, device=device)
    ids = torch.zeros(3, dtype=torch.int32, device=device)
    sets = sets_of(labels) if sampled else None
    batch = Batch(labels.shape, labels, mask, -100, None, ids, 2, 0, "token-mean", number + 5, sets)
    objective = Objective(
        advantages=advantages, old_logps=old_logps, policy_loss="clip", clip_low=0.2, clip_high=0.3,
        variance_coef=number, center=torch.ones(2, device=device),
        importance_weights=old_logps * 0 + 1, ref_logps=old_logps - 0.1, kl_coef=0.1,
        entropy_coef=0.1, temperature=advantages * 0 + 1.0,
    )  # fmt: skip
    call = ops.Call(batch, objective, with_entropy, kernels)
    flat = call.flat(logits)
    saved = ops.logps_forward(logits, None, *flat)
    workspace, logps, _, _, entropy = saved
    gradients = logps, entropy, number, call.token_ids, None, with_entropy, kernels
    backward = (*(x.clone() for x in saved), *gradients)
    finish = workspace.clone(), logps, entropy, old_logps, 2, *ops.finish_options(call)
    call.batch = dataclasses.replace(batch, labels=None, sampling_mask=None)
    given = logps if with_entropy else None, *call.flat(logps)
    settings = 0.1, 0.1, 0.01, 10.0, kernels
    return logits, {
        "check": (advantages, advantages > -100, advantages, "x", "more"),
        "logps_forward": (logits, None, *flat),
        "logps_backward": (logits, *backward),
        "logps_backward_": (logits.clone(), *backward),
        "one_pass": (logits, *flat),
        "one_pass_": (logits.clone(), *flat),
        "scale_": (logits.clone(), number, kernels),
        "prepare": (logps, *given),
        "finish": (*finish, True, kernels),
        "dual_step": (number.clone(), *torch.rand(3, 2, device=device), True, *settings),
    }


OPS = (
    "logps_forward", "logps_backward", "logps_backward_", "one_pass", "one_pass_", "scale_",
    "prepare", "finish", "dual_step",
)  # fmt: skip


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("name", ["check", *OPS])
def test_opcheck(kernels, device, name, with_entropy, sampled):
    _, arguments = op_arguments(device, kernels, torch.float32, with_entropy, sampled)
    check_op(name, arguments[name])


def broken(value):
    """What is wrong about a tensor, by name; none of it may reach a kernel."""
    if value.is_floating_point():
        yield "complex numbers", value.to(torch.complex64)
    else:
        yield "floats", value.float()
    yield "another shape", torch.cat([value.reshape(-1)] * 2)
    freed = value.clone()
    freed.untyped_storage().resize_(value.element_size() // 2)
    yield "memory given back", freed
    if value.dim() == 3:
        yield "no vocabulary", value[..., :0]
        yield "a strided vocabulary", value.transpose(1, 2)


# Any dtype is read, and a mask of floats is one.
READ_AS_THEY_COME = {("mask", "floats"), ("mask", "complex numbers")}


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_is_reached_with_an_argument_that_is_wrong(op, kernels, device, monkeypatch):
    """Whoever calls an op: for each of its tensors, and each way in which it can be wrong."""
    monkeypatch.setenv("R2VPO_KERNELS_VALIDATE", "1")
    _, arguments = op_arguments(device, kernels)

    class Trap:
        SIMULATED = EMULATED = True

        def __getattr__(self, name):
            raise AssertionError(f"{name} was reached")

    monkeypatch.setattr(registry, "_imported", lambda backend: Trap())
    call, good = getattr(torch.ops.r2vpo_kernels, op), list(arguments[op])
    names = [argument.name for argument in call.default._schema.arguments]
    seen = set()
    for at, (name, value) in enumerate(zip(names, good, strict=True)):
        if isinstance(value, torch.Tensor):
            bad = dict(broken(value))
        else:
            choices = {
                "backend": "auto", "kl": "k4", "kl_estimator": "k4", "ratio_level": "word",
                "missing_label": "drop", "policy_loss": "ppo",
            }  # fmt: skip
            bad = {"unknown": choices[name]} if name in choices else {}
            if name == "missing_label" and good[names.index("token_ids")] is None:
                bad = {}  # of no mask
        if name == "token_ids" and "offsets" not in names:
            # More of them would not be read.
            bad |= {"another shape": value[:-1], "words outside": value + V, "below": value - V}
        for what, wrong in bad.items():
            if (name, what) in READ_AS_THEY_COME:
                continue
            # Kernels that do not take such an input are not available for it; of two shapes that
            # do not fit either may be named.
            others = {"logps": "|workspace", "weight": "|d_sum", "token_ids": "|offsets"}
            others = others.get(name, "")
            named = f"({name}|backend|shape{others})" if at == 0 or others else name
            with pytest.raises((ValueError, TypeError), match=f"^{named}: "):
                call(*good[:at], wrong, *good[at + 1 :])
            seen.add(name)
    tensors_of = {
        n for n, value in zip(names, good, strict=True) if isinstance(value, torch.Tensor)
    }
    assert seen >= tensors_of
    with pytest.raises(AssertionError, match="was reached"):
        call(*good)


@pytest.mark.parametrize("op", ["logps_forward", "one_pass", "one_pass_"])
def test_sets_that_no_sampling_mask_would_have_are_refused(op, kernels, device, monkeypatch):
    monkeypatch.setenv("R2VPO_KERNELS_VALIDATE", "1")
    _, arguments = op_arguments(device, kernels)
    call, good = getattr(torch.ops.r2vpo_kernels, op), list(arguments[op])
    names = [argument.name for argument in call.default._schema.arguments]
    ids, offsets, largest = (
        good[names.index(name)] for name in ("token_ids", "offsets", "largest")
    )
    for name, wrong in (
        ("token_ids", ids.flip(0)),  # does not rise
        ("token_ids", ids.index_fill(0, torch.tensor([1], device=device), -1)),
        ("token_ids", ids.index_copy(0, torch.tensor([0], device=device), ids[1:2])),
        ("offsets", offsets + 1),
        ("offsets", offsets.flip(0)),
        ("largest", largest - 1),
    ):
        at = names.index(name)
        with pytest.raises(ValueError, match=f"^{name}: "):
            call(*good[:at], wrong, *good[at + 1 :])
    # What is true of a part of it.
    at = names.index("largest")
    call(*good[:at], largest * 0 + V - 1, *good[at + 1 :])
    with pytest.raises(ValueError, match=f"^sampling_mask: got {V}, expected token_ids from 0 to"):
        call(*good[:at], largest * 0 + V, *good[at + 1 :])


@pytest.mark.parametrize("op", [name for name in OPS if name.endswith("_")])
def test_rows_that_share_memory_are_not_overwritten(op, kernels, device):
    _, arguments = op_arguments(device, kernels)
    logits, *rest = arguments[op]
    shared = logits[:, :1].expand_as(logits)
    with pytest.raises(ValueError, match="share memory"):
        getattr(torch.ops.r2vpo_kernels, op)(shared, *rest)


def test_tensors_on_two_devices_are_refused(kernels, device):
    # Not through the dispatcher, which answers for a meta tensor itself.
    labels = torch.zeros(3, 4, dtype=torch.long, device="meta")
    call = ops.Call(Batch(labels.shape, labels), Objective(), False, kernels)
    with pytest.raises(ValueError, match=r"^labels: got .* on meta, expected .* on c"):
        call.check(device)


def test_the_empty_gradient_lies_as_its_logits_do():
    """Rows at the same place within 16 bytes, for every view; contiguous for contiguous logits."""
    for dtype in (torch.bfloat16, torch.float32):
        word = 16 // dtype.itemsize
        for vocabulary in (1, 7, 16, 33):
            base = torch.zeros(4, 6, vocabulary, dtype=dtype)
            views = [base, base[:, :-1], base[:, 1:], base[1:], base[::2], base.transpose(0, 1)]
            views += [base[:1].expand(4, 6, vocabulary), base[:1], base[:, :1]]
            for logits in views:
                gradient = ops.empty_gradient(logits)
                assert gradient.shape == logits.shape
                for b in range(logits.shape[0]):
                    for t in range(logits.shape[1]):
                        ours, theirs = gradient[b, t], logits[b, t]
                        assert (ours.storage_offset() - theirs.storage_offset()) % word == 0
                # No two elements share memory.
                gradient.copy_(torch.arange(gradient.numel()).reshape(gradient.shape) % 97)
                assert (gradient.reshape(-1).float() == torch.arange(logits.numel()) % 97).all()
            assert ops.empty_gradient(base).is_contiguous()


ROUTES = {
    "one pass": {},
    "in place": {"inplace": True},
    "entropy and KL": {"entropy_coef": 0.1, "kl_coef": 0.1},
    "group": {"center": "group", "group_size": 1},
    "sequence": {"ratio_level": "sequence", "reduction": "seq-mean-token-mean"},
    "none": {"reduction": "none"},
    "clip": {"policy_loss": "clip"},
    "CISPO and unbiased KL": {"policy_loss": "cispo", "kl_coef": 0.1, "kl_unbiased": True},
    "sampled": {"sampled": "error"},
    "sampled, group": {"sampled": "full", "center": "group", "group_size": 1},
}


def routes():
    """Every route under aot_eager, and one of each kind under the default compiler.

    What is traced is the same for all kernels: a backend is a string that an op takes.
    """
    own = "cpp" if "cpp" in KERNELS else "triton"
    every = [(backend, name) for backend in ("eager", own) for name in ROUTES]
    every += [(backend, "one pass") for backend in KERNELS if backend != own]
    for backend, name in every:
        yield pytest.param(backend, name, "aot_eager", id=f"{backend}-{name}")
    for backend, name in (("eager", "group"), ("triton", "one pass"), ("auto", "entropy and KL")):
        yield pytest.param(backend, name, COMPILER, id=f"{backend}-{name}-{COMPILER}")


@pytest.mark.slow
@pytest.mark.parametrize("backend, name, compiler", list(routes()))
def test_fullgraph_with_at_most_one_extra_compilation(device, backend, name, compiler):
    """Shapes, λ, ε and temperature change between calls; all results stay those of eager mode."""
    keywords = dict(ROUTES[name])
    missing_label = keywords.pop("sampled", None)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def call(logits, labels, old_logps, advantages, coef, temperature, sets):
        clip = {"clip_range": (coef / 10, coef)} if "policy_loss" in keywords else {}
        out = r2vpo_loss(
            logits * 1, labels, old_logps, advantages, variance_coef=coef,
            temperature=temperature, ref_logps=old_logps - 0.1, sampling_mask=sets,
            backend=backend, **clip, **keywords,
        )  # fmt: skip
        return out.loss, out.stats, out.metrics()

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for batch, length, coef, temperature in ((3, 4, 2.5, 1.0), (4, 5, 0.5, 0.7), (5, 7, 1.5, 1.3)):
        results = []
        for function in (compiled, call):
            logits, *rest = tensors(device, batch, length)
            leaf = logits.requires_grad_()
            # As many ids as in no other call.
            sets = missing_label and sets_of(rest[0], batch, missing_label)
            loss, stats, metrics = function(leaf, *rest, coef, temperature, sets)
            (loss.sum() * 1.5).backward()
            results.append((loss, stats, metrics, leaf.grad))
        counts.append(counter.frame_count)
        (loss, stats, metrics, gradient), (loss_, stats_, metrics_, gradient_) = results
        # Inductor may sum in another order and contract products.
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(loss, loss_, **close)
        torch.testing.assert_close(gradient, gradient_, **close)
        torch.testing.assert_close(stats.variance, stats_.variance, **close)
        assert metrics.keys() == metrics_.keys()
        for key in metrics:
            torch.testing.assert_close(metrics[key], metrics_[key], **close)
    assert counts[0] == 1 and counts[-1] <= 2, counts


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_mask_in_a_closure(device, backend):
    """Ids of any number, without a compilation of their own; label and set are held together."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    logits, labels, old_logps, advantages = tensors(device)
    sets = None

    def call(logits):
        return r2vpo_loss(
            logits, labels, old_logps, advantages, sampling_mask=sets, backend=backend
        ).loss  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for size in (2, 3, 5, 7, 30):
        sets = sets_of(labels, size)
        torch.testing.assert_close(compiled(logits), call(logits), rtol=0, atol=0)
        counts.append(counter.frame_count)
    assert counts[0] == 1 and counts[-1] <= 2, counts
    if device.type == "cpu":
        sets = SamplingMask.from_lists([[0, 1]] * labels.numel())
        with pytest.raises(ValueError, match=r"^labels: got .* expected each in the token's set"):
            compiled(logits)


@pytest.mark.slow
def test_in_place_on_a_slice_under_a_compiler_that_may_mutate(device):
    """The permission goes unused there: functionalised mutation of views is not to be relied on."""
    logits, labels, old_logps, advantages = tensors(device)

    def call(logits):
        return r2vpo_loss(
            (logits * 2)[:, 1:], labels[:, 1:], old_logps[:, 1:], advantages, inplace=True,
            backend="triton",
        ).loss  # fmt: skip

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=COMPILER)):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_the_other_entries_compile_too(device):
    logits, labels, old_logps, advantages = tensors(device)

    def both(logits):
        logps, entropy = token_logps(
            logits, labels, ignore_index=-100, return_entropy=True, backend="triton"
        )
        return r2vpo_loss_from_logps(
            logps, old_logps, advantages, mask=labels != -100, entropy=entropy, entropy_coef=0.1,
            center="group",
        ).loss  # fmt: skip

    gradients = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


class Step(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.head = torch.nn.Parameter(torch.randn(V, 5))
        self.name = name

    def forward(self, hidden, labels, logps, advantages):
        logits = hidden @ self.head.t()
        shared = {"group_size": 2, "mask": labels >= 0}
        if self.name == "log-probs":
            return token_logps(logits, labels)
        if self.name == "from log-probs":
            return r2vpo_loss_from_logps(logits[..., 0], logps, advantages, **shared)
        if self.name.startswith("linear"):
            return linear_r2vpo_loss(
                hidden, self.head, labels, logps, advantages, compact=self.name == "linear",
                **shared,
            )  # fmt: skip
        if self.name != "none":
            shared["normalizer"] = labels.shape[0] * labels.shape[1]
        return r2vpo_loss(logits, labels, logps, advantages, **shared, **ROUTES[self.name])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "name", ["one pass", "sequence", "none", "log-probs", "from log-probs", "linear", "linear, all"]
)
def test_an_export_keeps_sizes_symbolic(device, name, strict):
    """What is exported at one B and T computes at another."""
    half, length = Dim("half", max=32), Dim("length", min=2, max=64)
    module, sizes = Step(name).to(device), {0: 2 * half, 1: length}

    def inputs(batch, length):
        torch.manual_seed(0)
        shape = batch, length
        inputs = torch.randn(*shape, 5), torch.randint(0, V, shape), torch.full(shape, -2.0)
        return tuple(x.to(device) for x in (*inputs, torch.randn(batch)))

    exported = export(
        module, inputs(4, 6), dynamic_shapes=(sizes, sizes, sizes, {0: 2 * half}), strict=strict
    ).module()
    other = inputs(8, 9)
    for ours, theirs in zip(
        pytree.tree_leaves(exported(*other)), pytree.tree_leaves(module(*other)), strict=True
    ):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


class Sampled(torch.nn.Module):
    def forward(self, logits, labels, advantages, sets):
        out = r2vpo_loss(logits, labels, None, advantages, sampling_mask=sets)
        return out, sets


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_takes_a_mask(device, strict):
    """A packed batch of any size, with any number of ids; masks and outputs are its pytrees."""

    def inputs(tokens, size):
        torch.manual_seed(tokens)
        labels = torch.randint(0, V, (tokens,), device=device)
        tensors = torch.randn(tokens, V, device=device), labels, labels * 0.1
        return *tensors, sets_of(labels, size, "full")

    tokens, ids = Dim("tokens", min=2, max=99), Dim("ids", max=9999)
    sizes = {0: tokens}
    exported = export(
        Sampled(), inputs(6, 3), dynamic_shapes=(*[sizes] * 3, [{0: ids}, {0: tokens + 1}, {}]),
        strict=strict,
    ).module()  # fmt: skip
    for other in (inputs(6, 3), inputs(11, 5)):
        (ours, sets), (theirs, same) = exported(*other), Sampled()(*other)
        leaves = (pytree.tree_leaves(x) for x in (ours, theirs))
        torch.testing.assert_close(*([x for x in found if x is not None] for found in leaves))
        assert ours.metrics().keys() == theirs.metrics().keys()
        assert sets.missing_label == "full" and torch.equal(sets.offsets, same.offsets)


def test_a_constraint_compiles_into_the_step(device):
    logits, labels, old_logps, advantages = tensors(device)
    constraint = VarianceConstraint(0.01, device=device)

    def step(coef):
        out = r2vpo_loss(logits, labels, old_logps, advantages, variance_coef=coef)
        return out.loss, out.stats

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        loss, stats = compiled(constraint.coef)
        expected, _ = step(constraint.coef)
        torch.testing.assert_close(loss, expected)
        constraint.step(stats)


def test_a_bad_label_raises_under_fullgraph_too(device, backend):
    if device.type != "cpu":
        pytest.skip("on a GPU a bad label gives NaN instead")
    logits, labels, old_logps, advantages = tensors(device)

    def call(labels):
        return r2vpo_loss(logits, labels, old_logps, advantages, backend=backend).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(labels)
    labels[1, 1] = V
    with pytest.raises(ValueError, match=f"labels: got {V} at 5"):
        compiled(labels)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("center", ["one", "group"])
def test_a_second_derivative_raises(kernels, device, center, sampled):
    logits, labels, old_logps, advantages = tensors(device)
    leaf = logits.requires_grad_()
    loss = r2vpo_loss(
        leaf, labels, old_logps, advantages, center=center, backend=kernels,
        sampling_mask=sets_of(labels) if sampled else None,
    ).loss  # fmt: skip
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as a collective's result is."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        def unwrap(x):
            return x.inner if isinstance(x, Wrapped) else x

        return function(
            *pytree.tree_map(unwrap, arguments), **pytree.tree_map(unwrap, keywords or {})
        )


def negated(x):
    """The same values, with the opposite ones in memory."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("disguise", [Wrapped, negated])
@pytest.mark.parametrize("center", ["one", "group"])
def test_what_does_not_lie_in_memory_as_it_reads(kernels, device, disguise, center):
    logits, labels, old_logps, advantages = tensors(device)
    plain = {
        "normalizer": torch.tensor(30.0, device=device),
        "variance_coef": torch.tensor(2.5, device=device),
        "advantages": advantages,
        "old_logps": old_logps,
    }
    upstream = torch.tensor(0.5, device=device)

    def gradient(disguised, upstream):
        leaf = logits.clone().requires_grad_()
        out = r2vpo_loss(leaf, labels, **(plain | disguised), center=center, backend=kernels)
        return out, torch.autograd.grad(out.loss, leaf, upstream)[0]

    expected, gradient_expected = gradient({}, upstream)
    for name, value in plain.items():
        out, found = gradient({name: disguise(value)}, upstream)
        assert torch.equal(out.loss, expected.loss), name
        assert torch.equal(found, gradient_expected), name
    _, found = gradient({}, disguise(upstream))
    assert torch.equal(found, gradient_expected)
    constraints = [VarianceConstraint(0.01, center=center, device=device) for _ in range(2)]
    stats = expected.stats
    fields = (disguise(x) for x in (stats.weight, stats.d_sum, stats.d_sq_sum))
    constraints[0].step(stats)
    constraints[1].step(RatioStats(*fields))
    assert torch.equal(constraints[0].coef, constraints[1].coef)


def test_memory_that_was_given_back_is_refused(kernels, device):
    logits, labels, old_logps, advantages = tensors(device)
    for name in ("labels", "old_logps", "advantages"):
        given = {"labels": labels, "old_logps": old_logps, "advantages": advantages}
        given[name] = given[name].clone()
        given[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"^{name}: got a tensor whose memory was given back"):
            r2vpo_loss(logits, **given, backend=kernels)


@pytest.mark.parametrize("center", ["one", "group"])
def test_what_came_with_the_loss_may_be_changed_before_backward(kernels, device, center):
    logits, labels, old_logps, advantages = tensors(device)
    gradients = []
    for changes in (False, True):
        leaf = logits.clone().requires_grad_()
        out = r2vpo_loss(leaf, labels, old_logps, advantages, center=center, backend=kernels)
        logps = old_logps.clone().requires_grad_()
        from_logps = r2vpo_loss_from_logps(
            logps, old_logps - 0.1, advantages, center=center, backend=kernels
        )
        if changes:
            for stats in (out.stats, from_logps.stats):
                stats.weight.add_(1.0)
            from_logps.logps.zero_()
        (out.loss + from_logps.loss).backward()
        gradients.append((leaf.grad, logps.grad))
    for without, after in zip(*gradients, strict=True):
        assert torch.equal(without, after)


BAD_VALUES = {
    "a label of V": {"labels": torch.tensor([1, 2, V, 4, 5, 6])},
    "a negative label": {"labels": torch.tensor([1, 2, -7, 4, 5, 6])},
    "a negative coefficient": {"variance_coef": torch.tensor(-1.0)},
    "a temperature of zero": {"temperature": torch.zeros(6)},
    "offsets past the end": {"cu_seqlens": torch.tensor([0, 3, 90])},
    "offsets that end early": {"cu_seqlens": torch.tensor([0, 3, 5])},
    "offsets that fall": {"cu_seqlens": torch.tensor([0, 40, -2, 6])},
    "a group out of range": {"group_ids": torch.tensor([0, 1, 9, -9, 1, 0]), "num_groups": 2},
    "a negative normalizer": {"normalizer": torch.tensor(-1.0)},
    "a word of V": {"sampling_mask": SamplingMask.from_lists([[i, V] for i in range(6)])},
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_where_nobody_looks_a_bad_value_makes_the_loss_nan(device, backend, monkeypatch, name):
    """A GPU without R2VPO_KERNELS_VALIDATE=1, by pretending: NaN, nothing out of bounds."""
    monkeypatch.setattr(checks, "may_synchronise", lambda value: False)
    monkeypatch.setattr(ops, "may_synchronise", lambda value: False)
    torch.manual_seed(0)
    logits = torch.randn(6, V, device=device, requires_grad=True)
    arguments = {"labels": torch.arange(6), "old_logps": torch.full((6,), -3.0)}
    arguments |= BAD_VALUES[name]
    sequences = len(arguments.get("cu_seqlens", [0] * 7)) - 1
    arguments["advantages"] = torch.ones(sequences)
    arguments = {k: v if isinstance(v, int) else v.to(device) for k, v in arguments.items()}
    out = r2vpo_loss(logits, **arguments, center="group", backend=backend)
    assert out.loss.isnan()
    monkeypatch.undo()
    if device.type == "cuda":
        monkeypatch.setenv("R2VPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=f"^{next(iter(BAD_VALUES[name]))}: "):
        r2vpo_loss(logits, **arguments, backend=backend)


def missing(backend, reason):
    """What `registry` then finds of the backends."""
    found = registry._imported
    return lambda name: reason if name == backend else found(name)


def test_triton_refuses_cpu_tensors_outside_the_interpreter(device, monkeypatch):
    monkeypatch.setattr(triton, "SIMULATED", False)
    logits = torch.randn(2, 3, V)
    labels = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="backend: 'triton' is not available: it runs on a GPU"):
        token_logps(logits, labels, backend="triton")
    reason = "it cannot be imported (no module)"
    monkeypatch.setattr(registry, "_imported", missing("triton", reason))
    with pytest.raises(ValueError, match="cannot be imported"):
        token_logps(logits, labels, backend="triton")


def test_auto_takes_the_kernels_where_they_can_and_eager_elsewhere(device, monkeypatch):
    logits = torch.randn(2, 3, V, device=device)
    best = "cpp" if device.type == "cpu" else "triton"
    assert registry.choose_backend("auto", logits) == best
    assert registry.choose_backend("auto", logits.double()) == "eager"
    reason = "it cannot be imported (no compiler)"
    monkeypatch.setattr(registry, "_imported", missing(best, reason))
    assert registry.choose_backend("auto", logits) == "eager"
    with pytest.raises(ValueError, match="no compiler"):
        registry.choose_backend(best, logits)
