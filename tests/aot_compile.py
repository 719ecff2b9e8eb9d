"""Compile what the launchers launch, for a GPU that is not there, and report what came out as JSON.

    python tests/aot_compile.py cuda 90 32

The launchers run unchanged on CPU tensors under a driver that names the target and launches
nothing. Not in the tests' own process, where Triton interprets.
"""

import json
import os
import re
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch
from sass import kernels_in
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from r2vpo_kernels.backends import triton_kernels


class NoDevice:
    """Answers what a compilation asks of a driver."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def resources(kernel, target) -> dict:
    """Registers, spills, shared memory, and the width in bytes of each access to global memory."""
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            (found,) = kernels_in(file.name).values()
        registers, spills = found["registers"], found["spills"]
        loads, stores = sorted(found["loads"] + found["copies"]), found["stores"]
        maxima = re.findall(r"\b(?:max|min)\S*\.f32", kernel.asm["ptx"])
        loses_nan = [m for m in maxima if ".NaN" not in m]
        # In bfloat16 the label's logit is the only narrow load of an aligned row.
        text = kernel.asm["ptx"]
        label, store = text.find("ld.global.b16"), text.find("st.global.cs.v4")
        label_first = 0 <= label < store and "bar.sync" in text[label:store]
    else:
        assembly = kernel.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # noqa: E731
        registers = number("vgpr_count")
        spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
        sizes = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "dword": 4}
        sizes |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}
        pattern = r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9]+)"
        found = re.findall(pattern, assembly)
        loads, stores = (
            sorted(sizes[name] for kind, name in found if kind == which)
            for which in ("load", "store")
        )
        loses_nan, label_first = [], True
    return {
        "kernel": kernel.name,
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "threads": kernel.metadata.num_warps * target.warp_size,
        "loads": loads,
        "stores": stores,
        "loses_nan": loses_nan,
        "label_first": label_first,
    }


def call_everything(shape, dtype, entropy):
    """The launches of a plain loss or, with entropy, of one with everything; float16's two."""
    batch, length, _ = shape
    # meta tensors have no pointers; these take address space alone.
    logits = torch.empty(shape, dtype=dtype)
    dlogits = torch.empty(shape, dtype=dtype)
    labels = torch.zeros(batch * length, dtype=torch.int64)
    token = torch.zeros(batch * length)
    # A number may lie anywhere, as one of several stacked losses does.
    number = torch.zeros(shape[1] + 1)[shape[1]]
    triton_kernels.logps_forward(logits, labels, token, token, token, token, token, entropy)
    triton_kernels.logps_backward(
        logits, dlogits, labels, token, token, token, token, token, token, token, entropy
    )
    if dtype == torch.float16:
        return
    triton_kernels.one_pass(
        logits, dlogits, labels, token, token, token, token, token, token,
        token if entropy else None, number, number, number, "k3", token, token, entropy,
    )  # fmt: skip
    triton_kernels.scale(dlogits, number)


def main():
    backend, arch, warp_size = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    driver.set_active(NoDevice(target))
    triton_kernels._multiprocessors = lambda device: 132
    compiled = {}
    original = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **keywords):
        kernel = original(self, *arguments, grid=grid, warmup=True, **keywords)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    report = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        # Whole 16-byte words in every row, and rows that must be peeled.
        for vocabulary in (151936, 50257):
            for entropy in (False, True):
                compiled.clear()
                call_everything((1, 2, vocabulary), dtype, entropy)
                variants = len(compiled)
                # Nothing that varies between steps compiles anything again.
                for batch, length in ((1, 1), (2, 16), (3, 5), (16, 16)):
                    call_everything((batch, length, vocabulary), dtype, entropy)
                recompiled = len(compiled) - variants
                for kernel in compiled.values():
                    report.append(
                        resources(kernel, target)
                        | {
                            "dtype": str(dtype).removeprefix("torch."),
                            "vocabulary": vocabulary,
                            "entropy": entropy,
                            "recompiled": recompiled,
                        }
                    )
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
