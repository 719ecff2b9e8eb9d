"""A vocabulary shared out over processes: every rank gets what one process would, exactly."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from support.harness import Shard, check_case, check_linear_case
from support.ranks import run_on
from support.strategies import Case, cases, drawn, linear_cases

from r2vpo_kernels import (
    SamplingMask,
    linear_r2vpo_loss,
    linear_token_logps,
    r2vpo_loss,
    token_logps,
)


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("processes over gloo, on a CPU")


def words_of(rank, ranks, vocabulary):
    """Parts of unequal sizes, none of them empty."""
    begin, end = (r + (vocabulary - ranks) * r**2 // ranks**2 for r in (rank, rank + 1))
    return slice(begin, end)


def words_but_of_one(rank, ranks, vocabulary):
    """Which rank has no word depends on the vocabulary."""
    nobody = vocabulary // 2 % ranks
    part = words_of(rank - (rank > nobody), ranks - 1, vocabulary)
    return slice(part.start, part.start) if rank == nobody else part


def check_drawn(rank, jobs, parts):
    ranks = dist.get_world_size()
    for case, backend in jobs:
        plain = case if isinstance(case, Case) else case.case
        shard = Shard(dist.group.WORLD, parts(rank, ranks, plain.vocabulary))
        logits_or_inputs, labels, *keywords = case.tensors(torch.device("cpu"))
        check = check_case if isinstance(case, Case) else check_linear_case
        try:
            check(logits_or_inputs, labels, *keywords, backend, shard=shard)
        except Exception as error:
            raise AssertionError(f"{backend}, {case}") from error


def jobs(**counts):
    """Cases of logits, and half as many of a head, for each backend."""
    vocabularies = st.sampled_from([4, 7, 16, 33, 40, 129])
    shapes = vocabularies.flatmap(lambda v: cases(vocabulary=v))
    heads = vocabularies.flatmap(lambda v: linear_cases(vocabulary=v))
    return [
        (case, backend)
        for backend, count in counts.items()
        for case in (*drawn(shapes, count), *drawn(heads, count // 2))
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_call_is_within_the_budget(ranks, tmp_path):
    """cpp and eager on many, what is simulated on a few; logits and a head."""
    drawn_jobs = jobs(cpp=40, eager=10, triton=5)
    run_on(ranks, tmp_path, check_drawn, drawn_jobs, words_of)


@pytest.mark.slow
def test_a_rank_without_words_takes_part(tmp_path):
    drawn_jobs = jobs(cpp=20, eager=10, triton=4, cuda=4)
    run_on(3, tmp_path, check_drawn, drawn_jobs, words_but_of_one)


def batch(vocabulary=10):
    """(logits, labels, old_logps, advantages), the same on every rank."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, vocabulary, generator=g)
    labels = torch.randint(0, vocabulary, (2, 3), generator=g)
    return logits, labels, torch.full((2, 3), -2.0), torch.tensor([1.0, -1.0])


def check_infinities(rank):
    """A shard of -inf alone; the label in it; a row of nothing else; a NaN in one shard."""
    group, words = dist.group.WORLD, words_of(rank, 2, 10)
    logits, labels, *_ = batch()
    labels[0] = torch.tensor([1, 8, 1])
    second = words_of(1, 2, 10)
    logits[0, 0, second] = -torch.inf  # the other shard's label
    logits[0, 1, second] = -torch.inf  # the label is there
    logits[0, 2] = -torch.inf
    logits[1, 0, 7] = torch.nan
    labels[1, 1] = -100
    logits[1, 1] = torch.nan
    for backend in ("cpp", "eager", "triton"):
        whole = logits.clone().requires_grad_()
        part = logits[..., words].clone().requires_grad_()
        options = {"return_entropy": True, "backend": backend}
        expected = token_logps(whole, labels, **options)
        found = token_logps(part, labels, tp_group=group, **options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-6)
        keep = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        for logps, entropy in (expected, found):
            (keep * torch.where(logps.isfinite(), logps + entropy, 0.0)).nansum().backward()
        used = keep[..., None].expand_as(part) != 0
        theirs = whole.grad[..., words][used]
        torch.testing.assert_close(part.grad[used], theirs, rtol=1e-5, atol=1e-6)
        assert (part.grad[1, 1] == 0).all()


def check_sets(rank):
    """Of the whole vocabulary on each rank; some of them of words of one shard alone."""
    group, words = dist.group.WORLD, words_of(rank, 2, 10)
    first, second = (list(range(10)[words_of(r, 2, 10)]) for r in (0, 1))
    logits, labels, old_logps, advantages = batch()
    labels[0] = torch.tensor([0, 9, 4])
    labels[1] = torch.tensor([9, 0, -100])
    sets = SamplingMask.from_lists([first, second, [9, 4, 0], [9], None, [3]])
    inside = torch.zeros(6, 10, dtype=torch.bool)
    for row, kept in zip(inside, (first, second, [0, 4, 9], [9], range(10), []), strict=True):
        row[list(kept)] = True
    inside = inside.view_as(logits)
    # What is kept nowhere may be anything, all of a shard's row too.
    poisoned = torch.where(inside, logits, torch.nan)
    for backend in ("cpp", "eager", "triton"):
        for keywords in ({}, {"center": "group"}, {"inplace": True}, {"entropy_coef": 0.1}):
            keywords = keywords | {"sampling_mask": sets, "backend": backend}
            whole = logits.clone().requires_grad_()
            part = poisoned[..., words].clone().requires_grad_()
            expected = r2vpo_loss(whole * 1, labels, old_logps, advantages, **keywords)
            out = r2vpo_loss(part * 1, labels, old_logps, advantages, tp_group=group, **keywords)
            close = {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(out.loss, expected.loss, **close)
            torch.testing.assert_close(out.logps, expected.logps, **close)
            out.loss.backward()
            expected.loss.backward()
            torch.testing.assert_close(part.grad, whole.grad[..., words], **close)
            assert not part.grad[~inside[..., words]].any()
            # A set of one is certain, on the rank that has it and on the other.
            assert out.logps[1, 0] == 0 and not part.grad[1, 0].any()
            metrics = expected.metrics()
            assert all(
                torch.equal(out.metrics()[name], metrics[name])
                for name in ("support/single", "support/size")
            )


def check_cost(rank):
    """One MAX and one SUM of a few floats per token; for a head one of its hidden states more."""
    group, words = dist.group.WORLD, words_of(rank, 2, 10)
    logits, labels, old_logps, advantages = batch()
    calls, all_reduce = [], dist.all_reduce

    def counted(x, op, group):
        calls.append((op, x.numel()))
        all_reduce(x, op, group)

    dist.all_reduce = counted
    tokens, MAX, SUM = labels.numel(), dist.ReduceOp.MAX, dist.ReduceOp.SUM
    for keywords, floats in (({}, 4), ({"entropy_coef": 0.1}, 5)):
        part = logits[..., words].clone().requires_grad_()
        r2vpo_loss(part, labels, old_logps, advantages, tp_group=group, **keywords).loss.backward()
        assert calls == [(MAX, tokens), (SUM, floats * tokens)]
        calls.clear()
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Linear(8, words.stop - words.start)
    for frozen, more in ((False, [(SUM, hidden.numel())]), (True, [])):
        states = hidden.clone().requires_grad_(not frozen)
        out = linear_r2vpo_loss(states, head, labels, old_logps, advantages, tp_group=group)
        out.loss.backward()
        assert calls == [(MAX, tokens), (SUM, 4 * tokens), *more]
        calls.clear()
    dist.all_reduce = all_reduce


def check_errors(rank):
    """What one rank raises, and what ranks disagree on, raises on all: none waits for another."""
    group, words = dist.group.WORLD, words_of(rank, 2, 10)
    logits, labels, old_logps, advantages = batch()
    logits = logits[..., words]
    hidden, weight = torch.randn(2, 3, 4), torch.randn(words.stop - words.start, 4)
    short = slice(0, 3 - rank)

    def loss(logits=logits, labels=labels, old=old_logps, advantages=advantages, **keywords):
        r2vpo_loss(logits, labels, old, advantages, tp_group=group, **keywords)

    def linear(hidden=hidden, weight=weight, labels=labels, **keywords):
        linear_token_logps(hidden, weight, labels, tp_group=group, **keywords)

    def linear_with_grad_on_rank_0():
        with torch.set_grad_enabled(rank == 0):
            linear(hidden.clone().requires_grad_())

    def sets(*more, missing_label="error"):
        lists = [[int(y), *more] for y in labels.reshape(-1)]
        return SamplingMask.from_lists(lists, missing_label=missing_label)

    pairs = [[int(y), (int(y) + 1 + rank) % 10] for y in labels.reshape(-1)]
    pairs = SamplingMask.from_lists(pairs)
    ones, nine, ten = sets(), *(SamplingMask.from_lists([list(range(n))] * 6) for n in (9, 10))
    other, hole, outside = labels.clone(), labels.clone(), labels.clone()
    other[1, 2] = (0, 9)[rank]  # a word of the other shard
    hole[1, 2] = -100 if rank else 0
    outside[0, 1] = 10 if rank else 3
    alike = "labels: got .* at [0-5], expected .* the same, or masked, on all ranks"
    for call, message in (
        # Each has what fits together, but not the same.
        (lambda: loss(logits[:, short], labels[:, short], old_logps[:, short]),
         r"got \w+ \(2, 2\) on rank 1, expected \w+ \(2, 3\), that of rank 0"),
        (lambda: loss(logits.double() if rank else logits), "torch.float64"),
        (lambda: loss(return_entropy=rank == 0), "entropy False on rank 1, expected entropy True"),
        (lambda: loss(backend="eager" if rank else "cpp"), "eager"),
        (lambda: loss(temperature=1.0 + rank), "temperature 2.0"),
        (lambda: loss(variance_coef=1.0 + rank), "variance_coef 2.0"),
        (lambda: loss(old=None if rank else old_logps), "old_logps"),
        (lambda: loss(center="group" if rank else "one"), "center group"),
        (lambda: loss(mask=torch.ones(2, 3) if rank else None), "mask"),
        (lambda: loss(sampling_mask=ones if rank else None), "token_ids|sampling_mask"),
        (lambda: loss(sampling_mask=ten if rank else ones), r"token_ids \(60,\)"),
        (lambda: linear(sampling_mask=ten if rank else ones), r"token_ids \(60,\)"),
        (lambda: loss(sampling_mask=sets(missing_label="full") if rank else ones),
         "missing_label full"),
        (lambda: linear(softcap=3.0 + rank), "softcap 4.0"),
        (lambda: linear(hidden.half(), weight.half(), logits_dtype=(None, torch.float32)[rank]),
         "logits torch.float32"),
        (lambda: linear(bias=weight[:, 0] if rank else None), "bias True"),
        (lambda: linear(hidden.clone().requires_grad_(rank == 0)), "gradient of hidden False"),
        (linear_with_grad_on_rank_0, "gradient of hidden False"),
        # Rank 1 has what does not fit.
        (lambda: loss(labels=labels[:, short]), r"labels: .*\(2, 2\)"),
        (lambda: loss(old=old_logps[:, short]), r"old_logps: .*\(2, 2\)"),
        (lambda: loss(advantages=advantages[: 2 - rank]), "advantages: "),
        (lambda: loss(labels=labels.double() if rank else labels), "labels: .*float64"),
        (lambda: loss(logits[0] if rank else logits), r"labels: .*\(3,\)"),
        (lambda: loss(reduction="mean" if rank else "none"), "reduction: "),
        (lambda: loss(variance_coef=-float(rank)), "variance_coef: "),
        (lambda: loss(temperature=torch.tensor(1.0 - rank)), "temperature: got 0.0"),
        (lambda: loss(backend="tpu" if rank else "cpp"), "backend: "),
        (lambda: loss(inplace=rank == 1, logits=logits.clone().requires_grad_()), "inplace: "),
        (lambda: linear(weight=weight[:, : 4 - rank]), "weight: "),
        (lambda: linear(weight=weight.half() if rank else weight), "weight: .*float16"),
        (lambda: linear(chunk_tokens=1 - rank), "chunk_tokens: "),
        (lambda: loss(sampling_mask=ones[: 6 - rank]), "sampling_mask: got sets of 5 tokens"),
        (lambda: loss(sampling_mask=nine, labels=labels * 0 + 9 * rank), "labels: got 9 at 0"),
        # Only together can they know.
        (lambda: loss(sampling_mask=sets(10)), "sampling_mask: got 10, expected .* from 0 to 9"),
        (lambda: loss(sampling_mask=sets(10), backend="eager"), "sampling_mask: got 10"),
        (lambda: loss(sampling_mask=sets(10 + rank)), "checksum_of_token_ids"),
        (lambda: loss(sampling_mask=pairs), "checksum_of_token_ids"),
        (lambda: loss(logits[..., :0]), "tp_group: got no word on any rank"),
        (lambda: linear(weight=weight[:0]), "tp_group: got no word on any rank"),
        *(
            (lambda labels=wrong, backend=backend: loss(labels=labels, backend=backend), alike)
            for wrong in (other, hole, outside, labels + 10)
            for backend in ("cpp", "eager")
        ),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match="tp_group: got DeviceMesh, expected"):
        r2vpo_loss(logits, labels, old_logps, advantages, tp_group=mesh)
    sharded = dist.tensor.DTensor.from_local(weight, mesh, [dist.tensor.Shard(0)])
    with pytest.raises(ValueError, match="weight: got a DTensor, expected this rank's rows"):
        linear(weight=sharded)
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(TypeError, match="tp_group: got int, expected"):
            r2vpo_loss(logits, labels, old_logps, advantages, tp_group=alone)
    leaf = logits.clone().requires_grad_()
    for backend in ("cpp", "eager"):
        logps = token_logps(leaf, labels, tp_group=group, backend=backend)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(logps.sum(), leaf, create_graph=True)


def check_on_two(rank):
    for check in (check_infinities, check_sets, check_cost, check_errors):
        check(rank)


def test_infinities_sets_cost_and_errors(tmp_path):
    run_on(2, tmp_path, check_on_two)


def check_two_of_three(rank):
    group = dist.new_group([0, 1])
    if rank < 2:
        with pytest.raises(ValueError, match="tp_group: got 2 ranks, expected a divisor of all 3"):
            r2vpo_loss(*batch(), tp_group=group)


def test_a_group_that_does_not_divide_the_ranks(tmp_path):
    run_on(3, tmp_path, check_two_of_three)


def check_compiled(rank):
    logits, labels, old_logps, advantages = batch()
    group = dist.group.WORLD
    leaves = logits.requires_grad_(), torch.randn(10, 10, requires_grad=True)
    sets = SamplingMask.from_lists([[int(y), (int(y) + 1) % 10] for y in labels.reshape(-1)])

    def losses(logits, weight):
        rest, keywords = (labels, old_logps, advantages), {"tp_group": group}
        return (
            r2vpo_loss(logits, *rest, **keywords).loss
            + r2vpo_loss(logits, *rest, sampling_mask=sets, **keywords).loss
            + linear_r2vpo_loss(logits, weight, *rest, sampling_mask=sets, **keywords).loss
            + linear_r2vpo_loss(logits, weight, *rest, **keywords).loss
        )

    expected = losses(*leaves)
    found = torch.compile(losses, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, leaves) for loss in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    ops = torch.ops.r2vpo_kernels
    torch.library.opcheck(ops.all_reduce, (logits.detach(), "SUM", group.group_name))
    described = "kind", "labels", [2], [2, 3, 10], "", group.group_name
    torch.library.opcheck(ops.shard_layout, (labels, *described))


@pytest.mark.slow
def test_compiled_and_as_ops(tmp_path):
    run_on(1, tmp_path, check_compiled)
