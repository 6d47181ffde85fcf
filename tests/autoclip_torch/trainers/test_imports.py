"""Whose library is imported when, seen in fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIBRARIES = ["lightning", "pytorch_lightning", "transformers", "accelerate"]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_autoclip_torch_imports_no_trainer() -> None:
    code = "import sys, autoclip.torch, autoclip.torch.logging; print(*sys.modules)"
    modules = run(code).split()
    assert "autoclip.torch" in modules
    assert not set(modules) & set(LIBRARIES)


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("lightning", "lightning", "lightning"),
        ("transformers", "transformers", "transformers"),
        ("transformers", "accelerate", "transformers"),
    ],
)
def test_a_missing_library_is_named_with_the_command(module: str, missing: str, extra: str) -> None:
    said = run(
        f"""
import sys
sys.modules[{missing!r}] = None  # as if it were not installed
try:
    import autoclip.torch.{module}
except ImportError as error:
    print(error)
"""
    )
    assert f'pip install "autoclip-torch[{extra}]"' in said
