"""Compilations for GPUs that are not there, in the background of the other tests."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Target, and shared memory that a program may have there (bytes).
TARGETS = {
    "sm_80": (("cuda", "80", "32"), 166912),
    "sm_90": (("cuda", "90", "32"), 232448),
    "sm_100": (("cuda", "100", "32"), 232448),
    "gfx942": (("hip", "gfx942", "64"), 65536),
}
# The kinds of objective that `one_pass` and `finish` are compiled for, besides the default.
OBJECTIVES = {
    "clip": {"policy_loss": "clip", "kl": None, "kl_unbiased": False},
    "cispo": {"policy_loss": "cispo", "kl": None, "kl_unbiased": False},
    "unbiased": {"policy_loss": "ratio", "kl": "k3", "kl_unbiased": True},
}
REPORTS = {}
_compilations = {}


def start_compiling(targets):
    """One target after another in the background, while other tests run."""
    pool = ThreadPoolExecutor(max_workers=1)
    for target in targets:
        arguments, _ = TARGETS[target]
        _compilations[target] = pool.submit(compile_for, arguments)


def compile_for(arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = Path(__file__).parents[1]
    environment["PYTHONPATH"] = f"{tests.parent}:{tests}"
    with tempfile.TemporaryDirectory() as cache:
        return subprocess.run(
            [sys.executable, "-m", "support.aot_compile", *arguments],
            env=environment | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True,
        )  # fmt: skip


def compilation(target):
    return _compilations[target].result()


def name(kernel):
    if "variant" in kernel:
        units = " units of one" if kernel["units_of_one"] else ""
        return f"{kernel['kernel']} {kernel['variant']}{units}"
    if "everything" in kernel:
        return f"{kernel['kernel']} compact{' everything' if kernel['everything'] else ''}"
    peeled = "" if kernel["vocabulary"] == 151936 else " peeled"
    sampled = " sampled" if kernel["sampled"] else ""
    entropy = " entropy" if kernel["entropy"] else ""
    objective = f" {kernel['objective']}" if "objective" in kernel else ""
    return f"{kernel['kernel']} {kernel['dtype']}{entropy}{sampled}{objective}{peeled}"
