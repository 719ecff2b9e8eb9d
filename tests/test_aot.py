"""The gate without a GPU: what is launched, compiled ahead of time for real targets."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Target, and shared memory that a program may have there (bytes).
TARGETS = {
    "sm_80": (("cuda", "80", "32"), 166912),
    "sm_90": (("cuda", "90", "32"), 232448),
    "sm_100": (("cuda", "100", "32"), 232448),
    "gfx942": (("hip", "gfx942", "64"), 65536),
}
REPORTS = {}
_compilations = {}


def start_compiling():
    """All targets, one after another in the background, while other tests run."""
    pool = ThreadPoolExecutor(max_workers=1)
    for target, (arguments, _) in TARGETS.items():
        _compilations[target] = pool.submit(compile_for, arguments)


def compile_for(arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = str(here.parent)
    with tempfile.TemporaryDirectory() as cache:
        return subprocess.run(
            [sys.executable, str(here / "aot_compile.py"), *arguments],
            env=environment | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module", params=TARGETS)
def report(request):
    run = _compilations[request.param].result()
    assert run.returncode == 0, run.stderr[-4000:]
    REPORTS[request.param] = json.loads(run.stdout)
    return REPORTS[request.param], TARGETS[request.param][1]


def name(kernel):
    peeled = "" if kernel["vocabulary"] == 151936 else " peeled"
    return f"{kernel['kernel']} {kernel['dtype']}{' entropy' if kernel['entropy'] else ''}{peeled}"


def test_every_kernel_was_compiled_once(report):
    kernels, _ = report
    assert len({k["kernel"] for k in kernels}) == 4
    # Two alignments, with entropy or without; float16 has no one-pass and nothing to scale.
    assert len(kernels) == 2 * 2 * (4 + 4 + 2)
    assert all(k["recompiled"] == 0 for k in kernels), "a size or a stride was specialised on"


def test_no_register_spills(report):
    kernels, _ = report
    assert {name(k): k["spills"] for k in kernels if k["spills"]} == {}


def test_shared_memory_and_threads_are_within_the_limits(report):
    kernels, limit = report
    assert {name(k): k["shared"] for k in kernels if k["shared"] > limit} == {}
    assert {name(k): k["threads"] for k in kernels if k["threads"] > 1024} == {}


def test_no_maximum_drops_a_nan(report):
    kernels, _ = report
    assert {name(k): k["loses_nan"] for k in kernels if k["loses_nan"]} == {}


def test_the_label_is_read_before_a_barrier(report):
    """In place its logit is overwritten after: without one between, by a thread that is ahead."""
    kernels, _ = report
    for k in kernels:
        if name(k) in ("one_pass_kernel bfloat16", "one_pass_kernel bfloat16 entropy"):
            assert k["label_first"], name(k)


# How often a kernel looks at a row, and how many numbers per token it may load and store.
LOOKS = {
    "logps_forward_kernel": (1, 3, 4),
    "logps_backward_kernel": (1, 7, 0),
    "one_pass_kernel": (2, 11, 2),
    "scale_kernel": (1, 1, 0),
}


def test_accesses_to_logits_are_16_bytes_wide(report):
    """Of a row only the label's logit is read in less, and the edges of a row that is peeled.

    A peeled row's edge blocks take one narrow access for each of a thread's 8 columns; its body and
    every aligned row take 16 bytes at a time.
    """
    kernels, _ = report
    element = {"bfloat16": 2, "float16": 2, "float32": 4}
    for k in kernels:
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
        # The gradient, and the zeros of a row of weight zero, which the compiler unrolls.
        narrow = 4 * edges + (per_token_stores if size == 4 else 0)
        assert k["stores"].count(size) <= narrow, name(k)
        assert k["stores"].count(16) >= 1, name(k)
