"""The table of deviations that contributors print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from implementations import IMPLEMENTATIONS


@pytest.mark.nightly  # test_conformance compares the same numbers
def test_the_script_prints_every_implementation() -> None:
    """As a script, which finds the harness without pytest."""
    script = Path(__file__).with_name("report.py")
    found = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    lines = found.stdout.splitlines()[1:]
    names = [name for name in IMPLEMENTATIONS if any(line.startswith(name) for line in lines)]
    assert names == [*IMPLEMENTATIONS]
