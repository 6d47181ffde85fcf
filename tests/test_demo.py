"""The demo, with as little training as it takes: `hatch run demo` must not rot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "docs" / "examples" / "digits.py"


def test_it_prints_a_table_and_leaves_a_plot_and_a_state(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--seeds", "1", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("arm"))
    arms = [line[:14].strip() for line in lines[start + 1 : start + 4]]
    assert arms == ["no clipping", "max_norm=1.0", "AutoClip"]
    assert "loaded it into a new one: the same state" in done.stdout
    output = tmp_path / "output"
    assert {path.name for path in output.iterdir()} == {"digits.png", "digits.autoclip"}
    assert (output / "digits.png").read_bytes().startswith(b"\x89PNG")
