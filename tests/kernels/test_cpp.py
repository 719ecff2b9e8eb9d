"""What is the C++ backend's own: instruction sets, its exponential, threads, its build."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from support import wheel
from support.harness import check_case
from support.strategies import DTYPES, cases, uneven_rows
from support.tolerance import U

from r2vpo_kernels import ops, r2vpo_loss, token_logps
from r2vpo_kernels.backends import cpp

NAN = torch.tensor([-1], dtype=torch.int32).view(torch.float32)[0]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=list(cpp.INSTRUCTION_SETS))
def instruction_set(request):
    best, cpp.INSTRUCTION_SET = cpp.INSTRUCTION_SET, request.param
    yield request.param
    cpp.INSTRUCTION_SET = best


@given(cases())
def test_each_instruction_set_is_within_the_budget(instruction_set, case):
    logits, labels, keywords = case.tensors(torch.device("cpu"))
    check_case(logits, labels, keywords, "cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1023, 1024, 1025, 2048 + 17, 5000])
def test_rows_of_several_blocks(instruction_set, dtype, vocabulary):
    """The maximum rises from block to block, falls, and is -inf in whole blocks."""
    logits, labels, keywords = uneven_rows(vocabulary)
    check_case(logits.to(dtype), labels, keywords, "cpp")


def test_the_exponential_is_within_its_stated_error(instruction_set):
    """3.3U, at every 97th float from -126 to 1; exactly 1 at 0; 0 below -126.5; NaN for NaN."""
    tiny, lowest, one = (torch.tensor(x).view(torch.int32).item() for x in (2.0**-40, 126.0, 1.0))
    sign = torch.tensor(-(2**31), dtype=torch.int32)
    below = torch.arange(tiny, lowest, 97, dtype=torch.int32) | sign
    above = torch.arange(tiny, one, 97, dtype=torch.int32)
    x = torch.cat([below, above]).view(torch.float32)
    y = torch.empty_like(x)
    exp2 = cpp.INSTRUCTION_SETS[instruction_set].exp2
    exp2(x.data_ptr(), y.data_ptr(), x.numel())
    truth = torch.exp2(x.double())
    assert ((y.double() - truth).abs() / truth).max() <= 3.3 * U
    special = torch.tensor([0.0, -0.0, -127.0, -126.6, torch.nan])
    y = torch.empty_like(special)
    exp2(special.data_ptr(), y.data_ptr(), 5)
    assert y[:4].tolist() == [1.0, 1.0, 0.0, 0.0] and y[4].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# 1.5 brings ties, and the last is a NaN of which all bits are set.
@pytest.mark.parametrize("factor", [2.0, 1.5, 1 / 3, 1e-3, NAN])
def test_every_half_precision_number_is_read_and_rounded_as_torch_does(
    instruction_set, dtype, factor
):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    scaled = every.clone().view(1, 64, 1024)
    ops.scale_(scaled, torch.as_tensor(factor), "cpp")
    exact = every.float() * factor
    ours, expected = scaled.view(-1), exact.to(dtype)
    # What is not a normal float32 number may become 0, as on a GPU.
    flushed = (exact.abs() < 2.0**-126) & (ours == 0)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ((ours == expected) | flushed | expected.isnan()).all()


@pytest.mark.parametrize("keywords", [{}, {"center": "group"}, {"entropy_coef": 0.1}])
def test_the_number_of_threads_changes_no_bit(instruction_set, keywords):
    torch.manual_seed(0)
    logits = torch.randn(7, 11, 3000).bfloat16()
    labels = torch.randint(0, 3000, (7, 11))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            out = r2vpo_loss(leaf, labels, None, torch.ones(7), backend="cpp", **keywords)
            out.loss.backward()
            results.append((out.loss.detach(), out.logps, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_row_does_not_depend_on_where_it_lies(instruction_set):
    """Unlike the kernels that peel rows, for every alignment."""
    torch.manual_seed(0)
    row = torch.randn(1, 1, 1500).bfloat16()
    label = torch.tensor([[700]])
    first = None
    for offset in range(9):
        memory = torch.zeros(1600, dtype=torch.bfloat16)
        leaf = memory[offset : offset + 1500].view(1, 1, 1500).copy_(row).requires_grad_()
        out = r2vpo_loss(leaf, label, None, torch.ones(1), backend="cpp")
        out.loss.backward()
        first = first or (out.logps, leaf.grad)
        assert torch.equal(out.logps, first[0]) and torch.equal(leaf.grad, first[1])


def test_subnormal_logits_are_read_whatever_the_callers_setting(instruction_set):
    """torch sets its flag on the calling thread alone: rows must not depend on who takes them."""
    logits = (torch.rand(1, 64, 2000) * 6e-5).half()
    labels = torch.randint(0, 2000, (1, 64))
    expected = token_logps(logits, labels, temperature=1e-4, backend="cpp")
    torch.set_flush_denormal(True)
    try:
        again = token_logps(logits, labels, temperature=1e-4, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("columns", [1024, 4096, 131072])
def test_equal_logits_below_one_are_within_the_budget(instruction_set, columns):
    """Roundings that all have one sign."""
    logits = torch.full((1, 1, columns), -0.3)
    logits[..., 5] = 0.4
    labels = torch.tensor([[7]])
    advantages = torch.ones(1)
    keywords = {"old_logps": None, "advantages": advantages, "entropy_coef": 0.1}
    check_case(logits, labels, keywords, "cpp")


@pytest.mark.parametrize("temperature", [1e36, 1e38])
def test_minus_infinity_has_no_share_at_any_temperature(instruction_set, temperature):
    """Past 3.8e36 no finite distance is 0 to the exponential."""
    logits = torch.randn(1, 1, 100).index_fill(2, torch.arange(30), -torch.inf).requires_grad_()
    label = torch.tensor([[50]])
    logps = token_logps(logits, label, temperature=temperature, backend="cpp")
    (logps * temperature).sum().backward()
    torch.testing.assert_close(logps.exp(), torch.full((1, 1), 1 / 70))
    assert not logits.grad[..., :30].any()
    torch.testing.assert_close(logits.grad[..., 51:], torch.full((1, 1, 49), -1 / 70))


def test_the_callers_floating_point_state_survives():
    logits = torch.randn(1, 3, 50, requires_grad=True)
    r2vpo_loss(logits, torch.zeros(1, 3).long(), None, torch.ones(1), backend="cpp").loss.backward()
    assert (torch.tensor(1e-40) * 0.5).item() > 0


@pytest.mark.slow
def test_the_installation_says_what_it_found():
    run = subprocess.run(
        [sys.executable, "-m", "r2vpo_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f"torch {torch.__version__}" in run.stdout
    assert "cpp     available" in run.stdout and "auto: cpp" in run.stdout


def innermost_loops(path: str) -> list[list[str]]:
    """The instructions of each, as objdump prints them."""
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops = []
    for function in text.split("\n\n"):
        instructions = re.findall(r"^ *([0-9a-f]+):\t(.+)$", function, re.MULTILINE)
        place = {address: i for i, (address, _) in enumerate(instructions)}
        last = -1
        for i, (_, instruction) in enumerate(instructions):
            jump = re.match(r"j\w+ +([0-9a-f]+)", instruction)
            begin = place.get(jump[1], i) if jump else i
            # The loop around one that has just ended begins before it.
            if last < begin < i:
                loops.append([instruction for _, instruction in instructions[begin : i + 1]])
            if begin < i:
                last = i
    return loops


@pytest.mark.skipif(
    "avx2" not in cpp.INSTRUCTION_SETS or not shutil.which("objdump"),
    reason="needs objdump, and code for AVX2",
)
def test_no_loop_copies_vectors_by_parts():
    """A wide load of what two narrow stores wrote waits for the first-level cache.

    GCC copies structs larger than a vector so, through the stack: float32 took four times as long.
    """
    loops = [loop for loop in innermost_loops(cpp._cpp.__file__) if "mm" in "".join(loop)]
    # Either way between 16 bytes of memory and a register.
    by_parts = re.compile(r"vmov(dq|up|ap)(?=.*%xmm).*\(%r")
    for register in ("%ymm", "%zmm"):
        wide = [loop for loop in loops if register in "".join(loop)]
        assert len(wide) > 20, "no loops were found"
        for loop in wide:
            assert not any(map(by_parts.search, loop)), "\n".join(loop)


def build(folder: Path, root: Path = ROOT, **environment: str) -> dict[str, str]:
    """What setup.py reports of a build of its own, without the CUDA kernels unless asked for."""
    environment = {"R2VPO_KERNELS_CUDA": "0"} | environment
    command = [
        sys.executable, "setup.py", "--quiet", "build_ext",
        f"--build-lib={folder}/lib", f"--build-temp={folder}/temp",
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = folder / "lib" / "r2vpo_kernels" / "backends" / "build_report.json"
    return json.loads(report.read_text())


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    assert "no C++ compiler was found" in build(tmp_path, CXX="no-such-compiler")["cpp"]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, words",
    [
        ({"CXXFLAGS": "-include no_such_header.h"}, "no_such_header.h"),
        ({"CXXFLAGS": "-fsyntax-only"}, "g++"),
        ({"CXX": "true"}, "true failed"),
    ],
)
def test_a_compiler_that_fails_is_reported(tmp_path, environment, words):
    report = build(tmp_path, **environment)["cpp"]
    assert report.startswith("not built:") and words in report
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_an_empty_name_of_a_compiler_and_a_path_with_a_space_compile(tmp_path):
    folder = tmp_path / "a folder: $1"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    report = build(folder, folder, CXX="", CXXFLAGS="-O0")
    assert report["cpp"].startswith("built by")
    assert list(folder.rglob("_cpp*.so"))


@pytest.mark.slow
def test_a_compiler_without_openmp_gives_one_thread(tmp_path):
    """As Apple's: the same source."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1;; *) exec g++ "$@";; esac\n'
    )
    compiler.chmod(0o755)
    report = build(tmp_path, CXX=str(compiler), CXXFLAGS="-O0")
    assert " without OpenMP, so with one thread for " in report["cpp"]
    package = tmp_path / "r2vpo_kernels"
    shutil.copytree(ROOT / "r2vpo_kernels", package, ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(tmp_path / "lib" / "r2vpo_kernels", package, dirs_exist_ok=True)
    run = subprocess.run(
        [sys.executable, wheel.__file__, "eager"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
