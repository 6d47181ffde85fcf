"""Real wheels, and fresh virtual environments to install them into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from processes import HARNESS, ForkServer, Outcome, execute

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        root: its folder.
        wheels: the folder that it installs our packages from.
        server: of processes that have imported torch, as it is in this environment.
    """

    root: Path
    wheels: Path
    server: ForkServer

    @property
    def site_packages(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    def pip(self, command: str, *arguments: str | Path) -> None:
        """Run pip with our wheels and no index; it must succeed."""
        local = ("--no-index", "--find-links", self.wheels) if command == "install" else ()
        self.pip_with_index(command, *local, *arguments)

    def pip_with_index(self, *arguments: str | Path) -> None:
        """Run pip; it must succeed."""
        done = self._python("-m", "pip", *arguments)
        assert done.returncode == 0, f"pip {arguments}\n{done.stdout}\n{done.stderr}"

    def succeed(self, code: str) -> str:
        """Run `code`, which must succeed, and return what it printed."""
        done = self._python("-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fail(self, code: str) -> str:
        """Run `code`, which must raise, and return the traceback."""
        done = self._python("-c", code)
        assert done.returncode == 1, done.stdout
        return done.stderr

    def succeed_with_torch(self, code: str) -> str:
        """As `succeed`, without waiting for the import of torch."""
        outcome = self._with_torch(code)
        assert outcome.status == 0, str(outcome)
        return outcome.output.strip()

    def fail_with_torch(self, code: str) -> str:
        """As `fail`, without waiting for the import of torch."""
        outcome = self._with_torch(code)
        assert outcome.status == 1, str(outcome)
        return outcome.error

    def _with_torch(self, code: str) -> Outcome:
        arguments = {"code": code, "site_packages": self.site_packages}
        return self.server.run(execute, arguments)[0]

    def installed(self) -> dict[str, str]:
        """The versions of what pip installed here; what is only lent does not count."""
        found = [path for path in self.site_packages.glob("*.dist-info") if not path.is_symlink()]
        return {each.name: each.version for each in map(Distribution.at, found)}

    def _python(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        # Isolated: neither PYTHONPATH nor the current folder lends it our source tree. With
        # bytecode, as users have it: an uninstall may leave a __pycache__ behind.
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        command = [self.root / "bin" / "python", "-I", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of each of the four packages, built from the tree."""
    folder = tmp_path_factory.mktemp("distributions")
    for project in (REPOSITORY, *sorted((REPOSITORY / "packages").iterdir())):
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    return folder


def lend(environment: Path, only: Sequence[str] = ("",), without: Sequence[str] = ()) -> None:
    """Lend a new virtual environment what is installed in the one that runs the tests.

    By links, one by one, which pip counts as installed there; what is left out is truly absent. (A
    .pth file to the parent would lend our own packages, too, and pip would have nothing to
    install.)

    Args:
        environment: its folder.
        only: how the names of what it is lent start.
        without: how the names of what it is not lent start; nothing of ours is lent.
    """
    venv.create(environment, symlinks=True, with_pip=False)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    ours = ("autoclip", "_autoclip", "__editable__")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.startswith(tuple(only)) and not entry.name.startswith((*ours, *without)):
            (site_packages / entry.name).symlink_to(entry)


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """In an environment that has nothing of ours; a process turns to one that has."""
    root = tmp_path_factory.mktemp("environment")
    lend(root)
    server = ForkServer(HARNESS / "torch_alone.py", python=(root / "bin" / "python", "-I"))
    yield server
    server.close()


@pytest.fixture
def make_environment(
    tmp_path: Path, distributions: Path, torch_server: ForkServer
) -> Callable[..., Environment]:
    """Makes a virtual environment that has nothing of ours; for the arguments, see `lend`."""

    def make(only: Sequence[str] = ("",), without: Sequence[str] = ()) -> Environment:
        lend(tmp_path / "venv", only, without)
        return Environment(tmp_path / "venv", distributions, torch_server)

    return make
