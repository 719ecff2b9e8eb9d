"""DTensors over processes: each rank computes with its part, and together they get the whole."""

import functools
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from support.harness import check_gradient, truth_of
from support.ranks import run_on
from support.strategies import IGNORE, cases, drawn
from support.tolerance import assert_within
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from r2vpo_kernels import (
    SamplingMask,
    linear_r2vpo_loss,
    linear_token_logps,
    r2vpo_loss,
    r2vpo_loss_from_logps,
    token_logps,
)
from r2vpo_kernels.sources.sparse import SparseHead

# Of logits (B, T, V); five sequences and five words leave some ranks fewer, or none.
B, T = 5, 3
WHOLE, SEQUENCES, TOKENS, WORDS = Replicate(), Shard(0), Shard(1), Shard(2)
LAYOUTS = [
    ((4,), (WORDS,)), ((4,), (SEQUENCES,)), ((4,), (TOKENS,)), ((4,), (WHOLE,)),
    ((2, 2), (SEQUENCES, WORDS)), ((2, 2), (WORDS, TOKENS)), ((2, 2), (WHOLE, WORDS)),
    ((2, 2), (SEQUENCES, TOKENS)), ((2, 2), (SEQUENCES, WHOLE)), ((2, 2), (SEQUENCES, SEQUENCES)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("processes over gloo, on a CPU")


def placed(x, mesh, placements, shape):
    """x as logits have it; whole where it is nothing for each token or sequence."""
    if not isinstance(x, torch.Tensor):
        return x
    dims = [i for i, size in enumerate(x.shape) if i < len(shape) and size == shape[i]]
    here = [p if p.is_shard() and p.dim in dims else WHOLE for p in placements]
    return distribute_tensor(x, mesh, here)


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def check_layouts(rank, jobs):
    meshes = {sizes: init_device_mesh("cpu", sizes) for sizes, _ in LAYOUTS}
    for case, (sizes, placements), backend, rest_is_local in jobs:
        logits, labels, keywords = case.tensors(torch.device("cpu"))
        valid = labels != IGNORE
        if keywords["mask"] is not None:
            valid = valid & (keywords["mask"] != 0)
        count = valid.sum() if case.reduction == "token-mean" else valid.any(1).sum()
        keywords["normalizer"] = count
        truth = truth_of(logits, labels, keywords, backend, sharded=WORDS in placements)

        mesh, shape = meshes[sizes], labels.shape
        leaf = distribute_tensor(logits, mesh, placements).requires_grad_()
        rest = {
            name: placed(x, mesh, placements, shape)
            for name, x in {"labels": labels, **keywords}.items()
        }
        if "sampling_mask" in rest:
            # That of this rank's tokens in either case.
            tokens = placed(torch.arange(labels.numel()).view(shape), mesh, placements, shape)
            rest["sampling_mask"] = keywords["sampling_mask"][local(tokens).reshape(-1)]
        if rest_is_local:
            rest = {name: local(x) for name, x in rest.items()}
        out = r2vpo_loss(leaf, **rest, backend=backend)
        out.loss.backward()

        # Those who have the same tokens have the same loss.
        copies = [n for n, p in zip(sizes, placements, strict=True) if p in (WHOLE, WORDS)]
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        for n in copies:
            loss /= n
        assert_within("loss", loss, truth.loss.sum(), truth.loss_bound.sum(), ulps=2)
        assert type(out.logps) is torch.Tensor
        own = local(placed(truth.logps.reshape(shape), mesh, placements, shape))
        bound = local(placed(truth.logps_bound.reshape(shape), mesh, placements, shape))
        if own.numel():
            assert_within("logps", out.logps, own, bound)
        assert leaf.grad.placements == leaf.placements
        check_gradient(leaf.grad.full_tensor(), truth, backend)


def test_any_layout_is_within_the_budget(tmp_path):
    def fixed(layout):
        shape = {"batch": B, "length": T, "packed": False, "layout": "plain", "groups": "none"}
        options = st.fixed_dictionaries({
            "reduction": st.sampled_from(["token-mean", "seq-mean-token-sum"]),
            "center": st.sampled_from(["one", "given"]),
            "variance_coef": st.sampled_from(["number", "scalar", "sequence", "token"]),
            "vocabulary": st.sampled_from([5, 16, 33]),
        })  # fmt: skip
        return options.flatmap(lambda f: cases(**f, **shape, level="token"))

    jobs = [
        (case, layout, "eager" if i % 4 == 3 else "cpp", i % 2 == 0)
        for layout in LAYOUTS
        for i, case in enumerate(drawn(fixed(layout), 8))
    ]
    run_on(4, tmp_path, check_layouts, jobs)


def batch():
    """(logits, labels, old_logps, advantages), the same on every rank."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 10, generator=g)
    labels = torch.randint(0, 10, (2, 3), generator=g)
    return logits, labels, torch.full((2, 3), -2.0), torch.tensor([1.0, -1.0])


def check_entries(rank):
    """Each entry does with DTensors what it does with the parts of this rank."""
    mesh = init_device_mesh("cpu", (2,))
    group = mesh.get_group()
    logits, labels, old_logps, advantages = batch()
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(10, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def both(call, x, placement, **options):
        """`call` of a DTensor, and of its part as a leaf."""
        whole = distribute_tensor(x, mesh, [placement]).requires_grad_()
        part = whole.to_local().detach().clone().requires_grad_()
        ours, theirs = call(whole), call(part, **options)
        ours, theirs = (r if isinstance(r, tuple) else (r,) for r in (ours, theirs))
        for one, other in zip(ours, theirs, strict=True):
            assert type(one) is torch.Tensor
            assert torch.equal(one, other)
        found, expected = (
            torch.autograd.grad(sum(r.sum() for r in results), leaf)[0]
            for results, leaf in ((ours, whole), (theirs, part))
        )
        assert found.placements == (placement,)
        assert found.shape == x.shape
        assert torch.equal(found.to_local(), expected)

    def parts(placement):
        return [
            local(placed(x, mesh, [placement], (2, 3))) for x in (labels, old_logps, advantages)
        ]

    for placement, options in (
        (WORDS, {"tp_group": group}), (WHOLE, {}), (SEQUENCES, {}), (TOKENS, {})
    ):  # fmt: skip
        rest = labels_here, *_ = parts(placement)
        both(
            lambda x, labels=labels_here, **tp: token_logps(x, labels, return_entropy=True, **tp),
            logits, placement, **options,
        )  # fmt: skip
        both(
            lambda x, rest=rest, **tp: r2vpo_loss(x, *rest, **tp).loss, logits, placement, **options
        )
        leaf = distribute_tensor(logits, mesh, [placement]).requires_grad_()
        # Backward of tanh reads what it returned.
        kept, written = (
            torch.autograd.grad(r2vpo_loss(leaf.tanh(), *rest, inplace=inplace).loss, leaf)[0]
            for inplace in (False, True)
        )
        assert torch.equal(kept.to_local(), written.to_local())
        if placement == WORDS:
            # The group may be named, too.
            both(lambda x, rest=rest: r2vpo_loss(x, *rest, tp_group=group).loss, logits, placement)
            continue
        # Of one word or two, which the sparse head takes.
        sets = [[y, 9 - y] if y % 2 else [y] for y in labels_here.flatten().tolist()]
        for mask in (None, SamplingMask.from_lists(sets)):
            loss, logps = (
                functools.partial(call, sampling_mask=mask)
                for call in (linear_r2vpo_loss, linear_token_logps)
            )
            with patch.object(SparseHead, "logits", autospec=True, side_effect=SparseHead.logits):
                both(lambda x, f=loss, rest=rest: f(x, weight, *rest).loss, hidden, placement)
                both(lambda x, f=logps, y=labels_here: f(x, weight, y), hidden, placement)
                assert SparseHead.logits.called == (mask is not None)
        both(
            lambda x, rest=rest[1:]: r2vpo_loss_from_logps(
                x, *rest, entropy=x, entropy_coef=0.1
            ).loss,
            old_logps, placement,
        )  # fmt: skip
    # A head's rows and whole hidden states.
    rows = weight.detach()[rank * 5 : rank * 5 + 5].clone()
    both(lambda x: linear_token_logps(x, rows, labels, tp_group=group), hidden, WHOLE)


def check_errors(rank):
    mesh, wide = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    backwards = DeviceMesh("cpu", [1, 0])
    group = mesh.get_group()
    alone = [dist.new_group([r]) for r in range(2)][rank]
    logits, labels, old_logps, advantages = batch()
    hidden, weight = torch.randn(2, 3, 4), torch.randn(10, 4)

    def at(x, *placements, mesh=mesh):
        return DTensor.from_local(x, mesh, placements, run_check=False)

    def loss(logits=logits, labels=labels, advantages=advantages, **keywords):
        r2vpo_loss(logits, labels, old_logps, advantages, **keywords)

    def linear(hidden, **keywords):
        linear_token_logps(hidden, weight, labels, **keywords)

    words = at(logits[..., rank * 5 : rank * 5 + 5], WORDS)
    for call, message in (
        (lambda: loss(at(logits, Partial())),
         r"logits: got a DTensor placed \(Partial\(sum\),\), expected Replicate and Shard of"),
        (lambda: token_logps(at(logits, WORDS, WORDS, mesh=wide), labels),
         "logits: .*, expected .* over at most one dimension of the mesh"),
        (lambda: loss(at(logits, WORDS, mesh=backwards)),
         r"logits: got a vocabulary sharded over ranks \[1, 0\], expected ascending ranks"),
        (lambda: linear(at(hidden, WORDS)), r"hidden: got a DTensor placed \(Shard\(dim=2\),\)"),
        (lambda: r2vpo_loss_from_logps(at(old_logps, Partial()), None, advantages), "logps: "),
        (lambda: r2vpo_loss_from_logps(at(old_logps, TOKENS), at(old_logps, WHOLE), advantages),
         r"old_logps: got .*\(Replicate\(\),\).*, expected \(Shard\(dim=1\),\)"),
        (lambda: loss(words, at(labels, SEQUENCES)),
         r"labels: got .* \(Shard\(dim=0\),\) .*, expected \(Replicate\(\),\) .*where logits is"),
        (lambda: loss(at(logits, TOKENS), advantages=at(advantages, SEQUENCES)),
         r"advantages: .*, expected \(Replicate\(\),\)"),
        (lambda: loss(at(logits, SEQUENCES), center=at(torch.ones(1), SEQUENCES)),
         r"center: .*, expected \(Replicate\(\),\)"),
        (lambda: loss(words, advantages=at(advantages, WHOLE, mesh=backwards)),
         r"advantages: got .* on DeviceMesh.*, expected .* on DeviceMesh"),
        (lambda: loss(labels=at(labels, WHOLE)), "labels: got a DTensor, expected a plain tensor"),
        (lambda: linear_token_logps(at(hidden, SEQUENCES), at(weight, SEQUENCES), labels),
         "weight: got a DTensor, expected a plain tensor"),
        # The group against the mesh.
        (lambda: loss(at(logits, WHOLE), tp_group=group),
         r"tp_group: got ranks \[0, 1\], expected ranks that share out the vocabulary of logits"),
        (lambda: loss(at(logits, SEQUENCES), tp_group=group), r"tp_group: got ranks \[0, 1\]"),
        (lambda: loss(words, tp_group=alone), rf"tp_group: got ranks \[{rank}\], expected"),
        (lambda: linear(at(hidden, SEQUENCES), tp_group=group), r"tp_group: got ranks \[0, 1\]"),
        (lambda: loss(words, tp_group=mesh), "tp_group: got DeviceMesh, expected"),
        # On one rank alone.
        (lambda: loss(words, at(labels, SEQUENCES) if rank else labels), "labels: got a DTensor"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    # Ranks that the mesh does not have may share out what it calls the vocabulary.
    single = DeviceMesh("cpu", [rank], _init_backend=False)
    part = at(logits[..., rank * 5 : rank * 5 + 5], SEQUENCES, mesh=single)
    found = token_logps(part, labels, tp_group=group)
    assert torch.equal(found, token_logps(words, labels))


def check_on_two(rank):
    check_entries(rank)
    check_errors(rank)


def test_entries_and_errors(tmp_path):
    run_on(2, tmp_path, check_on_two)


def check_compiled(rank):
    logits, *rest = batch()
    mesh = init_device_mesh("cpu", (1,))

    def loss(logits):
        return r2vpo_loss(logits, *rest).loss

    for placement in (SEQUENCES, WORDS):
        leaf = distribute_tensor(logits, mesh, [placement]).requires_grad_()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (expected,), (found,) = (torch.autograd.grad(call(leaf), leaf) for call in (loss, compiled))
        assert torch.equal(found.to_local(), expected.to_local())


@pytest.mark.slow
def test_compiled(tmp_path):
    run_on(1, tmp_path, check_compiled)
