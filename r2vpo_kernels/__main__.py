"""`python -m r2vpo_kernels`: versions, the backends found, and why another was not."""

import platform
from importlib import metadata

import torch

from .backends import registry
from .backends.compiled import build_report
from .sources.products import multiplies_in_float32


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


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


if __name__ == "__main__":
    main()
