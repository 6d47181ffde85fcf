"""The documentation has one address, in the site's configuration and every package's metadata."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from pages import ROOT

PROJECTS = [
    "pyproject.toml",
    *(f"packages/autoclip-{name}/pyproject.toml" for name in ("core", "torch", "tf")),
]


def addresses(root: Path) -> set[str]:
    (site,) = re.findall(r'^site_url: "?([^"\n]*)"?$', (root / "mkdocs.yml").read_text(), re.M)
    found = {site}
    for project in PROJECTS:
        written = re.findall(r'^Documentation = "(.*)"$', (root / project).read_text(), re.M)
        found.update(written or [""])
    return found


def test_they_agree() -> None:
    assert len(addresses(ROOT)) == 1


def test_one_command_sets_them_all(tmp_path: Path) -> None:
    for name in ("mkdocs.yml", ".ci/set-docs-address", *PROJECTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for address in ("https://example.org/first/", "https://example.org/second/"):
        subprocess.run([sys.executable, tmp_path / ".ci" / "set-docs-address", address], check=True)
        assert addresses(tmp_path) == {address}
