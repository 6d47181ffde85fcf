"""The examples in the core's pages run, one after the other, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoclip.core import RULES

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str) -> dict[str, object]:
    """The names that the page's Python defines."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.M | re.S)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    return namespace


def test_the_core_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the examples write files
    try:
        names = run("core.md")
    finally:
        RULES.pop("median", None)  # the rule that the page adds
    assert {"Median", "resumed"} <= names.keys()
    assert "holds a clipper with the standard rule, but" in capsys.readouterr().out
    files = {"history.safetensors", "median.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_the_state_format() -> None:
    assert {"read_state", "fitted"} <= run("state-format.md").keys()
