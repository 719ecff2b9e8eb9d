"""What is the CUDA backend's own: its kernels' source on an emulated GPU, and its machine code.

tests/support/emulator runs csrc/cuda/rows.h and tokens.h on a CPU. A GPU's threads take turns there
in a random order, copies arrive late, and what a GPU would do wrong in silence is an error: a
deadlock, a word of the ring read before it arrived, a store to what a copy still reads. What a
block puts into memory for others is not there before a fence. The instructions' own semantics only
a GPU shows.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from support.emulator.build import DEFAULTS
from support.harness import check_case, check_gradient, check_values, truth_of, upstream_of
from support.sass import cuda_kernels
from support.strategies import DTYPES, cases, uneven_rows
from support.tolerance import assert_within
from test_cpp import build

from r2vpo_kernels import SamplingMask, ops, r2vpo_loss, token_logps
from r2vpo_kernels.backends import calls, cuda, registry
from r2vpo_kernels.output import METRICS

ROOT = Path(__file__).parents[2]
CUDA = pytest.mark.skipif(not cuda.SIMULATED, reason="on a GPU the kernels themselves are tested")

# Of the emulated kernels: words in a chunk, chunks in registers where there are no clusters.
CHUNK, HELD = 128, 2
# Rings that hold a row with room for the next, barely, and not; blocks alone and in clusters.
GPUS = {
    f"{'clusters' if clusters else 'alone'}, {stages} stages": {
        "stages": stages, "most_stages": stages, "clusters": clusters, "held_at_once": held
    }
    for clusters in (True, False)
    for stages, held in ((1, 1), (2, 2), (6, 3))
}  # fmt: skip


@pytest.fixture(params=GPUS)
def gpu(request):
    cuda._cuda.configure(**GPUS[request.param], seed=1)
    yield GPUS[request.param]
    cuda._cuda.configure(**DEFAULTS)


@pytest.fixture(scope="module", params=GPUS)
def any_gpu(request):
    cuda._cuda.configure(**GPUS[request.param], seed=2)
    yield
    cuda._cuda.configure(**DEFAULTS)


def counted(call):
    """What `call` read and wrote of the rows: two lists of (address, bytes)."""
    cuda._cuda.count(True)
    call()
    return cuda._cuda.count(False)


def of_elements(spans, x):
    """(B, T, V) how often each element of x was touched; none was in part."""
    size, base = x.element_size(), x.untyped_storage().data_ptr()
    changes = torch.zeros(x.untyped_storage().nbytes() + 1, dtype=torch.long)
    begin, length = torch.tensor(spans, dtype=torch.long).view(-1, 2).T
    changes.index_add_(0, begin - base, torch.ones_like(begin))
    changes.index_add_(0, begin - base + length, -torch.ones_like(begin))
    touched = changes.cumsum(0)[:-1].view(-1, size)
    assert (touched == touched[:, :1]).all()
    return touched[:, 0].clone().as_strided(x.shape, x.stride(), x.storage_offset())


def reloaded(row, gpu, held=HELD):
    """The columns of a row that ring and registers do not hold: they are read a second time."""
    size = row.element_size()
    columns = 16 // size
    head = min(-row.data_ptr() % 16 // size, row.numel())
    words = (row.numel() - head) // columns
    cluster, stages = 1, gpu["stages"]
    while gpu["clusters"] and cluster < 8 and math.ceil(words_of(words, cluster)) + 4 > stages:
        cluster *= 2
    held = 0 if gpu["clusters"] else held
    again = torch.zeros(row.numel(), dtype=torch.bool)
    share = math.ceil(words / cluster)
    for rank in range(cluster):
        mine = range(min(rank * share, words), min((rank + 1) * share, words))
        over = math.ceil(len(mine) / CHUNK) - stages - held
        for word in mine[: max(0, over) * CHUNK]:
            again[head + word * columns : head + (word + 1) * columns] = True
    return again


def words_of(words, cluster):
    return math.ceil(words / cluster) / CHUNK


def inputs(dtype, vocabulary, offset=0):
    """One sequence of four tokens, the second masked, at `offset` elements from a 16-byte word."""
    torch.manual_seed(vocabulary)
    memory = torch.randn(4 * vocabulary + offset).mul_(3).to(dtype)
    logits = memory[offset:].view(1, 4, vocabulary)
    labels = torch.randint(0, vocabulary, (1, 4))
    labels[0, 1] = -100
    return logits, labels


def prepared(labels, vocabulary, length=None, groups=1, sets=None, words=None, **given):
    """The workspace of tokens in units of `length`, of these sets and for this shard's words."""
    tokens = labels.numel()
    length = length or tokens
    units = -(-tokens // length)
    workspace = torch.empty(calls.workspace_size(tokens, units))
    level = given.pop("sequence_level", False)
    on_policy = "old_logps" not in given
    t = calls.Tokens(
        workspace, tokens, units, groups, min(units, 512), on_policy, level,
        with_support=sets is not None,
    )  # fmt: skip
    columns = {
        name: calls.column(name, x, labels.shape, labels.device)
        for name, x in {"labels": labels, **given}.items()
        if name != "group_ids"
    }
    p = calls.Prepare(t, **columns, group_ids=given.get("group_ids"), unit_length=length)
    words = words or range(vocabulary)
    p.vocabulary, p.first_word, p.words = vocabulary, words.start, len(words)
    p.sampling_mask, p.sampling_vocabulary = sets, vocabulary
    p.count_kind, p.numbers = 1, (0.5, 1.0, 1.0, 0.0, 0.0, 20.0, 0.0, 0.0, math.inf)
    cuda.prepare(p)
    if sets is not None:
        t.support = ops.support_of(sets.token_ids, words.start)
    return t


# Around one, two and more chunks of 128 words of 8 or 4 columns, and around the words' edges.
VOCABULARIES = (1, 3, 8, 9, 1023, 1024, 1025, 1032, 2049, 3 * 1024 + 5, 9 * 1024, 20011)


@CUDA
@pytest.mark.parametrize(
    "dtype, offset", [(torch.bfloat16, 0), (torch.bfloat16, 3), (torch.float32, 1)]
)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_element_is_read_once_and_written_once(gpu, dtype, offset, vocabulary):
    """Of a row that the chip holds; of a longer one what does not fit is read twice."""
    logits, labels = inputs(dtype, vocabulary, offset)
    t = prepared(labels, vocabulary, advantages=torch.ones(1, 4))
    dlogits, logps = ops.empty_gradient(logits), torch.empty(4)
    reads, writes = counted(lambda: cuda.one_pass(logits, dlogits, t, None, 0, logps, None))
    expected = torch.ones(1, 4, vocabulary, dtype=torch.long)
    for t in (0, 2, 3):
        expected[0, t] += reloaded(logits[0, t], gpu)
        expected[0, t, labels[0, t]] += 1  # for its log-prob
    expected[0, 1] = 0
    assert torch.equal(of_elements(reads, logits), expected)
    assert (of_elements(writes, dlogits) == 1).all()
    assert sum(size for _, size in writes) == dlogits.numel() * dlogits.element_size()


@CUDA
def test_what_has_one_look_reads_once(gpu):
    """Log-probs forward and backward, scaling, and scaling by 1, which touches nothing."""
    logits, labels = inputs(torch.bfloat16, 5003, 1)
    t = prepared(labels, 5003)
    once = torch.ones(logits.shape, dtype=torch.long)
    once[0, 1] = 0
    logps, top, log_total = torch.empty(3, 4)
    forward = logps, top, log_total, None
    reads, writes = counted(lambda: cuda.logps_forward(logits, t, None, 0, *forward))
    of_label = once.scatter_add(2, labels.clamp(min=0)[..., None], once[..., :1])
    assert torch.equal(of_elements(reads, logits), of_label) and not writes
    dlogits = ops.empty_gradient(logits)
    upstream = torch.ones(4), None, None
    reads, writes = counted(
        lambda: cuda.logps_backward(logits, dlogits, t, None, 0, *forward, *upstream)
    )
    assert torch.equal(of_elements(reads, logits), once)
    assert (of_elements(writes, dlogits) == 1).all()
    for factor, times in ((0.5, 1), (1.0, 0)):
        reads, writes = counted(lambda f=factor: cuda.scale(logits, torch.tensor(f)))
        assert (of_elements(reads, logits) == times).all()
        assert (of_elements(writes, logits) == times).all()


@CUDA
@given(cases())
def test_any_call_is_within_the_budget(any_gpu, case):
    logits, labels, keywords = case.tensors(torch.device("cpu"))
    check_case(logits, labels, keywords, "cuda")


@CUDA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES[3:])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_several_chunks(gpu, dtype, vocabulary, inplace):
    """The maximum rises from chunk to chunk, falls, and is -inf in whole chunks."""
    logits, labels, keywords = uneven_rows(vocabulary)
    check_case(logits.to(dtype), labels, keywords | {"inplace": inplace}, "cuda")


def assert_same_bits(step, seeds, clusters):
    """Of what step(seed) returns, whatever the order of events, the ring and the rows at once."""
    results = []
    try:
        for seed in range(seeds):
            stages = 4 + seed % 2
            cuda._cuda.configure(stages, stages, clusters, 1 + seed, seed)
            results.append(step(seed))
    finally:
        cuda._cuda.configure(**DEFAULTS)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@CUDA
@pytest.mark.parametrize("keywords", [{}, {"center": "group"}, {"entropy_coef": 0.1}])
def test_no_bit_depends_on_the_order_of_events(keywords):
    """Nor on the length of the ring, nor on how many rows are on the chip at once."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6001).bfloat16()
    labels = torch.randint(0, 6001, (2, 5))

    def step(seed):
        leaf = logits.clone().requires_grad_()
        out = r2vpo_loss(leaf, labels, None, torch.ones(2), backend="cuda", **keywords)
        out.loss.backward()
        return out.loss.detach(), out.logps, leaf.grad

    assert_same_bits(step, 4, clusters=True)


@CUDA
@pytest.mark.parametrize("with_sets", [False, True])
def test_recorded_log_probs_are_those_of_the_loss(gpu, with_sets):
    """All kernels add up a row in one order: δ is 0 where nothing has changed."""
    logits, labels = inputs(torch.bfloat16, 5003, 5)
    sets = sets_of(labels, 5003, [9, 9, 700, FULL]) if with_sets else None
    keywords = {"sampling_mask": sets, "backend": "cuda"}
    leaf = logits.clone().requires_grad_()
    # Of the leaf: a clone lies elsewhere within 16 bytes.
    recorded = token_logps(leaf, labels, **keywords).detach()
    out = r2vpo_loss(leaf, labels, recorded, torch.ones(1), **keywords)
    assert torch.equal(out.logps, recorded) and out.stats.second_moment.item() == 0.0


# Rows under a sampling mask.

FULL = 0


def sets_of(labels, vocabulary, sizes, missing_label="error"):
    """Sets of these sizes, each with its token's label; FULL: the full vocabulary."""
    sets = []
    for label, size in zip(labels.view(-1).tolist(), sizes, strict=True):
        ids = torch.randperm(vocabulary)[: min(size, vocabulary)]
        if size and label >= 0 and not (ids == label).any():
            ids[0] = label
        sets.append(ids.tolist() or None)
    return SamplingMask.from_lists(sets, missing_label=missing_label)


def kept_words(sets, vocabulary):
    """(N, V): whether each is in its token's set."""
    kept = torch.zeros(len(sets), vocabulary, dtype=torch.bool)
    kept[sets.token_of(), sets.token_ids.long()] = True
    return kept | (sets.offsets.diff() == 0)[:, None]


# Of the tokens of `inputs_with_sets`: one word, a few, more than all threads of a cluster take at a
# time, all of the vocabulary's.
SIZES = (1, 9, FULL, 9, 700, 20011, FULL, 70)
MASKED = (3, 6)  # one that has a set, and one that has none


def inputs_with_sets(dtype, vocabulary, offset=0):
    torch.manual_seed(vocabulary)
    memory = torch.randn(8 * vocabulary + offset).mul_(3).to(dtype)
    logits = memory[offset:].view(1, 8, vocabulary)
    labels = torch.randint(0, vocabulary, (1, 8))
    sets = sets_of(labels, vocabulary, SIZES)
    labels[0, MASKED] = -100
    return logits, labels, sets


@CUDA
@pytest.mark.parametrize(
    "dtype, offset", [(torch.bfloat16, 0), (torch.bfloat16, 3), (torch.float32, 1)]
)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_of_a_set_only_kept_logits_are_read_and_all_is_written(gpu, dtype, offset, vocabulary):
    """Once in each look, and the label once more; a row's zeros, and kept words over them."""
    logits, labels, sets = inputs_with_sets(dtype, vocabulary, offset)
    t = prepared(labels, vocabulary, sets=sets, advantages=torch.ones(1, 8))
    kept = kept_words(sets, vocabulary)
    kept[MASKED, :] = False
    of_label = torch.zeros(8, vocabulary, dtype=torch.long)
    of_label.scatter_(1, labels.clamp(min=0).view(-1, 1), (labels >= 0).long().view(-1, 1))
    full = [token for token in range(8) if SIZES[token] == FULL and token not in MASKED]
    again = torch.zeros(8, vocabulary, dtype=torch.long)
    for token in full:
        again[token] = reloaded(logits[0, token], gpu, held=0)
    written = 1 + kept.long()
    written[full] = 1
    second = kept.long()
    second[full] = again[full]

    logps, top, log_total = torch.empty(3, 8)
    forward = logps, top, log_total, None
    reads, writes = counted(lambda: cuda.logps_forward(logits, t, None, 0, *forward))
    assert torch.equal(of_elements(reads, logits)[0], kept + of_label) and not writes
    dlogits, upstream = ops.empty_gradient(logits), (torch.ones(8), None, None)
    reads, writes = counted(
        lambda: cuda.logps_backward(logits, dlogits, t, None, 0, *forward, *upstream)
    )
    assert torch.equal(of_elements(reads, logits)[0], kept.long())
    assert torch.equal(of_elements(writes, dlogits)[0], written)
    dlogits = ops.empty_gradient(logits)
    reads, writes = counted(lambda: cuda.one_pass(logits, dlogits, t, None, 0, logps, None))
    assert torch.equal(of_elements(reads, logits)[0], kept + of_label + second)
    assert torch.equal(of_elements(writes, dlogits)[0], written)
    assert not dlogits[0][~kept].any()
    size = dlogits.element_size()
    assert sum(bytes for _, bytes in writes) == int(written.sum()) * size


def check_with_sets(logits, labels, keywords, sets, upstream=1.0):
    """Held to the truth of logits that are -inf outside the sets; there the gradient is 0."""
    leaf = logits.detach().requires_grad_()
    inside = kept_words(sets, logits.shape[-1])
    seen = leaf * 1 if keywords.get("inplace") else leaf
    out = r2vpo_loss(seen, labels, sampling_mask=sets, backend="cuda", **keywords)
    each = upstream_of(labels, keywords, upstream)
    (gradient,) = torch.autograd.grad(out.loss, leaf, each)
    of_sets = logits.masked_fill(~inside.view(logits.shape), -math.inf)
    truth = truth_of(of_sets, labels, keywords, "cuda", each.expand(labels.shape).reshape(-1))
    check_values(out, truth, each)
    roundings = 2 if upstream != 1.0 and out.loss.dim() == 0 else 1
    check_gradient(gradient, truth, "cuda", roundings)
    assert not gradient.reshape(inside.shape)[~inside].any()
    valid = labels.reshape(-1) != -100
    if keywords.get("mask") is not None:
        valid &= keywords["mask"].reshape(-1) != 0
    sizes = sets.offsets.diff()[valid].double()
    single = (sizes == 1).double().sum() / max(len(sizes), 1)
    assert out.metrics()["support/single"] == single.float()
    assert out.metrics()["support/size"] == (sizes.sum() / (sizes > 0).sum().clamp(min=1)).float()


@CUDA
@given(cases(support="none"))
def test_any_call_with_sets_is_within_the_budget(any_gpu, case):
    device, vocabulary = torch.device("cpu"), case.vocabulary
    logits, _, _ = case.tensors(device)
    in_rows = logits.reshape(case.batch, case.length, vocabulary)
    _, labels, _ = case.tensors(device, in_rows)
    torch.manual_seed(case.seed)
    sizes = torch.tensor([FULL, 1, 2, 5, vocabulary // 2 + 1, vocabulary])
    sizes = sizes[torch.randint(0, 6, (labels.numel(),))].tolist()
    sets = sets_of(labels, vocabulary, sizes)
    outside = ~kept_words(sets, vocabulary).view(in_rows.shape)
    # Recorded log-probs are near those over the sets.
    _, labels, keywords = case.tensors(device, in_rows.masked_fill(outside, -math.inf))
    check_with_sets(logits, labels, keywords, sets, upstream=-0.5 if case.seed % 2 else 1.0)


# The one pass, and what takes log-probs first.
ROUTES = {
    "one pass": {"entropy_coef": 0.1},
    "group": {"center": "group"},
    "sequence": {"ratio_level": "sequence", "entropy_coef": 0.1},
    "none": {"reduction": "none"},
}


@CUDA
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocabulary", [9, 1032, 20011])
def test_sets_among_rows_of_several_chunks(gpu, dtype, vocabulary, inplace, route):
    logits, labels, sets = inputs_with_sets(dtype, vocabulary)
    keywords = ROUTES[route] | {
        "inplace": inplace, "advantages": torch.tensor([0.7]), "temperature": 0.8,
        "old_logps": token_logps(logits.double(), labels, sampling_mask=sets, backend="eager")
        .float() + 0.2,
    }  # fmt: skip
    check_with_sets(logits, labels, keywords, sets)


@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_label_is_found_in_whichever_share_it_is(gpu, dtype):
    """In each block's, at both edges, alone there or not."""
    vocabulary, offset = 8 * 1024 + 5, 3
    columns = [0, 1, vocabulary - 1, *range(500, vocabulary, 1024)]
    torch.manual_seed(0)
    memory = torch.randn(len(columns) * vocabulary + offset).mul_(3).to(dtype)
    logits = memory[offset:].view(1, -1, vocabulary)
    labels = torch.tensor([columns])
    for size in (1, 3, 400):
        sets = sets_of(labels, vocabulary, [size] * len(columns))
        keywords = {"advantages": torch.ones(1), "old_logps": torch.zeros(labels.shape)}
        check_with_sets(logits, labels, keywords, sets)


@CUDA
@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"center": "group"}, {"entropy_coef": 0.1}])
def test_no_bit_of_sets_depends_on_the_order_of_events(keywords, clusters):
    """Nor on the gradient's place, the ring, or how many rows are on the chip at once."""
    logits, labels, sets = inputs_with_sets(torch.bfloat16, 6001)

    def step(seed):
        leaf = logits.clone().requires_grad_()
        out = r2vpo_loss(
            leaf * 1, labels, None, torch.ones(1), sampling_mask=sets, inplace=seed % 3 == 1,
            backend="cuda", **keywords,
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach(), out.logps, leaf.grad

    assert_same_bits(step, 6, clusters)


@CUDA
def test_without_sets_a_mask_changes_no_bit(gpu):
    logits, labels = inputs(torch.bfloat16, 5003, 5)
    sets = SamplingMask.from_lists([None] * 4)
    found = []
    for sampling_mask in (None, sets):
        leaf = logits.detach().requires_grad_()
        out = r2vpo_loss(
            leaf, labels, None, torch.ones(1), sampling_mask=sampling_mask, backend="cuda"
        )
        out.loss.backward()
        found.append((out.loss.detach(), out.logps, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def found_by_each_kernel(t, rows, gradient, entropy):
    """What the row kernels write, in place: the numbers of tokens, and gradient(logits)."""
    forward, of_one_pass = torch.full((4, 8), 99.0), torch.full((2, 8), 99.0)
    last = slice(None) if entropy else slice(-1)
    arguments = [*forward[last], *[None] * (not entropy)]
    cuda.logps_forward(rows(), t, None, 0, *arguments)
    slopes = torch.linspace(-1, 1, 8), torch.linspace(0, 1, 8) if entropy else None
    logits = rows()
    cuda.logps_backward(logits, logits, t, None, 0, *arguments, *slopes, None)
    backward, logits = gradient(logits), rows()
    arguments = [*of_one_pass[last], *[None] * (not entropy)]
    cuda.one_pass(logits, logits, t, None, 0, *arguments)
    return forward, of_one_pass, backward, gradient(logits)


@CUDA
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocabulary", [33, 20011])
def test_compact_values_are_as_their_words_in_rows(gpu, vocabulary, entropy):
    """No row is touched; full vocabularies are left out. A block alone gives the same bits."""
    logits, labels, sets = inputs_with_sets(torch.float32, vocabulary)
    t = prepared(labels, vocabulary, sets=sets, advantages=torch.ones(1, 8))
    t.workspace[2] = 0.1 * entropy  # its coefficient
    places = sets.token_of(), sets.token_ids.long()
    values = logits[0][places]

    def compact_rows():
        t.support = calls.Support(sets.token_ids, values.clone(), 0, True)
        return t.support.values.expand(1, 8, -1)

    found = []
    touched = counted(
        lambda: found.extend(
            found_by_each_kernel(t, compact_rows, lambda _: t.support.values, entropy)
        )
    )
    assert touched == ([], [])
    tokens = torch.arange(8)
    masked = torch.isin(tokens, torch.tensor(MASKED))
    left_out = (torch.tensor(SIZES) == FULL) & ~masked
    for numbers in found[:2]:
        numbers = numbers if entropy else numbers[:-1]
        assert (numbers[:, left_out] == 99.0).all() and (numbers[:, masked] == 0.0).all()
    of_masked = masked[places[0]]
    assert all(torch.equal(x[of_masked], values[of_masked]) for x in found[2:])

    # Of this objective.
    keywords = {"advantages": torch.ones(1), "old_logps": None, "entropy_coef": 0.1 * entropy}
    of_sets = logits.masked_fill(~kept_words(sets, vocabulary), -math.inf)
    truth = truth_of(of_sets, labels, keywords, "cuda")
    here = ~left_out
    for numbers in found[:2]:
        assert_within("logps", numbers[0, here], truth.logps[here], truth.logps_bound[here])
    exact, bound = truth.gradient[places], truth.gradient_bound[places]
    assert_within("gradient", found[3][~of_masked], exact[~of_masked], bound[~of_masked])

    if gpu["clusters"] and gpu["stages"] < 4:
        return  # several blocks share the words of a set, as they share no device's
    cuda._cuda.configure(**DEFAULTS | {"clusters": False})
    t.support = ops.support_of(sets.token_ids, 0)
    in_rows = found_by_each_kernel(t, logits.clone, lambda rows: rows[0][places], entropy)
    for numbers, of_row in zip(found[:2], in_rows[:2], strict=True):
        assert torch.equal(numbers[:, here], of_row[:, here])
    for x, of_row in zip(found[2:], in_rows[2:], strict=True):
        assert torch.equal(x[~of_masked], of_row[~of_masked])


@CUDA
def test_a_shard_reads_and_writes_its_own_words(gpu):
    """The label is in one of them; a set may have no word in another."""
    vocabulary = 5000
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, vocabulary), torch.tensor([[10, 2500, 4999]])
    sets = SamplingMask.from_lists([[10, 30, 40], [1, 2500, 3000, 4000], [4999]])
    kept = kept_words(sets, vocabulary)
    for words in (range(0, 2000), range(2000, 2500), range(2500, 5000)):
        here = slice(words.start, words.stop)
        shard, own = logits[..., here].clone(), kept[:, here]
        t = prepared(labels, vocabulary, sets=sets, words=words, advantages=torch.ones(1, 3))
        logps, top, log_total = torch.empty(3, 3)
        cuda.logps_forward(shard, t, None, 0, logps, top, log_total, None)
        exact = shard[0].double().masked_fill(~own, -math.inf)
        owns_label = torch.tensor([label in words for label in labels[0].tolist()])
        assert torch.equal(logps.isfinite(), owns_label)
        has_words = own.any(1)
        assert torch.equal(log_total == -math.inf, ~has_words)
        assert torch.equal(top[has_words], exact.amax(1).float()[has_words])
        forward = torch.zeros(3), top, log_total, None
        gradient = torch.empty_like(shard)
        slopes = torch.ones(3), None, None
        _, writes = counted(
            lambda shard=shard, gradient=gradient, t=t, rest=(*forward, *slopes): (
                cuda.logps_backward(shard, gradient, t, None, 0, *rest)
            )
        )
        assert torch.equal(of_elements(writes, gradient)[0], 1 + own.long())
        assert not gradient[0][~own].any()
        # The label's is 1 - p, which is 0 for a log-prob of 0.
        of_label = torch.zeros_like(own)
        for token in owns_label.nonzero()[:, 0].tolist():
            of_label[token, labels[0, token] - words.start] = True
        assert torch.equal(gradient[0] != 0, own & ~of_label)


# The kernels over tokens.


@pytest.fixture
def poisoned(monkeypatch):
    """What no block has put is NaN."""
    scratch = cuda._launchers.scratch
    monkeypatch.setattr(cuda._launchers, "scratch", lambda t: scratch(t).fill_(math.nan))


# One unit, which a block shares out; more units than blocks; units that are tokens, in one block
# and in several. Groups that the last block combines, and some with a launch of their own.
UNITS = [
    (300, 300, 1),
    (200, 13, 1),
    (130, 13, 3),
    (200, 13, 70),
    (50, 1, 7),
    (330, 1, 1),
    (330, 1, 9),
]


def finished(tokens, length, groups, level, seed):
    """All that means and finish write, twice from one workspace."""
    cuda._cuda.configure(**DEFAULTS | {"seed": seed})
    torch.manual_seed(tokens)
    units = -(-tokens // length)
    logps = -3 * torch.rand(tokens)
    labels = torch.where(torch.rand(tokens) < 0.2, -100, 0)
    t = prepared(
        labels, 1, length, groups, advantages=torch.randn(tokens), sequence_level=level,
        old_logps=logps + torch.randn(tokens), variance_coef=torch.rand(tokens),
        group_ids=torch.randint(0, groups, (units,)),
    )  # fmt: skip
    results = []
    for _ in range(2):
        means, stats = torch.full((2, groups), math.nan), torch.full((3, groups), math.nan)
        loss, metrics = torch.tensor(math.nan), torch.full((len(METRICS),), math.nan)
        slopes = torch.full((2, tokens), math.nan)
        cuda.means(t, logps, calls.NOTHING, means)
        cuda.finish(t, logps, None, calls.NOTHING, means, loss, stats, metrics, *slopes)
        results.append((means, loss, stats, metrics, slopes))
    assert not t.workspace.view(torch.int32)[calls.TICKETS : calls.SHARD_FAULT + 1].any()
    return results


@CUDA
@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("tokens, length, groups", UNITS)
def test_no_bit_of_tokens_depends_on_the_order_of_threads(poisoned, tokens, length, groups, level):
    """The last block, whichever it is, has all of the others' numbers, and resets the ticket."""
    try:
        runs = [finished(tokens, length, groups, level, seed) for seed in range(12)]
    finally:
        cuda._cuda.configure(**DEFAULTS)
    first = runs[0][0]
    assert not any(x.isnan().any() for x in first)
    for result in (result for run in runs for result in run):
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


@CUDA
def test_a_ticket_that_is_taken_leaves_no_last_block(poisoned):
    """What the test above would see, if a block came to its end before others."""
    t = prepared(torch.zeros(50, dtype=torch.long), 1, 10)
    t.workspace.view(torch.int32)[calls.TICKETS + 1] = 1000
    metrics = torch.full((len(METRICS),), math.nan)
    cuda.finish(
        t, torch.zeros(50), None, calls.NOTHING, None, torch.empty(()), torch.empty(3, 1), metrics,
        None, None,
    )  # fmt: skip
    assert metrics.isnan().all()


@CUDA
@pytest.mark.parametrize("with_sets", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_a_row_takes_the_numbers_of_its_token(with_index, with_sets):
    """Rows of a part of the tokens, in any order, and nothing is written for the others."""
    torch.manual_seed(0)
    labels = torch.tensor([3, -100, 7, 0, 5, 2])
    sets = sets_of(labels, 12, [3, 4, FULL, 5, 2, 12]) if with_sets else None
    given = {"advantages": torch.randn(6), "temperature": torch.rand(6) + 0.5}
    t = prepared(labels, 12, sets=sets, **given)
    logits = torch.randn(1, 6, 12)

    def one_pass(rows, index, first):
        part = logits[:, rows].clone()
        logps = torch.full((6,), 99.0)
        cuda.one_pass(part, part, t, index, first, logps, None)
        return part, logps

    gradient, logps = one_pass(range(6), None, 0)
    rows = torch.tensor([4, 1, 2]) if with_index else torch.arange(2, 5)
    part, some = one_pass(rows, rows if with_index else None, 0 if with_index else 2)
    assert torch.equal(part, gradient[:, rows])
    expected = torch.full((6,), 99.0)
    expected[rows] = logps[rows]
    assert torch.equal(some, expected)


# Shared memory in bytes that a block may have, that a multiprocessor has, and whether there are
# clusters: CUDA's programming guide, "Compute Capabilities".
DEVICES = {
    "A100": (166912, 167936, False),
    "L4": (101376, 102400, False),
    "H100": (232448, 233472, True),
    "B200": (232448, 233472, True),
}
REAL_CHUNK, CONTROL, REAL_HELD = 512 * 16, 1024, {False: 10, True: 9}


@CUDA
@pytest.mark.parametrize("device", DEVICES)
def test_the_plan_fits_the_device(device):
    of_block, of_multiprocessor, clusters = DEVICES[device]
    for size in (2, 4):
        for vocabulary in (1, 7, 1000, 32000, 50257, 128256, 151936, 262144, 10**6, 2**31 - 1):
            about = of_block, of_multiprocessor, clusters, vocabulary * size // 16
            shares, cluster, stages, holds = cuda._cuda.plan(*about, True, True)
            # The same shares make the same sums; a kernel that looks once takes no cluster.
            assert shares == cluster
            assert cuda._cuda.plan(*about, True, False)[:2] == (shares, 1)
            assert cuda._cuda.plan(*about, False, True)[:2] == (1, 1)
            blocks = 1 if holds else 2
            shared = CONTROL + stages * REAL_CHUNK
            assert cluster in ((1, 2, 4, 8) if clusters else (1,))
            assert shared <= of_block and blocks * (shared + 1024) <= of_multiprocessor
            # Less than a stage more is unused.
            assert (
                stages == 28
                or blocks * (shared + REAL_CHUNK + 1024) > of_multiprocessor
                or (shared + REAL_CHUNK > of_block)
            )


@CUDA
def test_which_rows_a_device_reads_once():
    """The largest vocabularies; the README and DERIVATION.md name them."""
    found = {}
    for device, (of_block, of_multiprocessor, clusters) in DEVICES.items():
        for size, entropy in ((2, False), (2, True), (4, False)):

            def once(vocabulary, size=size, entropy=entropy, shared=(of_block, of_multiprocessor),
                     clusters=clusters):  # fmt: skip
                words = vocabulary * size // 16
                _, cluster, stages, holds = cuda._cuda.plan(*shared, clusters, words, True, True)
                chunks = math.ceil(math.ceil(words / cluster) * 16 / REAL_CHUNK)
                return chunks <= stages + (REAL_HELD[entropy] if holds else 0)

            low, high = 1, 2**22
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if once(middle) else (low, middle - 1)
            found[device, size, entropy] = low // 1024
    assert found == {
        ("A100", 2, False): 120, ("A100", 2, True): 116, ("A100", 4, False): 60,
        ("L4", 2, False): 88, ("L4", 2, True): 84, ("L4", 4, False): 44,
        ("H100", 2, False): 448, ("H100", 2, True): 448, ("H100", 4, False): 224,
        ("B200", 2, False): 448, ("B200", 2, True): 448, ("B200", 4, False): 224,
    }  # fmt: skip


# The machine code.

TARGETS = ("sm_80", "sm_90a", "sm_100a")
NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture(scope="module")
def machine_code():
    return cuda_kernels()


@pytest.mark.slow
@NVCC
@pytest.mark.parametrize("target", TARGETS)
def test_the_machine_code_is_as_meant(machine_code, target):
    """No spills, room for two blocks, 16-byte accesses, and copies that the loading warp makes."""
    kernels = {name: r for name, r in machine_code[target].items() if len(name) == 5}
    # Three dtypes: log-probs both ways and the one-pass, with entropy and without, with a sampling
    # mask and without; the one-pass also with a part of the row in registers; scaling.
    assert len(kernels) == 3 * (4 + 4 + 4 + 2 + 1)
    bulk = target != "sm_80"
    for (kernel, dtype, entropy, support, held), r in kernels.items():
        name = f"{kernel} {dtype} {entropy=} {support=} {held=}"
        assembly = r["assembly"]

        def count(pattern, assembly=assembly):
            return len(re.findall(rf"\b{pattern}\b", assembly))

        assert r["spills"] == 0, name
        # None of its own but what the system takes from sm_90 on.
        assert r["shared"] <= 1024, name
        if bulk and held:
            # Clusters take its place.
            assert count("LDG") == count("STG") == 0, name
            continue
        # Nine warps a block, on four schedulers of 16384 registers.
        warps = math.ceil(9 * (1 if held else 2) / 4)
        assert r["registers"] <= 16384 // warps // 32 // 8 * 8, name
        assert count(r"UBLKCP[\w.]*") == (1 if bulk else 0), name
        assert (count(r"LDGSTS\.E\.BYPASS\.128") >= 1) == (not bulk), name
        # Logits come by those copies; what is loaded otherwise is per token, or a row's edge.
        assert max(r["loads"], default=0) <= 8, name
        if dtype != "Float32":
            # An edge in each look of its own, and the label; of a set eight in each look.
            alone = {"LogpsForward": 2, "OnePass": 2}.get(kernel, 1)
            of_sets = 8 * support * (2 if kernel == "OnePass" else 1)
            assert r["loads"].count(2) == alone + of_sets, name
        assert count(r"LDS\.128") >= 2, name
        has_gradient = kernel != "LogpsForward"
        assert (r["stores"].count(16) >= 2) == has_gradient, name
        assert count(r"STG\.E\.EF\.128") == r["stores"].count(16), name
        # The parts of a row's sum go to the cluster's other blocks, where there is one.
        assert count(r"STAS\.128") == (bulk and kernel == "OnePass"), name


@pytest.mark.slow
@NVCC
@pytest.mark.parametrize("target", TARGETS)
def test_the_machine_code_over_tokens_is_as_meant(machine_code, target):
    """No spills; blocks meet by an integer ticket, between fences, and sums are no atomics."""
    kernels = {name[0]: r for name, r in machine_code[target].items() if len(name) == 1}
    assert kernels.keys() == {
        "Prepare", "Means", "Groups of Means", "Finish", "Groups of Finish", "ShardParts",
        "ShardCombine", "DualStep", "HeadLogits", "HeadDhidden", "HeadDweight",
    }  # fmt: skip
    for name, r in kernels.items():
        assert r["spills"] == 0, name
        # 16 warps a block on four schedulers of 16384 registers.
        assert r["registers"] <= 128, name
        # Each warp's sums (the totals but for two extremes), and what the system takes.
        assert r["shared"] <= 1024 + 16 * (cuda.TOTALS - 2) * 8, name
        atomics = re.findall(r"\b(?:ATOM|RED)[A-Z]?\.[\w.]+", r["assembly"])
        meets = name in ("Means", "Finish")
        assert atomics == (["ATOMG.E.ADD.STRONG.GPU"] if meets else []), name
        assert len(re.findall(r"\bMEMBAR\.\w+\.GPU\b", r["assembly"])) == 2 * meets, name
        # What other blocks put is read past this multiprocessor's own cache.
        fetched = "LDG.E.64.STRONG.GPU" in r["assembly"]
        assert fetched == (meets or name.startswith("Groups")), name


@pytest.mark.slow
@NVCC
def test_without_a_driver_it_imports_and_a_launch_raises_in_cudas_words():
    program = """
import torch
from r2vpo_kernels.backends import cuda, registry
z = torch.zeros(1, 2, 3)
print(registry.why_not("cuda", z))
try:
    with_gpu = torch.cuda.is_available()
    cuda._launchers.launch_target = lambda x: (0 if not with_gpu else 10**6, 0)
    cuda.scale(z, torch.tensor(0.5))
except RuntimeError as error:
    print(error)
print(z.any().item())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    why, error, touched = run.stdout.splitlines()
    assert why == "it runs on a GPU, and the input is on cpu", run.stderr
    assert re.fullmatch(r"cudaSetDevice: cudaError\w+: .+", error) and touched == "False"


def test_it_is_chosen_only_where_results_show_it_right_and_faster():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu import where_cuda_is_faster

    files = (ROOT / "benchmarks" / "results").glob("*.json")
    shown = set().union(*(where_cuda_is_faster(json.loads(path.read_text())) for path in files))
    assert shown.issuperset(registry.CUDA_IS_FASTER)


def test_which_results_show_it():
    """Every number of tokens of a dtype and V: timed, which nothing wrong is, and ahead."""
    from gpu import where_cuda_is_faster

    def row(contender, n, ms, status="timed", v=32000):
        return {"contender": contender, "n": n, "v": v, "dtype": "bfloat16", "both_ms": ms,
                "status": status}  # fmt: skip

    def found(*rows, ok=True):
        parts = {"grid": {"rows": list(rows)}, "tests": {"ok": ok}, "racecheck": {"ok": True},
                 "memcheck": {"ok": True}}  # fmt: skip
        return where_cuda_is_faster({"environment": {"device": "A"}, "parts": parts})

    triton, cuda_row = row("triton one-pass", 8, 2.0), row("cuda one-pass", 8, 1.5)
    assert found(triton, cuda_row) == {("A", torch.bfloat16, 32000)}
    assert found(triton, cuda_row, ok=False) == set()
    assert found(triton, row("cuda one-pass", 8, 2.5)) == set()
    assert found(triton, row("cuda one-pass", 8, 1.5, "wrong: loss")) == set()
    assert found(triton, cuda_row, row("triton one-pass", 16, 2.0)) == set()
    slower = row("triton one-pass", 16, 2.0), row("cuda one-pass", 16, 3.0)
    assert found(triton, cuda_row, *slower) == set()
    assert found(triton) == set()


def test_auto_takes_it_where_it_is_faster(monkeypatch):
    class OnGpu:
        is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (1, 2, 32000)

    class Properties:
        name = "A"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert registry.choose_backend("auto", OnGpu) == "triton"
    faster = frozenset({("A", torch.bfloat16, 32000)})
    monkeypatch.setattr(registry, "CUDA_IS_FASTER", faster)
    assert registry.choose_backend("auto", OnGpu) == "cuda"
    OnGpu.dtype = torch.float32
    assert registry.choose_backend("auto", OnGpu) == "triton"


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 3), (12, 0)])
def test_a_gpu_that_it_is_not_compiled_for_is_named(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = cuda.why_not(torch.device("cuda", 0))
    assert reason.endswith(f"cuda:0 has {capability[0]}.{capability[1]}")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
def test_a_gpu_that_it_is_compiled_for_is_taken(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda.why_not(torch.device("cuda", 0)) is None


def test_the_build_without_cuda_and_with_an_nvcc_that_fails(tmp_path):
    assert "cuda" not in build(tmp_path / "without", CXX="no-such-compiler")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'fatal error: no such architecture'\nexit 1\n")
    nvcc.chmod(0o755)
    path = f"{nvcc.parent}:{os.environ['PATH']}"
    report = build(tmp_path / "with", PATH=path, R2VPO_KERNELS_CUDA="1", CXX="true")
    assert report["cuda"] == "not built: nvcc failed: fatal error: no such architecture"
