"""The examples in docs/torch.md run, one after the other, as a reader would run them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"


def test_every_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    torch.manual_seed(0)
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 8
    namespace: dict[str, object] = {}
    for _, block in blocks:
        exec(textwrap.dedent(block), namespace)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "history.autoclip"}
    assert "clipped to" in capsys.readouterr().out
