"""What a built wheel must do where it is installed: the right loss, and one OpenMP runtime.

Run by cibuildwheel in the environment of each wheel, without pytest. As `wheel.py eager` it takes
an installation without kernels, or with those of a compiler without OpenMP, for what it is.
"""

import math
import sys

import torch

from r2vpo_kernels import r2vpo_loss
from r2vpo_kernels.__main__ import openmp_runtimes
from r2vpo_kernels.backends import registry
from r2vpo_kernels.backends.compiled import build_report


def main() -> None:
    eager = sys.argv[1:] == ["eager"]
    if not eager:
        reason = registry.why_not("cpp", torch.empty(0))
        assert reason is None, f"the C++ kernels are not in this wheel: {reason}"
        assert "without OpenMP" not in build_report("cpp"), build_report("cpp")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator).requires_grad_()
    labels = torch.randint(1000, (64,), generator=generator)
    old_logps = torch.full((64,), -math.log(1000))
    results = []
    for backend in ("auto", "eager"):
        loss = r2vpo_loss(logits, labels, old_logps, torch.ones(64), backend=backend).loss
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*results)
    if sys.platform == "linux" and not eager:
        found = openmp_runtimes()
        assert len(found) == 1, f"expected one OpenMP runtime, found {sorted(found)}"
    print(f"the wheel computes, with {'what is there' if eager else 'one OpenMP runtime'}")


if __name__ == "__main__":
    main()
