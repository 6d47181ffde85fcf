"""Real wheels, and fresh virtual environments to install them into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the folder of wheels that it installs from."""

    root: Path
    wheels: Path

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


@pytest.fixture
def make_environment(tmp_path: Path, distributions: Path) -> Callable[..., Environment]:
    """Makes a virtual environment that has nothing of ours.

    It is lent the installed packages of the environment that runs the tests: those whose name
    starts with one of `only`, but with none of `without`. By links, one by one, which pip counts as
    installed here; what is left out is truly absent. (A .pth file to the parent would lend our own
    packages, too, and pip would have nothing to install.)
    """

    def make(only: Sequence[str] = ("",), without: Sequence[str] = ()) -> Environment:
        environment = Environment(tmp_path / "venv", distributions)
        venv.create(environment.root, symlinks=True, with_pip=False)
        ours = ("autoclip", "_autoclip", "__editable__")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if entry.name.startswith(tuple(only)) and not entry.name.startswith((*ours, *without)):
                (environment.site_packages / entry.name).symlink_to(entry)
        return environment

    return make
