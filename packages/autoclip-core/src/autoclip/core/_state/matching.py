"""A saved state matched to the clipper that loads it: which history is whose.

Names that both sides have decide. A history goes to another name only if no name is shared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from autoclip.core._errors import StateError
from autoclip.core._settings.settings import CLIPPER_SETTINGS
from autoclip.core._state.safetensors import brief_repr
from autoclip.core._warnings import warn_user

if TYPE_CHECKING:
    from autoclip.core._state.state import GroupState, ParameterInfo, State

__all__ = ["match_states"]

Sources: TypeAlias = npt.NDArray[np.int64]
"""int64[rows]: the saved row whose history each of the clipper's rows gets; -1 for none.

Rows are counted through all groups.
"""

T = TypeVar("T")


def match_states(
    saved: State, current: State, source: str, *, partial: bool, others: Collection[str]
) -> State:
    """The clipper's state with the histories of a saved one; see `State.match`."""
    if saved.mode != current.mode:
        raise StateError(
            f"{source} holds {saved.mode.description}, but it is loaded into a clipper with "
            f"{current.mode.description}. Make the clipper with {saved.mode.request}."
        )
    matching = _Matching(saved, current, source, partial, others)
    sources = matching.by_group() if saved.mode.joins else matching.by_parameter()
    notes = [
        _different_settings(saved, current, sources),
        _other_names(saved, current, sources) if matching.is_by_order else "",
        _rows_without_partner(saved, current, sources),
    ]
    if any(notes):
        warn_user(" ".join(f"{source} {note}" for note in notes if note))
    return replace(current, groups=tuple(_with_histories(saved, current, sources)))


class _Matching:
    """Two states and whether their rows can be the same ones.

    Attributes:
        is_by_order: True if no name is shared, so that the order decides.

    Args:
        saved: the state that was saved.
        current: the clipper that loads it.
        source: the saved state's name in messages.
        partial: True if rows that do not fit start empty instead of raising StateError.
        others: names of parameters that are not the clipper's.
    """

    def __init__(
        self, saved: State, current: State, source: str, partial: bool, others: Collection[str]
    ) -> None:
        self._saved, self._current = saved, current
        self._source, self._partial, self._others = source, partial, frozenset(others)
        self._same_framework = saved.framework == current.framework
        self.is_by_order = False

    def by_parameter(self) -> Sources:
        """The sources of rows that stand for a parameter each."""
        theirs, mine = _parameters(self._saved), _parameters(self._current)
        sources = np.full(len(mine), -1, np.int64)
        found, wanted = _by_name(theirs), _by_name(mine)
        if found.keys() & {*wanted, *self._others} - {None}:
            for name, rows in wanted.items():
                partners = found.get(name, [])
                # Equal names match in order. If there are more on one side, nobody knows which.
                if len(partners) == len(rows):
                    sources[rows] = partners
        elif self._same_numbers():
            self.is_by_order = True
            sources = np.arange(len(mine))
        for row, (partner, parameter) in enumerate(zip(sources.tolist(), mine)):
            if partner >= 0 and not theirs[partner].fits(parameter, self._same_framework):
                self._refuse_parameter(row, theirs[partner], parameter)
                sources[row] = -1
        return sources

    def by_group(self) -> Sources:
        """The sources of rows that stand for a group of parameters each, or for all of them."""
        mine, theirs = self._current.groups, self._saved.groups
        sources = np.full(len(mine), -1, np.int64)
        links = _shared_names(theirs, mine)
        if not links and any(not self._others.isdisjoint(_names(group)) for group in theirs):
            return sources
        if not links or self._saved.mode.has_one_row:
            if not self._same_number_of_groups():
                return sources
            self.is_by_order = True
            links = {(i, i) for i in range(len(mine))}
        split, joined = (Counter(each) for each in zip(*links))
        for i, j in sorted(links):
            # A group that was split or joined has no history in the file.
            is_one_to_one = split[i] == joined[j] == 1
            if is_one_to_one and self._same_parameters(theirs[i], mine[j], j):
                sources[j] = i
        return sources

    # -- conditions -----------------------------------------------------------------------

    def _refuse(self, message: str) -> None:
        if not self._partial:
            raise StateError(message)

    def _same_numbers(self) -> bool:
        """True if rows can be matched by position."""
        return self._same_number_of_groups() and all(
            self._same_number_of_parameters(saved, ours, i)
            for i, (saved, ours) in enumerate(zip(self._saved.groups, self._current.groups))
        )

    def _same_number_of_groups(self) -> bool:
        theirs, mine = len(self._saved.groups), len(self._current.groups)
        if theirs == mine:
            return True
        self._refuse(
            f"{self._source} has {theirs} parameter groups, but the clipper has {mine}, and no "
            "parameter's name is in both. Groups without shared names are matched by order: make "
            "the same ones."
        )
        return False

    def _same_number_of_parameters(self, saved: GroupState, ours: GroupState, group: int) -> bool:
        theirs, mine = len(saved.parameters), len(ours.parameters)
        if theirs == mine:
            return True
        self._refuse(
            f"{self._source} has {theirs} parameters in group {group}, but the clipper has "
            f"{mine}{_only_on_one_side(saved, ours)}. Load it for the same model."
        )
        return False

    def _same_parameters(self, saved: GroupState, ours: GroupState, group: int) -> bool:
        """True if two groups can have the same parameters, in any order."""
        if not self._same_number_of_parameters(saved, ours, group):
            return False
        theirs, mine = (
            [each.shape for each in either.parameters if each.shape is not None]
            for either in (saved, ours)
        )
        if not len(theirs) == len(mine) == len(ours.parameters):
            return True  # shapes are not known
        if self._same_framework:
            fits = sorted(theirs) == sorted(mine)
        else:
            fits = sorted(map(math.prod, theirs)) == sorted(map(math.prod, mine))
        if not fits:
            row = _first_row(self._current, group)
            for k, (there, here) in enumerate(zip(saved.parameters, ours.parameters)):
                if not there.fits(here, self._same_framework):
                    self._refuse_parameter(row + k, there, here)
                    break
        return fits

    def _refuse_parameter(self, row: int, saved: ParameterInfo, ours: ParameterInfo) -> None:
        if self._partial:
            return
        group = 0
        while row >= len(self._current.groups[group].parameters):
            row -= len(self._current.groups[group].parameters)
            group += 1
        quantity = "shapes" if self._same_framework else "numbers of elements"
        self._refuse(
            f"Parameter {row} of group {group} does not match: {self._source} has {saved}, the "
            f"clipper has {ours}; their {quantity} differ. Load it for the same model."
        )


def _parameters(state: State) -> list[ParameterInfo]:
    return [info for group in state.groups for info in group.parameters]


def _by_name(parameters: Sequence[ParameterInfo]) -> dict[str | None, list[int]]:
    """The indices of each name's parameters."""
    found: dict[str | None, list[int]] = {}
    for row, parameter in enumerate(parameters):
        found.setdefault(parameter.name, []).append(row)
    return found


def _names(group: GroupState) -> list[str]:
    return [info.name for info in group.parameters if info.name is not None]


def _shared_names(theirs: Sequence[GroupState], mine: Sequence[GroupState]) -> set[tuple[int, int]]:
    """The pairs of a saved group and one of the clipper's that share a parameter's name."""
    owners: dict[str, set[int]] = {}
    for i, group in enumerate(theirs):
        for name in _names(group):
            owners.setdefault(name, set()).add(i)
    return {
        (i, j)
        for j, group in enumerate(mine)
        for name in _names(group)
        for i in owners.get(name, ())
    }


def _first_row(state: State, group: int) -> int:
    """The index of a group's first parameter among all parameters."""
    return sum(len(each.parameters) for each in state.groups[:group])


def _rows_by_group(state: State) -> list[int]:
    """The number of rows of each group."""
    return [len(group.lengths) for group in state.groups]


# -- histories -----------------------------------------------------------------------------------


def _with_histories(saved: State, current: State, sources: Sources) -> Iterator[GroupState]:
    """The clipper's groups with the saved windows, as few copies as possible."""
    parts = [group.values for group in saved.groups]
    values = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    # One more row, which is empty: that of the source -1.
    nothing = np.zeros(1, np.int64)
    lengths = np.concatenate([*(group.lengths for group in saved.groups), nothing])
    recorded = np.concatenate([*(group.recorded for group in saved.groups), nothing])
    ends = np.cumsum(lengths)
    first = 0
    for group, rows in zip(current.groups, _rows_by_group(current)):
        own = sources[first : first + rows]
        first += rows
        kept = np.minimum(lengths[own], group.settings["history_length"])
        yield replace(
            group,
            values=_joined(values, ends[own] - kept, kept),
            lengths=kept,
            recorded=recorded[own],
        )


def _joined(
    values: npt.NDArray[np.float32], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Stretches of `values` one after the other; a view if they lie so already."""
    if not len(starts):
        return values[:0]
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return values[starts[0] : starts[-1] + lengths[-1]]
    shifts = starts - (np.cumsum(lengths) - lengths)
    joined: npt.NDArray[np.float32] = values[np.repeat(shifts, lengths) + np.arange(lengths.sum())]
    return joined


# -- warnings --------------------------------------------------------------------------------


def _different_settings(saved: State, current: State, sources: Sources) -> str:
    """A note on settings that differ between groups that share a history; or ""."""
    matched = sources >= 0
    theirs = np.repeat(np.arange(len(saved.groups)), _rows_by_group(saved))[sources[matched]]
    mine = np.repeat(np.arange(len(current.groups)), _rows_by_group(current))[matched]
    pairs = np.unique(np.stack([mine, theirs]), axis=1).T.tolist()
    found: dict[str, list[int]] = {}
    for j, i in pairs:
        there, here = saved.groups[i].settings, current.groups[j].settings
        # Another rule has other settings of its own.
        names = {**here, **there} if saved.rule == current.rule else CLIPPER_SETTINGS
        for name in names:
            values = there.get(name, _ABSENT), here.get(name, _ABSENT)
            if values[0] != values[1]:
                text = "{}={} there and {} here".format(
                    brief_repr(name)[1:-1], *map(_shown, values)
                )
                found.setdefault(text, []).append(j)
    everywhere = {j for j, _ in pairs}
    differences = [
        text if {*groups} == everywhere else f"{text} (group {_some(groups, str, 30, ', ')})"
        for text, groups in found.items()
    ]
    if saved.rule != current.rule:
        rules = f"rule={brief_repr(saved.rule)} there and {brief_repr(current.rule)} here"
        differences.insert(0, rules)
    if not differences:
        return ""
    return f"was saved with other settings, and the clipper's own are used: {_some(differences)}."


def _other_names(saved: State, current: State, sources: Sources) -> str:
    """A note on histories that go to other names; or ""."""
    theirs, mine = _parameters_of_rows(saved), _parameters_of_rows(current)
    moved = [
        (source, row)
        for row, source in enumerate(sources.tolist())
        if source >= 0 and _share_no_name(theirs[source], mine[row])
    ]

    def show(pair: tuple[int, int]) -> str:
        source, row = pair
        return f"{_title(saved, source, theirs)} → {_title(current, row, mine)}"

    if not moved:
        return ""
    return (
        "has no parameter's name in common with the clipper, so its histories are matched by "
        f"order: {_some(moved, show)}. Make sure that these are the same parameters."
    )


def _rows_without_partner(saved: State, current: State, sources: Sources) -> str:
    """A note on rows that start empty and on saved ones that are left over; or ""."""
    empty = np.flatnonzero(sources < 0).tolist()
    unused = np.setdiff1d(np.arange(sum(_rows_by_group(saved))), sources).tolist()
    if not empty and not unused:
        return ""
    theirs, mine = _parameters_of_rows(saved), _parameters_of_rows(current)
    starting = _some(empty, lambda row: _label(current, row, mine), 120)
    left = _some(unused, lambda row: _label(saved, row, theirs), 120)
    return (
        f"does not match the clipper everywhere. Histories that start empty: {starting}. "
        f"Saved histories that are not used: {left}."
    )


def _parameters_of_rows(state: State) -> list[tuple[ParameterInfo, ...]]:
    """The parameters that each row stands for."""
    if state.mode.joins:
        return [group.parameters for group in state.groups]
    return [(info,) for info in _parameters(state)]


def _share_no_name(saved: Sequence[ParameterInfo], ours: Sequence[ParameterInfo]) -> bool:
    theirs, mine = ({info.name for info in each} - {None} for each in (saved, ours))
    return bool(theirs) and bool(mine) and theirs.isdisjoint(mine)


def _label(state: State, row: int, parameters: Sequence[Sequence[ParameterInfo]]) -> str:
    """A row's name and its parameter's shape."""
    if state.mode.joins:
        return state.mode.row_names((), len(state.groups))[row]
    return str(parameters[row][0])


def _title(state: State, row: int, parameters: Sequence[Sequence[ParameterInfo]]) -> str:
    """A row's name; of a row of several parameters with the first one's."""
    first = next(brief_repr(info.name) for info in parameters[row] if info.name is not None)
    return f"{_label(state, row, parameters)} ({first}, …)" if state.mode.joins else first


_ABSENT = object()


def _shown(setting: object) -> str:
    return "absent" if setting is _ABSENT else brief_repr(setting)


def _only_on_one_side(saved: GroupState, ours: GroupState) -> str:
    """The names that one of two groups has, for an error; or ""."""
    theirs, mine = dict.fromkeys(_names(saved)), dict.fromkeys(_names(ours))
    if not theirs or not mine:
        return ""
    there, here = (
        _some([name for name in one if name not in other], brief_repr, 60, ", ")
        for one, other in ((theirs, mine), (mine, theirs))
    )
    return f" (only saved: {there}; only in the clipper: {here})"


def _some(
    items: Sequence[T],
    show: Callable[[T], str] = str,
    limit: int = 300,
    separator: str = "; ",
) -> str:
    """The first of many items, in about `limit` characters, and how many more there are."""
    text = show(items[0]) if items else "none"
    for i, item in enumerate(items[1:], start=1):
        shown = show(item)
        if len(text) + len(shown) > limit:
            return f"{text}{separator}and {len(items) - i} more"
        text += separator + shown
    return text
