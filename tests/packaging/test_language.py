"""The language of sources and pages, as far as it can be counted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "packages").glob("*/src/**/*.py"))
FIRST_WORDS = re.compile(r"(What|Which|Where|How|Whether)\b")
# Of an entry in a section, such as `rows: how many rows`.
FIRST_WORDS_OF_ENTRIES = re.compile(r"^ *\w+: (what|which|where|how|whether) .*", re.MULTILINE)
UNUSUAL = re.compile(r"\b(so many|anew|as yet|for ever|beside|whatever)\b", re.IGNORECASE)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of all docstrings, those of attributes included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for each in node.body if hasattr(node, "body") and isinstance(node.body, list) else []:
            match each:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield each.lineno, text.strip()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_docstring_begins_with_a_noun_or_a_verb(path: Path) -> None:
    for line, text in docstrings(path):
        assert not FIRST_WORDS.match(text), f"{path}:{line}: {text}"
        entry = FIRST_WORDS_OF_ENTRIES.search(text)
        assert not entry, f"{path}:{line}: {entry and entry[0]}"


def test_so_does_a_docstring_of_a_test_or_script() -> None:
    folders = (ROOT / "tests", ROOT / "docs")
    for path in (each for folder in folders for each in sorted(folder.rglob("*.py"))):
        for line, text in docstrings(path):
            assert not FIRST_WORDS.match(text), f"{path}:{line}: {text}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_use_common_words(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{path}:{i}: {line}" for i, line in enumerate(lines, 1) if UNUSUAL.search(line)]
    assert not found, "\n".join(found)


def test_relative_clauses_have_a_noun() -> None:
    """At most 0.5 times `what` in 1000 words: the thing's name stands in its place."""
    words = re.findall(r"[a-z']+", " ".join(p.read_text(encoding="utf-8") for p in SOURCES).lower())
    assert words.count("what") <= 0.0005 * len(words)
