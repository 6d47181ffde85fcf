"""The process that pages and examples are forked from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ForkServer

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))  # for `pages` and `programs`


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer(FOLDER / "programs.py")
    yield server
    server.close()
