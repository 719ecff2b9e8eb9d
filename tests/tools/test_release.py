"""What may be released, and what must hold of this installation as of a wheel."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import wheel
from support.release import problems

PYPROJECT, CITATION = 'name = "x"\nversion = "1.2.3"\n', "cff-version: 1.2.0\nversion: 1.2.3\n"
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.3\n\n- Faster.\n\n## 1.2.2\n\n- Right.\n"


def test_a_tag_that_fits_may_be_released():
    assert problems("v1.2.3", PYPROJECT, CITATION, CHANGELOG) == []


def test_what_does_not_fit_is_named():
    (version, citation, section) = problems("v1.2.4", PYPROJECT, CITATION, CHANGELOG)
    assert version.startswith("pyproject.toml: got version 1.2.3, expected 1.2.4")
    assert citation.startswith("CITATION.cff: got version 1.2.3, expected 1.2.4")
    assert section.startswith("CHANGELOG.md: got no section '1.2.4'")
    left_over = CHANGELOG.replace("## 1.2.3", "- Soon.\n\n## 1.2.3")
    (entries,) = problems("v1.2.3", PYPROJECT, CITATION, left_over)
    assert entries.startswith("CHANGELOG.md: got entries under 'Unreleased'")
    (empty,) = problems("v1.2.3", PYPROJECT, CITATION, CHANGELOG.replace("- Faster.\n", ""))
    assert empty.startswith("CHANGELOG.md: got no section '1.2.3'")


@pytest.mark.slow
def test_this_installation_is_what_a_wheel_must_be():
    """The right loss by the C++ kernels, and one OpenMP runtime in the process."""
    run = subprocess.run(
        [sys.executable, wheel.__file__], capture_output=True, text=True, cwd=Path("/")
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "the wheel computes, with one OpenMP runtime\n"
