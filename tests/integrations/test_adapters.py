"""What holds for all adapters."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import types

import pytest
from support.trainers import FRAMEWORKS

from r2vpo_kernels import VarianceConstraint, r2vpo_loss
from r2vpo_kernels.integrations import Trainer
from r2vpo_kernels.integrations.hook import Settings


@pytest.mark.slow
def test_the_package_imports_no_framework():
    code = (
        "import sys, r2vpo_kernels, r2vpo_kernels.integrations\n"
        f"found = [n for n in {[*FRAMEWORKS.values()]} if n in sys.modules]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_those_of_the_loss():
    loss, constraint = (inspect.signature(f).parameters for f in (r2vpo_loss, VarianceConstraint))
    for field in dataclasses.fields(Settings):
        if field.name in loss:
            assert field.default == loss[field.name].default
        elif field.name.startswith("variance_coef_") and field.name != "variance_coef_file":
            name = field.name.removeprefix("variance_coef_")
            assert field.default == constraint[name if name == "lr" else f"{name}_coef"].default
        else:
            assert field.default is None


@pytest.mark.parametrize(("adapter", "framework"), FRAMEWORKS.items())
def test_a_trainer_that_is_not_there_is_named(monkeypatch, forget, adapter, framework):
    forget(framework, f"r2vpo_kernels.integrations.{adapter}")
    monkeypatch.setitem(sys.modules, framework, None)
    package = adapter.replace("_", "-")
    message = rf"{package}: got version .*, which cannot be imported as needed .*tested with"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"r2vpo_kernels.integrations.{adapter}")


def some_function(a, *, b=1):
    pass


@dataclasses.dataclass
class Record:
    a: int
    b: list = dataclasses.field(default_factory=list)


def test_what_a_trainer_lacks_is_named(monkeypatch):
    module = types.ModuleType("some_trainer")
    module.__version__ = "0.3.1"
    monkeypatch.setitem(sys.modules, "some_trainer", module)
    trainer = Trainer("some-trainer", tested="0.2 and 0.3.0")
    assert trainer.version == "0.3.1"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "7.0.dev1")
    assert trainer.version == "7.0.dev1"
    trainer.takes(some_function, "a", "b")
    trainer.takes(lambda **keywords: None, "a")
    trainer.has(Record, "a", "b", "__init__")
    found = r"some-trainer: got version 7\.0\.dev1, which "
    tested = r"; this adapter was tested with 0\.2 and 0\.3\.0"
    with pytest.raises(
        ImportError, match=found + ".*some_function without the parameter c" + tested
    ):
        trainer.takes(some_function, "a", "c", "d")
    with pytest.raises(ImportError, match=found + "has Record without c" + tested):
        trainer.has(Record, "a", "c")
    with (
        pytest.raises(ImportError, match=found + ".*cannot import name 'nothing'.*" + tested),
        trainer.imports(),
    ):
        from some_trainer import nothing  # noqa: F401


def test_a_trainer_without_a_version(monkeypatch):
    assert Trainer("no-trainer", tested="1").version == "unknown"
