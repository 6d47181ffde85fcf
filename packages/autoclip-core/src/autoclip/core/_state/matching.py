"""A saved state matched to the clipper that loads it: which history is whose.

Names that both sides have decide. A history goes to another name only if no name is shared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from autoclip.core._errors import StateError
from autoclip.core._settings.settings import CLIPPER_SETTINGS
from autoclip.core._state.safetensors import brief_repr
from autoclip.core._warnings import warn_user

if TYPE_CHECKING:
    from autoclip.core._state.state import GroupState, ParameterInfo, State

Row: TypeAlias = "tuple[ParameterInfo, ...]"
"""The parameters that a row stands for. Rows are counted through all groups."""

Pair: TypeAlias = tuple[int, int]
"""A saved row, and the clipper's row that gets its history."""

T = TypeVar("T")

_ABSENT = object()


def match_states(
    saved: State, current: State, source: str, *, partial: bool, others: Collection[str]
) -> State:
    """The clipper's state with the histories of a saved one; see `State.match`."""
    if saved.mode != current.mode:
        raise StateError(
            f"{source} holds {saved.mode.description}, but it is loaded into a clipper with "
            f"{current.mode.description}. Make the clipper with {saved.mode.request}."
        )
    theirs, mine = _rows(saved), _rows(current)
    found, wanted = _rows_by_name(theirs), _rows_by_name(mine)
    is_by_order = not found.keys() & {*wanted, *others} - {None}
    forgiven = [StateError] if partial else []
    pairs: list[Pair] = []
    with suppress(*forgiven):
        if is_by_order:
            pairs = _pairs_by_order(saved, current, source, len(mine))
        else:
            pairs = (_pairs_of_groups if saved.mode.joins else _pairs_by_name)(found, wanted)
    sources = [-1] * len(mine)  # the saved row whose history each row gets; -1 for none
    for there, here in pairs:
        with suppress(*forgiven):
            _check_fit(saved, current, source, theirs[there], mine[here], here)
            sources[here] = there
    notes = [
        _different_settings(saved, current, sources),
        _other_names(saved, current, sources) if is_by_order else "",
        _rows_without_partner(saved, current, sources),
    ]
    if any(notes):
        warn_user(" ".join(f"{source} {note}" for note in notes if note))
    return replace(current, groups=_with_histories(saved, current, sources))


def _rows(state: State) -> list[Row]:
    if state.mode.joins:
        return [group.parameters for group in state.groups]
    return [(info,) for group in state.groups for info in group.parameters]


def _rows_by_name(rows: Sequence[Row]) -> dict[str | None, list[int]]:
    """The rows that each name's parameters belong to."""
    found: dict[str | None, list[int]] = {}
    for row, parameters in enumerate(rows):
        for info in parameters:
            found.setdefault(info.name, []).append(row)
    return found


# -- pairs ---------------------------------------------------------------------------------------


def _pairs_by_name(
    found: Mapping[str | None, list[int]], wanted: Mapping[str | None, list[int]]
) -> list[Pair]:
    """Pairs of parameters. Equal names match in order, and so do parameters without one."""
    pairs = [
        pair
        for name, rows in wanted.items()
        # If there are more on one side, nobody knows which.
        if len(found.get(name, [])) == len(rows)
        for pair in zip(found[name], rows)
    ]
    return sorted(pairs, key=itemgetter(1))  # an error names the first parameter that is wrong


def _pairs_of_groups(
    found: Mapping[str | None, list[int]], wanted: Mapping[str | None, list[int]]
) -> list[Pair]:
    """Pairs of groups that share a name. One that was split or joined has no history saved."""
    links = {
        (there, here)
        for name, rows in wanted.items()
        if name is not None
        for here in rows
        for there in found.get(name, [])
    }
    split, joined = Counter(there for there, _ in links), Counter(here for _, here in links)
    return sorted(pair for pair in links if split[pair[0]] == joined[pair[1]] == 1)


def _pairs_by_order(saved: State, current: State, source: str, count: int) -> list[Pair]:
    """Pairs of rows at the same positions, of which the clipper has `count`.

    Raises:
        StateError: there are not as many.
    """
    theirs, mine = len(saved.groups), len(current.groups)
    if theirs != mine:
        raise StateError(
            f"{source} has {theirs} parameter group{'s' * (theirs != 1)}, but the clipper has "
            f"{mine}, and no parameter's name is in both. Groups without shared names are matched "
            "by order: make the same ones. If `autoclip convert` wrote it, convert again with "
            "--group-sizes."
        )
    if not saved.mode.joins:
        for i, (there, here) in enumerate(zip(saved.groups, current.groups)):
            _check_number(source, there.parameters, here.parameters, i)
    return [(row, row) for row in range(count)]


def _check_number(source: str, theirs: Row, mine: Row, group: int) -> None:
    """Refuse another number of parameters in a group.

    Raises:
        StateError: the numbers differ.
    """
    if len(theirs) == len(mine):
        return
    there, here = (dict.fromkeys(_names(row)) for row in (theirs, mine))
    names = ""
    if there and here:
        only_there, only_here = (
            _some([name for name in one if name not in other], brief_repr, 60, ", ")
            for one, other in ((there, here), (here, there))
        )
        names = f" (only saved: {only_there}; only in the clipper: {only_here})"
    raise StateError(
        f"{source} has {len(theirs)} parameters in group {group}, but the clipper has "
        f"{len(mine)}{names}. Load it for the same model."
    )


def _check_fit(saved: State, current: State, source: str, theirs: Row, mine: Row, row: int) -> None:
    """Refuse a history of parameters that cannot be those of the clipper's row, in any order.

    Within a framework shapes are equal. Across frameworks only the numbers of elements are: a
    Linear weight and a Dense kernel are each other's transpose. An unknown shape fits any.

    Raises:
        StateError: a shape does not fit.
    """
    if saved.mode.joins:
        _check_number(source, theirs, mine, row)
    same_framework = saved.framework == current.framework
    there, here = (
        [
            each.shape if same_framework or each.shape is None else math.prod(each.shape)
            for each in either
        ]
        for either in (theirs, mine)
    )
    if there == here or None in there or None in here or Counter(there) == Counter(here):
        return
    k = next(k for k, (one, other) in enumerate(zip(there, here)) if one != other)
    positions = [
        (i, k) for i, group in enumerate(current.groups) for k in range(len(group.parameters))
    ]
    group, index = (row, k) if saved.mode.joins else positions[row]
    raise StateError(
        f"Parameter {index} of group {group} does not match: {source} has {theirs[k]}, the "
        f"clipper has {mine[k]}; their {'shapes' if same_framework else 'numbers of elements'} "
        "differ. Load it for the same model."
    )


def _names(row: Row) -> list[str]:
    return [info.name for info in row if info.name is not None]


# -- histories -----------------------------------------------------------------------------------


def _with_histories(saved: State, current: State, sources: Sequence[int]) -> tuple[GroupState, ...]:
    """The clipper's groups with the saved windows."""
    windows, recorded = saved.by_row()
    # One more row, which is empty: that of the source -1.
    windows, recorded = [*windows, np.empty(0, np.float32)], np.append(recorded, 0)
    remaining = iter(sources)
    groups = []
    for group in current.groups:
        own = [*islice(remaining, len(group.lengths))]
        length = group.settings["history_length"]
        kept = [windows[row][-length:] for row in own]
        groups.append(group.from_windows(group.settings, group.parameters, kept, recorded[own]))
    return tuple(groups)


# -- warnings --------------------------------------------------------------------------------


def _different_settings(saved: State, current: State, sources: Sequence[int]) -> str:
    """A note on settings that differ between groups that share a history; or ""."""
    theirs, mine = (
        [i for i, group in enumerate(state.groups) for _ in group.lengths]
        for state in (saved, current)
    )
    pairs = {(mine[row], theirs[there]) for row, there in enumerate(sources) if there >= 0}
    found: dict[str, list[int]] = {}
    for j, i in sorted(pairs):
        there, here = saved.groups[i].settings, current.groups[j].settings
        # Another rule has other settings of its own.
        for name in {**here, **there} if saved.rule == current.rule else CLIPPER_SETTINGS:
            if there.get(name, _ABSENT) != here.get(name, _ABSENT):
                values = (
                    brief_repr(each[name]) if name in each else "absent" for each in (there, here)
                )
                text = "{}={} there and {} here".format(brief_repr(name)[1:-1], *values)
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


def _other_names(saved: State, current: State, sources: Sequence[int]) -> str:
    """A note on histories that go to other names; or ""."""
    theirs, mine = _rows(saved), _rows(current)
    moved = [
        (there, row)
        for row, there in enumerate(sources)
        if there >= 0 and _names(theirs[there]) and _names(mine[row])
    ]
    if not moved:
        return ""

    def show(pair: Pair) -> str:
        there, row = pair
        return f"{_title(saved, there, theirs[there])} → {_title(current, row, mine[row])}"

    return (
        "has no parameter's name in common with the clipper, so its histories are matched by "
        f"order: {_some(moved, show)}. Make sure that these are the same parameters."
    )


def _rows_without_partner(saved: State, current: State, sources: Sequence[int]) -> str:
    """A note on rows that start empty and on saved ones that are left over; or ""."""
    theirs, mine = _rows(saved), _rows(current)
    empty = [row for row, there in enumerate(sources) if there < 0]
    unused = sorted({*range(len(theirs))}.difference(sources))
    if not empty and not unused:
        return ""
    starting = _some(empty, lambda row: _label(current, row, mine[row]), 120)
    left = _some(unused, lambda row: _label(saved, row, theirs[row]), 120)
    return (
        f"does not match the clipper everywhere. Histories that start empty: {starting}. "
        f"Saved histories that are not used: {left}."
    )


def _label(state: State, row: int, parameters: Row) -> str:
    """A row's name and its parameter's shape."""
    if state.mode.joins:
        return state.mode.row_names((), len(state.groups))[row]
    return str(parameters[0])


def _title(state: State, row: int, parameters: Row) -> str:
    """A row's name; of a row of several parameters with the first one's."""
    first = brief_repr(_names(parameters)[0])
    return f"{_label(state, row, parameters)} ({first}, …)" if state.mode.joins else first


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
