"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from unittest.mock import patch

import pytest
from pages import ROOT

from autoclip.core.adapter import RULES

# By name, not by path: pointed at a folder named `torch`, doctest takes it for torch itself.
MODULES = sorted(
    ".".join(path.relative_to(package / "src").with_suffix("").parts).removesuffix(".__init__")
    for package in (ROOT / "packages").iterdir()
    for path in package.glob("src/**/*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    if name == "autoclip.torch.deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not part of this environment")
    with patch.dict(RULES):  # some examples register one
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
