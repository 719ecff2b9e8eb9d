"""`python -m r2vpo_kernels`: what it prints, and what it finds wrong."""

import os
import subprocess
import sys

import torch

from r2vpo_kernels.__main__ import problems

ONE = {"/torch/lib/libgomp.so.1"}


def test_it_prints_backends_and_no_problem():
    run = subprocess.run(
        [sys.executable, "-m", "r2vpo_kernels"], capture_output=True, text=True, check=True
    )
    assert f"torch {torch.__version__}" in run.stdout
    assert "backends for cpu tensors (auto: cpp)" in run.stdout
    assert "PROBLEM" not in run.stdout


def test_a_torch_that_is_too_old(tmp_path):
    (problem,) = problems("2.10.1+cu128", ONE, tmp_path)
    assert problem == "torch 2.10.1+cu128 is too old: pip install 'torch>=2.11'"
    for good in ("2.11.0", "2.14.1+cpu", "3.0.0a0+git1234", torch.__version__):
        assert problems(good, ONE, tmp_path) == []


def test_two_openmp_runtimes(tmp_path):
    (problem,) = problems("2.13.0", ONE | {"/usr/lib/libomp.so"}, tmp_path)
    assert problem.startswith("2 OpenMP runtimes")
    assert "(/torch/lib/libgomp.so.1, /usr/lib/libomp.so)" in problem


def test_a_build_older_than_its_sources(tmp_path):
    package, source = tmp_path / "r2vpo_kernels", tmp_path / "csrc" / "cpu" / "rows.cpp"
    built = package / "backends" / "_cpp.cpython-311-x86_64-linux-gnu.so"
    for file in (source, built):
        file.parent.mkdir(parents=True)
        file.write_text("")
    (package / "backends" / "build_report.json").write_text("")
    os.utime(source, (1000, 1000))
    os.utime(built, (2000, 2000))
    assert problems("2.13.0", ONE, package) == []
    os.utime(source, (3000, 3000))
    (problem,) = problems("2.13.0", ONE, package)
    assert problem == "the C++ kernels are older than csrc/cpu/rows.cpp: pip install --editable ."
    built.unlink()
    assert problems("2.13.0", ONE, package) == []


def test_sources_that_were_imported_unbuilt(tmp_path):
    """As in a clone after `pip install .`."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "token.h").write_text("")
    (problem,) = problems("2.13.0", ONE, tmp_path / "r2vpo_kernels")
    assert problem.startswith(f"this is the source folder {tmp_path}, in which nothing is built")
