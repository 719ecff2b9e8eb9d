"""The demo runs from end to end, in little: it writes its table and its plot, and λ moves."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("loss", ["r2vpo", "ppo-clip"])
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


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="TRL is installed for 3.11 alone")
def test_train_trl():
    run = subprocess.run(
        [sys.executable, "examples/train_trl.py", "--steps", "2"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("step"))
    assert "λ" in line and "nan" not in line
