"""The gate without a GPU: what is launched, compiled ahead of time for real targets."""

import json

import pytest
import triton
from support.aot import OBJECTIVES, REPORTS, TARGETS, compilation, name

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# A target takes minutes: `make test` has one.
SLOW = [target for target in TARGETS if target != "sm_90"]


@pytest.fixture(
    scope="module", params=["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in SLOW)]
)
def report(request):
    run = compilation(request.param)
    assert run.returncode == 0, run.stderr[-4000:]
    REPORTS[request.param] = json.loads(run.stdout)
    return REPORTS[request.param], TARGETS[request.param][1]


def row_kernels(kernels, sampled=False):
    return [k for k in kernels if k.get("sampled") is sampled]


def test_every_kernel_was_compiled_once(report):
    kernels, _ = report
    rows = row_kernels(kernels)
    assert len({k["kernel"] for k in rows}) == 4
    # Two alignments, with entropy or without; float16 has no one-pass and nothing to scale. One
    # pass once more with entropy for each kind of objective.
    assert len(rows) == 2 * 2 * (4 + 4 + 2) + 2 * len(OBJECTIVES)
    sampled = row_kernels(kernels, sampled=True)
    assert len({k["kernel"] for k in sampled}) == 3
    assert len(sampled) == 2 * 2 * 3
    head = [k for k in kernels if "everything" in k]
    # Compact values alone, one pass over them or all three kernels, and the products.
    assert len({k["kernel"] for k in head}) == 6
    assert len(head) == 4 + 6
    tokens = [k for k in kernels if "variant" in k]
    assert len({k["kernel"] for k in tokens}) == 6
    # Sequences and units of one token; the plain loss needs no means. `finish` once more at each
    # level for each kind of objective.
    assert len(tokens) == 2 * (5 + 6 + 6 + 6 + 2 * len(OBJECTIVES))
    assert all(k["recompiled"] == 0 for k in kernels), "a size or a stride was specialised on"


def test_no_register_spills(report):
    kernels, _ = report
    # `means` and `finish` do with Triton 3.6: they read some 40 bytes a token, and no logits.
    held = [k for k in kernels if TRITON >= (3, 7) or "variant" not in k]
    assert {name(k): k["spills"] for k in held if k["spills"]} == {}


def test_shared_memory_and_threads_are_within_the_limits(report):
    kernels, limit = report
    assert {name(k): k["shared"] for k in kernels if k["shared"] > limit} == {}
    assert {name(k): k["threads"] for k in kernels if k["threads"] > 1024} == {}


def test_no_maximum_drops_a_nan(report):
    kernels, _ = report
    assert {name(k): k["loses_nan"] for k in kernels if k["loses_nan"]} == {}


def test_the_label_is_read_before_a_barrier_and_stored_after_one(report):
    """In place its logit is overwritten after: without one between, by a thread that is ahead.

    Its gradient takes the place of what another thread has stored there.
    """
    kernels, _ = report
    for k in row_kernels(kernels):
        if k["dtype"] == "bfloat16" and k["vocabulary"] == 151936 and "objective" not in k:
            assert k["label_first"] or k["kernel"] != "one_pass_kernel", name(k)
            writes = k["kernel"] in ("one_pass_kernel", "logps_backward_kernel")
            assert k["label_last"] or not writes, name(k)


def test_threads_wait_for_each_other_in_rows_with_a_support(report):
    """Each reads values that others gathered, and puts a gradient where others wrote a zero."""
    kernels, _ = report
    for k in row_kernels(kernels, sampled=True):
        assert k["gather_waits"], name(k)
        assert k["scatter_waits"] or k["kernel"] == "logps_forward_kernel", name(k)


# How often a kernel looks at a row, and how many numbers per token it may load and store.
LOOKS = {
    "logps_forward_kernel": (1, 3, 4),
    "logps_backward_kernel": (1, 10, 0),
    "one_pass_kernel": (2, 14, 2),
    "scale_kernel": (1, 1, 0),
}


def test_accesses_to_logits_are_16_bytes_wide(report):
    """Of a row only what the label has is accessed in less, and the edges of a peeled row.

    A peeled row's edge blocks take one narrow access for each of a thread's 8 columns; its body and
    every aligned row take 16 bytes at a time.
    """
    kernels, _ = report
    element = {"bfloat16": 2, "float16": 2, "float32": 4}
    for k in row_kernels(kernels):
        looks, per_token_loads, per_token_stores = LOOKS[k["kernel"]]
        size = element[k["dtype"]]
        edges = 0 if k["vocabulary"] == 151936 else 8
        # A compiler may unroll the walk once.
        narrow = 2 * looks * edges + (k["kernel"] in ("logps_forward_kernel", "one_pass_kernel"))
        if size == 4:
            narrow += per_token_loads
        assert k["loads"].count(size) <= narrow, name(k)
        assert k["loads"].count(16) >= looks, name(k)
        if k["kernel"] == "logps_forward_kernel":
            continue
        # The gradient, the label's once more, and the zeros of a row of weight zero, which the
        # compiler unrolls.
        narrow = 4 * edges + (k["kernel"] != "scale_kernel")
        narrow += per_token_stores if size == 4 else 0
        assert k["stores"].count(size) <= narrow, name(k)
        assert k["stores"].count(16) >= 1, name(k)
