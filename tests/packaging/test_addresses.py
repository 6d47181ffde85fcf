"""The site and the repository have one address each, in metadata, README, citation and site."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

ROOT = Path(__file__).parents[2]
PROJECTS = [".", *(f"packages/autoclip-{name}" for name in ("core", "torch", "tf"))]
TEXTS = ["README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "mkdocs.yml", "docs/index.md"]


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(root / ".ci" / "set-addresses"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def urls(root: Path, project: str) -> dict[str, str]:
    return ProjectMetadata(str(root / project), PluginManager()).core.urls


def written(root: Path, name: str, pattern: str) -> str:
    (found,) = set(re.findall(pattern, (root / name).read_text("utf-8"), re.MULTILINE))
    return str(found)


def check_agreement(root: Path) -> tuple[str, str]:
    first, *others = (urls(root, project) for project in PROJECTS)
    assert all(each == first for each in others)
    site, repository = first["Homepage"], first["Repository"]
    assert first == {
        "Homepage": site,
        "Documentation": site,
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{site}changelog/",
        "Paper": "https://arxiv.org/abs/2007.14469",
    }
    assert written(root, "mkdocs.yml", r"^site_url: (.*)$") == site
    assert written(root, "mkdocs.yml", r"^repo_url: (.*)$") == repository
    assert written(root, "CITATION.cff", r'^url: "(.*)"$') == site
    assert written(root, "CITATION.cff", r'^repository-code: "(.*)"$') == repository
    assert written(root, "README.md", r"\[Documentation\]\(([^)]*)\)") == site
    assert written(root, "README.md", r"\[Issues\]\(([^)]*)\)") == f"{repository}/issues"
    assert written(root, "README.md", r"\[Changelog\]\(([^)]*)\)") == f"{site}changelog/"
    for project in PROJECTS[1:]:
        readme = f"{project}/README.md"
        assert written(root, readme, r"\[Documentation\]\(([^)]*)\)") == site
        assert written(root, readme, r"\[Changelog\]\(([^)]*)\)") == f"{site}changelog/"
    links = re.findall(r"\]\((https://[^)]*)\)", (root / "CHANGELOG.md").read_text("utf-8"))
    assert all(link.startswith((site, "https://keepachangelog.com/")) for link in links)
    return site, repository


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in (".ci/set-addresses", *(f"{project}/pyproject.toml" for project in PROJECTS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (*TEXTS, *(f"{project}/README.md" for project in PROJECTS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_they_agree() -> None:
    check_agreement(ROOT)


def test_one_command_sets_them_all(copy: Path) -> None:
    for host in ("first", "second"):
        new = f"https://{host}.org/autoclip/", f"https://git.{host}.org/team/autoclip"
        assert command(copy, *new).returncode == 0
        assert check_agreement(copy) == new
    assert command(copy, "--check").returncode == 0


def test_placeholders_are_not_released(copy: Path) -> None:
    command(copy, "https://autoclip.example/", "https://git.autoclip.example/autoclip")
    done = command(copy, "--check")
    assert done.returncode == 1
    assert "placeholder" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("https://a.org/",), ("http://a.org/", "https://b.org/c"), ("https://a.org/", "b.org/c/")],
)
def test_an_incomplete_address_changes_nothing(copy: Path, arguments: tuple[str, ...]) -> None:
    before = check_agreement(copy)
    assert command(copy, *arguments).returncode == 1
    assert check_agreement(copy) == before
