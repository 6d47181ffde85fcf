"""The Python blocks of a page, and how each of them is run.

Every block runs, in order, in one namespace and one process. A comment on the line before a block
says otherwise:

* `<!-- needs: deepspeed -->`: run where that is installed, in a second run of the whole page.
* `<!-- recipe: trl -->`: run by tests/frameworks, where what it needs is installed.
* `<!-- not run: reason -->`: not run.

A page that has `<!-- processes: 2 -->` anywhere runs in two processes at once.

`<!-- prints -->` before a block of text: the block of Python above it prints that, word by word;
numbers may differ by 5 %, since another processor rounds otherwise.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import runpy
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Package indexes show these, without the files around them.
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
PRINTS = "<!-- prints -->"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
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
        prints: the output that the page shows for it, or "".
    """

    line: int
    code: str
    needs: str = ""
    recipe: str = ""
    not_run: str = ""
    prints: str = ""


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
                    prints=_output_below(lines[i + 1 :]),
                )
            )
            opened = None
    assert opened is None, f"{page}: the block at line {opened} has no end"
    return blocks


def _output_below(lines: list[str]) -> str:
    """The block of text that follows with the mark `prints`, or ""."""
    text = "\n".join(lines).lstrip()
    if not text.startswith(PRINTS):
        return ""
    return text.split("```text\n", 1)[1].split("\n```", 1)[0]


def check_output(shown: str, printed: str) -> None:
    """Compare a page's output with what its block printed."""
    assert NUMBER.sub("0", shown).split() == NUMBER.sub("0", printed).split(), printed
    for one, other in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        assert math.isclose(float(one), float(other), rel_tol=0.05), printed


def processes_of(page: Path) -> int:
    """The number of processes that the page runs in."""
    marks = (MARK.match(line) for line in page.read_text("utf-8").splitlines())
    return next((int(mark[2]) for mark in marks if mark and mark[1] == "processes"), 1)


def run_page(path: str, needs: str) -> None:
    """Run a page's blocks in order in one namespace, as a reader would.

    Args:
        path: of the page.
        needs: also the blocks that are marked with this need.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(Path(path)):
        if block.needs in ("", needs) and not (block.recipe or block.not_run):
            # Empty lines before it, so that a traceback has the page's line numbers.
            source = "\n" * block.line + block.code
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(source, path, "exec", dont_inherit=True), namespace)
            print(printed.getvalue(), end="")
            if block.prints:
                check_output(block.prints, printed.getvalue())


def run_example(path: str, arguments: list[str]) -> None:
    """Run a script."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
