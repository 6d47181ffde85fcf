"""Declarations and contents of the four distributions."""

from __future__ import annotations

import email
import shlex
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PROJECTS = {
    "autoclip": REPOSITORY,
    "autoclip-core": REPOSITORY / "packages" / "autoclip-core",
    "autoclip-torch": REPOSITORY / "packages" / "autoclip-torch",
    "autoclip-tf": REPOSITORY / "packages" / "autoclip-tf",
}
CODE = [name for name in PROJECTS if name != "autoclip"]
PLACEHOLDERS = {f"autoclip/{name}.py" for name in ("torch", "tf", "QuantileClip", "StandardClip")}


def declared(name: str) -> ProjectMetadata:
    """The version in the pyproject file: an installed environment does not notice a new one."""
    return ProjectMetadata(str(PROJECTS[name]), PluginManager())


def wheel(folder: Path, name: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(folder.glob(f"{name.replace('-', '_')}-*.whl")))


def sdist(folder: Path, name: str) -> tarfile.TarFile:
    return tarfile.open(next(folder.glob(f"{name.replace('-', '_')}-*.tar.gz")))


def contents(archive: zipfile.ZipFile) -> set[str]:
    """The files that a wheel puts into site-packages, its own metadata aside."""
    return {file for file in archive.namelist() if ".dist-info/" not in file}


def metadata(archive: zipfile.ZipFile) -> Message:
    file = next(file for file in archive.namelist() if file.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(file))


def test_the_repository_has_three_folders() -> None:
    """Not those that a trainer or a test has left behind and `git add` has found."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "-c", "safe.directory=*", "ls-files", "--", ":(glob)*/**"]
    tracked = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    folders = {path.split("/")[0] for path in tracked.stdout.splitlines()}
    visible = {folder for folder in folders if not folder.startswith(".")}
    assert visible == {"docs", "packages", "tests"}


def siblings(requirements: list[str]) -> dict[str, str]:
    """Our own distributions that are required, and their versions."""
    parsed = map(Requirement, requirements)
    return {each.name: str(each.specifier) for each in parsed if each.name in PROJECTS}


def test_all_four_have_one_version() -> None:
    versions = {name: declared(name).version for name in PROJECTS}
    assert len(set(versions.values())) == 1, versions


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("autoclip", ["autoclip-core"]),
        ("autoclip-core", []),
        ("autoclip-torch", ["autoclip-core", "autoclip"]),
        ("autoclip-tf", ["autoclip-core", "autoclip"]),
    ],
)
def test_siblings_are_pinned_to_that_version(name: str, required: list[str]) -> None:
    pin = f"=={declared(name).version}"
    assert siblings(declared(name).core.dependencies) == dict.fromkeys(required, pin)


def test_the_metapackage_offers_each_framework_and_both() -> None:
    pin = f"=={declared('autoclip').version}"
    extras = declared("autoclip").core.optional_dependencies
    assert {extra: siblings(lines) for extra, lines in extras.items()} == {
        "torch": {"autoclip-torch": pin},
        "tf": {"autoclip-tf": pin},
        "all": {"autoclip-torch": pin, "autoclip-tf": pin},
    }


@pytest.mark.parametrize("page", ["docs/tensorflow.md", "packages/autoclip-tf/README.md"])
def test_another_build_of_tensorflow_comes_with_every_requirement(page: str) -> None:
    """Pip installs the packages themselves without requirements there."""
    text = (REPOSITORY / page).read_text("utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("pip install tensorflow-cpu")]
    named = {Requirement(each).name for each in shlex.split(line)[2:]} | {"tensorflow"}
    needed = [
        *declared("autoclip-core").core.dependencies,
        *declared("autoclip-tf").core.dependencies,
    ]
    assert {Requirement(each).name for each in needed} - set(PROJECTS) <= named


@pytest.mark.parametrize("name", PROJECTS)
def test_each_stands_on_its_own(name: str, distributions: Path) -> None:
    archive = wheel(distributions, name)
    message = metadata(archive)
    assert message["Name"] == name
    assert message["Version"] == declared(name).version
    assert message["Requires-Python"]
    assert message["License-Expression"] == "MIT"
    assert str(message.get_payload()).startswith(f"# {name}\n" if name in CODE else "# AutoClip\n")
    # Equal texts, for a link to one file would dangle in an sdist.
    licence = next(file for file in archive.namelist() if file.endswith("/licenses/LICENSE"))
    assert archive.read(licence) == (REPOSITORY / "LICENSE").read_bytes()
    names = {file.partition("/")[2] for file in sdist(distributions, name).getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


@pytest.mark.parametrize("name", CODE)
def test_a_wheel_holds_its_source_and_nothing_else(name: str, distributions: Path) -> None:
    source = PROJECTS[name] / "src"
    tracked = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    extra = PLACEHOLDERS if name == "autoclip-core" else set()
    found = contents(wheel(distributions, name))
    assert found == tracked | extra
    folder = name.replace("-", "/")
    assert f"{folder}/py.typed" in found
    # A namespace: whoever ships this file would hide the others' packages.
    assert "autoclip/__init__.py" not in found


def test_the_metapackage_holds_no_code(distributions: Path) -> None:
    assert contents(wheel(distributions, "autoclip")) == set()


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_built_from_the_sdist_is_the_same(
    name: str, distributions: Path, tmp_path: Path
) -> None:
    with sdist(distributions, name) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=unpacked, check=True, capture_output=True)
    rebuilt, built = wheel(tmp_path, name), wheel(distributions, name)
    assert {file: rebuilt.read(file) for file in rebuilt.namelist()} == {
        file: built.read(file) for file in built.namelist()
    }


@pytest.mark.parametrize("name", CODE)
def test_an_sdist_can_be_tested(name: str, distributions: Path, tmp_path: Path) -> None:
    with sdist(distributions, name) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    own = f"tests/{name.replace('-', '_')}"
    shared = ["tests/harness", "tests/conformance"]
    if name != "autoclip-core":
        shared.append("tests/across_frameworks")
    shipped = {path.relative_to(unpacked).as_posix() for path in unpacked.glob("tests/**/*.py")}
    tracked = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in (own, *shared)
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert shipped == {*tracked, "tests/conftest.py"}
    if name == "autoclip-core":  # the others' tests import a framework first
        command = [sys.executable, "-m", "pytest", "-q", "-n0", f"{own}/test_attachment.py"]
        done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert " passed" in done.stdout.splitlines()[-1]
