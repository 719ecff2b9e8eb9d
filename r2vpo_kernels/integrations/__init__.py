"""The loss in trainers: one module per framework, imported only when that module is."""

from __future__ import annotations

import importlib
import importlib.metadata
import re


def check_version(package: str, at_least: str, below: str) -> None:
    """Raise ImportError unless `package` is installed at a version in [at_least, below)."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A checkout on the path has no metadata, but may define __version__.
        try:
            found = importlib.import_module(package.replace("-", "_")).__version__
        except (ImportError, AttributeError):
            found = "none"
    if not _numbers(at_least) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"{package}: got version {found}, expected at least {at_least} and below {below}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """1.16.0rc1 → (1, 16): the release's numbers, without suffix and without trailing zeros.

    A string that starts with no number gives (), which is below every version.
    """
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(n) for n in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
