"""The parameter groups of a clipper: their parameters, names, settings, and rows of the history."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip.core.adapter import (
    ClipperSettings,
    GroupSettings,
    ParameterInfo,
    ParamGroup,
    parameter_names,
    row_names,
)
from autoclip.torch._parameters import checked_names, hyperparameters, named, shape_of
from autoclip.torch._rows import Rows

__all__ = ["Group", "Groups"]


class Group:
    """One parameter group.

    Attributes:
        settings: the settings of its rows.
        names: of each parameter, or None.
        rows: one for each parameter in the mode "parameter", otherwise a single one.
        parameters: the parameters, unless an optimizer has them.
        positions: where in an optimizer's groups the parameters are: group and place.
    """

    def __init__(self, settings: GroupSettings) -> None:
        self.settings = settings
        self.names: list[str | None] = []
        self.rows: list[int] = []
        self.parameters: list[Tensor] = []
        self.positions: list[tuple[int, int]] = []


class Groups:
    """All parameter groups of a clipper.

    They either hold their parameters or, after `follow`, read them from an optimizer's groups by
    position whenever they are asked for.

    Args:
        settings: of the clipper.
        rows: where rows are added.
    """

    def __init__(self, settings: ClipperSettings, rows: Rows) -> None:
        self.settings = settings
        self._rows = rows
        self._groups: list[Group] = []
        self._known: set[int] = set()
        # Weakly: a cycle would keep a dropped optimizer's state in memory until a collection.
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._theirs: list[dict[str, Any]] = []
        self._hyperparameters: set[str] = set()
        self._counts: list[int] = []
        self._is_one_to_one = False
        if settings.mode == "global":
            rows.add(settings.default, 1)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def is_attached(self) -> bool:
        """Whether the parameters are read from an optimizer."""
        return self._optimizer is not None

    # -- making ------------------------------------------------------------------------------

    def add(
        self,
        params: Any,
        settings: GroupSettings,
        names: Iterable[Any] | None = None,
    ) -> None:
        """Append a group.

        Args:
            params: a tensor or an iterable of tensors or (name, tensor) pairs.
            settings: of the group.
            names: of the parameters, if `params` has none.

        Raises:
            TypeError, ValueError: see `Clipper.add_param_group`. Nothing has changed.
        """
        found, parameters = named(params)
        checked = checked_names(found if names is None else names, len(parameters))
        identities = {id(parameter) for parameter in parameters}
        if len(identities) != len(parameters):
            raise ValueError("A parameter group has the same parameter more than once.")
        if not self._known.isdisjoint(identities):
            raise ValueError("Some parameters appear in more than one parameter group.")
        group = self._append(settings)
        self._extend(group, checked)
        group.parameters = parameters
        self._known |= identities

    def _append(self, settings: GroupSettings) -> Group:
        group = Group(settings)
        if self.settings.mode == "group":
            group.rows += self._rows.add(settings, 1)
        elif self.settings.mode == "global":
            group.rows.append(0)
        self._groups.append(group)
        return group

    def _extend(self, group: Group, names: Sequence[str | None]) -> None:
        """Take more parameters, called `names`, into a group."""
        group.names += names
        if self.settings.mode == "parameter":
            group.rows += self._rows.add(group.settings, len(names))

    # -- an optimizer's parameters -----------------------------------------------------------

    def follow(self, optimizer: Optimizer) -> None:
        """Read the parameters from `optimizer.param_groups` from now on.

        Raises:
            ValueError: its parameters are not these. Nothing has changed.
        """
        places = {
            id(parameter): (i, j)
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        }
        missing = len(self._known - places.keys())
        extra = len(places.keys() - self._known)
        if missing or extra:
            raise ValueError(
                "A clipper attaches to an optimizer over the same parameters, but "
                f"{missing} of the clipper's are not the optimizer's, and {extra} of the "
                "optimizer's are not the clipper's. Make the clipper from the same ones, or use "
                "as_optimizer."
            )
        for group in self._groups:
            group.positions = [places[id(parameter)] for parameter in group.parameters]
            group.parameters = []
        self._known = set()
        self._optimizer = weakref.ref(optimizer)
        self._theirs = optimizer.param_groups
        self._hyperparameters = hyperparameters(optimizer)
        self._counts = [len(group["params"]) for group in self._theirs]
        self._look_whether_one_to_one()

    def release(self) -> None:
        """Hold the parameters that the optimizer has now."""
        if self.is_attached:
            self._groups, self._known = self._released()
            self._optimizer, self._theirs, self._counts = None, [], []

    def _released(self) -> tuple[list[Group], set[int]]:
        groups = []
        for group, parameters in zip(self._groups, self.by_group()):
            own = Group(group.settings)
            own.names, own.rows = list(group.names), list(group.rows)
            own.parameters = list(parameters)
            groups.append(own)
        return groups, {id(parameter) for group in groups for parameter in group.parameters}

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds its parameters and follows no optimizer.
        state = dict(self.__dict__)
        state["_groups"], _ = self._released()
        state["_known"] = set()
        state["_optimizer"], state["_theirs"], state["_counts"] = None, [], []
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known = {id(p) for group in self._groups for p in group.parameters}

    def _look_whether_one_to_one(self) -> None:
        self._is_one_to_one = len(self._groups) == len(self._theirs) and all(
            group.positions == [(i, j) for j in range(count)]
            for i, (group, count) in enumerate(zip(self._groups, self._counts))
        )

    def _look_for_new_parameters(self) -> None:
        """Give rows to parameters that were added to the optimizer; torch has no hook for that."""
        counts = [len(group["params"]) for group in self._theirs]
        if counts == self._counts:
            return
        known = [*self._counts, *[0] * (len(counts) - len(self._counts))]
        if len(counts) < len(self._counts) or any(n < k for n, k in zip(counts, known)):
            raise RuntimeError(
                f"The optimizer's groups had {self._counts} parameters and have {counts} now. "
                "AutoClip knows parameters by their position, and cannot tell which are gone. "
                "Make a new clipper for the new parameters."
            )
        owners = {place[0]: group for group in self._groups for place in group.positions}
        if self._is_one_to_one:  # also where a group is empty as yet
            owners = dict(enumerate(self._groups))
        grown = [i for i, (count, before) in enumerate(zip(counts, known)) if count > before]
        # All new groups before any is added: a wrong setting must leave the clipper as it was.
        new = {i: self._settings_in(self._theirs[i]) for i in grown if i not in owners}
        owners.update({i: self._append(settings) for i, settings in new.items()})
        for i in grown:
            before, count = known[i], counts[i]
            names = list(self._theirs[i].get("param_names", []))
            names += [None] * (count - len(names))
            self._extend(owners[i], names[before:count])
            owners[i].positions += [(i, j) for j in range(before, count)]
        self._counts = counts
        self._look_whether_one_to_one()

    def _settings_in(self, group: dict[str, Any]) -> GroupSettings:
        """The settings of an optimizer's group, its own hyperparameters left out."""
        own = self._hyperparameters
        return self.settings.taken_from({k: v for k, v in group.items() if k not in own})

    # -- reading -----------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, one after the other, as they are now.

        Raises:
            RuntimeError: parameters have vanished from the optimizer.
        """
        return [parameter for group in self.by_group() for parameter in group]

    def by_group(self) -> list[list[Tensor]]:
        """The parameters of each group as they are now; see `parameters`."""
        if self._optimizer is None:
            return [group.parameters for group in self._groups]
        optimizer = self._optimizer()
        if optimizer is not None:  # otherwise the clipper outlives it, with what it had at last
            self._theirs = optimizer.param_groups
        self._look_for_new_parameters()
        theirs = [group["params"] for group in self._theirs]
        if self._is_one_to_one:
            return theirs
        return [[theirs[i][j] for i, j in group.positions] for group in self._groups]

    def rows_by_group(self) -> list[list[int]]:
        """The rows of each group: one a parameter, or one; see `make_state`."""
        return [group.rows for group in self._groups]

    def rows_of_parameters(self) -> list[int]:
        """The row of each parameter, group by group."""
        if self.settings.mode == "parameter":
            return self.reported_rows()
        return [row for group in self._groups for row in group.rows * len(group.names)]

    def reported_rows(self) -> list[int]:
        """The rows in the order of reports, each once."""
        if self.settings.mode == "global":
            return [0]
        return [row for group in self._groups for row in group.rows]

    def reported_names(self) -> tuple[str, ...]:
        """What `reported_rows` are called."""
        return row_names(self.settings.mode, self.names(), len(self))

    def names(self) -> list[str]:
        """What to call each parameter, group by group."""
        return parameter_names([group.names for group in self._groups])

    @property
    def has_unnamed(self) -> bool:
        """Whether a parameter has no name; looks for new parameters first."""
        self.by_group()
        return any(None in group.names for group in self._groups)

    def name_parameters(self, names: Mapping[int, str]) -> None:
        """Give names to parameters that have none.

        Args:
            names: by the parameters' `id`.
        """
        for group, parameters in zip(self._groups, self.by_group()):
            group.names = [
                names.get(id(parameter)) if name is None else name
                for name, parameter in zip(group.names, parameters)
            ]

    def group_settings(self) -> list[GroupSettings]:
        """The settings of each group."""
        return [group.settings for group in self._groups]

    def infos(self) -> list[list[ParameterInfo]]:
        """Names and shapes of each group's parameters, as a state holds them."""
        return [
            [ParameterInfo(name, shape_of(p)) for name, p in zip(group.names, parameters)]
            for parameters, group in zip(self.by_group(), self._groups)
        ]

    def per_parameter(self, name: str) -> list[Any]:
        """A setting of each parameter's group, group by group."""
        return [
            value
            for group in self._groups
            for value in [getattr(group.settings, name)] * len(group.names)
        ]

    def views(self) -> list[ParamGroup]:
        """The groups as dicts whose settings can be written."""
        return [
            ParamGroup(
                {
                    "params": list(parameters),
                    **({"param_names": list(group.names)} if any(group.names) else {}),
                    **group.settings.settings,
                },
                lambda name, value, group=group: self._write(group, name, value),
            )
            for parameters, group in zip(self.by_group(), self._groups)
        ]

    def _write(self, group: Group, name: str, value: Any) -> Any:
        """Change a setting of one group; under global clipping, of the only row."""
        settings = group.settings.merged({name: value})
        if self.settings.mode == "global":
            self.settings = dataclasses.replace(self.settings, default=settings)
            for each in self._groups:
                each.settings = settings
            self._rows.change([0], settings)
        else:
            group.settings = settings
            self._rows.change(group.rows, settings)
        return settings.settings[name]
