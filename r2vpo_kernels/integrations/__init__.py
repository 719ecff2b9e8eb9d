"""The loss in trainers: one module per framework, imported only when that module is."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Trainer:
    """What an adapter needs of its trainer, looked for where it is used.

    Versions are not compared: main branches, forks and checkouts name none, or another.

    Args:
        package: the trainer's distribution, as pip names it.
        tested: the versions that the adapter was run with, for people to read.
    """

    def __init__(self, package: str, tested: str) -> None:
        self.package = package
        self.tested = tested

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            # A checkout on the path has no metadata, but may define __version__.
            try:
                return str(importlib.import_module(self.package.replace("-", "_")).__version__)
            except (ImportError, AttributeError):
                return "unknown"

    def unmet(self, need: str) -> ImportError:
        return ImportError(
            f"{self.package}: got version {self.version}, which {need}; "
            f"this adapter was tested with {self.tested}"
        )

    @contextmanager
    def imports(self) -> Iterator[None]:
        """Around the adapter's imports of the trainer: a name that is not there is named."""
        try:
            yield
        except ImportError as error:
            raise self.unmet(f"cannot be imported as needed ({error})") from error

    def takes(self, function: Callable[..., Any], *parameters: str) -> None:
        """Raise ImportError unless `function` has these parameters."""
        known = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return
        missing = [name for name in parameters if name not in known]
        if missing:
            where = f"{function.__module__}.{function.__qualname__}"
            raise self.unmet(f"has {where} without the parameter {missing[0]}")

    def has(self, owner: Any, *attributes: str) -> None:
        """Raise ImportError unless `owner`, a module, class or object, has these attributes.

        A dataclass has its fields.
        """
        fields = getattr(owner, "__dataclass_fields__", {})
        missing = [name for name in attributes if not hasattr(owner, name) and name not in fields]
        if missing:
            name = getattr(owner, "__name__", type(owner).__name__)
            raise self.unmet(f"has {name} without {missing[0]}")
