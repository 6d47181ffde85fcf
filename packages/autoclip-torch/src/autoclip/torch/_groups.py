"""The parameter groups of a clipper: held by itself, or read from an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip.core import adapter
from autoclip.core.adapter import Change, ClipperSettings, Group, GroupSettings, Histories, commit
from autoclip.torch._following import NEW_CLIPPER, Followed
from autoclip.torch._parameters import hyperparameters, shape_of, with_names

_params = itemgetter("params")


class Groups(adapter.Groups[Tensor]):
    """All parameter groups of a clipper.

    They either hold their parameters or, after `following`, read them from an optimizer's groups
    whenever they are asked for: see `Followed`.

    Args:
        settings: of the clipper.
        histories: the histories that rows are added to.
    """

    def __init__(self, settings: ClipperSettings, histories: Histories[Any]) -> None:
        super().__init__("torch", settings)
        self._histories = histories
        self._followed: Followed | None = None
        if self.mode.has_one_row:
            commit(*histories.insertion([settings.default]))

    def shape_of(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The shape; None of a lazy parameter."""
        return shape_of(parameter)

    # -- adding ------------------------------------------------------------------------------

    def add(self, *entries: tuple[Any, GroupSettings, Iterable[Any] | None]) -> None:
        """Append groups.

        Args:
            entries: of each group a tensor or an iterable of tensors or (name, tensor) pairs, its
                settings, and the names of the parameters, or None for those in the pairs.

        Raises:
            TypeError, ValueError: see `Clipper.add_param_group`. Nothing has changed.
        """
        known, rows = {*map(id, self.parameters())}, [*self._histories.settings]
        groups: list[Group[Tensor]] = []
        for params, settings, names in entries:
            checked, parameters = with_names(params, names)
            if not known.isdisjoint(map(id, parameters)):
                raise ValueError("Some parameters appear in more than one parameter group.")
            known.update(map(id, parameters))
            groups.append(Group(settings, checked, parameters))
            rows += [settings] * self.mode.rows_of(len(parameters))
        self._replace([*self._groups, *groups], self._histories.insertion(rows))

    def _replace(
        self, groups: list[Group[Tensor]], changes: Iterable[Change], **attributes: Any
    ) -> None:
        own = {"_groups": groups, "version": self.version + 1, **attributes}
        commit((vars(self), own), *changes)

    # -- an optimizer's parameters -----------------------------------------------------------

    def following(self, optimizer: Optimizer) -> Change:
        """The change, for `commit`, to reading parameters from `optimizer.param_groups`.

        Raises:
            ValueError: its parameters are not these.
        """
        followed = Followed.found(optimizer, self.by_group())
        groups: list[Group[Tensor]] = [Group(each.settings, each.names) for each in self._groups]
        return vars(self), {"_groups": groups, "_followed": followed}

    def holding(self) -> Change:
        """The change, for `commit`, to holding the parameters that the optimizer has now.

        Raises:
            RuntimeError: parameters have vanished from the optimizer.
        """
        groups = [
            Group(group.settings, [*group.names], [*parameters])
            for parameters, group in zip(self.by_group(), self._groups)
        ]
        return vars(self), {"_groups": groups, "_followed": None}

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds its parameters and follows no optimizer.
        own, held = self.holding()
        return {**own, **held}

    def _follow_changes(self, followed: Followed) -> Followed:
        """Follow parameters that were moved, exchanged or added; torch has no hook for that.

        Groups that were the optimizer's, one to one, are again: one that has moved keeps its
        settings, and a parameter that has moved to another group takes its history and its name
        along, and gets the settings of that group. Other groups keep their parameters, and get
        those that were added.
        """
        now = followed.located()
        if followed.is_one_to_one:
            positions, sources = now.all_positions(), followed.sources(now)
            if self.mode.joins and not self.mode.has_one_row and len(sources) < len(self._groups):
                raise RuntimeError(
                    f"The optimizer had {len(self._groups)} parameter groups and has "
                    f"{len(sources)} now. With group_clipping each has one history, and histories "
                    f"of several groups cannot be joined. {NEW_CLIPPER}"
                )
        else:
            positions = now.grown()
            sources = [*range(len(positions))]
        own_names = chain.from_iterable(group.names for group in self._groups)
        names = dict(zip(chain.from_iterable(now.positions), own_names))
        groups: list[Group[Tensor]] = []
        for k, (source, own) in enumerate(zip(sources, positions)):
            known = source < len(self._groups)
            theirs = own[0][0] if own else k
            settings = self._groups[source].settings if known else self._settings_in(now, theirs)
            groups.append(
                Group(settings, [names[at] if at in names else now.name_of(*at) for at in own])
            )
        if self.mode.joins:
            moved = sorted(range(len(sources)), key=sources.__getitem__)[: len(self._histories)]
        else:
            rows = {at: row for row, at in enumerate(chain.from_iterable(positions))}
            moved = [rows[at] for at in names]
        found = Followed(now.optimizer, now.param_groups, positions)
        if [group.names for group in groups] == [group.names for group in self._groups] and (
            moved == [*range(len(self._histories))]
        ):
            self._followed = found  # only other objects or positions: rows stay as they are
            return found
        changes: Iterable[Change] = ()
        if not self.mode.has_one_row:
            sizes = [len(group.names) for group in groups]
            settings_by_row = self.mode.by_row([group.settings for group in groups], sizes)
            changes = self._histories.insertion(settings_by_row, moved)
        self._replace(groups, changes, _followed=found)
        return found

    def _settings_in(self, now: Followed, index: int) -> GroupSettings:
        """The settings of a group that is new in the optimizer."""
        own = hyperparameters(now.optimizer())
        named = {k: v for k, v in now.param_groups[index].items() if k not in own}
        return self.settings.taken_from(named)

    # -- reading -----------------------------------------------------------------------------

    def by_group(self) -> list[list[Tensor]]:
        """The parameters of each group as they are now.

        Raises:
            RuntimeError: parameters have vanished from the optimizer.
        """
        followed = self._followed
        if followed is None:
            return super().by_group()
        optimizer = followed.optimizer()
        if optimizer is not None:  # otherwise the clipper outlives it, with its last parameters
            followed.param_groups = optimizer.param_groups
        theirs = [*map(_params, followed.param_groups)]
        if [*map(id, chain.from_iterable(theirs))] != followed.identities or [
            *map(len, theirs)
        ] != followed.counts:
            followed = self._follow_changes(followed)
        if followed.is_one_to_one:
            return theirs
        return [[theirs[i][j] for i, j in positions] for positions in followed.positions]

    def name_parameters(self, names: Mapping[int, str]) -> None:
        """Give names to parameters that have none.

        Args:
            names: by the parameters' `id`.
        """
        by_group = self.by_group()  # first: there may be new parameters
        for group, parameters in zip(self._groups, by_group):
            group.names = [
                names.get(id(parameter)) if name is None else name
                for name, parameter in zip(group.names, parameters)
            ]
