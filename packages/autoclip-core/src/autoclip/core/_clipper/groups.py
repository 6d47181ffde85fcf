"""The parameter groups of a clipper: the only owner of parameters, names and settings."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

from autoclip.core._clipper.commit import Change, commit
from autoclip.core._clipper.histories import Histories
from autoclip.core._settings.mode import Mode
from autoclip.core._settings.settings import ClipperSettings, GroupSettings
from autoclip.core._state.state import ParameterInfo, State, parameter_names

ParameterT = TypeVar("ParameterT")


@dataclass(eq=False)
class Group(Generic[ParameterT]):
    """One parameter group.

    Attributes:
        settings: all of its settings.
        names: the name of each parameter, or None.
        parameters: the parameters; empty while an optimizer holds them.
        match: the regular expression that selected them by name; None if there is none.
    """

    settings: GroupSettings
    names: list[str | None] = field(default_factory=list)
    parameters: list[ParameterT] = field(default_factory=list)
    match: str | None = None


class Groups(ABC, Generic[ParameterT]):
    """All parameter groups of a clipper, and through its mode the rows that they have.

    Args:
        framework: the name of the framework in saved states.
        settings: of the clipper.

    Attributes:
        settings: of the clipper; `settings.default` are those of a group that names none.
        version: another number whenever groups or parameters have been added.
    """

    def __init__(self, framework: str, settings: ClipperSettings) -> None:
        self.settings = settings
        self.version = 0
        self._framework = framework
        self._groups: list[Group[ParameterT]] = []
        self._rows: tuple[int, list[range]] = (-1, [])

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def mode(self) -> Mode:
        """The meaning of a row; see `Mode`."""
        return self.settings.mode

    # -- parameters --------------------------------------------------------------------------

    def by_group(self) -> list[list[ParameterT]]:
        """The parameters of each group as they are now."""
        return [group.parameters for group in self._groups]

    def parameters(self) -> list[ParameterT]:
        """The parameters of all groups, group by group, as they are now."""
        return [*chain.from_iterable(self.by_group())]

    @property
    def sizes(self) -> list[int]:
        """The number of parameters of each group."""
        return [len(group.names) for group in self._groups]

    def names(self) -> list[str]:
        """The name of each parameter, group by group; see `parameter_names`."""
        return parameter_names([group.names for group in self._groups])

    @abstractmethod
    def shape_of(self, parameter: ParameterT) -> tuple[int, ...] | None:
        """A parameter's shape, of the whole one if it is sharded; None if not known yet."""

    # -- rows --------------------------------------------------------------------------------

    def rows_by_group(self) -> list[range]:
        """The rows of each group."""
        # Kept: a loop over thousands of groups that writes a setting asks each time.
        if self._rows[0] != self.version:
            self._rows = self.version, self.mode.rows_by_group(self.sizes)
        return self._rows[1]

    def row_of_parameters(self) -> list[int]:
        """The row of each parameter, group by group."""
        return self.mode.row_of_parameters(self.sizes)

    def row_names(self) -> tuple[str, ...]:
        """The name of each row in reports."""
        return self.mode.row_names(self.names(), len(self))

    # -- settings ----------------------------------------------------------------------------

    def settings_by_group(self) -> list[GroupSettings]:
        """The settings of each group; at least one entry, the clipper's own."""
        return [*map(self.settings_of, self._groups)] or [self.settings.default]

    def settings_by_row(self) -> list[GroupSettings]:
        """The settings of each row."""
        if self._groups or self.mode.has_one_row:
            return self.mode.by_row(self.settings_by_group(), self.sizes)
        return []

    def per_parameter(self, name: str) -> list[Any]:
        """The value of a setting for each parameter, group by group."""
        return [
            value
            for group in self._groups
            for value in [getattr(self.settings_of(group), name)] * len(group.names)
        ]

    def settings_of(self, group: Group[ParameterT]) -> GroupSettings:
        """The settings of a group, or the clipper's own if the group has none of its own."""
        return self.settings.default if self._shares_default(group) else group.settings

    def change(self, index: int, name: str, value: Any, histories: Histories[Any]) -> Any:
        """Change a setting of a group and its rows, or of all if they share one row.

        Args:
            index: the group's index.
            name: the setting's name.
            value: its new value.
            histories: the rows.

        Returns:
            The value as it is kept.

        Raises:
            TypeError, ValueError: the value is wrong, or `histories` refused it. Nothing has
                changed.
        """
        settings, own = self._changed(self._groups[index], name, value)
        commit(own, *histories.change(self.rows_by_group()[index], settings))
        histories.finish()
        return settings.settings[name]

    def _changed(
        self, group: Group[ParameterT], name: str, value: Any
    ) -> tuple[GroupSettings, Change]:
        """The settings of a group with another value, and the change, for `commit`, to them.

        Raises:
            TypeError, ValueError: the value is wrong.
        """
        settings = self.checked(self.settings_of(group).merged({name: value}))
        if self._shares_default(group):
            return settings, (
                vars(self),
                {"settings": dataclasses.replace(self.settings, default=settings)},
            )
        return settings, (vars(group), {"settings": settings})

    def _shares_default(self, group: Group[ParameterT]) -> bool:
        """True if the group's settings are the clipper's own."""
        return self.mode.has_one_row

    def checked(self, settings: GroupSettings) -> GroupSettings:
        """Return settings that the framework can follow.

        Raises:
            ValueError: it cannot.
        """
        return settings

    def views(self, histories: Histories[Any]) -> list[ParamGroup]:
        """The groups as dicts whose settings can be written; see `change`."""
        return [
            ParamGroup(
                {
                    "params": list(parameters),
                    **self.labels(group),
                    **self.settings_of(group).settings,
                },
                lambda name, value, i=i: self.change(i, name, value, histories),
            )
            for i, (parameters, group) in enumerate(zip(self.by_group(), self._groups))
        ]

    def labels(self, group: Group[ParameterT]) -> dict[str, Any]:
        """The entries of a group's view between its parameters and its settings."""
        return {"param_names": list(group.names)} if any(group.names) else {}

    # -- state -------------------------------------------------------------------------------

    def state(self, *contents: Any) -> State:
        """The clipper's state; without `contents`, windows and counts by row, its description."""
        by_group = self.by_group()  # first: an attached clipper may find new parameters
        infos = [
            [ParameterInfo(name, self.shape_of(p)) for name, p in zip(group.names, parameters)]
            for parameters, group in zip(by_group, self._groups)
        ]
        return State.of(self._framework, self.mode, self.settings_by_group(), infos, *contents)

    def describe(self) -> str:
        """The clipper's `repr`."""
        return self.settings.describe(
            (
                len(parameters),
                self.settings_of(group),
                "" if group.match is None else f", match={group.match!r}",
            )
            for parameters, group in zip(self.by_group(), self._groups)
        )


class ParamGroup(dict[str, Any]):
    """A parameter group as `param_groups` shows it. Writing a setting changes the clipper's.

    >>> group = ParamGroup({"params": [], "quantile": 0.9}, lambda name, value: value)
    >>> group["quantile"] = 0.5
    >>> group["quantile"]
    0.5
    """

    def __init__(self, contents: Mapping[str, Any], write: Any) -> None:
        super().__init__(contents)
        self._write = write

    def __setitem__(self, name: str, value: Any) -> None:
        fixed = ("params", "param_names", "match")
        if name in fixed or name not in self:
            settings = [key for key in self if key not in fixed]
            raise KeyError(
                f"{name!r} cannot be set. The settings of this group are "
                f"{', '.join(map(repr, settings))}."
            )
        super().__setitem__(name, self._write(name, value))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several settings; see `dict.update`."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("A parameter group's settings can be changed, not removed.")

    __delitem__ = pop = popitem = clear = setdefault = _refuse
    __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is a plain dict: writing to it changes no clipper
