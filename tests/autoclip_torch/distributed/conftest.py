"""Runs a test marked `processes(n)` in n processes at once, joined by torch.distributed.

With several numbers, `processes(2, 4)`, the test runs as often, one after the other, and each time
with the same arguments: what one run leaves in `tmp_path`, the next one finds.

The processes are forked for each test from one that has imported torch already, so that they cost
little, and one test's hanging or dying process is no other test's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# For `oracles`, which the tests here share; in the forked processes too.
sys.path.insert(0, str(FOLDER))

SECONDS = 90


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes(*n): run in n processes under torch.distributed.")


class Server:
    """The process that the tests' processes are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(FOLDER / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, count: int, function: pytest.Function, folder: Path) -> dict[int, str]:
        """Run a test in `count` processes; what went wrong, by rank."""
        names = function._fixtureinfo.argnames
        arguments = {name: function.funcargs[name] for name in names}
        request = {
            "path": str(function.path),
            "name": function.originalname,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()},
            "count": count,
            "folder": str(folder),
            "seconds": SECONDS,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of processes has died"
        return {int(rank): report for rank, report in json.loads(answer).items()}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("processes")
    if marker is None:
        return None
    server = pyfuncitem._request.getfixturevalue("server")
    folders = pyfuncitem._request.getfixturevalue("tmp_path_factory")
    for count in marker.args:
        failures = server.run(count, pyfuncitem, folders.mktemp("processes"))
        if failures:
            reports = [f"rank {rank} of {count}:\n{failures[rank]}" for rank in sorted(failures)]
            pytest.fail("\n".join(reports), pytrace=False)
    return True
