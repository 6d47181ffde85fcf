"""The examples that users read: those in docstrings, and those in the packages' READMEs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

PACKAGES = sorted((Path(__file__).parents[1] / "packages").iterdir())

# By name, not by path: pointed at a folder named `torch`, doctest takes it for torch itself.
MODULES = sorted(
    ".".join(path.relative_to(package / "src").with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in package.glob("src/**/*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_readme(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (package / "README.md").read_text(), re.M | re.S)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:  # later ones use what earlier ones made, as a reader would
        exec(block, namespace)
