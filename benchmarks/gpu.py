"""Everything that only a GPU shows, in parts that each end within eight minutes; no network.

    python benchmarks/gpu.py                      # all parts, one after another
    python benchmarks/gpu.py launches memory      # these; memcheck or another step alone too
    python benchmarks/gpu.py bench --out FOLDER

parity: parity and laws through pytest on the device, then as many more draws as the time holds.
launches: launches, host time, host syncs, recompilations, CUDA graphs. bench: from logits, from
hidden states, DRAM bytes per logit. memory: compute-sanitizer's memcheck and racecheck. tune: the
candidates for Triton's static table.

Every part builds the extensions first, if they are not, and consists of steps. A step runs in
processes of its own, with a limit of its own: one that fails or hangs loses nothing else, and what
the time left does not hold is skipped, and says so. Its output goes into --out as it comes; when it
ends, what it found goes into gpu.json there, beside what other parts found of the same sources on
the same device. The exit status is 1 where a check failed.

Without a GPU it checks that all its parts import, and exits with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
sys.path[:0] = [str(ROOT), str(HERE)]

# Seconds of a part: 15 short of eight minutes.
PART_SECONDS = 465.0
# What processes at their limit have to say what they found.
SECONDS_TO_STOP = 5
# Test files, wherever they are below tests/; those of which more is drawn.
TESTS = ("parity", "laws", "known_bugs", "ops", "linear", "sparse", "tokens")
DRAWN = ("parity", "laws", "linear")
TEST_PROCESSES = max(4, (os.cpu_count() or 8) - 2)
# Cells in this order: the most telling first, for a limit cuts off the last.
GRID = {
    "loss": ["--n", "8192", "16384", "2048", "512", "--v", "151936", "32000", "128256", "262144"],
    "linear": ["--n", "16384", "--h", "4096", "--v", "151936"],
    "sparse_head": [
        "--n",
        "16384",
        "--h",
        "4096",
        "--v",
        "151936",
        "--sizes",
        "20",
        "--contenders",
        "triton sparse head",
        "cuda sparse head",
    ],
    "overhead": [],
    "tune": ["--v", "151936", "32000", "128256", "262144"],
}
# A one-pass loss against a copy of the same bytes; the linear route, in several chunks, and the
# sparse head, for sets of 20 words, against three products in one; bytes per logit against Eq. 15;
# host time against five lines of torch.
SLOWEST = 1.15
SLOWEST_LINEAR = 1.4
SLOWEST_SPARSE = 1 / 13
MORE_BYTES = 0.1
MOST_HOST_TIME = 0.9

# A step's findings: "ok" is None where it could not be checked, and "note" says why.
Findings = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    code: int | None  # None: it was stopped at its limit
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-3000:]


def run_all(
    commands: dict[str, Sequence[str]], folder: Path, limit: float, at_once: int, **variables: str
) -> dict[str, Run]:
    """Commands in the repository by name, each ended with all that it started at the limit.

    What each prints goes into NAME.log in `folder`, as it comes.
    """
    hidden = ("TRITON_INTERPRET", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    # Beside what else the caller's own path has: peers may be installed there.
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | variables
    waiting = list(commands.items())
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    done: dict[str, Run] = {}
    end = time.monotonic() + limit
    try:
        while waiting or running:
            over = time.monotonic() >= end
            while waiting and len(running) < at_once and not over:
                name, command = waiting.pop(0)
                # A file, because a pipe that something left behind holds open would never end.
                with (folder / f"{name}.log").open("w") as log:
                    process = subprocess.Popen(
                        list(command), cwd=ROOT, env=environment, stdout=log,
                        stderr=subprocess.STDOUT, start_new_session=True,
                        preexec_fn=heed_interrupts,
                    )  # fmt: skip
                running[name] = process, time.monotonic()
            codes = {name: process.poll() for name, (process, _) in running.items()}
            if over:
                stop([running[name][0] for name, code in codes.items() if code is None])
            for name, code in codes.items():
                if code is None and not over:
                    continue
                _, started = running.pop(name)
                text = (folder / f"{name}.log").read_text(errors="replace")
                done[name] = Run(code, text, time.monotonic() - started)
            if over:
                done |= {name: Run(None, "", 0.0) for name, _ in waiting}
                break
            time.sleep(0.05)
    finally:
        stop([process for process, _ in running.values()])
    return done


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """With all that they started; first they may say what they found, as pytest does."""
    end = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        send(signal.SIGINT, process)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        send(signal.SIGKILL, process)
        process.wait()


def heed_interrupts() -> None:
    """A shell's background process ignores them, and so does what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def send(what: signal.Signals, process: subprocess.Popen[bytes]) -> None:
    """To all of its group, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, what)


def run(name: str, command: Sequence[str], folder: Path, limit: float, **variables: str) -> Run:
    return run_all({name: command}, folder, limit, 1, **variables)[name]


def stopped(done: Run) -> Findings:
    return {"ok": False, "note": f"stopped after {done.seconds:.0f} s", "output": done.tail}


def printed_checks(output: str) -> dict[str, Findings]:
    """What gpu_work.py has printed, up to where it came."""
    found = {}
    for line in output.splitlines():
        if line.startswith('{"check":'):
            try:
                check = json.loads(line)
            except ValueError:
                continue  # cut off within the line
            found[check.pop("check")] = check
    return found


def work(name: str, limit: float, folder: Path) -> Findings:
    """One of gpu_work.py."""
    done = run(name, [sys.executable, str(HERE / "gpu_work.py"), name], folder, limit)
    checks = printed_checks(done.output)
    failed = sum(not check["ok"] for check in checks.values())
    found: Findings = {
        "ok": done.code == 0 and failed == 0 and bool(checks),
        "note": f"{len(checks) - failed} of {len(checks)} checks passed",
        "checks": checks,
    }
    if done.code is None:
        found["note"] = f"stopped after {done.seconds:.0f} s, {found['note']}"
    return found if found["ok"] else found | {"output": done.tail}


def build(limit: float, folder: Path) -> Findings:
    """The extensions, in place, for this machine's Python."""
    for package in ("setuptools", "ninja"):
        if importlib.util.find_spec(package) is None:
            note = f"no {package}: the extensions that are there, if any, stay"
            return {"ok": None, "note": note}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = run("build", command, folder, limit)
    if done.code is None:
        return stopped(done)
    path = ROOT / "r2vpo_kernels" / "backends" / "build_report.json"
    if done.code != 0 or not path.exists():
        return {"ok": None, "note": f"exit status {done.code}", "output": done.tail}
    report = json.loads(path.read_text())
    cuda = report.get("cuda", "not built: no nvcc")
    return {"ok": cuda.startswith("built by") or None, "note": cuda, "report": report}


# Parity.


def missing_for_tests() -> list[str]:
    return [x for x in ("pytest", "hypothesis") if importlib.util.find_spec(x) is None]


def test_files() -> dict[str, Path]:
    """The files of TESTS by their names; one that is not there is an error."""
    paths = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [name for name in TESTS if name not in paths]
    if missing:
        raise FileNotFoundError(f"no test_{missing[0]}.py below tests/")
    return {name: paths[name] for name in TESTS}


# Triton compiles its kernels in each process: its tests take ten times as long as all the others.
HALVES = ("triton", "not triton")


def run_pytest(
    step: str,
    names: Sequence[str],
    folder: Path,
    limit: float,
    *options: str,
    halves: Sequence[str] = HALVES,
    **variables: str,
) -> tuple[Findings, bool]:
    """Test files on the device, several at once: what was found, and whether all came to an end."""
    files = test_files()
    commands: dict[str, Sequence[str]] = {}
    for name, half in itertools.product(names, halves):
        of_pytest = ["-q", "-rfE", "--tb=short", str(files[name]), "-k", half, *options]
        key = f"{step}-{name}-{half.replace(' ', '-')}"
        commands[key] = [sys.executable, "-m", "pytest", *of_pytest]
    # Each has few small tensors on the CPU, and threads of all of them would wait for each other.
    variables |= {"R2VPO_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "2"}
    done = run_all(commands, folder, limit, TEST_PROCESSES, **variables)
    counts: Counter[str] = Counter()
    failed, unfinished = [], []
    for name, each in done.items():
        lines = each.output.strip().splitlines()
        failed += [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if each.code is None:
            unfinished.append(name)
        for number_of, kind in re.findall(
            r"(\d+) (passed|failed|errors?|skipped)", lines[-1] if lines else ""
        ):
            counts[kind] += int(number_of)
        # 5: nothing had that half's name.
        if each.code not in (None, 0, 1, 5):
            failed.append(f"{name}: exit status {each.code}")
    note = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no test ran"
    if unfinished:
        note += f"; stopped at the limit: {', '.join(unfinished)}"
    codes = {each.code for each in done.values()}
    ok: bool | None = not failed and codes <= {0, 5} and bool(counts["passed"])
    if unfinished and not failed:
        ok = None
    return {"ok": ok, "note": note, "counts": counts, "failed": failed}, not unfinished


def tests(half: str) -> Callable[[float, Path], Findings]:
    """As the test suite has them: the same examples in every run."""

    def step(limit: float, folder: Path) -> Findings:
        if missing_for_tests():
            return {"ok": None, "note": f"not installed: {', '.join(missing_for_tests())}"}
        return run_pytest("tests", TESTS, folder, limit, halves=[half], CI="1")[0]

    return step


def draws(limit: float, folder: Path) -> Findings:
    """Other examples, seed after seed, until the time is over."""
    if missing_for_tests():
        return {"ok": None, "note": f"not installed: {', '.join(missing_for_tests())}"}
    end = time.monotonic() + limit
    total: Findings = {"ok": None, "counts": Counter(), "failed": []}
    longest = 0.0
    for seed in itertools.count(1):
        begun = time.monotonic()
        if end - begun < max(1.2 * longest, 5):
            break
        found, whole = run_pytest(
            f"draws-{seed}", DRAWN, folder, end - begun, f"--hypothesis-seed={seed}"
        )
        longest = max(longest, time.monotonic() - begun)
        total["counts"] += found["counts"]
        total["failed"] += [f"seed {seed}: {line}" for line in found["failed"]]
        if found["ok"] is not None:
            total["ok"] = total["ok"] is not False and found["ok"]
        if not whole:
            break
    passed = total["counts"]["passed"]
    total["note"] = f"{passed} tests passed, {len(total['failed'])} failed; seeds to {seed}"
    return total


# The benchmarks.


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def grid(name: str, folder: Path, limit: float) -> tuple[Run, Rows]:
    """One of the benchmarks at GRID's shapes, and the rows that it wrote."""
    path = folder / f"{name}.csv"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *GRID[name], "--out", str(folder)]
    done = run(name, command, folder, limit)
    if not path.exists():
        return done, []
    with path.open(newline="") as file:
        return done, [{k: number(x) for k, x in row.items()} for row in csv.DictReader(file)]


def graded(done: Run, rows: Rows, checks: dict[str, Findings], note: str) -> Findings:
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


def at_most(value: float | None, limit: float) -> Findings:
    return {"value": value, "limit": limit, "ok": value is not None and value <= limit}


def of_gpu(row: dict[str, Any], *names: str) -> bool:
    """Whether a row is of a contender of ours by one of these names that could run."""
    backend, _, name = row["contender"].partition(" ")
    ran = not row["status"].startswith("no: ")
    return backend in ("triton", "cuda") and name in names and ran


def from_logits(limit: float, folder: Path) -> Findings:
    """benchmarks/loss.py: one-pass near the speed of a copy."""
    done, rows = grid("loss", folder, limit)
    copies = {(r["n"], r["v"]): r["both_ms"] for r in rows if r["contender"] == "copy"}
    checks = {}
    for row in rows:
        # A copy reads and writes each logit once, as the one-pass route does.
        if of_gpu(row, "one-pass", "in place"):
            name = f"{row['contender']} {row['n']:.0f} x {row['v']:.0f}, time over a copy's"
            value = row["both_ms"] / copies[row["n"], row["v"]] if row["both_ms"] else None
            checks[name] = at_most(value, SLOWEST) | {"note": row["status"]}
    return graded(done, rows, checks, f"{len(copies)} shapes")


def over_products(benchmark: str, contender: str, most: float) -> Callable[[float, Path], Findings]:
    """A benchmark from hidden states: the time over that of the three products."""

    def step(limit: float, folder: Path) -> Findings:
        done, rows = grid(benchmark, folder, limit)
        checks = {
            f"{row['contender']} {row['n']:.0f} x {row['v']:.0f} x {row['h']:.0f}, over products":
            at_most(row["over_products"] or None, most) | {"note": row["status"]}
            for row in rows
            if of_gpu(row, contender)
        }  # fmt: skip
        return graded(done, rows, checks, f"{len(checks)} shapes")

    return step


def overhead(limit: float, folder: Path) -> Findings:
    """benchmarks/overhead.py: launches and host time of a call."""
    done, rows = grid("overhead", folder, limit)
    checks = {}
    for row in rows:
        name = f"{row['backend']} {row['contender']}"
        if row["most_launches"] != "":
            checks[f"{name}, launches"] = at_most(row["launches"], row["most_launches"])
        if row["contender"] in ("one pass", "group", "sequence", "none"):
            checks[f"{name}, host time over eager's"] = at_most(
                row["over_eager"] or None, MOST_HOST_TIME
            )
    return graded(done, rows, checks, f"{len(rows)} calls")


def tune(limit: float, folder: Path) -> Findings:
    """benchmarks/tune.py: the fastest of the candidates, for each vocabulary."""
    done, rows = grid("tune", folder, limit)
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["status"] == "timed" and row["contender"] not in ("copy", "clone"):
            key = f"{row['v']:.0f} {row['contender']}"
            if key not in best or row["both_ms"] < best[key]["both_ms"]:
                best[key] = row
    for key, row in best.items():
        print(f"  {key}: {row['tuning']}, {row['both_ms']:.3f} ms")
    timed = {"value": len(best), "limit": "any", "ok": bool(best)}
    return graded(done, rows, {"timed": timed}, f"{len(rows)} rows") | {"best": best}


def where_cuda_is_faster(results: dict[str, Any]) -> set[tuple[str, Any, int]]:
    """(device, dtype, V) where a run found the CUDA kernels right (by the tests that are not
    Triton's, and compute-sanitizer), and faster than Triton's one-pass for every number of tokens:
    what r2vpo_kernels/backends/registry.py may choose them for.
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


# Under tools.


def traffic(limit: float, folder: Path) -> Findings:
    """DRAM bytes per bfloat16 logit of each launch, by the hardware's own counters."""
    from gpu_work import CUDA_KERNEL, TRAFFIC, TRAFFIC_SHAPE

    if shutil.which("ncu") is None:
        return {"ok": None, "note": "no ncu on the path"}
    metrics = ("dram__bytes_read.sum", "dram__bytes_write.sum")
    names = "|".join(sorted({kernel for _, kernel, _ in TRAFFIC} | {CUDA_KERNEL}))
    command = [
        "ncu", "--csv", "--print-units", "base", "--metrics", ",".join(metrics),
        "--clock-control", "none", "--print-kernel-base", "function",
        "--kernel-name", f"regex:^({names})$",
        sys.executable, str(HERE / "gpu_work.py"), "traffic",
    ]  # fmt: skip
    done = run("traffic", command, folder, limit)
    if done.code is None:
        # The tool's slowness, as far as anyone knows.
        return stopped(done) | {"ok": None}
    try:
        launches = read_ncu(done.output)
    except KeyError as error:
        return {"ok": None, "note": f"ncu's table has no column {error}", "output": done.tail}
    if done.code != 0 or not launches:
        return {"ok": None, "note": "ncu counted nothing", "output": done.tail}
    launched = [
        (f"{backend} {name}", kernel if backend == "triton" else CUDA_KERNEL, expected)
        for backend in printed_checks(done.output)["launched"]["backends"]
        for name, kernel, expected in TRAFFIC
    ]
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


def sanitizer(tool: str, limit: float, folder: Path) -> Findings:
    """compute-sanitizer over small shapes of every kernel."""
    if shutil.which("compute-sanitizer") is None:
        return {"ok": None, "note": "no compute-sanitizer on the path"}
    program = [sys.executable, str(HERE / "gpu_work.py"), "sanitize"]
    started = time.monotonic()
    # First without it: compiled kernels are then in Triton's cache, and a fault of the program
    # itself is told from one that the tool finds.
    alone = run(f"{tool}-alone", program, folder, limit)
    if alone.code != 0:
        return {"ok": False, "note": "the program fails without the tool", "output": alone.tail}
    done = run(
        tool,
        [
            "compute-sanitizer", "--tool", tool, "--report-api-errors", "no",
            "--error-exitcode", "97", *program,
        ],
        folder,
        limit - (time.monotonic() - started),
        # Each tensor an allocation of its own, whose end the tool can see.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    of_all = f"{len(printed_checks(done.output))} of {len(printed_checks(alone.output))} calls"
    if done.code is None:
        found = stopped(done)
        return found | {"ok": None, "note": f"{found['note']}, {of_all}"}
    summary = [x for x in done.output.splitlines() if "SUMMARY" in x]
    if done.code not in (0, 97) or not summary:
        note = "the tool did not run to its end"
        return {"ok": None, "note": note, "output": done.tail}
    # An error of racecheck names two places. What has no _kernel in its name is a library's.
    places = re.findall(r"access at (.+?)\+0x", done.output)
    foreign = [place for place in places if "_kernel" not in place]
    errors = re.search(r"\((\d+) errors", summary[-1])
    all_foreign = errors is not None and len(foreign) == len(places) == 2 * int(errors[1])
    ok = done.code == 0 or (tool == "racecheck" and all_foreign)
    found = {"ok": ok, "note": f"{summary[-1].strip('= ')}; {of_all}"}
    if foreign:
        found["note"] += f"; in {', '.join(sorted(set(foreign)))}"
    return found if ok else found | {"output": done.output[:3000]}


# All together.


@dataclass(frozen=True)
class Step:
    """limit: seconds it may take. least: seconds without which it is not begun."""

    name: str
    function: Callable[[float, Path], Findings]
    limit: float
    least: float


def worker(name: str) -> Callable[[float, Path], Findings]:
    return lambda limit, folder: work(name, limit, folder)


def under(tool: str) -> Callable[[float, Path], Findings]:
    return lambda limit, folder: sanitizer(tool, limit, folder)


BUILD = Step("build", build, 180, 30)
# What comes last is what a slow machine skips.
PARTS = {
    "parity": [
        Step("tests", tests("not triton"), 200, 60),
        Step("triton-tests", tests("triton"), 400, 60),
        Step("draws", draws, 400, 30),
    ],
    "launches": [
        Step("launches", worker("launches"), 60, 15),
        Step("syncs", worker("syncs"), 90, 15),
        Step("graphs", worker("graphs"), 90, 15),
        Step("overhead", overhead, 60, 15),
        Step("recompilations", worker("recompilations"), 180, 30),
    ],
    "bench": [
        Step("traffic", traffic, 90, 30),
        Step("linear", over_products("linear", "linear", SLOWEST_LINEAR), 120, 60),
        Step("sparse", over_products("sparse_head", "sparse head", SLOWEST_SPARSE), 90, 45),
        Step("grid", from_logits, 400, 60),
    ],
    "memory": [
        Step("memcheck", under("memcheck"), 220, 40),
        Step("racecheck", under("racecheck"), 400, 40),
    ],
    "tune": [Step("tune", tune, 450, 60)],
}
# What can be asked for: a part, or a step of one.
ASKED_FOR = {step.name: [step] for steps in PARTS.values() for step in steps} | PARTS


def check_imports() -> int:
    """Without a GPU: everything that would run, as far as it goes. 1 if something does not."""
    for name in (
        "measure", "contenders", "parity", "loss", "linear", "sparse_head", "routes", "overhead",
        "tune", "gpu_work",
    ):  # fmt: skip
        importlib.import_module(name)
        print(f"imports: benchmarks/{name}.py")
    if missing_for_tests():
        print(f"not installed, so the tests would be skipped: {', '.join(missing_for_tests())}")
        return 0
    names = [str(path.relative_to(ROOT)) for path in test_files().values()]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-3000:] + done.stderr[-3000:])
        return 1
    print(f"imports: {', '.join(names)}")
    return 0


def sources() -> str:
    """A digest of what is measured."""
    folders = ("r2vpo_kernels", "csrc")
    suffixes = (".py", ".h", ".cpp", ".cu")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in suffixes):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def earlier(path: Path, environment: dict[str, str]) -> dict[str, Findings]:
    """What was found of the same sources on the same device."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    keys = ("sources", "device", "torch", "triton")
    same = all(results["environment"].get(key) == environment[key] for key in keys)
    return results["parts"] if same else {}


def show(found: dict[str, Findings]) -> None:
    words = {True: "passed", False: "FAILED", None: "skipped"}
    print()
    for name, step in found.items():
        print(f"{name:16} {words[step['ok']]:8} {step['seconds']:5.0f} s  {step['note']}")
        for line in step.get("failed", ()):
            print(f"{'':16} {line[:200]}")
        for what, check in step.get("checks", {}).items():
            if not check["ok"]:
                said = check.get("note") or check.get("error") or ""
                values = f"{check.get('value')}, expected {check.get('limit')}"
                print(f"{'':16} {what}: {values} {said}"[:200])


def run_part(
    steps: Sequence[Step],
    seconds: float,
    folder: Path,
    environment: dict[str, str],
    found: dict[str, Findings],
) -> None:
    """Each step of a part into `found`, and that into gpu.json."""
    started = time.monotonic()
    for step in steps:
        begun = time.monotonic()
        left = seconds - (begun - started)
        if left < step.least:
            findings: Findings = {"ok": None, "note": "no time left"}
        else:
            print(f"{step.name} ...", flush=True)
            limit = min(step.limit, left)
            try:
                findings = step.function(limit, folder)
            except Exception as error:
                findings = {"ok": False, "note": f"{type(error).__name__}: {error}"}
            if limit < step.limit and findings["note"].startswith("stopped after"):
                # Its own limit would have given it longer.
                findings["ok"] = None
        findings["seconds"] = time.monotonic() - begun
        found[step.name] = findings
        results = {"environment": environment, "parts": earlier(folder / "gpu.json", environment)}
        results["parts"] |= found
        results["ok"] = all(x["ok"] is not False for x in results["parts"].values())
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    steps = ", ".join(name for name in ASKED_FOR if name not in PARTS)
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all), {steps}")
    add("--out", type=Path, default=HERE / "out" / "gpu", help="default: %(default)s")
    add("--commit", help="what to record where git does not know")
    add("--seconds", type=float, default=PART_SECONDS, help="of a part (default: %(default)s)")
    add("--no-build", action="store_true", help="take the extensions that are there")
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in ASKED_FOR]
    if unknown:
        parser.error(f"got {unknown[0]!r}, expected one of {', '.join(ASKED_FOR)}")
    try:
        import torch
    except ImportError as error:
        print(f"{sys.executable} has no torch, without which nothing can be checked: {error}")
        return 1
    if not torch.cuda.is_available():
        print("No GPU here: nothing is measured. Checking that all parts import.")
        return check_imports()

    from measure import environment

    folder: Path = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    machine = environment(device, options.commit) | {"sources": sources()}
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value))
    found: dict[str, Findings] = {}
    for name in options.parts or PARTS:
        steps = ASKED_FOR[name] if options.no_build else [BUILD, *ASKED_FOR[name]]
        run_part(steps, options.seconds, folder, machine, found)
    show(found)
    ok = all(x["ok"] is not False for x in found.values())
    print(f"\n{'no check failed' if ok else 'SOME CHECKS FAILED'}; written: {folder}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
