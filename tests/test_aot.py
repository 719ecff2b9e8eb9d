"""The gate without a GPU: what is launched, compiled ahead of time for real targets."""

import json
import os
import subprocess
import sys
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


@pytest.fixture(scope="module", params=TARGETS)
def report(request, tmp_path_factory):
    arguments, shared_limit = TARGETS[request.param]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    here = Path(__file__).parent
    environment["PYTHONPATH"] = str(here.parent)
    run = subprocess.run(
        [sys.executable, str(here / "aot_compile.py"), *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = json.loads(run.stdout)
    REPORTS[request.param] = kernels
    return kernels, shared_limit


def name(kernel):
    peeled = "" if kernel["vocabulary"] == 151936 else " peeled"
    return f"{kernel['kernel']} {kernel['dtype']}{' entropy' if kernel['entropy'] else ''}{peeled}"


def test_every_kernel_was_compiled_once(report):
    kernels, _ = report
    assert len({k["kernel"] for k in kernels}) == 4
    # Two dtypes, two alignments; entropy or not for all but the scaling.
    assert len(kernels) == 2 * 2 * 2 * 4
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


def test_accesses_to_logits_are_16_bytes_wide(report):
    """Per token numbers are narrow; of the row itself only the label's logit and peeled edges are.

    A program that walked its row in narrow accesses would have at least 8 of them per block.
    """
    kernels, _ = report
    element = {"bfloat16": 2, "float32": 4}
    for k in kernels:
        looks = {"logps_forward_kernel": 1, "one_pass_kernel": 2}.get(k["kernel"], 1)
        wide_loads, wide_stores = k["loads"].count(16), k["stores"].count(16)
        assert wide_loads >= looks, name(k)
        assert wide_stores >= (k["kernel"] != "logps_forward_kernel"), name(k)
        if k["vocabulary"] == 151936 and k["dtype"] == "bfloat16":
            # Aligned: nothing is 2 bytes wide but the load of the label's logit.
            narrow = [w for w in k["loads"] if w == element[k["dtype"]]]
            assert len(narrow) <= (k["kernel"] in ("logps_forward_kernel", "one_pass_kernel")), (
                name(k)
            )
            assert all(w != 2 for w in k["stores"]), name(k)
        if k["vocabulary"] == 151936 and k["dtype"] == "float32":
            # What is per token is 4 bytes wide too: at most one load each.
            per_token = {
                "logps_forward_kernel": 2,
                "logps_backward_kernel": 6,
                "one_pass_kernel": 11,
            }
            assert k["loads"].count(4) <= per_token.get(k["kernel"], 1), name(k)
            assert k["stores"].count(4) <= 3, name(k)


def test_the_gate_has_looked_at_every_target(report):
    # Also the place where a run's figures can be read: pytest -s.
    for target, kernels in REPORTS.items():
        for k in kernels:
            line = f"{k['registers']} registers, {k['spills']} spills, {k['shared']} B shared"
            print(f"{target} {name(k)}: {line}")
    assert REPORTS
