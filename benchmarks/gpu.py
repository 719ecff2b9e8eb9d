"""Everything that only a GPU shows, in one command of under 9 minutes without a network.

    python benchmarks/gpu.py [--out results.json]

The parts: building the CUDA kernels, recompilations, host synchronisations and graphs, parity and
laws on the device, the benchmarks from logits and from hidden states, DRAM bytes per logit, memory
and race checks. Each runs in a process of its own with a limit of its own, so that one that fails
or hangs loses nothing else; what the time left does not hold is skipped, and says so. Writes one
JSON; exits with 1 where a check failed.

Without a GPU it checks that all its parts import, and exits with 0.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT), str(HERE)]

# Seconds, all in all: 15 short of nine minutes.
TOTAL = 525.0
TESTS = [f"test_{x}.py" for x in ("parity", "laws", "known_bugs", "ops", "linear")]
TEST_PROCESSES = 8
GRID = {
    "loss": ["--n", "8192", "16384", "--v", "151936", "32000"],
    "linear": ["--n", "16384", "--h", "4096", "--v", "151936"],
}
# A one-pass loss against a copy of the same bytes; the linear route, in several chunks, against
# three products in one; bytes per logit against Eq. 15.
SLOWEST = 1.15
SLOWEST_LINEAR = 1.4
MORE_BYTES = 0.1

# A part's findings: "ok" is None where it could not be checked, and "note" says why.
Findings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    code: int | None  # None: it was stopped at its limit
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-3000:]


def run(command: Sequence[str], limit: float, **variables: str) -> Run:
    """A command in the repository, ended with all that it started when its time is over."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    started = time.monotonic()
    # A file, because a pipe that something left behind holds open would never end.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment | variables, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return Run(code, output.read(), time.monotonic() - started)


def stopped(done: Run) -> Findings:
    return {"ok": False, "note": f"stopped after {done.seconds:.0f} s", "output": done.tail}


def work(name: str, limit: float) -> Findings:
    """One of gpu_work.py that prints what it found."""
    done = run([sys.executable, str(HERE / "gpu_work.py"), name], limit)
    if done.code is None:
        return stopped(done)
    if done.code != 0:
        return {"ok": False, "note": f"exit status {done.code}", "output": done.tail}
    return json.loads(done.output.strip().splitlines()[-1])


def build(limit: float) -> Findings:
    """The extensions, in place, for this machine's Python."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = run(command, limit)
    if done.code is None:
        return stopped(done)
    path = ROOT / "r2vpo_kernels" / "backends" / "build_report.json"
    if done.code != 0 or not path.exists():
        return {"ok": None, "note": f"exit status {done.code}", "output": done.tail}
    report = json.loads(path.read_text())
    cuda = report.get("cuda", "not built: no nvcc")
    built = cuda.startswith("built by")
    return {"ok": built or None, "note": cuda, "report": report}


def missing_for_tests() -> list[str]:
    return [x for x in ("pytest", "hypothesis") if importlib.util.find_spec(x) is None]


def tests(limit: float) -> Findings:
    """Parity, laws, known bugs and ops, as the test suite has them, on the device."""
    if missing_for_tests():
        return {"ok": None, "note": f"not installed: {', '.join(missing_for_tests())}"}
    command = [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}" for name in TESTS)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(TEST_PROCESSES)]
    done = run(command, limit, R2VPO_TEST_DEVICE="cuda", CI="1")
    if done.code is None:
        return stopped(done)
    last = done.output.strip().splitlines()[-1].strip("= ")
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)
    }
    failed = [x for x in done.output.splitlines() if x.startswith(("FAILED", "ERROR"))]
    found: Findings = {"ok": done.code == 0, "counts": counts, "failed": failed, "note": last}
    return found if done.code == 0 else found | {"output": done.tail}


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def grid(name: str, folder: Path, limit: float) -> tuple[Run, list[dict[str, Any]]]:
    """One of the benchmarks at GRID's shapes, and the rows that it wrote."""
    for old in folder.glob(f"{name}.*"):
        old.unlink()
    command = [sys.executable, str(HERE / f"{name}.py"), *GRID[name], "--device", "cuda"]
    done = run([*command, "--out", str(folder)], limit)
    path = folder / f"{name}.csv"
    if not path.exists():
        return done, []
    with path.open(newline="") as file:
        return done, [{k: number(x) for k, x in row.items()} for row in csv.DictReader(file)]


def graded(
    done: Run, rows: list[dict[str, Any]], checks: dict[str, Findings], note: str
) -> Findings:
    """Nothing of ours wrong, and nothing over its limit."""
    if not rows:
        return {"ok": False, "note": "it wrote no results", "output": done.tail}
    found: Findings = {
        "ok": done.code in (0, None) and bool(checks) and all(c["ok"] for c in checks.values()),
        "note": note + (", stopped at its limit" if done.code is None else ""),
        "checks": checks,
        "rows": rows,
    }
    return found if done.code in (0, None) else found | {"output": done.tail}


def from_logits(limit: float, folder: Path) -> Findings:
    """benchmarks/loss.py: one-pass near the speed of a copy."""
    from gpu_work import BACKENDS

    done, rows = grid("loss", folder, limit)
    copies = {(r["n"], r["v"]): r["both_ms"] for r in rows if r["contender"] == "copy"}
    checks = {}
    for row in rows:
        # A copy reads and writes each logit once, as the one-pass route does.
        if row["contender"] in [f"{x} {y}" for x in BACKENDS for y in ("one-pass", "in place")]:
            name = f"{row['contender']} {row['n']:.0f} x {row['v']:.0f}, time over a copy's"
            value = row["both_ms"] / copies[row["n"], row["v"]] if row["both_ms"] else None
            checks[name] = at_most(value, SLOWEST) | {"note": row["status"]}
    return graded(done, rows, checks, f"{len(copies)} shapes")


def from_hidden_states(limit: float, folder: Path) -> Findings:
    """benchmarks/linear.py: near the time of the three products."""
    from gpu_work import BACKENDS

    done, rows = grid("linear", folder, limit)
    checks = {
        f"{row['contender']} {row['n']:.0f} x {row['v']:.0f} x {row['h']:.0f}, time over products'":
        at_most(row["over_products"] or None, SLOWEST_LINEAR) | {"note": row["status"]}
        for row in rows
        if row["contender"] in [f"{x} linear" for x in BACKENDS]
    }  # fmt: skip
    return graded(done, rows, checks, f"{len(checks)} shapes")


def at_most(value: float | None, limit: float) -> Findings:
    return {"value": value, "limit": limit, "ok": value is not None and value <= limit}


def where_cuda_is_faster(results: dict[str, Any]) -> set[tuple[str, Any, int]]:
    """(device, dtype, V) where a run found the CUDA kernels right, and faster than Triton's for
    every number of tokens: what r2vpo_kernels/ops.py may choose them for.
    """
    import torch

    parts = results["parts"]
    if not all(parts.get(name, {}).get("ok") for name in ("tests", "memcheck", "racecheck")):
        return set()
    times: dict[tuple[str, float], dict[tuple[str, float], float]] = {}
    for row in parts.get("grid", {}).get("rows", ()):
        of_cell = times.setdefault((row["dtype"], row["v"]), {})
        if row["status"] == "timed":
            of_cell[row["contender"], row["n"]] = row["both_ms"]
    device = results["environment"]["device"]
    found = set()
    for (dtype, v), of_cell in times.items():
        triton = {n: ms for (name, n), ms in of_cell.items() if name == "triton one-pass"}
        never = float("inf")
        if triton and all(of_cell.get(("cuda one-pass", n), never) < triton[n] for n in triton):
            found.add((device, getattr(torch, dtype), int(v)))
    return found


def traffic(limit: float) -> Findings:
    """DRAM bytes per bfloat16 logit of each launch, by the hardware's own counters."""
    from gpu_work import BACKENDS, CUDA_KERNEL, TRAFFIC, TRAFFIC_SHAPE

    launched = [
        (f"{backend} {name}", kernel if backend == "triton" else CUDA_KERNEL, expected)
        for backend in BACKENDS
        for name, kernel, expected in TRAFFIC
    ]
    if shutil.which("ncu") is None:
        return {"ok": None, "note": "no ncu on the path"}
    metrics = ("dram__bytes_read.sum", "dram__bytes_write.sum")
    names = "|".join(sorted({kernel for _, kernel, _ in launched}))
    done = run(
        [
            "ncu", "--csv", "--print-units", "base", "--metrics", ",".join(metrics),
            "--clock-control", "none", "--print-kernel-base", "function",
            "--kernel-name", f"regex:^({names})$",
            sys.executable, str(HERE / "gpu_work.py"), "traffic",
        ],
        limit,
    )  # fmt: skip
    if done.code is None:
        # The tool's slowness, as far as anyone knows.
        return stopped(done) | {"ok": None}
    try:
        launches = read_ncu(done.output)
    except KeyError as error:
        return {"ok": None, "note": f"ncu's table has no column {error}", "output": done.tail}
    if done.code != 0 or not launches:
        return {"ok": None, "note": "ncu counted nothing", "output": done.tail}
    kernels = [kernel for kernel, _ in launches]
    if kernels != [kernel for _, kernel, _ in launched]:
        return {"ok": False, "note": f"launched: {', '.join(kernels)}"}
    batch, length, vocabulary = TRAFFIC_SHAPE
    checks = {}
    for (name, _, expected), (_, values) in zip(launched, launches, strict=True):
        read, written = (values[m] / (batch * length * vocabulary) for m in metrics)
        checks[name] = at_most(read + written, expected + MORE_BYTES)
        checks[name] |= {"read": read, "written": written, "expected": expected}
    note = ", ".join(f"{c['value']:.2f}" for c in checks.values() if c["expected"])
    found = {"ok": all(c["ok"] for c in checks.values()), "checks": checks}
    return found | {"note": f"{note} bytes per logit"}


def read_ncu(output: str) -> list[tuple[str, dict[str, float]]]:
    """(kernel, {metric: value}) of each launch, in order: a line of CSV holds one metric."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines):
        kernel = row["Kernel Name"].partition("(")[0]
        _, values = launches.setdefault(row["ID"], (kernel, {}))
        values[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(launches.values())


def sanitizer(tool: str, limit: float) -> Findings:
    """compute-sanitizer over small shapes of every kernel."""
    if shutil.which("compute-sanitizer") is None:
        return {"ok": None, "note": "no compute-sanitizer on the path"}
    program = [sys.executable, str(HERE / "gpu_work.py"), "sanitize"]
    started = time.monotonic()
    # First without it: compiled kernels are then in Triton's cache, and a fault of the program
    # itself is told from one that the tool finds.
    alone = run(program, limit)
    if alone.code != 0:
        return {"ok": False, "note": "the program fails without the tool", "output": alone.tail}
    done = run(
        [
            "compute-sanitizer", "--tool", tool, "--report-api-errors", "no",
            "--error-exitcode", "97", *program,
        ],
        limit - (time.monotonic() - started),
        # Each tensor an allocation of its own, whose end the tool can see.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    if done.code is None:
        return stopped(done) | {"ok": None}
    summary = [x for x in done.output.splitlines() if "SUMMARY" in x]
    if done.code not in (0, 97) or not summary:
        note = "the tool did not run to its end"
        return {"ok": None, "note": note, "output": done.tail}
    found: Findings = {"ok": done.code == 0, "note": summary[-1].strip("= ")}
    return found if done.code == 0 else found | {"output": done.output[:3000]}


@dataclass(frozen=True)
class Part:
    """limit: seconds it may take. least: seconds without which it is not begun."""

    name: str
    function: Callable[[float], Findings]
    limit: float
    least: float


def check_imports() -> int:
    """Without a GPU: everything that would run, as far as it goes. 1 if something does not."""
    for name in ("measure", "contenders", "parity", "loss", "linear", "tune", "gpu_work"):
        importlib.import_module(name)
        print(f"imports: benchmarks/{name}.py")
    if missing_for_tests():
        print(f"not installed, so the tests would be skipped: {', '.join(missing_for_tests())}")
        return 0
    names = [f"tests/{name}" for name in TESTS]
    done = run([sys.executable, "-m", "pytest", "--collect-only", "-q", *names], 120)
    if done.code != 0:
        print(done.tail)
        return 1
    print(f"imports: {', '.join(names)}")
    return 0


def show(found: dict[str, Findings]) -> None:
    words = {True: "passed", False: "FAILED", None: "skipped"}
    print()
    for name, part in found.items():
        print(f"{name:16} {words[part['ok']]:8} {part['seconds']:5.0f} s  {part['note']}")
        for what, check in part.get("checks", {}).items():
            if not check["ok"]:
                print(f"{'':16} {what}: {check['value']}, at most {check['limit']}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "out" / "gpu.json", help="default: %(default)s")
    add("--commit", help="what to record where git does not know")
    options = parser.parse_args(argv)
    try:
        import torch
    except ImportError as error:
        print(f"{sys.executable} has no torch, without which nothing can be checked: {error}")
        return 1
    if not torch.cuda.is_available():
        print("No GPU here: nothing is measured. Checking that all parts import.")
        return check_imports()

    from measure import environment

    started = time.monotonic()
    out: Path = options.out.resolve()
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    # The most telling first: what comes last is what a slow machine skips.
    parts = [
        Part("build", build, 150, 30),
        Part("syncs", lambda limit: work("syncs", limit), 60, 15),
        Part("recompilations", lambda limit: work("recompilations", limit), 90, 30),
        Part("graphs", lambda limit: work("graphs", limit), 60, 15),
        Part("tests", tests, 200, 60),
        Part("grid", lambda limit: from_logits(limit, folder), 170, 60),
        Part("linear", lambda limit: from_hidden_states(limit, folder), 120, 60),
        Part("traffic", traffic, 90, 30),
        Part("memcheck", lambda limit: sanitizer("memcheck", limit), 100, 40),
        Part("racecheck", lambda limit: sanitizer("racecheck", limit), 100, 40),
    ]
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {"environment": environment(device, options.commit)}
    found: dict[str, Findings] = {}
    for part in parts:
        begun = time.monotonic()
        left = TOTAL - (begun - started)
        if left < part.least:
            findings: Findings = {"ok": None, "note": "no time left"}
        else:
            print(f"{part.name} …", flush=True)
            limit = min(part.limit, left)
            try:
                findings = part.function(limit)
            except Exception as error:
                findings = {"ok": False, "note": f"{type(error).__name__}: {error}"}
            if limit < part.limit and findings["note"].startswith("stopped after"):
                # Its own limit would have given it longer.
                findings["ok"] = None
        findings["seconds"] = time.monotonic() - begun
        found[part.name] = findings
        results["parts"] = found
        results["ok"] = all(x["ok"] is not False for x in found.values())
        out.write_text(json.dumps(results, indent=1) + "\n")
    show(found)
    print(f"\n{'all checks passed' if results['ok'] else 'SOME CHECKS FAILED'}; written: {out}")
    return 0 if results["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
