"""Which suite notices a mistake: python tests/support/breaks.py [WORD …] [--suite quick test …]

Each of BREAKS is put into a copy of the checkout, whose suites then run there by make, the smallest
first, cut down to the tests that are expected to fail. A Markdown table says which suite fails
first, and by which test; WORD names those breaks alone that have it in their name. docs/tests.md
has the table of all.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
# The targets of the Makefile that a suite consists of, but for what runs parity once more. Most
# breaks are noticed outside of the interpreter.
SUITES = {
    "quick": ["quick"],
    "test": ["test-others", "test-interpreter"],
    "test-all": ["all-others", "all-interpreter", "all-interpreter-linear"],
}
# What is built and not tracked.
BUILT = (
    "r2vpo_kernels/backends/*.so", "r2vpo_kernels/backends/build_report.json",
    "build/emulator/*.so",
)  # fmt: skip


class Break(NamedTuple):
    """A mistake that someone could make: `new` in the place of `old`, which a file has once."""

    name: str
    file: str
    old: str
    new: str
    # Tests, as pytest's -k takes them; of each of these at least one fails.
    noticed_by: tuple[str, ...]


BREAKS = (
    Break(
        "the policy term has the other sign",
        "r2vpo_kernels/reference.py",
        "    return -tokens.advantages * factor",
        "    return tokens.advantages * factor",
        ("test_reference",),
    ),
    Break(
        "masked tokens count in the mean",
        "r2vpo_kernels/reference.py",
        "return valid.sum().to(one.dtype)",
        "return torch.ones_like(valid).sum().to(one.dtype)",
        ("test_reference",),
    ),
    Break(
        "the dual's step has no bound",
        "r2vpo_kernels/reference.py",
        "(lr * excess.clamp(max=1.0)).exp()",
        "(lr * excess).exp()",
        ("test_dual",),
    ),
    Break(
        "a mask of any shape is taken",
        "r2vpo_kernels/batch.py",
        "if not isinstance(mask, Tensor) or mask.shape != shape:",
        "if not isinstance(mask, Tensor):",
        ("test_errors",),
    ),
    Break(
        "a lower clip range above 1 is taken",
        "r2vpo_kernels/objective.py",
        'check_number("clip_range", low, 0.0, 1.0)',
        'check_number("clip_range", low, 0.0)',
        ("test_errors",),
    ),
    Break(
        "a loaded λ is another tensor",
        "r2vpo_kernels/dual.py",
        '            self.coef.copy_(state_dict["coef"])',
        '            self.coef = state_dict["coef"]',
        ("test_dual",),
    ),
    Break(
        "the first id of a set is in the set before",
        "r2vpo_kernels/sampling.py",
        "segment = torch.searchsorted(offsets.contiguous(), position, right=True) - 1",
        "segment = torch.searchsorted(offsets.contiguous(), position) - 1",
        ("test_sampling",),
    ),
    Break(
        "statistics are not summed over ranks",
        "r2vpo_kernels/output.py",
        "        dist.all_reduce(fields, group=group)\n",
        "",
        ("test_steps and two_ranks or test_distributed and data",),
    ),
    Break(
        "two metrics have each other's names",
        "r2vpo_kernels/output.py",
        '    "ratio/min",\n    "ratio/max",',
        '    "ratio/max",\n    "ratio/min",',
        ("test_laws and metrics and cpp",),
    ),
    Break(
        "the clip binds on the wrong side",
        "csrc/token.h",
        "return {loses && low, (gains && high) ||",
        "return {gains && low, (loses && high) ||",
        tuple(f"(test_parity or test_laws and clip) and {name}" for name in ("cpp", "cuda")),
    ),
    Break(
        "the penalty's slope lacks the ratio",
        "csrc/token.h",
        "token.variance_coef * gap * r.ratio;",
        "token.variance_coef * gap;",
        tuple(f"test_parity and {name}" for name in ("cpp", "cuda")),
    ),
    Break(
        "the slope of the k3 estimate has the other sign",
        "csrc/token.h",
        "slope = -minus_one;",
        "slope = minus_one;",
        tuple(f"(test_parity or test_laws and kl) and {name}" for name in ("cpp", "cuda")),
    ),
    Break(
        "1 - p cancels near p = 1",
        "csrc/token.h",
        "const float slope = -dlogp * e.minus_one, p",
        "const float slope = dlogp * (1.0f - e.value), p",
        tuple(f"test_known_bugs and digits and {name}" for name in ("cpp", "cuda")),
    ),
    Break(
        "a mask of float64 is read as float32",
        "csrc/tokens.h",
        "  if (c.dtype == Dtype::float64) return static_cast<const double*>(c.data)[k] != 0.0;\n",
        "",
        tuple(f"test_tokens and mask_is_valid and {name}" for name in ("cpp", "cuda")),
    ),
    Break(
        "a group's moments have the weights of the loss",
        "csrc/cpu/tokens.cpp",
        "const double weight = t.token_weight(i), d = r.d;",
        "const double weight = token.weight, d = r.d;",
        ("(test_parity or test_tokens) and cpp",),
    ),
    Break(
        "exponents are bounded where 2^x has no bits",
        "csrc/cpu/vector.h",
        "kLowestExponent = -127.0f;",
        "kLowestExponent = -150.0f;",
        ("test_cpp and (exponential or infinity) or test_parity and cpp",),
    ),
    Break(
        "the last columns of a row are not summed",
        "csrc/cpu/rows.cpp",
        "  if (column < end) body(column, load_part(row + column, end - column));\n",
        "",
        ("test_parity and cpp",),
    ),
    Break(
        "sums of earlier blocks keep the old maximum",
        "csrc/cpu/rows.cpp",
        "        s *= decay;\n",
        "",
        ("test_cpp and several_blocks",),
    ),
    Break(
        "the head's gradient takes in masked tokens",
        "csrc/cpu/head.h",
        "            if (!is_supported(a, i)) continue;\n",
        "",
        ("test_sparse and cpp",),
    ),
    Break(
        "no barrier before a row is overwritten",
        "csrc/cuda/rows.h",
        "    machine_.sync_computing();\n    zero(place);\n",
        "    zero(place);\n",
        ("test_cuda and sets",),
    ),
    Break(
        "a stage is freed before it is read",
        "csrc/cuda/rows.h",
        "      read(place, chunk, kept_.stage, words);\n      release(kept_.stage);\n",
        "      release(kept_.stage);\n      read(place, chunk, kept_.stage, words);\n",
        ("test_cuda and (several_chunks or order_of_events)",),
    ),
    Break(
        "log-probs are summed by other shares than in one pass",
        "csrc/cuda/plan.h",
        "return {shares, work.writes ? shares : 1, stages, false};",
        "return {work.writes ? shares : 1, work.writes ? shares : 1, stages, false};",
        ("test_cuda and recorded",),
    ),
    Break(
        "a block takes its ticket before all its threads have stored",
        "csrc/cuda/tokens.h",
        "  machine.fence();\n  machine.sync_block();\n  double* const came",
        "  machine.fence();\n  double* const came",
        ("test_cuda and order_of_threads",),
    ),
    Break(
        "a maximum drops NaN on a GPU",
        "r2vpo_kernels/backends/triton/math.py",
        "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)",
        "tl.maximum(a, b)",
        ("test_aot and sm_90",),
    ),
    Break(
        "every block of an unaligned row is masked",
        "r2vpo_kernels/backends/triton/rows.py",
        "    elif (block > 0) & ((block + 1) * BLOCK <= end):\n        # A mask whose",
        "    elif block < 0:\n        # A mask whose",
        ("test_aot and sm_90",),
    ),
    Break(
        "the label's gradient may be stored before its neighbours'",
        "r2vpo_kernels/backends/triton/rows.py",
        "    # Over what another thread has stored there.\n    tl.debug_barrier()\n",
        "",
        ("test_aot and sm_90 and label",),
    ),
    Break(
        "expm1 is exp - 1",
        "r2vpo_kernels/backends/triton/math.py",
        "return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)",
        "return tl.exp(x) - 1.0",
        ("(test_known_bugs and digits or test_parity and upstream) and triton",),
    ),
    Break(
        "κ is not about the group's mean",
        "r2vpo_kernels/backends/triton/tokens.py",
        " - mean * _group_sum(sums, groups, 2, group)\n",
        "\n",
        ("test_tokens and triton",),
    ),
    Break(
        "λ = NaN is no fault",
        "r2vpo_kernels/backends/triton/prepare.py",
        "low = (coef >= 0) == 0",
        "low = coef < 0",
        ("test_tokens and bad_value and triton",),
    ),
    Break(
        "the head's gradient takes in masked tokens, in Triton",
        "r2vpo_kernels/backends/triton/head.py",
        "known = (place < end) & (tl.load(row, mask=place < end, other=-1) >= 0)\n"
        "            known &= tl.load(row + tokens * SUPPORT_COUNT, mask=known, other=-1) >= 0\n",
        "known = place < end\n",
        ("test_sparse and triton and (rows_and_words or dense)",),
    ),
    Break(
        '"auto" takes kernels that cannot',
        "r2vpo_kernels/backends/registry.py",
        'return "eager" if why_not(best, tensor) else best',
        "return best",
        ("test_ops and auto",),
    ),
    Break(
        "a sequence begins where it does not",
        "r2vpo_kernels/backends/calls.py",
        "strides[0] - shape[1] * strides[1]",
        "strides[0]",
        ("test_parity and cpp",),
    ),
    Break(
        "a fake has another shape",
        "r2vpo_kernels/ops.py",
        "return *results, torch.empty_like(logps), torch.empty_like(entropy), slopes\n",
        "return *results, torch.empty_like(logps), torch.empty_like(logps), slopes\n",
        ("test_ops and (opcheck or fullgraph) and cpp",),
    ),
    Break(
        "a compilation depends on numbers",
        "r2vpo_kernels/ops.py",
        "            vector = torch.stack([zero + number for number in numbers])\n"
        "            numbers = []\n",
        "            vector = None\n",
        ("test_ops and (fullgraph or export) and cpp",),
    ),
    Break(
        "a launch more",
        "r2vpo_kernels/ops.py",
        "logps_out, entropy_out = torch.empty_like(logps), torch.empty_like(entropy)",
        "logps_out, entropy_out = torch.zeros_like(logps), torch.empty_like(entropy)",
        ("test_launches and cpp",),
    ),
    Break(
        "a second backward scales once more",
        "r2vpo_kernels/sources/autograd.py",
        "    if graph_is_kept():\n        gradient = gradient.clone()\n",
        "",
        ("test_laws and second_backward and cpp",),
    ),
    Break(
        "in place takes a copy",
        "r2vpo_kernels/sources/logits.py",
        "        values = logits.detach()\n",
        "        values = logits.detach().clone()\n",
        ("test_known_bugs and 9_in_place and cpp",),
    ),
    Break(
        "the head's gradient is that of the last chunk",
        "r2vpo_kernels/sources/products.py",
        "self.multiply(dz.t(), self.chunk, scale, self.dweight, add=self.begun)",
        "self.multiply(dz.t(), self.chunk, scale, self.dweight)",
        ("test_linear and (same_as or sums_over_chunks)",),
    ),
    Break(
        "sums over chunks are rounded to bfloat16",
        "r2vpo_kernels/sources/products.py",
        "kind = x.dtype if once else torch.float32",
        "kind = x.dtype",
        ("test_linear and sums_over_chunks",),
    ),
    Break(
        "the sparse head overwrites what dense products found",
        "r2vpo_kernels/sources/sparse.py",
        "products.dweight, products.dbias, products.begun",
        "products.dweight, products.dbias, False",
        ("test_sparse and cpp",),
    ),
    Break(
        "a rank keeps its part of the gradient of hidden states",
        "r2vpo_kernels/sources/linear.py",
        "        dhidden = ctx.shard.sum(dhidden)\n",
        "        pass\n",
        ("test_tensor_parallel and budget",),
    ),
    Break(
        "each rank sums about its own maximum",
        "r2vpo_kernels/sources/shard.py",
        'whole_top = _all_reduce(top, "MAX", self.group)',
        "whole_top = top",
        ("test_tensor_parallel and budget",),
    ),
    Break(
        "a sharded parameter gets the sum of the ranks' gradients",
        "r2vpo_kernels/sources/dtensor.py",
        'Partial("avg")',
        'Partial("sum")',
        ("test_dtensor or test_distributed or test_adapter and sharded",),
    ),
    Break(
        "an adapter has no scaling",
        "r2vpo_kernels/sources/adapter.py",
        "adapter.a.to(dtype) * adapter.scaling",
        "adapter.a.to(dtype)",
        ("test_adapter and pefts",),
    ),
    Break(
        "an optimizer step counts those before it",
        "r2vpo_kernels/integrations/steps.py",
        "        window, self._window = self._window, {}\n",
        "        window = self._window\n",
        ("test_steps",),
    ),
    Break(
        "the last micro-batch stands for the optimizer step",
        "r2vpo_kernels/integrations/steps.py",
        "stats if known is None else known + stats",
        "stats",
        ("test_steps",),
    ),
    Break(
        "a trainer's options with a prefix are not found",
        "r2vpo_kernels/integrations/hook.py",
        "if hasattr(config, prefix + name)",
        "if hasattr(config, name)",
        ("test_slime",),
    ),
    Break(
        "verl's importance weights are dropped",
        "r2vpo_kernels/integrations/verl.py",
        '"importance_weights": rollout_is_weights,',
        '"importance_weights": None,',
        ("test_verl",),
    ),
    Break(
        "TRL's groups are dealt out",
        "r2vpo_kernels/integrations/trl/trainer.py",
        'output["group_ids"] = places // size',
        'output["group_ids"] = places % (sequences // size)',
        ("test_trl and group_ids",),
    ),
    Break(
        "a second OpenMP runtime is no problem",
        "r2vpo_kernels/__main__.py",
        "if len(runtimes) > 1:",
        "if len(runtimes) > 2:",
        ("test_main",),
    ),
    Break(
        "a build does not say why the compiler failed",
        "setup.py",
        'raise CannotBuild(f"{name} failed: {first_error(run.stdout)}")',
        'raise CannotBuild("a compiler failed")',
        ("test_cpp and compiler_that_fails",),
    ),
    Break(
        "the demo's old log-probs are over all words",
        "examples/train_tiny.py",
        "token_logps(model(tokens), labels, sampling_mask=sets)",
        "token_logps(model(tokens), labels)",
        ("test_examples and top_p",),
    ),
    Break(
        "the DPO example has no penalty",
        "examples/dpo_penalty.py",
        "variance_coef=coef",
        "variance_coef=0.0",
        ("test_examples and dpo",),
    ),
    Break(
        "a contender with a wrong gradient is timed",
        "benchmarks/parity.py",
        "            faults.append(str(fault))\n",
        "            pass\n",
        ("test_benchmarks and contender",),
    ),
)


def copy_checkout(to: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    files += [str(path.relative_to(ROOT)) for pattern in BUILT for path in ROOT.glob(pattern)]
    for file in files:
        if (ROOT / file).is_file():
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            # With its time: what was built stays newer than its sources.
            shutil.copy2(ROOT / file, to / file)


def apply(one: Break, checkout: Path) -> None:
    file = checkout / one.file
    text = file.read_text()
    assert text.count(one.old) == 1, f"{one.name}: {one.file} has {one.old!r} not once"
    file.write_text(text.replace(one.old, one.new))
    # The emulated CUDA kernels are built where tests begin.
    if one.file.startswith("csrc/") and not one.file.startswith("csrc/cuda/"):
        # Optimised no further than compiles fast.
        environment = {"R2VPO_KERNELS_CUDA": "0", "CXXFLAGS": "-O1"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = os.environ | environment
        subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
        report = json.loads((checkout / "r2vpo_kernels/backends/build_report.json").read_text())
        assert report["cpp"].startswith("built by"), report


def check_imports(checkout: Path) -> None:
    """The suites import the package of the directory they run in, not what is installed."""
    command = [sys.executable, "-c", "import r2vpo_kernels; print(r2vpo_kernels.__file__)"]
    imported = subprocess.check_output(command, cwd=checkout, text=True)
    assert Path(imported.strip()).is_relative_to(checkout), imported


def first_failure(target: str, expression: str, checkout: Path) -> str | None:
    venv = Path(sys.prefix)
    command = ["make", f"--old-file={venv}/ready", f"VENV={venv}", target]
    # Files that the expression does not name would be collected for nothing.
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*/test_*.py")}
    named = {file for file in files if Path(file).stem in re.findall(r"\w+", expression)}
    recipe = subprocess.check_output([*command, "--dry-run"], cwd=checkout, text=True)
    paths = re.findall(r"(?<!--ignore )tests/[\w/.]+", recipe)
    if paths and not any(file.startswith(path) for file in named for path in paths):
        return None
    ignored = " ".join(f"--ignore={file}" for file in sorted(files - named))
    # CI: examples are the same in every run.
    environment = {"CI": "1", "PYTEST_ADDOPTS": f"-x -k '{expression}' {ignored}"}
    run = subprocess.run(
        command, cwd=checkout, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    summary = run.stdout.rpartition("short test summary info")[2]
    if failure := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", summary, re.MULTILINE):
        return failure[1]
    # Nothing ran, or nothing failed; what else make may end with is no answer.
    assert re.search(r"^(\d+ (passed|skipped|deselected)|no tests ran)", summary, re.M), run.stdout
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of breaks")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    options = parser.parse_args()
    chosen = [b for b in BREAKS if not options.words or any(w in b.name for w in options.words)]
    subprocess.run([sys.executable, "tests/support/emulator/build.py"], cwd=ROOT, check=True)
    print("| break | file | noticed by | first failing test |\n|---|---|---|---|", flush=True)
    unnoticed = 0
    for number, one in enumerate(chosen):
        with tempfile.TemporaryDirectory() as folder:
            checkout = Path(folder).resolve()
            copy_checkout(checkout)
            if number == 0:
                check_imports(checkout)
            (checkout / "build").mkdir(exist_ok=True)
            apply(one, checkout)
            for expression in one.noticed_by:
                runs = ((s, t) for s in SUITES if s in options.suite for t in SUITES[s])
                found = ((s, first_failure(t, expression, checkout)) for s, t in runs)
                suite, test = next(((s, t) for s, t in found if t), ("nothing", ""))
                unnoticed += not test
                test = f"`{test.removeprefix('tests/')}`" if test else ""
                print(f"| {one.name} | `{one.file}` | {suite} | {test} |", flush=True)
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
