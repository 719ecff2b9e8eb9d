"""What compiled CUDA kernels are made of, by the disassembler that comes with Triton.

PYTHONPATH=tests python -m support.sass       # of the module r2vpo_kernels.backends._cuda
"""

import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path


def run_tool(name, *arguments, cwd=None):
    """The output of cuobjdump or nvdisasm."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    command = [str(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def kernels_in(cubin):
    """{mangled name: its resources} of each kernel in a file of machine code.

    Registers, bytes of static shared memory, spills (instructions and bytes), the width in bytes of
    each access to global memory (copies: to shared memory), and the instructions themselves.
    """
    usage = run_tool("cuobjdump", "--dump-resource-usage", cubin)
    sections = re.split(r"^\s*\.section\s+", run_tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        counts = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", numbers)}
        (assembly,) = (text for text in sections if text.startswith(f".text.{name},"))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly)) + counts["STACK"] + counts["LOCAL"]
        found[name] = {
            "registers": counts["REG"],
            "shared": counts["SHARED"],
            "spills": spills,
            "loads": sorted(_widths("LDG", assembly)),
            "copies": sorted(_widths("LDGSTS", assembly)),
            "stores": sorted(_widths("STG", assembly)),
            "assembly": assembly,
        }
    return found


def cuda_kernels():
    """{target: {name: resources}} of the CUDA backend as built.

    The name of a kernel over rows: (kernel, dtype, entropy, sampling mask, chunks held); over
    tokens: (kernel,).
    """
    folder = Path(__file__).resolve().parents[2] / "r2vpo_kernels" / "backends"
    (module,) = folder.glob("_cuda*.so")
    found = {}
    with tempfile.TemporaryDirectory() as cubins:
        run_tool("cuobjdump", "-xelf", "all", module, cwd=cubins)
        for cubin in sorted(Path(cubins).glob("*.cubin")):
            kernels = {_name(mangled): r for mangled, r in kernels_in(cubin).items()}
            # The runtime's own has none.
            if kernels:
                found[cubin.suffixes[-2].removeprefix(".")] = kernels
    return found


def _name(mangled):
    row = r"row_kernelINS_\d+([A-Z]\w+?)ENS_\d+([A-Z]\w+?)ELb(\d)ELb(\d)ELi(\d+)E"
    if match := re.search(row, mangled):
        dtype, kernel, entropy, support, held = match.groups()
        return kernel, dtype, entropy == "1", support == "1", int(held)
    _, _, token = mangled.partition("token_kernelI")
    return (" of ".join(re.findall(r"\d((?:[A-Z][a-z]+)+)", token)),)


def _widths(instruction, assembly):
    for suffix in re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", assembly):
        named = re.search(r"\.(?:U|S)?(8|16|64|128)\b", suffix)
        yield int(named[1]) // 8 if named else 4


def main():
    print(f"{'target':8} {'kernel':40} registers spills")
    for target, kernels in cuda_kernels().items():
        for name, r in sorted(kernels.items(), key=str):
            # From sm_90 on clusters take the place of registers that hold.
            if target == "sm_80" or name[4:] in ((), (0,)):
                print(
                    f"{target:8} {' '.join(map(str, name)):40} {r['registers']:9} {r['spills']:6}"
                )


if __name__ == "__main__":
    main()
