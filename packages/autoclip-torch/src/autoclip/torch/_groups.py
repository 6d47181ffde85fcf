"""The parameter groups of a clipper: held by itself, or read from an optimizer by position."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip.core import adapter
from autoclip.core.adapter import ClipperSettings, Group, GroupSettings, Histories
from autoclip.torch._parameters import checked_names, hyperparameters, named, shape_of

__all__ = ["Groups"]

_params = itemgetter("params")


class Groups(adapter.Groups[Tensor]):
    """All parameter groups of a clipper.

    They either hold their parameters or, after `follow`, read them from an optimizer's groups by
    position whenever they are asked for.

    Args:
        settings: of the clipper.
        histories: the histories that rows are added to.
    """

    def __init__(self, settings: ClipperSettings, histories: Histories[Any]) -> None:
        super().__init__("torch", settings)
        self._histories = histories
        self._known: set[int] = set()
        self._forget_optimizer()
        if self.mode.has_one_row:
            histories.insert(0, settings.default, 1)

    def _forget_optimizer(self) -> None:
        # Weakly: a cycle would keep a dropped optimizer's state in memory until a collection.
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._theirs: list[dict[str, Any]] = []
        self._hyperparameters: set[str] = set()
        self._counts: list[int] = []
        # For each group, the index of each parameter's group in the optimizer, and in that group.
        self._positions: list[list[tuple[int, int]]] = []
        self._is_one_to_one = False

    @property
    def is_attached(self) -> bool:
        """True if the parameters are read from an optimizer."""
        return self._optimizer is not None

    def shape_of(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The shape; None of a lazy parameter."""
        return shape_of(parameter)

    # -- adding ------------------------------------------------------------------------------

    def add(self, params: Any, settings: GroupSettings, names: Iterable[Any] | None = None) -> None:
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
        self._append(settings, checked)
        self._groups[-1].parameters = parameters
        self._known |= identities

    def _append(self, settings: GroupSettings, names: Sequence[str | None] = ()) -> None:
        self._groups.append(Group(settings))
        self.version += 1
        if rows := self.mode.rows_of(0):
            self._histories.insert(len(self._histories), settings, rows)
        self._extend(len(self) - 1, names)

    def _extend(self, index: int, names: Sequence[str | None]) -> None:
        """Add parameters called `names` to a group."""
        group = self._groups[index]
        size = len(group.names)
        rows = self.mode.rows_of(size + len(names)) - self.mode.rows_of(size)
        if rows:
            is_last = index == len(self) - 1
            row = len(self._histories) if is_last else self.rows_by_group()[index].stop
            self._histories.insert(row, group.settings, rows)
        group.names += names
        self.version += 1

    # -- an optimizer's parameters -----------------------------------------------------------

    def follow(self, optimizer: Optimizer) -> None:
        """Read the parameters from `optimizer.param_groups` from now on.

        Raises:
            ValueError: its parameters are not these. Nothing has changed.
        """
        positions = {
            id(parameter): (i, j)
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        }
        missing = len(self._known - positions.keys())
        extra = len(positions.keys() - self._known)
        if missing or extra:
            raise ValueError(
                "A clipper attaches to an optimizer over the same parameters, but "
                f"{missing} of the clipper's are not the optimizer's, and {extra} of the "
                "optimizer's are not the clipper's. Make the clipper from the same ones, or use "
                "as_optimizer."
            )
        self._positions = [[positions[id(p)] for p in group.parameters] for group in self._groups]
        for group in self._groups:
            group.parameters = []
        self._known = set()
        self._optimizer = weakref.ref(optimizer)
        self._theirs = optimizer.param_groups
        self._hyperparameters = hyperparameters(optimizer)
        self._counts = [len(group["params"]) for group in self._theirs]
        self._check_one_to_one()

    def release(self) -> None:
        """Hold the parameters that the optimizer has now."""
        if self.is_attached:
            self.__dict__.update(self.__getstate__())
            self._known = set(map(id, self.parameters()))

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds its parameters and follows no optimizer.
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._groups = [
            Group(group.settings, list(group.names), list(parameters), group.match)
            for parameters, group in zip(self.by_group(), self._groups)
        ]
        copy._known = set()
        copy._forget_optimizer()
        return copy.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known = set(map(id, self.parameters()))

    def _check_one_to_one(self) -> None:
        self._is_one_to_one = len(self) == len(self._theirs) and all(
            positions == [(i, j) for j in range(count)]
            for i, (positions, count) in enumerate(zip(self._positions, self._counts))
        )

    def _add_new_parameters(self, counts: list[int]) -> None:
        """Add rows for parameters that were added to the optimizer; torch has no hook for that."""
        known = [*self._counts, *[0] * (len(counts) - len(self._counts))]
        if len(counts) < len(self._counts) or any(n < k for n, k in zip(counts, known)):
            raise RuntimeError(
                f"The optimizer's groups had {self._counts} parameters and have {counts} now. "
                "AutoClip knows parameters by their position, and cannot tell which are gone. "
                "Make a new clipper for the new parameters."
            )
        owners = {i: k for k, positions in enumerate(self._positions) for i, _ in positions}
        if self._is_one_to_one:  # also of groups that are empty
            owners = {i: i for i in range(len(self))}
        grown = [i for i, (count, before) in enumerate(zip(counts, known)) if count > before]
        # All new groups before any is added: a wrong setting must leave the clipper as it was.
        new = {i: self._settings_in(self._theirs[i]) for i in grown if i not in owners}
        for i in grown:
            if i in new:
                owners[i] = len(self)
                self._append(new[i])
                self._positions.append([])
            before, count = known[i], counts[i]
            names = list(self._theirs[i].get("param_names", []))
            names += [None] * (count - len(names))
            self._extend(owners[i], names[before:count])
            self._positions[owners[i]] += [(i, j) for j in range(before, count)]
        self._counts = counts
        self._check_one_to_one()

    def _settings_in(self, group: dict[str, Any]) -> GroupSettings:
        """The settings of an optimizer's group, its own hyperparameters left out."""
        own = self._hyperparameters
        return self.settings.taken_from({k: v for k, v in group.items() if k not in own})

    # -- reading -----------------------------------------------------------------------------

    def by_group(self) -> list[list[Tensor]]:
        """The parameters of each group as they are now.

        Raises:
            RuntimeError: parameters have vanished from the optimizer.
        """
        if self._optimizer is None:
            return super().by_group()
        optimizer = self._optimizer()
        if optimizer is not None:  # otherwise the clipper outlives it, with its last parameters
            self._theirs = optimizer.param_groups
        theirs = [*map(_params, self._theirs)]
        counts = [*map(len, theirs)]
        if counts != self._counts:
            self._add_new_parameters(counts)
        if self._is_one_to_one:
            return theirs
        return [[theirs[i][j] for i, j in positions] for positions in self._positions]

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, group by group, as they are now; see `by_group`."""
        return [*chain.from_iterable(self.by_group())]

    @property
    def has_unnamed(self) -> bool:
        """True if a parameter has no name; looks for new parameters first."""
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
