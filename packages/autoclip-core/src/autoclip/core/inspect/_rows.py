"""The rows of a saved history: their names, windows, settings and replayed steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autoclip.core._numpy.history import History
from autoclip.core._rules.rule import RULES
from autoclip.core._settings.settings import CLIPPER_SETTINGS, GroupSettings
from autoclip.core._state.state import GroupState, State
from autoclip.core.inspect._replay import Replay, replay
from autoclip.core.inspect._text import printable

__all__ = ["Rows"]

_MOST_NORMS = 10_000


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a state, in the order of its groups.

    Attributes:
        state: the state that they come from.
        names: of each row.
        groups: int[rows], the group that each row belongs to.
        windows: float32[length] a row, oldest norm first.
        recorded: int64[rows], how many norms each row has ever recorded.
        settings: of each row; None if the rule is not registered in this process.
    """

    state: State
    names: tuple[str, ...]
    groups: list[int]
    windows: list[npt.NDArray[np.float32]]
    recorded: npt.NDArray[np.int64]
    settings: list[GroupSettings] | None

    @classmethod
    def of(cls, state: State) -> Rows:
        """The rows of a state."""
        groups = [i for i, group in enumerate(state.groups) for _ in group.lengths]
        by_group = [_settings_of(state.rule, group) for group in state.groups]
        known = [settings for settings in by_group if settings is not None]
        windows, recorded = state.by_row()
        return cls(
            state,
            state.row_names,
            groups,
            windows,
            recorded,
            [known[i] for i in groups] if len(known) == len(by_group) else None,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shows_clipping(self) -> bool:
        """True if the norms show clipping: not if they were recorded after it."""
        return self.settings is not None and all(each.record == "raw" for each in self.settings)

    def only(self, row: int) -> Rows:
        """One row alone."""
        settings = None if self.settings is None else [self.settings[row]]
        return Rows(
            self.state,
            (self.names[row],),
            [self.groups[row]],
            [self.windows[row]],
            self.recorded[[row]],
            settings,
        )

    def newest(self, count: int) -> list[npt.NDArray[np.float32]]:
        """The newest norms of each window."""
        return [window[-count:] for window in self.windows]

    @cached_property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """float64[rows]: the thresholds of the windows as they are; NaN if the rule is unknown."""
        if self.replay is None or self.settings is None:
            return np.full(len(self), np.nan)
        found = self.replay.final.copy()
        for row, window in enumerate(self.windows):
            if len(window) > _MOST_NORMS:  # the replay has seen the newest ones only
                history = History.of([self.settings[row]])
                history.write([0], [window], self.recorded[[row]])
                found[row] = history.thresholds[0]
        return found

    @cached_property
    def replay(self) -> Replay | None:
        """The steps in the windows, at most the newest 10000; None if the rule is unknown."""
        if self.settings is None:
            return None
        return replay(self.settings, self.newest(_MOST_NORMS), self.recorded)

    def index(self, row: int | str | None) -> int:
        """The number of a row: by number, by name or a part that no other name has.

        Args:
            row: None for the one that is clipped hardest.

        Raises:
            KeyError: there is no such row, or several.
        """
        if row is None:
            return int(self.hardest_first()[0])
        if isinstance(row, str) and row in self.names:
            return self.names.index(row)
        if isinstance(row, str) and row.lstrip("-").isdecimal():
            row = int(row)
        if isinstance(row, int) and -len(self) <= row < len(self):
            return row % len(self)
        found = [i for i, name in enumerate(self.names) if isinstance(row, str) and row in name]
        if len(found) == 1:
            return found[0]
        shown = [self.names[i] for i in found] or self.names
        some = ", ".join(map(printable, shown[:5])) + ", …" * (len(shown) > 5)
        if found:
            raise KeyError(f"{len(found)} rows have {row!r} in their names: {some}.")
        raise KeyError(f"There is no row {row!r}. The {len(self)} rows are {some}.")

    def hardest_first(self) -> npt.NDArray[np.int64]:
        """int64[rows]: all rows, lowest mean coefficient first; empty windows come last."""
        coefficients = np.full(len(self), np.nan)
        if self.replay is not None and self.shows_clipping:
            coefficients = self.replay.coefficients
        return np.argsort(coefficients, kind="stable")  # NaN comes last


def _settings_of(rule: str, group: GroupState) -> GroupSettings | None:
    """The settings to compute thresholds with; None if the rule or a value is not known here.

    A file of another release may lack a setting, which then has its default, or have others.
    """
    if rule not in RULES:
        return None
    saved = group.settings
    own = {name: saved[name] for name in RULES[rule].setting_names() if name in saved}
    shared = {name: saved[name] for name in CLIPPER_SETTINGS if name in saved}
    try:
        return GroupSettings(RULES[rule].from_settings(own), **shared)
    except (TypeError, ValueError):
        return None
