"""Whether a tag may be released: python tests/support/release.py v1.2.3

The version is that of pyproject.toml and CITATION.cff, and CHANGELOG.md has a section for it under
an "Unreleased" that is empty.
"""

import re
import sys
from pathlib import Path

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())


def problems(tag: str, pyproject: str, citation: str, changelog: str) -> list[str]:
    found = []
    version = tag.removeprefix("v")
    for name, text, pattern in (
        ("pyproject.toml", pyproject, r'^version = "(.*)"$'),
        ("CITATION.cff", citation, r"^version: (.*)$"),
    ):
        match = re.search(pattern, text, re.MULTILINE)
        if match is None or match[1] != version:
            found.append(
                f"{name}: got version {match and match[1]}, expected {version}, of the tag"
            )
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    contents = {title: body.strip() for title, _, body in (s.partition("\n") for s in sections)}
    if not contents.get(version):
        found.append(
            f"CHANGELOG.md: got no section {version!r}, expected one that says what changed"
        )
    if contents.get("Unreleased"):
        found.append(
            "CHANGELOG.md: got entries under 'Unreleased', expected them under the version"
        )
    return found


def main() -> None:
    texts = (
        (ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    )
    found = problems(sys.argv[1], *texts)
    print("\n".join(found) or f"{sys.argv[1]} may be released")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
