"""Modules under the names of trainers that are not installed."""

import importlib
import importlib.metadata
import sys
import types

import pytest
from support.trainers import VERSIONS


@pytest.fixture
def stand_in(monkeypatch):
    """Modules under the trainers' names, and the adapter imported on top of them."""
    for name in list(sys.modules):
        if name.startswith("r2vpo_kernels.integrations."):
            monkeypatch.delitem(sys.modules, name)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: VERSIONS.get(n) or real(n))

    def install(adapter, **modules):
        for path, content in modules.items():
            parts = path.split("__")
            for i in range(1, len(parts)):
                parent = ".".join(parts[:i])
                if parent not in sys.modules:
                    package = types.ModuleType(parent)
                    package.__path__ = []
                    monkeypatch.setitem(sys.modules, parent, package)
            name = ".".join(parts)
            if not isinstance(content, types.ModuleType):
                module = types.ModuleType(name)
                vars(module).update(content)
                content = module
            monkeypatch.setitem(sys.modules, name, content)
            monkeypatch.setattr(
                sys.modules[".".join(parts[:-1])], parts[-1], content, raising=False
            )
        return importlib.import_module(f"r2vpo_kernels.integrations.{adapter}")

    return install
