"""Every block of Python in the documentation and the READMEs runs, page by page, in order."""

from __future__ import annotations

import importlib.util
import re
import socket
from pathlib import Path

import pytest
from pages import READMES, ROOT, blocks_of, pages, processes_of, run_page
from processes import ForkServer

RUNS = [
    pytest.param(page, needs, id=f"{page.relative_to(ROOT)}{needs and '-'}{needs}")
    for page in pages()
    for needs in sorted(
        {block.needs for block in blocks_of(page) if not (block.recipe or block.not_run)}
    )
]


@pytest.mark.parametrize(("page", "needs"), RUNS)
def test_blocks_run(server: ForkServer, page: Path, needs: str) -> None:
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not part of this environment")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"path": page, "needs": needs}
    for outcome in server.run(run_page, arguments, processes_of(page), port=port):
        assert outcome.status == 0, str(outcome)


@pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_readmes_have_no_relative_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)", page.read_text("utf-8"))
    targets = [one or other for one, other in links]
    assert targets and all(target.startswith("https://") for target in targets)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/rationale.md"])
def test_names_and_paths_of_the_code_exist(page: str) -> None:
    """Each name in backticks occurs in a source, and each path is one."""
    files = [
        path for folder in ("packages", "tests", "docs") for path in (ROOT / folder).rglob("*")
    ]
    paths = [path.as_posix() for path in files]
    sources = [path.read_text("utf-8") for path in files if path.suffix in (".py", ".toml")]
    words = {word for source in sources for word in re.findall(r"\w+", source)}
    text = (ROOT / page).read_text("utf-8")
    names = re.findall(r"`([A-Z]\w+\.\w+|\w*[a-z]_\w+)`", text)
    assert names
    for name in names:
        assert words.issuperset(name.split(".")), name
    for path in re.findall(r"`((?:core|tests|docs|packages|_\w+)/[\w./-]+|_\w+\.py)`", text):
        assert any(f"/{path.strip('/')}" in each for each in paths), path
