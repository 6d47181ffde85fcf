"""The Python blocks of a page, and how each of them is run.

Every block runs, in order, in one namespace and one process. A comment on the line before a block
says otherwise:

* `<!-- needs: deepspeed -->`: run with the page's other blocks of this need, where it is installed.
* `<!-- recipe: trl -->`: run by tests/frameworks, where what it needs is installed.
* `<!-- not run: reason -->`: not run.

A page that has `<!-- processes: 2 -->` anywhere runs in two processes at once.
"""

from __future__ import annotations

import re
import runpy
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Package indexes show these, without the files around them.
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
MARK = re.compile(r"^ *<!-- (needs|recipe|not run|processes): (.+?) -->$")


@dataclass(frozen=True)
class Block:
    """A block of Python.

    Attributes:
        line: how many lines of the page come before its code.
        code: without the page's indentation.
        needs: the package that it is marked with, or "".
        recipe: the recipe that it is marked with, or "".
        not_run: why it is not run, or "".
    """

    line: int
    code: str
    needs: str = ""
    recipe: str = ""
    not_run: str = ""


def pages() -> list[Path]:
    """Every page that has a block of Python."""
    found = [*READMES, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    return sorted(page for page in found if blocks_of(page))


def blocks_of(page: Path) -> list[Block]:
    """The page's blocks in order."""
    lines = page.read_text("utf-8").splitlines()
    blocks = []
    opened: int | None = None
    for i, line in enumerate(lines):
        if opened is None and re.match(r" *```(python|py)\b", line):
            opened = i + 1
        elif opened is not None and line.strip() == "```":
            mark = MARK.match(lines[opened - 2])
            kind, value = mark.groups() if mark else ("", "")
            blocks.append(
                Block(
                    opened,
                    textwrap.dedent("\n".join(lines[opened:i])),
                    needs=value if kind == "needs" else "",
                    recipe=value if kind == "recipe" else "",
                    not_run=value if kind == "not run" else "",
                )
            )
            opened = None
    assert opened is None, f"{page}: the block at line {opened} has no end"
    return blocks


def processes_of(page: Path) -> int:
    """How many processes the page runs in."""
    marks = (MARK.match(line) for line in page.read_text("utf-8").splitlines())
    return next((int(mark[2]) for mark in marks if mark and mark[1] == "processes"), 1)


def run_page(path: str, needs: str) -> None:
    """Run a page's blocks in order in one namespace, as a reader would.

    Args:
        path: of the page.
        needs: only the blocks that are marked with this need.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(Path(path)):
        if block.needs == needs and not (block.recipe or block.not_run):
            # Empty lines before it, so that a traceback has the page's line numbers.
            source = "\n" * block.line + block.code
            exec(compile(source, path, "exec", dont_inherit=True), namespace)


def run_example(path: str, arguments: list[str]) -> None:
    """Run a script."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
