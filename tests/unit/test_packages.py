"""The packages that pyproject.toml lists are the folders there are: an installed seqc would lack one that is not listed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_listed_packages_are_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: ROOT / place for name, place in setuptools["package-dir"].items()}
    found = {
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    assert sorted(found) == setuptools["packages"]
