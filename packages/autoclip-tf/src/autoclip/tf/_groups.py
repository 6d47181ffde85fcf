"""Parameter groups: which variables a pattern matches, and the settings that they have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import tensorflow as tf

from autoclip.core.adapter import ClipperSettings, GroupSettings
from autoclip.tf._private import check_backend, name_of, tf_variable, variable_key

__all__ = [
    "Group",
    "GroupPattern",
    "Variable",
    "assign_variables",
    "check_variables",
    "patterns",
    "usable",
]

Variable: TypeAlias = Any
"""A `tf.Variable` or a `keras.Variable`."""


@dataclass(frozen=True)
class GroupPattern:
    """An entry of `group_settings`: a regular expression, and the settings of what it matches."""

    match: str
    settings: GroupSettings


@dataclass
class Group:
    """A parameter group.

    Attributes:
        settings: what all of its rows have.
        match: the regular expression that its variables' names matched; None for the variables
            that no pattern matched.
        variables: in the order in which the clipper got them.
    """

    settings: GroupSettings
    match: str | None
    variables: list[Variable] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """What its variables are called."""
        return [name_of(variable) for variable in self.variables]


def patterns(given: object, settings: ClipperSettings) -> list[GroupPattern]:
    """Check the argument `group_settings` of a clipper.

    Raises:
        TypeError: it is not a list of dicts, or a value has the wrong type.
        ValueError: a dict has no regular expression under `"match"`, or a wrong or unknown setting.
    """
    if given is None:
        return []
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(
            'group_settings takes a list of dicts such as {"match": "embedding", ...}, but got '
            f"{type(given).__name__}."
        )
    return [_pattern(group, settings) for group in given]


def _pattern(group: object, settings: ClipperSettings) -> GroupPattern:
    if not isinstance(group, Mapping):
        raise TypeError(f"An entry of group_settings takes a dict, but got {type(group).__name__}.")
    if "match" not in group:
        raise ValueError('An entry of group_settings takes a dict with the key "match".')
    match = group["match"]
    if not isinstance(match, str):
        raise TypeError(
            f"match takes a regular expression as a string, but got {match!r:.200} of type "
            f"{type(match).__name__}."
        )
    try:
        re.compile(match)
    except re.error as error:
        raise ValueError(
            f"match takes a regular expression, but got {match!r:.200}: {error}."
        ) from None
    overrides = {name: value for name, value in group.items() if name != "match"}
    return GroupPattern(match, usable(settings.for_group(overrides)))


def usable(settings: GroupSettings) -> GroupSettings:
    """Return the settings of a group if TensorFlow can follow them.

    Raises:
        ValueError: `on_spike` is `"skip"`.
    """
    if settings.on_spike == "skip":
        raise ValueError(
            'on_spike="skip" is for PyTorch. A Keras optimizer updates all variables at once: '
            "without its gradient a variable would still move by momentum and weight decay. Use "
            'on_spike="zero".'
        )
    return settings


def check_variables(variables: Iterable[Variable], owner: str) -> list[Variable]:
    """The variables that a clipper is given, as a list.

    Raises:
        TypeError: an entry is not a variable.
        ValueError: there are none, or one is a duplicate.
    """
    variables = list(variables)
    for variable in variables:
        if not isinstance(tf_variable(variable), tf.Variable):
            check_backend()
            raise TypeError(
                f"build takes tf.Variables or Keras variables, but got {variable!r:.200}."
            )
    if not variables:
        raise ValueError(f"{owner} got an empty list of variables.")
    if len({variable_key(variable) for variable in variables}) != len(variables):
        raise ValueError(f"{owner} got the same variable twice.")
    return variables


def assign_variables(
    variables: Sequence[Variable], overrides: Sequence[GroupPattern], default: GroupSettings
) -> list[Group]:
    """Put each variable in the first group whose pattern its name matches, or else in a last one.

    Args:
        variables: of the clipper.
        overrides: the groups with patterns.
        default: the settings of the last group.

    Raises:
        ValueError: a group has no variable.
    """
    groups = [Group(each.settings, each.match) for each in overrides]
    rest = Group(default, None)
    for variable in variables:
        name = name_of(variable)
        matching = (g for g in groups if g.match is not None and re.search(g.match, name))
        next(matching, rest).variables.append(variable)
    for group in groups:
        if not group.variables:
            names = ", ".join(repr(name_of(variable)) for variable in variables)
            raise ValueError(
                f"The parameter group with match={group.match!r:.200} has no variable: the "
                "pattern matches no name, or earlier groups have them all. The names are "
                f"{names:.1000}."
            )
    return [*groups, rest] if rest.variables else groups
