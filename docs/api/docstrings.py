"""Prepares docstrings for the API reference; mkdocstrings loads this file.

Examples become blocks of code, and the public classes that a docstring names become links.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# From the first prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)

CORE = ["History", "Report", "MaxNorm", "StateError", "State", "GroupState", "ParameterInfo"]
RULES = ["Rule", "Quantile", "Standard", "Window"]
ADAPTERS = ("Clipper", "QuantileClip", "StandardClip")  # each adapter has its own


def target_of(name: str, path: str) -> str | None:
    """The object that a class's name means in the docstring of `path`."""
    if name in CORE + RULES:
        return f"autoclip.core.{name}"
    if name in ("Summary", "RowSummary"):
        return f"autoclip.core.inspect.{name}"
    package = ".".join(path.split(".")[:2])
    if name in ADAPTERS and package in ("autoclip.torch", "autoclip.tf"):
        return f"{package}.{name}"
    return None


class Docstrings(griffe.Extension):
    """Changes the docstring of each module, class, function and attribute."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put examples into fenced blocks, and link classes."""
        if not obj.docstring:
            return

        def link(match: re.Match[str]) -> str:
            target = target_of(match[1], obj.path)
            # A class's own docstring needs no link to itself.
            return match[0] if target in (None, obj.path) else f"[{match[0]}][{target}]"

        text = re.sub(r"(?<![\w`\[])`(\w+)`(?![`\]])", link, obj.docstring.value)
        obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)
