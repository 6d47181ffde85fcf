"""Processes that have imported an engine; see `processes` in the root's conftest."""

from __future__ import annotations

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
