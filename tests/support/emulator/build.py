"""The emulated CUDA backend: built if its sources changed, and put in the place of the real one."""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TARGET = ROOT / "build" / "emulator" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
# Contraction as in setup.py; optimised no further than compiles fast.
FLAGS = "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -ffp-contract=off -fno-math-errno"
FLAGS += " -Wall -Wextra -Wno-psabi"

# A row of some hundred columns is then shared out between blocks.
DEFAULTS = {"stages": 5, "most_stages": 6, "clusters": True, "held_at_once": 3, "seed": 0}


def build() -> Path:
    folders = ("csrc", "csrc/cpu", "csrc/cuda", "tests/support/emulator")
    sources = [path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    if TARGET.exists() and TARGET.stat().st_mtime > newest:
        return TARGET
    import pybind11

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name until it is whole: another process may be building it too.
    unfinished = TARGET.with_suffix(f".{os.getpid()}")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *FLAGS.split(), *includes, str(HERE / "module.cpp"), "-o"]
    subprocess.run([*command, str(unfinished)], check=True)
    unfinished.replace(TARGET)
    return TARGET


def emulate_cuda():
    """Before r2vpo_kernels is imported: from now on backend "cuda" takes a CPU's tensors."""
    name = "r2vpo_kernels.backends._cuda"
    spec = importlib.util.spec_from_file_location(name, build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    module.configure(**DEFAULTS)


if __name__ == "__main__":
    build()
