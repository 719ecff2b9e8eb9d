"""Compile what the launchers launch, for a GPU that is not there, and report what came out as JSON.

    PYTHONPATH=tests python -m support.aot_compile cuda 90 32

The launchers run unchanged on CPU tensors under a driver that names the target and launches
nothing. Each launch is made twice, as it comes and through Triton's own search for the variant, and
the driver must be asked for the same. Not in the tests' own process, where Triton interprets.
"""

import functools
import json
import os
import re
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from r2vpo_kernels.backends import calls
from r2vpo_kernels.backends import triton as triton_backend
from r2vpo_kernels.backends.triton import launch
from r2vpo_kernels.output import METRICS
from r2vpo_kernels.sampling import SamplingMask

from .aot import OBJECTIVES
from .sass import kernels_in

PLAIN = {"policy_loss": "ratio", "kl": None, "kl_unbiased": False}


class NoDevice:
    """Answers what a compilation and a launch ask of a driver, and keeps what it was to launch."""

    def __init__(self, target):
        self.target = target
        self.utils = self
        self.launched = []

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**31}

    def load_binary(self, name, binary, shared, device):
        return "module", "function", 0, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            grid, (enter_hook, exit_hook), values = arguments[:3], arguments[7:9], arguments[9:]
            given = [
                value.data_ptr() if isinstance(value, torch.Tensor) else value
                for value, kind in zip(values, source.signature.values(), strict=True)
                if kind != "constexpr"
            ]
            self.launched.append((metadata.hash, grid, enter_hook, exit_hook, given))

        return launch


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
        # Its gradient is the only narrow store, after the walk: behind a barrier of its own, and
        # the one with which loading ahead ends.
        before, _, _ = text.partition("st.global.b16")
        barriers = before[before.rfind("$L__BB") :].count("bar.sync")
        label_last = barriers == 1 + ("cp.async" in text)
        # Of a row with a support in bfloat16: a logit goes into values, a gradient out of them.
        order = " ".join(re.findall(r"(?:ld|st)\.global[\w.]*|bar\.sync", text))
        gather_waits = "ld.global.b16 st.global.b32 bar.sync" in order
        scatter_waits = "bar.sync ld.global.b32 ld.global.b32 st.global.b16" in order
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
        loses_nan, label_first, label_last, gather_waits, scatter_waits = [], *4 * [True]
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
        "label_last": label_last,
        "gather_waits": gather_waits,
        "scatter_waits": scatter_waits,
    }


def sets_of(tokens):
    """As many ids as there are tokens, and more."""
    offsets = torch.arange(tokens + 1)
    return SamplingMask.of(torch.zeros(tokens, dtype=torch.int32), offsets, offsets[0], "full")


def rows_and_tokens(batch, length, with_groups=True, sampled=False, compact=False, objective=PLAIN):
    """Tokens of a batch as `prepare` would have written them; meta tensors have no pointers."""
    units, tokens = batch, batch * length
    size = calls.HEADER + calls.ROWS * tokens + calls.UNIT_ROWS * units
    return calls.Tokens(
        torch.zeros(size), tokens, units, groups=units if with_groups else 1, parts=min(units, 8),
        on_policy=False, sequence_level=False, **objective, with_support=sampled,
        support=calls.Support(sets_of(tokens).token_ids, torch.zeros(tokens), batch, compact)
        if sampled else None,
    )  # fmt: skip


def call_rows(vocabulary, dtype, entropy, sampled, shape):
    """The launches of a plain loss or, with entropy, of one with everything; float16's two."""
    batch, length = shape
    logits = torch.empty(*shape, vocabulary, dtype=dtype)
    dlogits = torch.empty(*shape, vocabulary, dtype=dtype)
    tokens = rows_and_tokens(batch, length, sampled=sampled)
    tokens.kl = "k3" if entropy else None
    per_token = torch.zeros(batch * length)
    maybe = per_token if entropy else None
    # A number may lie anywhere, as one of several stacked losses does.
    number = torch.zeros(length + 1)[length]
    # Rows of a chunk have an index.
    index = torch.zeros(batch * length, dtype=torch.int64) if entropy else None
    kept = (per_token, per_token, per_token, maybe)
    triton_backend.logps_forward(logits, tokens, index, length, *kept)
    triton_backend.logps_backward(
        logits, dlogits, tokens, index, length, *kept, per_token, maybe, number
    )
    if dtype == torch.float16:
        return
    triton_backend.one_pass(logits, dlogits, tokens, index, length, per_token, maybe)
    if not sampled:
        triton_backend.scale(dlogits, number)


def call_one_pass(vocabulary, objective, shape):
    """One pass with everything, for a kind of objective."""
    batch, length = shape
    tokens = rows_and_tokens(batch, length, objective=objective)
    logits = torch.empty(*shape, vocabulary, dtype=torch.bfloat16)
    per_token, index = torch.zeros(batch * length), torch.zeros(batch * length, dtype=torch.int64)
    triton_backend.one_pass(
        logits, torch.empty_like(logits), tokens, index, length, per_token, per_token
    )


def call_head(dtype, everything, shape):
    """The launches of the sparse head: a plain one, or one with all that there is."""
    batch, length = shape
    tokens = rows_and_tokens(batch, length, sampled=True, compact=True)
    count, width = batch * length, 8 * length
    tokens.kl = "k3" if everything else None
    per_token = torch.zeros(count)
    maybe = per_token if everything else None
    hidden, weight = torch.zeros(count, width, dtype=dtype), torch.zeros(9, width, dtype=dtype)
    total = torch.float32 if everything else dtype
    dbias = torch.zeros(9, 1, dtype=total) if everything else None
    head = tokens, hidden, weight, 0.1 * length, maybe
    triton_backend.head_logits(*head, weight[:, 0].clone() if everything else None, 1.0 * batch)
    rows = tokens.support.values.expand(1, count, -1)
    if everything:
        triton_backend.logps_forward(rows, tokens, None, 0, per_token, per_token, per_token, maybe)
        triton_backend.logps_backward(
            rows, rows, tokens, None, 0, per_token, per_token, per_token, maybe, per_token, maybe,
            None,
        )  # fmt: skip
    triton_backend.one_pass(rows, rows, tokens, None, 0, per_token, maybe)
    triton_backend.head_dhidden(*head, torch.zeros(count, width, dtype=total))
    order = torch.zeros(count, dtype=torch.int32)
    dweight = torch.zeros(9, width, dtype=total)
    triton_backend.head_dweight(*head, order, order, dweight, dbias, everything)


def call_finish(tokens, upstream):
    """`finish` of a plain loss or, where there is an upstream gradient, with everything."""
    per_token = torch.zeros(tokens.tokens)
    entropy = means = dlogps = dentropy = None
    loss = torch.zeros(())
    if upstream is not calls.NOTHING:
        entropy = dlogps = dentropy = loss = per_token
        means = torch.zeros(2, tokens.groups)
    triton_backend.finish(
        tokens, per_token, entropy, upstream, means, loss, torch.zeros(3, tokens.groups),
        torch.zeros(len(METRICS)), dlogps, dentropy,
    )  # fmt: skip


def column_of(shape):
    """A view of a larger tensor."""
    batch, length = shape
    spread = torch.zeros(length + 1, batch + 1).t()[:batch, :length]
    return calls.Column(spread, length + 3, 1)


def call_objective(shape, objective, sequence_level):
    tokens = rows_and_tokens(*shape, objective=objective)
    tokens.sequence_level = sequence_level
    call_finish(tokens, column_of(shape))


def call_tokens(shape, variant):
    """The launches of `variant` on what is per token: what is there, and how much of it."""
    batch, length = shape
    tokens = rows_and_tokens(batch, length, variant != "plain", variant == "sampled")
    per_token = torch.zeros(batch * length)
    column, upstream = column_of(shape), calls.NOTHING
    spread = column.tensor
    arguments = calls.Prepare(
        tokens, advantages=column, labels=calls.Column(spread.long(), 1, 1), unit_length=length,
        vocabulary=50 + length, words=50 + length, count_kind=1 + length % 2,
        mean_over_unit=batch % 2 == 0,
        numbers=(0.1 * batch, 1.0, 1.0, 0.1, 0.1, 20.0, 0.1 * length, 0.1, 3.0),
    )  # fmt: skip
    entropy = None
    if variant != "plain":
        entropy, upstream = per_token, column
        tokens.kl, tokens.sequence_level = "k3", variant == "sequence"
        number = calls.Column(torch.zeros(length + 1)[length])
        arguments.mask = calls.Column(spread.bool(), length, 1)
        arguments.old_logps = calls.Column(spread.bfloat16(), length, 1)
        arguments.importance_weights = arguments.variance_coef = column
        arguments.ref_logps = arguments.logps = arguments.entropy = column
        arguments.temperature = number
        arguments.cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
        arguments.group_ids = torch.zeros(batch, dtype=torch.int64)
        arguments.center = torch.zeros(2 * batch)[:: 1 + batch % 2]
        arguments.normalizer, arguments.numbers = number.tensor, torch.zeros(9)
        arguments.logps_out = arguments.entropy_out = per_token
        arguments.activity = per_token.byte()
        arguments.sampling_mask = sets_of(batch * length) if variant == "sampled" else None
        triton_backend.means(tokens, per_token, upstream, torch.zeros(2, batch))
    triton_backend.prepare(arguments)
    call_finish(tokens, upstream)
    parts = torch.zeros(5, batch * length, dtype=torch.float64)
    triton_backend.shard_parts(
        tokens, length, per_token, per_token, per_token, entropy, per_token, parts
    )
    triton_backend.shard_combine(tokens, parts, batch, per_token, per_token, entropy)
    groups = torch.zeros(3, batch * length)
    settings = 0.1 * batch, 0.1 * length, 0.001, 100.0
    triton_backend.dual_step(torch.ones(()), *groups, variant == "token", *settings)


def compiled_by(call, sizes, compiled, target, **described):
    """What `call` compiles at the first of `sizes`, and how many more kernels at the others."""
    compiled.clear()
    call(sizes[0])
    variants = len(compiled)
    for size in sizes[1:]:
        call(size)
    described["recompiled"] = len(compiled) - variants
    return [resources(kernel, target) | described for kernel in compiled.values()]


def main():
    backend, arch, warp_size = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    device = NoDevice(target)
    driver.set_active(device)
    launch.multiprocessors = lambda device: 132
    compiled = {}
    original = launch.Kernel.__call__

    def launch_both_ways(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        kept, self.variants = self.variants, {}
        original(self, *arguments, **keywords)
        (kernel,) = self.variants.values()
        self.variants = kept
        compiled[kernel.hash] = kernel
        assert device.launched[-2] == device.launched[-1], device.launched[-2:]

    launch.Kernel.__call__ = launch_both_ways
    report = []
    sizes = (1, 2), (1, 1), (2, 16), (3, 5), (16, 16)
    for dtype, sampled in (
        (torch.bfloat16, False), (torch.float32, False), (torch.float16, False),
        (torch.bfloat16, True),
    ):  # fmt: skip
        # Whole 16-byte words in every row, and rows that must be peeled.
        for vocabulary in (151936, 50257):
            for entropy in (False, True):
                report += compiled_by(
                    functools.partial(call_rows, vocabulary, dtype, entropy, sampled),
                    sizes,
                    compiled,
                    target,
                    dtype=str(dtype).removeprefix("torch."),
                    vocabulary=vocabulary,
                    entropy=entropy,
                    sampled=sampled,
                )
    for objective, kind in OBJECTIVES.items():
        for vocabulary in (151936, 50257):
            report += compiled_by(
                functools.partial(call_one_pass, vocabulary, kind),
                sizes,
                compiled,
                target,
                dtype="bfloat16",
                vocabulary=vocabulary,
                entropy=True,
                sampled=False,
                objective=objective,
            )
    for everything in (False, True):
        report += compiled_by(
            functools.partial(call_head, torch.bfloat16, everything),
            sizes,
            compiled,
            target,
            dtype="bfloat16",
            everything=everything,
        )
    variants = {
        variant: functools.partial(call_tokens, variant=variant)
        for variant in ("plain", "token", "sequence", "sampled")
    }
    for objective, kind in OBJECTIVES.items():
        for sequence_level in (False, True):
            variant = f"{objective} {'sequence' if sequence_level else 'token'}"
            variants[variant] = functools.partial(
                call_objective, objective=kind, sequence_level=sequence_level
            )
    for variant, call in variants.items():
        # Sequences, and units of one token each.
        for sizes in (((2, 2), (2, 16), (3, 5), (16, 16)), ((2, 1), (3, 1), (16, 1))):
            report += compiled_by(
                call,
                sizes,
                compiled,
                target,
                variant=variant,
                units_of_one=sizes[0][1] == 1,
            )
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
