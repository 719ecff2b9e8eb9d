"""What a compiled CUDA kernel is made of, by the disassembler that comes with Triton."""

import re
import subprocess
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
    each access to global memory, and the instructions themselves.
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
            "stores": sorted(_widths("STG", assembly)),
            "assembly": assembly,
        }
    return found


def _widths(instruction, assembly):
    for suffix in re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", assembly):
        named = re.search(r"\.(?:U|S)?(8|16|64|128)\b", suffix)
        yield int(named[1]) // 8 if named else 4
