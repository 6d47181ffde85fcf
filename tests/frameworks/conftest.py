"""The environment of these tests: `hatch run frameworks:test`, and `hatch run vision:test`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# For `recipes`. A folder here with the name of a package would be imported where that is missing.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder for each test: trainers write their logs and checkpoints there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
