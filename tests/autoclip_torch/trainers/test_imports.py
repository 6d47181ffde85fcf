"""Whose library is imported when, seen in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from processes import HARNESS, ForkServer, execute

LIBRARIES = ["lightning", "pytorch_lightning", "transformers", "accelerate"]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], str]]:
    """Runs a program in a process that has imported torch alone, and returns what it printed."""
    server = ForkServer(HARNESS / "torch_alone.py")
    yield lambda code: server.call(execute, code=code).strip()
    server.close()


def test_autoclip_torch_imports_no_trainer(run: Callable[[str], str]) -> None:
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
def test_a_missing_library_is_named_with_the_command(
    run: Callable[[str], str], module: str, missing: str, extra: str
) -> None:
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
