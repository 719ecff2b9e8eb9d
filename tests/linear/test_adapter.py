"""Heads with LoRA around them: the truth, peft's own forward, what is computed, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from support.harness import Adapted, check_linear_case, truth_of
from support.launches import HEAD_KERNELS, count_launches
from support.ranks import run_on
from support.strategies import linear_cases, sampling_mask_of
from support.tolerance import Linear, assert_within
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import ProfilerActivity, profile

from r2vpo_kernels import linear_r2vpo_loss, linear_token_logps, r2vpo_loss, token_logps
from r2vpo_kernels.sources import products as module
from r2vpo_kernels.sources.linear import LinearLogits

H, V, N = 16, 40, 20


def wrapped(base, **options):
    """LoRA around a layer, its B not zero, as they are from the second step on."""
    model = nn.Sequential(base)
    inject_adapter_in_model(LoraConfig(target_modules=["0"], **options), model)
    layer = model[0]
    for b in layer.lora_B.values():
        nn.init.normal_(b.weight, std=0.3)
    return layer


def head(device, dtype=torch.float32, adapter_dtype=None, bias=True, seed=0, **options):
    """A frozen Linear with LoRA of rank 4 around it, and a scaling that is no power of two."""
    torch.manual_seed(seed)
    base = nn.Linear(H, V, bias=bias).to(dtype).requires_grad_(False)
    layer = wrapped(base, **{"r": 4, "lora_alpha": 7} | options)
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter_dtype or dtype)
    return layer.to(device)


def draw(device, dtype=torch.float32, seed=0):
    """(hidden, labels, old_logps, advantages) of a packed batch, some tokens masked."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[3:5] = -100
    old_logps = -3.5 + 0.3 * torch.randn(N, generator=g)
    return tuple(x.to(device) for x in (hidden, labels, old_logps, torch.randn(N, generator=g)))


def trained(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def run(hidden, layer, *arguments, **keywords):
    """(out, dhidden, the gradients of the layer's parameters by name)."""
    leaf, named = hidden.detach().requires_grad_(), trained(layer)
    out = linear_r2vpo_loss(leaf, layer, *arguments, **keywords)
    dhidden, *others = torch.autograd.grad(out.loss.sum(), [leaf, *named.values()])
    return out, dhidden, dict(zip(named, others, strict=True))


def by_peft(hidden, layer, *arguments, **keywords):
    leaf, named = hidden.detach().requires_grad_(), trained(layer)
    out = r2vpo_loss(layer(leaf), *arguments, **keywords)
    dhidden, *others = torch.autograd.grad(out.loss.sum(), [leaf, *named.values()])
    return out, dhidden, dict(zip(named, others, strict=True))


def adapted(scaling):
    def of_leaves(leaves):
        words, width = leaves["weight"].shape
        base = nn.Linear(width, words, bias="bias" in leaves, device=leaves["weight"].device)
        layer = wrapped(base, r=leaves["lora_a"].shape[0])
        base.weight, base.bias = leaves["weight"], leaves.get("bias")
        layer.lora_A["default"].weight = leaves["lora_a"]
        layer.lora_B["default"].weight = leaves["lora_b"]
        layer.scaling["default"] = scaling
        return layer

    return Adapted(of_leaves, scaling)


def with_adapter(inputs, rank, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    (words, width), device = inputs["weight"].shape, inputs["weight"].device
    a, b = torch.randn(rank, width, generator=g), torch.randn(words, rank, generator=g)
    more = {"lora_a": a / width**0.5, "lora_b": 0.5 * b / rank**0.5}
    return inputs | {name: x.to(device, dtype) for name, x in more.items()}


@pytest.mark.slow_in_interpreter
@given(
    linear_cases(),
    st.sampled_from([1, 3, 6]),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
    st.sampled_from([1.0, 2.0, -0.7]),
)
def test_any_call_is_within_the_budget(backend, device, halves, linear, rank, dtype, scaling):
    inputs, labels, options, keywords = linear.tensors(device)
    inputs = with_adapter(inputs, rank, dtype or inputs["hidden"].dtype)
    check_linear_case(inputs, labels, options, keywords, backend, adapted=adapted(scaling))


@pytest.mark.slow_in_interpreter
@given(linear_cases(dtype=torch.float32), st.sampled_from([torch.float32, torch.bfloat16]))
def test_under_autocast_all_products_are_in_its_dtype(kernels, device, halves, linear, dtype):
    inputs, labels, options, keywords = linear.tensors(device)
    inputs = with_adapter(inputs, 3, dtype)
    with torch.autocast(device.type, torch.bfloat16):
        check_linear_case(
            inputs, labels, options, keywords, kernels, dtype=torch.bfloat16, adapted=adapted(-0.7)
        )


@pytest.mark.parametrize("fault", ["no scaling", "no gradient of A", "rounded logits"])
def test_the_checker_rejects_a_wrong_computation(device, monkeypatch, fault):
    hidden, labels, old_logps, advantages = draw(device, torch.bfloat16)
    weight = torch.randn(V, H, device=device).bfloat16() / 4
    inputs = with_adapter({"hidden": hidden, "weight": weight}, 3, torch.float32)
    keywords = {"old_logps": old_logps, "advantages": advantages}
    options = {"logits_dtype": torch.float32}
    given_ = adapted(1.7)
    check_linear_case(inputs, labels, options, keywords, "auto", adapted=given_)
    made = given_.head

    def wrong(leaves):
        layer = made(leaves)
        if fault == "no scaling":
            layer.scaling["default"] = 1.0
        elif fault == "no gradient of A":
            leaves["lora_a"].register_hook(torch.zeros_like)
        return layer

    if fault == "rounded logits":
        original = module._multiplier
        monkeypatch.setattr(module, "_multiplier", lambda x, dtype, exact=False: original(x, dtype))
        monkeypatch.setenv("R2VPO_KERNELS_HALF_PRODUCTS", "native")
    given_.head = wrong
    with pytest.raises(AssertionError, match="lora_a: " if "A" in fault else "logps: "):
        check_linear_case(inputs, labels, options, keywords, "auto", adapted=given_)


# As peft has it.


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layer, self.head = nn.Linear(H, H), nn.Linear(H, V)

    def hidden(self, tokens):
        return torch.tanh(self.layer(self.embedding(tokens)))

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


@pytest.mark.parametrize("center", ["one", "group"])
def test_a_model_gets_the_gradients_of_pefts_forward(device, center):
    """In float64, where the order of sums alone makes a difference: two adapters, one rslora."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["head", "layer"])
    model = get_peft_model(Model(), config).double().to(device)
    other = LoraConfig(r=5, lora_alpha=4, target_modules=["head"], use_rslora=True)
    model.add_adapter("other", other)
    third = LoraConfig(r=2, target_modules=["layer"])
    model.add_adapter("third", third)
    model.base_model.set_adapter(["default", "other", "third"])
    model.double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    _, labels, old_logps, advantages = draw(device)
    tokens, named = labels.clamp(min=0), trained(model)
    assert sum("head" in name for name in named) == 4

    def gradients(loss):
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    rest = labels, old_logps, advantages
    theirs = gradients(r2vpo_loss(model(tokens), *rest, center=center).loss)
    hidden = model.base_model.model.hidden(tokens)
    ours = gradients(
        linear_r2vpo_loss(hidden, model.base_model.model.head, *rest, center=center).loss
    )
    for name, true in theirs.items():
        torch.testing.assert_close(ours[name], true, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_float32_adapters_of_a_bfloat16_head(device, halves, logits_dtype):
    """peft's default. Its own log-probs are within the budget of those here."""
    model = get_peft_model(Model().bfloat16(), LoraConfig(target_modules=["head"], lora_alpha=5))
    layer = model.base_model.model.head.to(device)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    nn.init.normal_(b, std=0.3)
    hidden, labels, old_logps, advantages = draw(device, torch.bfloat16)
    linear = Linear(
        torch.where(labels[:, None] < 0, 0, hidden).double(), layer.weight.double(),
        layer.bias.double(), None, 1.0, torch.bfloat16, logits_dtype,
        a.double() * layer.scaling["default"], b.double(), torch.float32,
    )  # fmt: skip
    keywords = {"old_logps": old_logps, "advantages": advantages}
    truth = truth_of(
        linear.logits().detach(), labels, keywords, "auto",
        logits_error=linear.logits_error().detach(),
    )  # fmt: skip
    found = linear_token_logps(hidden, layer, labels, logits_dtype=logits_dtype)
    assert_within("logps", found.detach(), truth.logps, truth.logps_bound)
    if logits_dtype is None:
        theirs = token_logps(layer(hidden), labels).detach()
        assert_within("peft's logps", theirs, truth.logps, truth.logps_bound)
        _, *ours = run(hidden, layer, labels, old_logps, advantages)
        _, *theirs = by_peft(hidden, layer, labels, old_logps, advantages)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)


def test_merged_or_disabled_adapters_leave_a_plain_head(kernels, device):
    layer, (hidden, *rest) = head(device), draw(device)
    out, *_ = run(hidden, layer, *rest, backend=kernels)
    layer.enable_adapters(False)
    plain = linear_r2vpo_loss(hidden, layer, *rest, backend=kernels)
    expected = linear_r2vpo_loss(hidden, layer.base_layer, *rest, backend=kernels)
    assert torch.equal(plain.loss, expected.loss) and not torch.equal(plain.loss, out.loss)
    layer.enable_adapters(True)
    layer.merge()
    merged = linear_r2vpo_loss(hidden, layer, *rest, backend=kernels)
    expected = linear_r2vpo_loss(hidden, layer.base_layer, *rest, backend=kernels)
    assert torch.equal(merged.loss, expected.loss)
    torch.testing.assert_close(merged.logps, out.logps, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    layer.set_adapter([])
    assert not layer.active_adapters
    none = linear_r2vpo_loss(hidden, layer, *rest, backend=kernels)
    torch.testing.assert_close(none.loss, plain.loss)


def test_dropout_in_eval_mode_is_none(device):
    layer, (hidden, *rest) = head(device, lora_dropout=0.5), draw(device)
    _, *expected = run(hidden, head(device), *rest)
    layer.eval()
    _, *found = run(hidden, layer, *rest)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# What is computed.


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("wanted", ["hidden", "lora_A", "lora_B", "base_layer", "nothing"])
def test_only_what_requires_grad_is_computed(kernels, device, center, wanted):
    hidden, *rest = draw(device)
    layer = head(device).requires_grad_(True)
    keywords = {"center": center, "backend": kernels, "chunk_tokens": 7}
    whole, dhidden, others = run(hidden, layer, *rest, **keywords)
    others = {name: g for name, g in others.items() if name.startswith(wanted)}
    layer.requires_grad_(False)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in others)
    leaf = hidden.detach().requires_grad_(wanted == "hidden")
    out = linear_r2vpo_loss(leaf, layer, *rest, **keywords)
    assert torch.equal(out.loss, whole.loss)
    if wanted == "nothing":
        assert not out.loss.requires_grad
        return
    expected = {"hidden": dhidden} if wanted == "hidden" else others
    leaves = [leaf] if wanted == "hidden" else list(trained(layer).values())
    found = torch.autograd.grad(out.loss, leaves)
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected.values()))


def test_a_frozen_head_gets_no_product_of_its_size(device, monkeypatch):
    """With neither the base's gradient nor a merged weight: what V and H share is one factor."""
    original, sizes = module._multiplier, []

    def counting(x, dtype, exact=False):
        multiply = original(x, dtype, exact)

        def counted(a, b, scale, out, **options):
            sizes.append((*a.shape, b.shape[1]))
            multiply(a, b, scale, out, **options)

        return counted

    monkeypatch.setattr(module, "_multiplier", counting)
    layer, (hidden, labels, *rest) = head(device), draw(device)
    run(hidden, layer, labels, *rest)
    n, r = int((labels >= 0).sum()), 4
    assert sizes == [
        (n, H, V), (n, H, r), (n, r, V),  # logits
        (n, V, r), (n, V, H), (n, r, H), (r, n, H), (V, n, r),  # gradients of hidden, A and B
    ]  # fmt: skip


def test_no_temporary_is_as_large_as_the_head(device, monkeypatch):
    for name, size in {"SIDE": 256, "ALIGNED": 64, "TILE": {"elsewhere": 2**14}}.items():
        monkeypatch.setattr(module, name, size)
    tokens, words, width = 64, 3000, 256
    base = nn.Linear(width, words, bias=False).bfloat16().requires_grad_(False)
    layer = wrapped(base).to(device)
    layer.lora_A.float(), layer.lora_B.float()
    hidden = torch.randn(tokens, width, device=device).bfloat16()
    labels = torch.randint(0, words, (tokens,), device=device)
    advantages = torch.ones(tokens, device=device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run(hidden, layer, labels, None, advantages, chunk_tokens=8)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest < base.weight.nbytes / 4


def test_what_masked_tokens_hold_is_harmless(backend, device):
    hidden, labels, *rest = draw(device)
    layer = head(device)
    for compact in (True, False):
        keywords = {"backend": backend, "compact": compact, "chunk_tokens": 6}
        expected = run(hidden, layer, labels, *rest, **keywords)
        bad = hidden.clone()
        bad[labels < 0] = torch.nan
        out, dhidden, others = run(bad, layer, labels, *rest, **keywords)
        assert torch.equal(out.loss, expected[0].loss) and torch.equal(dhidden, expected[1])
        assert all(torch.equal(g, expected[2][name]) for name, g in others.items())


def test_a_sampling_mask_takes_dense_products(kernels, device):
    hidden, labels, *rest = draw(device)
    sets = sampling_mask_of("small", labels.clamp(min=0).cpu(), V, torch.Generator().manual_seed(0))
    keywords = {"sampling_mask": sets.to(device), "backend": kernels}
    layer = head(device)
    counts = count_launches(lambda: run(hidden, layer, labels, *rest, **keywords))
    assert not any(counts[name] for name in HEAD_KERNELS)
    _, *found = run(hidden, layer, labels, *rest, **keywords)
    _, *expected = by_peft(hidden, layer, labels, *rest, **keywords)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("center", ["one", "group"])
def test_fullgraph_without_another_compilation(device, center):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = head(device)

    def call(hidden, labels, old_logps, advantages):
        out = linear_r2vpo_loss(
            hidden * 1, layer, labels, old_logps, advantages, center=center,
            logits_dtype=torch.float32,
        )  # fmt: skip
        return out.loss

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    leaves = list(trained(layer).values())
    for n in (20, 12, 9):
        tensors = [x[:n] for x in draw(device)]
        found = torch.autograd.grad(compiled(*tensors), leaves)
        expected = torch.autograd.grad(call(*tensors), leaves)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


RANKS = 2


def check_shards(rank):
    """Under FSDP2 the base and the factors are DTensors, each gathered once."""
    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, *rest = draw("cpu")
    rows = torch.arange(N).chunk(RANKS)[rank]
    alone = head("cpu").requires_grad_(True)
    keywords = {"normalizer": float(N)}
    _, _, expected = run(hidden, alone, *rest, **keywords)
    model = nn.Sequential(head("cpu").requires_grad_(True))
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    leaf = hidden[rows].requires_grad_()
    keywords["normalizer"] /= RANKS
    linear_r2vpo_loss(leaf, model[0], *(x[rows] for x in rest), **keywords).loss.backward()
    for name, p in model[0].named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)
    placed = DTensor.from_local(hidden[rows], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="weight: got a DTensor, expected a plain tensor"):
        linear_token_logps(placed, model[0], rest[0][rows])


@pytest.mark.slow
def test_sharded_parameters_are_gathered(tmp_path):
    run_on(RANKS, tmp_path, check_shards)


# What is refused.


def patched(layer):
    layer.forward = lambda x: 2 * x
    return layer


def ia3():
    model = nn.Sequential(nn.Linear(H, V))
    config = IA3Config(target_modules=["0"], feedforward_modules=[])
    return inject_adapter_in_model(config, model)[0]


def merged_and_disabled():
    layer = head("cpu")
    layer.merge()
    layer.enable_adapters(False)
    return layer


def of_quantised_factors():
    layer = head("cpu")
    layer.lora_A["default"] = nn.Bilinear(H, H, 4)
    return layer


def around(base):
    layer = head("cpu")
    layer.base_layer = base
    return layer


def of_another_rank():
    layer = head("cpu")
    layer.lora_B["default"].weight = nn.Parameter(torch.ones(V, 5))
    return layer


BAD = {
    "DoRA": (lambda: head("cpu", use_dora=True), "'default' of another kind.*merge"),
    "dropout": (lambda: head("cpu", lora_dropout=0.5), r"dropout of 0\.5 in training.*eval\(\)"),
    "a bias": (lambda: head("cpu", lora_bias=True), r"'default' that has a bias.*merge"),
    "IA3": (ia3, "peft.tuners.ia3.*may compute more.*merge"),
    "LoRA twice": (lambda: around(head("cpu")), "lora.layer.Linear within LoRA that may.*merge"),
    "a patched layer": (lambda: patched(head("cpu")), "lora.layer.Linear that may compute more"),
    "a patched base": (lambda: around(patched(nn.Linear(H, V))), "Linear within LoRA that may"),
    "merged and disabled": (merged_and_disabled, r"merged adapters that are disabled.*unmerge\(\)"),
    "factors of another kind": (of_quantised_factors, "'default' of Bilinear and Linear.*merge"),
    "factors that do not fit": (of_another_rank, r"lora_B: got .*\(40, 5\), expected shape"),
    "factors of float8": (
        lambda: head("cpu", adapter_dtype=torch.float8_e4m3fn), "lora_A: got .*float8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("entry", [linear_r2vpo_loss, linear_token_logps])
@pytest.mark.parametrize("name", BAD)
def test_what_is_not_honoured_is_refused(name, entry):
    make, words = BAD[name]
    hidden, labels, *rest = draw("cpu")
    arguments = (hidden, make(), labels, *(rest if entry is linear_r2vpo_loss else ()))
    with pytest.raises((ValueError, TypeError), match=rf"^weight(: got a|'s )(?s:.*){words}"):
        entry(*arguments)


def test_shards_are_refused():
    hidden, labels, *_ = draw("cpu")
    with pytest.raises(ValueError, match=r"^weight: got a head with LoRA adapters.*tp_group"):
        LinearLogits.build(
            hidden, head("cpu"), labels, bias=None, softcap=None, logit_scale=1.0,
            logits_dtype=None, chunk_tokens=None, compact=True, sharded=True, backend="auto",
        )  # fmt: skip
