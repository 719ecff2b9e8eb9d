"""What the docs' code prints is what they say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists()) / "docs"


@pytest.mark.parametrize("page", ["sampling_masks.md"])
def test_code_prints_its_last_lines(page):
    """One block after another; what each ends with, behind #, is its output."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        lines = block.splitlines()
        expected = []
        while lines[-1].startswith("# "):
            expected.insert(0, lines.pop()[2:])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("\n".join(lines), names)
        assert printed.getvalue().splitlines() == expected
