"""Processes that have imported an engine; see `processes` in the root's conftest."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ForkServer

FOLDER = Path(__file__).parent
# For `training`, which the tests here share.
sys.path.insert(0, str(FOLDER))


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer(FOLDER / "engine_ranks.py")
    yield server
    server.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs DeepSpeed here: the processes that a test forks cannot skip it."""
    if importlib.util.find_spec("deepspeed") is not None:
        return
    skip = pytest.mark.skip(reason="DeepSpeed is not part of this environment")
    for item in items:
        if FOLDER in item.path.parents and ("ZeRO" in item.name or "deepspeed" in item.name):
            item.add_marker(skip)
