"""The demo runs from end to end, in little: it writes its table and its plot, and λ moves."""

import csv
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


OTHERS = [pytest.param(loss, marks=pytest.mark.slow) for loss in ("ppo-clip", "cispo")]


@pytest.mark.parametrize("loss", ["r2vpo", *OTHERS])
def test_train_tiny(loss, tmp_path):
    command = [sys.executable, "examples/train_tiny.py", "--loss", loss, "--steps", "2"]
    run = subprocess.run(
        [*command, "--warm-up", "0.0", "--out", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "after 2 batches of RL" in run.stdout
    with open(tmp_path / f"train_tiny_{loss}_seed0.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    # Several optimizer steps per batch: the ratio has left 1.
    assert all(float(row["ratio_var"]) > 0 for row in rows)
    assert (rows[0]["lambda"] != rows[1]["lambda"]) == (loss == "r2vpo")
    assert (tmp_path / f"train_tiny_{loss}.png").stat().st_size > 10_000


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("train_tiny")


@pytest.mark.slow
def test_train_tiny_top_p(demo, monkeypatch, tmp_path):
    """Without a sampling mask the ratio starts at what top-p kept; with one it starts at 1."""

    def numbers(*options, loss="r2vpo"):
        # Little is learned, so that half the sets have one word at such a top-p. λ stays, so that
        # what the target is of changes nothing else.
        command = ["train_tiny", "--steps", "1", "--warm-up", "0.0", "--dual-lr", "0"]
        command += ["--top-p", "0.2", "--loss", loss, "--out", str(tmp_path)]
        command += ["--threads", str(torch.get_num_threads())]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        demo.main()
        with open(tmp_path / f"train_tiny_{loss}_seed0.csv") as file:
            (row,) = csv.DictReader(file)
        return {name: float(value) for name, value in row.items()}

    full, kept = numbers(), numbers("--sampling-mask")
    clipped = numbers("--sampling-mask", loss="ppo-clip")
    # The same forward in other batches: some hundred float32 roundings of 2^-24 each.
    for row in (kept, clipped):
        assert row["fresh_mean"] == pytest.approx(1, abs=1e-5) and row["fresh_var"] < 1e-10
    # The ratio is the probability of what was kept: at least top-p.
    assert 0.2 < full["fresh_mean"] < 0.5 and full["fresh_var"] > 1e-4
    assert 0 < kept["single"] == full["single"] < 1

    choices = numbers("--sampling-mask", "--target-of", "choices")
    expected = kept["ratio_var"] / (1 - kept["single"])
    assert choices["ratio_var"] == pytest.approx(expected, rel=1e-5)


def test_nucleus(demo):
    """The kept words reach top-p, and without the least probable of them they would not."""
    p = torch.randn(100, 11, generator=torch.Generator().manual_seed(0)).softmax(-1)
    kept = demo.nucleus(p, 0.7)
    mass, least = (p * kept).sum(-1), p.where(kept, math.inf).amin(-1)
    assert (mass >= 0.7).all() and (mass - least < 0.7).all()
    assert (p.where(~kept, 0).amax(-1) <= least).all()
    assert demo.nucleus(p, 1.0).all()


@pytest.mark.slow
def test_dpo_penalty():
    """The penalty holds the ratio's second moment down."""
    command = [sys.executable, "examples/dpo_penalty.py", "--steps", "8", "--pairs", "100"]
    run = subprocess.run(
        [*command, "--warm-up", "0.0", "--coefs", "0", "10"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    free, held = (float(line.split()[-1]) for line in run.stdout.splitlines()[-2:])
    assert 0 < held < free


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="TRL is installed for 3.11 alone")
def test_train_trl():
    run = subprocess.run(
        [sys.executable, "examples/train_trl.py", "--steps", "2"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("step"))
    assert "λ" in line and "nan" not in line
