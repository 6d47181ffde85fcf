"""Prepares docstrings and signatures for the API reference; mkdocstrings loads this file.

Examples become blocks of code, and the public classes that a docstring names become links.
Signatures spell out type aliases and constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import griffe

# From the first prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
# Of several, in a section of errors; a comma would be shown as a tuple.
ERRORS = re.compile(r"^ +\w+Error(?:, \w+Error)+:", re.MULTILINE)

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
        text = ERRORS.sub(lambda match: match[0].replace(",", " or"), text)
        obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)


def meaning_of(name: griffe.ExprName, objects: griffe.ModulesCollection) -> Any:
    """The value of one of our type aliases or constants; None for any other name."""
    try:
        found = objects[name.canonical_path]
        if found.is_alias:
            found = found.final_target
    except (KeyError, griffe.AliasResolutionError):  # of another library
        return None
    if not isinstance(found, griffe.Attribute) or not found.parent.is_module:
        return None
    value = found.value
    # A TypeVar has no meaning here, and Any says less than its alias.
    is_opaque = isinstance(value, griffe.ExprCall) or str(value) == "Any"
    return None if is_opaque else value


def spelled_out(value: Any, objects: griffe.ModulesCollection) -> Any:
    """An annotation or a default with the meanings of our names in it."""
    if isinstance(value, list):
        return [spelled_out(each, objects) for each in value]
    if isinstance(value, griffe.ExprName):
        meaning = meaning_of(value, objects)
        return value if meaning is None else spelled_out(meaning, objects)
    if not isinstance(value, griffe.Expr):
        return value
    changes = {each.name: spelled_out(getattr(value, each.name), objects) for each in fields(value)}
    return replace(value, **changes).modernize()


class Aliases(griffe.Extension):
    """Spells out type aliases and constants in signatures."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Change the annotations of all functions and attributes of a package."""
        objects = loader.modules_collection
        for each in members_of(pkg):
            if isinstance(each, griffe.Function):
                each.returns = spelled_out(each.returns, objects)
                for parameter in each.parameters:
                    parameter.annotation = spelled_out(parameter.annotation, objects)
                    parameter.default = spelled_out(parameter.default, objects)
            elif isinstance(each, griffe.Attribute):
                each.annotation = spelled_out(each.annotation, objects)


def members_of(parent: griffe.Object) -> Iterator[griffe.Object]:
    """All that `parent` defines, at every depth."""
    for each in parent.members.values():
        if not each.is_alias:
            yield each
            yield from members_of(each)
