"""Parameter groups: the variables that each pattern matches, and their settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from autoclip.core import adapter as core
from autoclip.core.adapter import ClipperSettings, Group, GroupSettings
from autoclip.tf._files.paths import pairs_of_paths
from autoclip.tf._private import (
    check_backend,
    name_of,
    overwritten_by_gradient,
    tf_variable,
    variable_key,
)

Variable: TypeAlias = Any
"""A `tf.Variable` or a `keras.Variable`."""


class Groups(core.Groups[Variable]):
    """The parameter groups of a clipper, one a pattern and one for the rest; empty before `build`.

    Args:
        settings: of the clipper.
        group_settings: see `Clipper`.

    Attributes:
        index: the position of each variable among all variables, by its `variable_key`; empty
            before `build`.
        paths: the variables' paths in the order of `build`, in which patterns are searched. In a
            model that Keras loads, variables of nested models have shorter paths than those in the
            optimizer's configuration, which count.

    Raises:
        TypeError: `group_settings` is not a list of dicts, or a value has the wrong type.
        ValueError: a dict has no regular expression under `"match"`, or a wrong or unknown setting.
    """

    def __init__(self, settings: ClipperSettings, group_settings: object = None) -> None:
        super().__init__("tensorflow", settings)
        rest = Group[Variable](self.checked(settings.default))
        patterns = [
            Group[Variable](self.checked(settings.for_group(overrides)), match=match)
            for match, overrides in map(_pattern, _list_of(group_settings))
        ]
        self._groups = [*patterns, rest]
        self.index: dict[str, int] = {}
        self.paths: list[str] = []

    @property
    def patterns(self) -> list[Group[Variable]]:
        """The groups with a pattern."""
        return [group for group in self._groups if group.match is not None]

    def unbuilt(self) -> Groups:
        """The same patterns and settings, without variables."""
        groups = Groups(self.settings)
        patterns = [Group[Variable](each.settings, match=each.match) for each in self.patterns]
        groups._groups = [*patterns, *groups._groups]
        groups.paths = self.paths
        return groups

    def build(self, variables: Iterable[Variable]) -> None:
        """Assign each variable to the first group whose pattern its name matches, or to a last one.

        Raises:
            TypeError, ValueError, RuntimeError: see `Clipper.build`. Nothing has changed.
        """
        owner = self.settings.owner
        variables = [v for v in _checked(variables, owner) if not overwritten_by_gradient(v)]
        if self.index:
            new = [each for each in variables if variable_key(each) not in self.index]
            if new:
                raise ValueError(
                    f"This {owner} was built with {len(self.index)} variables and now gets "
                    f"{len(new)} others, such as {name_of(new[0])!r}. A history belongs to its "
                    "variable: make a new clipper for new variables."
                )
            return
        groups = self.unbuilt()._groups
        names = [name_of(variable) for variable in variables]
        paths = list(names)
        for i, j in pairs_of_paths(self.paths, names):
            paths[j] = self.paths[i]
        for variable, name, path in zip(variables, names, paths):
            group = next(g for g in groups if g.match is None or re.search(g.match, path))
            group.parameters.append(variable)
            group.names.append(name)
        for group in groups:
            # With a configuration, the variables that matched may be frozen since.
            if not group.parameters and group.match is not None and not self.paths:
                raise ValueError(
                    f"The parameter group with match={group.match!r:.200} has no variable: the "
                    "pattern matches no name, or earlier groups have them all. The names are "
                    f"{', '.join(map(repr, paths)):.1000}."
                )
        self._groups = [group for group in groups if group.parameters]
        self.paths = paths
        self.index = {variable_key(each): i for i, each in enumerate(self.parameters())}
        self.version += 1

    def shape_of(self, parameter: Variable) -> tuple[int, ...] | None:
        """See `autoclip.core.adapter.Groups`, as for what follows."""
        shape = tf_variable(parameter).shape
        return tuple(shape) if shape.is_fully_defined() else None

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

    def describe(self) -> str:
        """The clipper's `repr`, before `build` without groups."""
        return super().describe() if self.index else self.settings.describe()

    def labels(self, group: Group[Variable]) -> dict[str, Any]:
        """The names of a group's variables, and its pattern."""
        return {**super().labels(group), "match": group.match}

    def _shares_default(self, group: Group[Variable]) -> bool:
        return group.match is None or super()._shares_default(group)


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
    if not tf.compat.v1.executing_eagerly_outside_functions():
        raise RuntimeError(
            "AutoClip does not run in graphs and sessions of TensorFlow 1: nothing would update "
            "the histories. Use tf.function, without tf.compat.v1.disable_eager_execution, "
            "disable_v2_behavior or tf.Graph().as_default()."
        )
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
