"""The benchmarks' own checks, on shapes that take no time; nothing here is timed."""

import csv
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r2vpo_kernels import r2vpo_loss
from r2vpo_kernels.backends import registry

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import contenders  # noqa: E402
import gpu  # noqa: E402
import linear  # noqa: E402
import loss  # noqa: E402
import measure  # noqa: E402
import overhead  # noqa: E402
import sparse_head  # noqa: E402
from from_tests import count_launches  # noqa: E402
from routes import ROUTES, StandIn, draw  # noqa: E402

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_clip_and_cispo_run_beside_r2vpo_on_the_same_kernels(tmp_path, monkeypatch):
    run_here = [c for c in contenders.contenders() if c.name.startswith(("cpp", "eager"))]
    monkeypatch.setattr(loss, "contenders", lambda: run_here)
    arguments = ["--n", "8", "--v", "515", "--rounds", "1", "--device", "cpu"]
    arguments += ["--out", str(tmp_path), "--policy-loss", "ratio", "clip", "cispo"]
    assert loss.main(arguments) == 0
    rows = rows_of(tmp_path / "loss.csv")
    with_gradient = [*OURS[:3], "eager"]
    others = {f"{name}, {loss}" for name in with_gradient for loss in ("clip", "CISPO")}
    assert rows.keys() == {"copy", "clone", *OURS, "eager", "eager log-probs", *others}
    assert all(row["status"] == "timed" for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("policy_loss", ["clip", "cispo"])
@pytest.mark.parametrize("name", ["cpp one-pass", "eager"])
def test_without_its_clip_a_loss_is_not_timed(tmp_path, monkeypatch, name, policy_loss):
    (r2vpo,) = (c for c in contenders.contenders() if c.name == name)
    right = r2vpo.with_policy_loss(policy_loss)

    def make():
        return lambda logits, task: r2vpo.make()(
            logits, dataclasses.replace(task, policy_loss="ratio")
        )

    wrong = [dataclasses.replace(right, make=make)]
    monkeypatch.setattr(loss, "contenders", lambda: wrong)
    _, rows = run(tmp_path, right.name)
    assert rows[right.name]["status"].startswith("wrong: ") and not rows[right.name]["both_ms"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_float32_logits_of_halves_are_as_exact_as_their_sums(tmp_path):
    names = ["cpp linear, float32 logits", "cpp linear log-probs, float32 logits"]
    code, rows = run_linear(tmp_path / "halves", "bfloat16", *names)
    assert code == 0
    # Eager torch rounds logits at 2⁻⁹; these are sums of 16 products in float32.
    assert float(rows[names[1]]["rms_over_eager"]) < 16 * 2.0**-24 / 2.0**-9
    code, rows = run_linear(tmp_path / "float32", "float32", *names)
    assert code == 0
    assert all(rows[name]["status"].startswith("no: its logits are float32") for name in names)


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


SPARSE = ["cpp sparse head", "cpp dense route"]


def run_sparse_head(folder, *names, arguments=()):
    arguments = ["--h", "16", "--n", "64", *arguments]
    return run(folder, *names, benchmark=sparse_head, arguments=arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_contenders_under_a_sampling_mask_are_right_and_recorded(tmp_path, dtype):
    names = [*SPARSE, "eager masking", "gather and index_add", "triton sparse head"]
    code, rows = run_sparse_head(tmp_path, *names, arguments=["--dtype", dtype, "--sizes", "40"])
    assert code == 0
    assert rows.keys() == {"three products", *names}
    for name, row in rows.items():
        on_gpu = name == "triton sparse head"
        assert row["status"].startswith("no: " if on_gpu else "timed"), row
        assert row["pairs"] == "2560"
    # The yardstick, found a few tokens at a time among kept words alone, is what eager torch does:
    # in float32 but for the order of its sums.
    most = {"bfloat16": 1.01, "float32": linear.OURS[torch.float32]}[dtype]
    assert 1 / most <= float(rows["eager masking"]["rms_over_eager"]) <= most
    row = rows["cpp sparse head"]
    assert float(row["limit_used"]) <= 1
    assert row["over_products"] and row["over_dense"] and row["commit"]
    assert all(f"{kernel} " in row["kernels"] for kernel in sparse_head.KERNELS)
    assert (tmp_path / "sparse_head.png").stat().st_size > 0


@pytest.mark.parametrize("fault", [*WRONG, "a gradient of words in no set"])
def test_a_contender_under_a_sampling_mask_that_is_wrong_is_not_timed(tmp_path, monkeypatch, fault):
    right = sparse_head.ours("cpp")[0]

    def make():
        function = right.make()

        def wrong(hidden, weight, task):
            value = function(hidden, weight, task)
            # Sums of rows beside which no error in the others would show.
            leak = 1e-9 * weight.sum()
            return WRONG[fault](value) if fault in WRONG else value + leak - leak.detach()

        return wrong

    wrong = [dataclasses.replace(right, make=make)]
    monkeypatch.setattr(sparse_head, "contenders", lambda: wrong)
    arguments = ["--dtype", "float32", "--sizes", "2"]
    code, rows = run_sparse_head(tmp_path, right.name, arguments=arguments)
    assert code == 1
    assert rows[right.name]["status"].startswith("wrong: ") and not rows[right.name]["both_ms"]


@pytest.mark.slow
def test_both_routes_are_taken_whatever_the_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.load("cpp"), "head_logits", None)
    for size in "4", "400":
        code, rows = run_sparse_head(tmp_path, *SPARSE, arguments=["--sizes", size])
        assert code == 1
        assert rows["cpp sparse head"]["status"].startswith("failed: ")
        assert rows["cpp dense route"]["status"] == "timed"


def test_sets_are_drawn_as_in_rollouts():
    sizes = sparse_head.draw_sets("drawn", 1024, 151936, torch.device("cpu")).offsets.diff()
    quantiles = sizes.double().quantile(torch.tensor([0.47, 0.5, 0.99], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([1, 2, 82], abs=1)
    assert sizes.double().mean().item() == pytest.approx(8, abs=0.1)
    # SamplingMask raises where a set has a word twice.
    everything = sparse_head.draw_sets("40", 3, 40, torch.device("cpu"))
    assert everything.token_ids.view(3, 40).equal(torch.arange(40).int().expand(3, 40))
    assert sparse_head.draw_sets("39", 3, 40, torch.device("cpu")).token_ids.max() < 40


def test_routes_cross_where_their_times_are_the_same():
    assert sparse_head.crossing([(400, 4.0), (100, 0.25), (50, 0.1)]) == pytest.approx(200)
    assert sparse_head.crossing([(50, 0.1), (100, 0.25)]) is None


def test_in_place_allocates_nothing_as_large_as_the_logits():
    logits = torch.randn(64, 151936).bfloat16()
    labels = torch.randint(0, 151936, (64,))

    def step():
        leaf = torch.zeros((), requires_grad=True)
        seen = StandIn.apply(leaf, [logits], [])
        r2vpo_loss(
            seen, labels, None, torch.ones(64), inplace=True, backend="cpp"
        ).loss.backward()  # fmt: skip

    step()
    assert measure.peak_memory(step, logits.device) < logits.nbytes / 10


def test_operators_count_where_a_gpu_would_run_something():
    x = torch.randn(4, 6)

    def idle():
        torch.empty_like(x)
        x.new_empty(3)
        x.view(-1)[2:].detach().unsqueeze(0).expand(2, -1).t().unbind()
        x.reshape(6, 4).contiguous()
        x[:0] * 2

    assert not count_launches(idle)
    counts = count_launches(lambda: (x.t().contiguous(), x.add_(1), x.to(torch.float64)))
    assert counts == {"aten.clone": 1, "aten.add_": 1, "aten._to_copy": 1}


def test_kernels_and_what_an_op_hides_count_once():
    inputs = draw(2, 4, 40, torch.float32, "cpu")

    def counts(name):
        return count_launches(lambda: ROUTES[name].step(inputs, "cpp"))

    one_pass = dict.fromkeys(("prepare", "one_pass", "finish", "scale", "aten.ones_like"), 1)
    assert counts("one pass") == one_pass
    general = "prepare", "logps_forward", "means", "finish", "logps_backward", "aten.ones_like"
    assert counts("group") == dict.fromkeys(general, 1)
    assert counts("linear")["aten.addmm"] == 3
    assert counts("linear, group")["aten.addmm"] == 4


def run_overhead(folder, *names):
    threads = str(torch.get_num_threads())
    arguments = ["--rounds", "2", "--backend", "cpp", "--device", "cpu", "--threads", threads]
    code = overhead.main([*arguments, "--out", str(folder), "--contenders", *names])
    return code, rows_of(folder / "overhead.csv")


def test_no_route_launches_more_than_its_budget(tmp_path):
    code, rows = run_overhead(tmp_path, *ROUTES)
    assert code == 0
    assert rows.keys() > ROUTES.keys() and "five lines from hidden states" in rows
    for name, route in ROUTES.items():
        row = rows[name]
        assert row["host_us"] and row["over_eager"]
        if route.most_launches is not None:
            assert int(row["launches"]) <= route.most_launches == int(row["most_launches"])
    logits = 4 * 256 * 64 * 2
    assert int(rows["one pass"]["logits_bytes"]) == 2 * logits - 64 * 2  # one row is masked


def test_a_route_over_its_budget_is_told(tmp_path, monkeypatch):
    route = dataclasses.replace(ROUTES["one pass"], most_launches=4)
    monkeypatch.setitem(ROUTES, "one pass", route)
    assert run_overhead(tmp_path, "one pass")[0] == 1


def test_a_step_that_is_stopped_keeps_what_it_printed(tmp_path):
    line = json.dumps({"check": "first", "ok": True})
    script = f"""
import time
try:
    print({line!r}); print({line[:12]!r}); time.sleep(60)
finally:
    print("the end"); time.sleep(60)
"""
    quick = "print(1)"
    commands = {name: [sys.executable, "-c", x] for name, x in (("slow", script), ("quick", quick))}
    started = time.monotonic()
    done = gpu.run_all(commands, tmp_path, 3, at_once=2)
    assert time.monotonic() - started < 30
    assert done["slow"].code is None and done["quick"].code == 0
    assert gpu.printed_checks(done["slow"].output) == {"first": {"ok": True}}
    assert (tmp_path / "slow.log").read_text().startswith(line)
    assert done["slow"].output.endswith("the end\n")


def test_parts_add_up_where_sources_and_device_are_the_same(tmp_path):
    def step(name):
        return gpu.Step(name, lambda limit, folder: {"ok": True, "note": ""}, 9, 1)

    def parts_after(part, device):
        environment = {"sources": "s", "device": device, "torch": "t", "triton": ""}
        gpu.run_part([step("build"), step(part)], 9, tmp_path, environment, {})
        return json.loads((tmp_path / "gpu.json").read_text())["parts"].keys()

    assert parts_after("a", "A") == {"build", "a"}
    assert parts_after("b", "A") == {"build", "a", "b"}
    assert parts_after("c", "B") == {"build", "c"}


@pytest.mark.slow
def test_without_a_gpu_the_gpu_run_checks_its_imports(device):
    if device.type == "cuda":
        pytest.skip("there is one")
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No GPU here" in run.stdout and "test_parity.py" in run.stdout
