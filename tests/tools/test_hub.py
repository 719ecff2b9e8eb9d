"""The layout for the Hugging Face Hub: a second copy, under another name, beside the package."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import r2vpo_kernels

ROOT = Path(__file__).parents[2]


# As the Hub's loader calls it, and as in somebody's package.
@pytest.mark.parametrize("name", ["_r2vpo_kernels_torch_1a2b3c", "somebodys.r2vpo_kernels"])
def test_it_is_loaded_beside_the_package_and_agrees_with_it(name, tmp_path, monkeypatch):
    subprocess.run(["make", "hub", f"HUB={tmp_path}/hub"], cwd=ROOT, check=True)
    package = tmp_path / "hub" / "torch-ext" / "r2vpo_kernels"
    assert not list(package.rglob("*.so")) and not (package / "integrations").exists()
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    copy = importlib.util.module_from_spec(spec)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType("somebodys"))
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)

    logits = torch.randn(4, 7, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = logits, torch.arange(28).view(4, 7), None, torch.tensor([1.0, -1.0, 2.0, 0.5])
    results = []
    # The copy has no compiled kernels.
    for module, backend in ((r2vpo_kernels, "eager"), (copy, "eager"), (copy, "auto")):
        out = module.r2vpo_loss(*arguments, center="group", group_size=2, backend=backend)
        results.append((out.loss, *torch.autograd.grad(out.loss, logits)))
        # Ops are looked up by name in a graph.
        torch.compile(module.r2vpo_loss, backend="eager", fullgraph=True)(*arguments)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
    assert hasattr(getattr(torch.ops, name.replace(".", "_")), "check")
