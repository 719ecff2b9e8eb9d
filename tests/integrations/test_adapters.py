"""What holds for all adapters."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import types

import pytest

from r2vpo_kernels import r2vpo_loss
from r2vpo_kernels.integrations import check_version

# What `import r2vpo_kernels` must leave alone.
FRAMEWORKS = ("verl", "openrlhf", "slime", "nemo_rl", "prime_rl", "skyrl", "torchtitan", "trl")


def test_the_package_imports_no_framework():
    code = (
        "import sys, r2vpo_kernels, r2vpo_kernels.integrations\n"
        f"found = [n for n in {FRAMEWORKS} if n in sys.modules]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_those_of_the_loss():
    from r2vpo_kernels.integrations.hook import Settings

    signature = inspect.signature(r2vpo_loss).parameters
    for field in dataclasses.fields(Settings):
        assert field.default == signature[field.name].default


@pytest.mark.parametrize(
    ("adapter", "package"),
    [(name, name.replace("_", "-")) for name in FRAMEWORKS[:-1]],
)
def test_an_incompatible_version_is_named(monkeypatch, adapter, package):
    name = f"r2vpo_kernels.integrations.{adapter}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "99.1" if n == package else "0")
    with pytest.raises(
        ImportError, match=rf"{package}: got version 99\.1, expected at least 0\.\d"
    ):
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("1.16.0", True), ("1.16", True), ("1.16.9.post1", True), ("1.16.0rc1", True),
        ("1.9.0", False), ("1.17.0", False), ("1.17.0.dev3", False), ("1.160", False),
        ("2", False), ("unknown", False),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(monkeypatch, found, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    if fits:
        check_version("trl", "1.16", "1.17")
    else:
        with pytest.raises(ImportError, match=f"trl: got version {found}, .*1.16 and below 1.17"):
            check_version("trl", "1.16", "1.17")


def test_a_checkout_names_its_version_itself(monkeypatch):
    module = types.ModuleType("some_trainer")
    module.__version__ = "0.3.1"
    monkeypatch.setitem(sys.modules, "some_trainer", module)
    check_version("some-trainer", "0.3", "0.4")
    with pytest.raises(ImportError, match=r"got version 0\.3\.1, expected at least 0\.4"):
        check_version("some-trainer", "0.4", "0.5")
    with pytest.raises(ImportError, match="no-trainer: got version none"):
        check_version("no-trainer", "0.1", "0.2")
