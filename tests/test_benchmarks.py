"""The benchmarks' own checks, on shapes that take no time; nothing here is timed."""

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r2vpo_kernels import r2vpo_loss

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import contenders  # noqa: E402
import linear  # noqa: E402
import loss  # noqa: E402
import measure  # noqa: E402

OURS = ["cpp one-pass", "cpp in place", "cpp general", "cpp log-probs"]


LINEAR = ["cpp linear", "cpp linear, group", "cpp linear log-probs"]


def rows_of(file):
    with file.open(newline="") as lines:
        return {row["contender"]: row for row in csv.DictReader(lines)}


def run(folder, *names, benchmark=loss, arguments=()):
    arguments = ["--n", "8", "--v", "515", "--rounds", "1", "--device", "cpu", *arguments]
    code = benchmark.main([*arguments, "--contenders", *names, "--out", str(folder)])
    return code, rows_of(folder / f"{benchmark.__name__}.csv")


def run_linear(folder, dtype, *names):
    arguments = ["--h", "16", "--dtype", dtype]
    return run(folder, *names, benchmark=linear, arguments=arguments)


def test_every_contender_of_a_cpu_is_right_and_recorded(tmp_path):
    names = [*OURS, "eager", "eager log-probs", "Liger GRPO", "triton one-pass"]
    code, rows = run(tmp_path, *names)
    assert code == 0
    assert rows.keys() == {"copy", "clone", *names}
    for name in names:
        on_gpu = name in ("Liger GRPO", "triton one-pass")
        assert rows[name]["status"].startswith("no: " if on_gpu else "timed"), rows[name]
    assert float(rows["cpp one-pass"]["budget_used"]) <= 1
    logits = 8 * 515 * 2
    assert int(rows["cpp one-pass"]["bytes_forward"]) == 2 * logits
    assert int(rows["cpp general"]["bytes_backward"]) == 2 * logits
    assert rows["eager"]["torch"] and rows["eager"]["commit"]
    assert (tmp_path / "loss.png").stat().st_size > 0


WRONG = {
    "a loss too large": lambda loss: loss * 1.001,
    "no gradient": lambda loss: loss.detach() + 0 * loss,
    "a gradient turned round": lambda loss: 2 * loss.detach() - loss,
    "a gradient too large": lambda loss: 1.02 * loss - 0.02 * loss.detach(),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_contender_that_is_wrong_is_not_timed(tmp_path, monkeypatch, fault):
    right = contenders.ours("cpp")[0]

    def make():
        function = right.make()
        return lambda logits, task: WRONG[fault](function(logits, task))

    wrong = [dataclasses.replace(right, make=make)]
    monkeypatch.setattr(loss, "contenders", lambda: wrong)
    code, rows = run(tmp_path, right.name)
    assert code == 1
    assert rows[right.name]["status"].startswith("wrong: ") and not rows[right.name]["both_ms"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_contenders_are_right_and_recorded(tmp_path, dtype):
    code, rows = run_linear(tmp_path, dtype, *LINEAR, "eager", "CCE", "triton linear")
    assert code == 0
    assert rows.keys() == {"three products", *LINEAR, "eager", "CCE", "triton linear"}
    for name, row in rows.items():
        on_gpu = name in ("CCE", "triton linear")
        assert row["status"].startswith("no: " if on_gpu else "timed"), row
    # The yardstick, found chunk by chunk, is what eager torch does.
    assert float(rows["eager"]["rms_over_eager"]) == pytest.approx(1, abs=0.01)
    assert float(rows["cpp linear"]["limit_used"]) <= 1
    assert rows["eager"]["over_products"] and rows["eager"]["over_ours"]
    assert rows["eager"]["torch"] and rows["eager"]["commit"]
    assert (tmp_path / "linear.png").stat().st_size > 0


@pytest.mark.parametrize("fault", WRONG)
def test_a_linear_contender_that_is_wrong_is_not_timed(tmp_path, monkeypatch, fault):
    right = linear.ours("cpp")[0]

    def make():
        function = right.make()
        return lambda hidden, weight, task: WRONG[fault](function(hidden, weight, task))

    wrong = [dataclasses.replace(right, make=make)]
    monkeypatch.setattr(linear, "contenders", lambda: wrong)
    code, rows = run_linear(tmp_path, "float32", right.name)
    assert code == 1
    assert rows[right.name]["status"].startswith("wrong: ") and not rows[right.name]["both_ms"]


def test_in_place_allocates_nothing_as_large_as_the_logits():
    logits = torch.randn(64, 151936).bfloat16()
    labels = torch.randint(0, 151936, (64,))

    def step():
        leaf = torch.zeros((), requires_grad=True)
        seen = loss._Model.apply(leaf, [logits], [])
        r2vpo_loss(
            seen, labels, None, torch.ones(64), inplace=True, backend="cpp"
        ).loss.backward()  # fmt: skip

    step()
    assert measure.peak_memory(step, logits.device) < logits.nbytes / 10


def test_without_a_gpu_the_gpu_run_checks_its_imports(device):
    if device.type == "cuda":
        pytest.skip("there is one")
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No GPU here" in run.stdout and "imports: tests/test_parity.py" in run.stdout
