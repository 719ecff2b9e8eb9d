"""Registered ops and torch.compile, as several tests take them."""

import shutil

import torch

COMPILER = "inductor" if shutil.which("g++") else "aot_eager"


def check_op(name, arguments):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The last compares outputs by allclose; the workspace's integers are NaN as floats.
    if name not in ("logps_forward", "prepare", "linear_logps_forward"):
        checks.append("test_aot_dispatch_dynamic")
    op = getattr(torch.ops.r2vpo_kernels, name).default
    torch.library.opcheck(op, arguments, test_utils=checks)
