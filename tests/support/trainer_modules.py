"""Modules under the names of trainers that are not installed."""

import importlib
import importlib.metadata
import sys
import types

import pytest

from .trainers import ADAPTERS, VERSIONS


@pytest.fixture
def forget():
    """A function: modules of these names, and theirs, are imported anew, by this test alone."""
    names, kept = [], {}

    def take_out():
        own = [n for n in sys.modules if any(n == x or n.startswith(f"{x}.") for x in names)]
        return {name: sys.modules.pop(name) for name in own}

    def forget(*given):
        names.extend(given)
        kept.update(take_out())

    yield forget
    for name in take_out().keys() | kept:
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            vars(sys.modules[parent]).pop(child, None)
            if name in kept:
                setattr(sys.modules[parent], child, kept[name])
    sys.modules.update(kept)


@pytest.fixture
def stand_in(monkeypatch, forget):
    """Modules under the trainers' names, and the adapter imported on top of them."""
    forget(*(f"r2vpo_kernels.integrations.{name}" for name in ADAPTERS))
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
