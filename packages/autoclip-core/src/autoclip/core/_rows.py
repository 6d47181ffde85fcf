"""From groups of parameters to rows of the history, and from rows to a state and back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from autoclip.core._settings.mode import Mode
from autoclip.core._settings.settings import GroupSettings
from autoclip.core._state.state import GroupState, ParameterInfo, State
from autoclip.core._version import __version__

__all__ = ["batches", "make_state", "parameter_names", "row_names", "split_state"]


def parameter_names(groups: Sequence[Sequence[str | None]]) -> list[str]:
    """The name of each parameter, group by group.

    Args:
        groups: the names of each group's parameters.
    """
    return [
        f"group {i}, parameter {k}" if name is None else name
        for i, names in enumerate(groups)
        for k, name in enumerate(names)
    ]


def row_names(mode: Mode, parameters: Sequence[str], groups: int) -> tuple[str, ...]:
    """The names of a clipper's rows in reports.

    Args:
        mode: the meaning of a row.
        parameters: the names of all parameters, in the order of their rows.
        groups: how many groups there are.
    """
    if mode == "global":
        return ("all parameters",)
    if mode == "group":
        return tuple(f"group {i}" for i in range(groups))
    return tuple(parameters)


def make_state(
    framework: str,
    rule: str,
    mode: Mode,
    settings: Sequence[GroupSettings],
    parameters: Sequence[Sequence[ParameterInfo]],
    rows: Sequence[Sequence[int]],
    windows: Sequence[npt.NDArray[np.float32]] | None = None,
    recorded: npt.NDArray[np.int64] | None = None,
) -> State:
    """The state of a clipper, or without windows its description.

    Args:
        framework: `"torch"`, `"tensorflow"`, or another backend's name.
        rule: the rule's name.
        mode: the meaning of a row. A global clipper's state has one group with all parameters.
        settings: of each group.
        parameters: of each group.
        rows: of each group, the numbers of its rows: one a parameter, or one.
        windows: of each row, oldest norm first; None for a description.
        recorded: int64[all rows]; None for a description.
    """
    if mode == "global":
        settings, rows = settings[:1], [[0]]
        parameters = [[info for group in parameters for info in group]]
    groups = [
        GroupState.empty(each.settings, infos, len(own))
        if windows is None or recorded is None
        else GroupState.from_windows(
            each.settings, infos, [windows[row] for row in own], recorded[list(own)]
        )
        for each, infos, own in zip(settings, parameters, rows)
    ]
    return State(rule, Mode(mode), framework, tuple(groups), __version__)


def split_state(
    state: State, rows: Sequence[Sequence[int]], count: int
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    """The windows and counts in a state by row; the opposite of `make_state`.

    Args:
        state: one that fits the clipper.
        rows: of each group, the numbers of its rows.
        count: how many rows there are.
    """
    windows = [np.empty(0, np.float32)] * count
    recorded = np.zeros(count, np.int64)
    if state.mode == "global":
        rows = [[0]]
    for own, group in zip(rows, state.groups):
        recorded[list(own)] = group.recorded
        for row, window in zip(own, group.windows()):
            windows[row] = window
    return windows, recorded


def batches(
    settings: Sequence[GroupSettings], *keys: Sequence[Hashable]
) -> dict[Hashable, list[int]]:
    """The rows that can be recorded together: those with equal `structure`.

    Args:
        settings: one a row.
        keys: other values that they must share, one a row, such as a device.
    """
    found: dict[Hashable, list[int]] = {}
    # Groups share their settings among many rows, and a look at each row's structure takes long.
    distinct = {id(each): each for each in settings}
    known = {key: each.structure for key, each in distinct.items()}
    for row, each in enumerate(settings):
        key = (known[id(each)], *(values[row] for values in keys))
        found.setdefault(key, []).append(row)
    return found
