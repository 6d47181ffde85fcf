"""Parameter groups: the variables that each pattern matches, and their settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from autoclip.core import adapter as core
from autoclip.core.adapter import ClipperSettings, Group, GroupSettings, ParamGroup, commit
from autoclip.tf._private import (
    check_backend,
    name_of,
    overwritten_by_gradient,
    tf_variable,
    variable_key,
)

__all__ = ["Groups", "Variable"]

Variable: TypeAlias = Any
"""A `tf.Variable` or a `keras.Variable`."""


class Groups(core.Groups[Variable]):
    """The parameter groups of a clipper. There are none before `build`, only patterns.

    Args:
        settings: of the clipper.
        group_settings: see `Clipper`.

    Attributes:
        patterns: the groups with a pattern; after `build` the first ones of all groups.
        index: the position of each variable among all variables, by its `variable_key`.

    Raises:
        TypeError: `group_settings` is not a list of dicts, or a value has the wrong type.
        ValueError: a dict has no regular expression under `"match"`, or a wrong or unknown setting.
    """

    def __init__(self, settings: ClipperSettings, group_settings: object = None) -> None:
        super().__init__("tensorflow", settings)
        self.checked(settings.default)
        self.patterns: list[Group[Variable]] = [
            Group(self.checked(settings.for_group(overrides)), match=match)
            for match, overrides in map(_pattern, _list_of(group_settings))
        ]
        self.index: dict[str, int] = {}

    def views(self, histories: core.Histories[Any]) -> list[ParamGroup]:
        """The groups as dicts whose settings can be written, also before `build`.

        A callback may write them before the first batch, when no group knows its variables yet.
        """
        if len(self):
            return super().views(histories)
        groups = [*self.patterns, Group[Variable](self.settings.default)]
        return [
            ParamGroup(
                {"params": [], **self.labels(group), **self.settings_of(group).settings},
                lambda name, value, group=group: self._change_unbuilt(group, name, value),
            )
            for group in groups
        ]

    def _change_unbuilt(self, group: Group[Variable], name: str, value: Any) -> Any:
        settings, own = self._changed(group, name, value)
        commit(own)
        return settings.settings[name]

    def all_settings(self) -> list[GroupSettings]:
        """The settings of all groups that there are or can be."""
        return [self.settings.default, *map(self.settings_of, self.patterns)]

    def unbuilt(self) -> Groups:
        """The same patterns and settings, without variables."""
        groups = Groups(self.settings)
        groups.patterns = [Group(each.settings, match=each.match) for each in self.patterns]
        return groups

    def build(self, variables: Iterable[Variable]) -> None:
        """Assign each variable to the first group whose pattern its name matches, or to a last one.

        Raises:
            TypeError, ValueError: see `Clipper.build`. Nothing has changed.
        """
        owner = self.settings.owner
        variables = [v for v in _checked(variables, owner) if not overwritten_by_gradient(v)]
        if len(self):
            new = [each for each in variables if variable_key(each) not in self.index]
            if new:
                raise ValueError(
                    f"This {owner} was built with {len(self.index)} variables and now gets "
                    f"{len(new)} others, such as {name_of(new[0])!r}. A history belongs to its "
                    "variable: make a new clipper for new variables."
                )
            return
        patterns, rest = self.unbuilt().patterns, Group[Variable](self.settings.default)
        for variable in variables:
            name = name_of(variable)
            matching = (g for g in patterns if g.match is not None and re.search(g.match, name))
            group = next(matching, rest)
            group.parameters.append(variable)
            group.names.append(name)
        for group in patterns:
            if not group.parameters:
                names = ", ".join(repr(name_of(variable)) for variable in variables)
                raise ValueError(
                    f"The parameter group with match={group.match!r:.200} has no variable: the "
                    "pattern matches no name, or earlier groups have them all. The names are "
                    f"{names:.1000}."
                )
        self.patterns = patterns
        self._groups = [*patterns, rest] if rest.parameters else patterns
        self.index = {variable_key(each): i for i, each in enumerate(self.parameters())}
        self.version += 1

    def shape_of(self, parameter: Variable) -> tuple[int, ...]:
        """See `autoclip.core.adapter.Groups`, as for what follows."""
        return tuple(tf_variable(parameter).shape.as_list())

    def checked(self, settings: GroupSettings) -> GroupSettings:
        """Return settings that TensorFlow can follow.

        Raises:
            ValueError: `on_spike` is `"skip"`.
        """
        if settings.on_spike == "skip":
            raise ValueError(
                'on_spike="skip" is for PyTorch. A Keras optimizer updates all variables at once: '
                "without its gradient a variable would still move by momentum and weight decay. "
                'Use on_spike="zero".'
            )
        return settings

    def labels(self, group: Group[Variable]) -> dict[str, Any]:
        """The names of a group's variables, and its pattern."""
        return {**super().labels(group), "match": group.match}

    def _follows_default(self, group: Group[Variable]) -> bool:
        return group.match is None


def _list_of(group_settings: object) -> list[Any]:
    if group_settings is None:
        return []
    if isinstance(group_settings, (str, Mapping)) or not isinstance(group_settings, Iterable):
        raise TypeError(
            'group_settings must be a list of dicts such as {"match": "embedding", ...}, but got '
            f"{type(group_settings).__name__}."
        )
    return list(group_settings)


def _pattern(entry: object) -> tuple[str, dict[str, Any]]:
    """The regular expression of an entry of `group_settings`, and its settings."""
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"An entry of group_settings must be a dict, but got {type(entry).__name__}."
        )
    if "match" not in entry:
        raise ValueError('An entry of group_settings must be a dict with the key "match".')
    match = entry["match"]
    if not isinstance(match, str):
        raise TypeError(
            f"match must be a regular expression as a string, but got {match!r:.200} of type "
            f"{type(match).__name__}."
        )
    try:
        re.compile(match)
    except re.error as error:
        raise ValueError(
            f"match must be a regular expression, but got {match!r:.200}: {error}."
        ) from None
    return match, {name: value for name, value in entry.items() if name != "match"}


def _checked(variables: Iterable[Variable], owner: str) -> Sequence[Variable]:
    variables = list(variables)
    for variable in variables:
        if not isinstance(tf_variable(variable), tf.Variable):
            check_backend()
            raise TypeError(
                f"variables must be tf.Variables or Keras variables, but got {variable!r:.200}."
            )
    if not variables:
        raise ValueError(f"{owner} got an empty list of variables.")
    if len({variable_key(variable) for variable in variables}) != len(variables):
        raise ValueError(f"{owner} got the same variable twice.")
    return variables
