"""`python -m r2vpo_kernels`: versions, the backends found, why another was not, what is wrong."""

import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from .backends import registry
from .backends.compiled import build_report
from .sources.products import multiplies_in_float32

OLDEST_TORCH = (2, 11)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def openmp_runtimes() -> set[str]:
    """The OpenMP libraries in this process, where the system tells (Linux)."""
    maps = Path("/proc/self/maps")
    files = (line.split()[-1] for line in maps.read_text().splitlines()) if maps.exists() else ()
    return {file for file in files if re.match(r"lib(gomp|omp|iomp)", Path(file).name)}


def problems(torch_version: str, runtimes: set[str], package: Path) -> list[str]:
    """What is wrong with this installation, and what to do, one line each."""
    found = []
    numbers = tuple(map(int, re.findall(r"\d+", torch_version)[:2]))
    if numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        found.append(f"torch {torch_version} is too old: pip install 'torch>={oldest}'")
    if len(runtimes) > 1:
        found.append(
            f"{len(runtimes)} OpenMP runtimes, each with threads of its own "
            f"({', '.join(sorted(runtimes))}): import torch first, or build all with torch's"
        )
    built = [file.stat().st_mtime for file in (package / "backends").glob("_cpp.*")]
    sources = [file for file in (package.parent / "csrc").rglob("*") if file.is_file()]
    if sources and not (package / "backends" / "build_report.json").exists():
        found.append(
            f"this is the source folder {package.parent}, in which nothing is built: leave it, or "
            "pip install --editable ."
        )
    changed = [file for file in sources if built and file.stat().st_mtime > max(built)]
    if changed:
        name = changed[0].relative_to(package.parent)
        found.append(f"the C++ kernels are older than {name}: pip install --editable .")
    return found


def main() -> None:
    print(f"r2vpo_kernels {_version('r2vpo_kernels')}")
    print(f"python {platform.python_version()}, {platform.machine()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    for dtype in (torch.bfloat16, torch.float16):
        how = "in float32" if multiplies_in_float32(torch.empty(0), dtype) else "by its units"
        print(f"products of {dtype} matrices on this CPU: {how}")
    print(f"triton {_version('triton')}")
    found = registry.available()
    if "cpp" in found:
        cpp = registry.load("cpp")
        sets = " < ".join(cpp.INSTRUCTION_SETS)
        print(f"cpp {build_report('cpp')}; here {cpp.INSTRUCTION_SET} (of {sets})")
    if "cuda" in found:
        print(f"cuda {build_report('cuda')}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"GPU {torch.cuda.get_device_name()}")
    for device in devices:
        logits = torch.empty(1, 1, 1, device=device)
        print(f"\nbackends for {device} tensors (auto: {registry.choose_backend('auto', logits)})")
        for backend in ("eager", *registry.TABLE):
            print(f"  {backend:8}{registry.why_not(backend, logits) or 'available'}")
    for problem in problems(torch.__version__, openmp_runtimes(), Path(__file__).parent):
        print(f"\nPROBLEM: {problem}")


if __name__ == "__main__":
    main()
