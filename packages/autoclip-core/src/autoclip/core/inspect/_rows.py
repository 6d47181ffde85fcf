"""The rows of a saved history: their names, windows, settings and replayed steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autoclip.core._numpy.history import History
from autoclip.core._settings.settings import GroupSettings
from autoclip.core._state.state import State
from autoclip.core.inspect._reading import settings_of
from autoclip.core.inspect._replay import Replay, replay
from autoclip.core.inspect._text import printable

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
    """

    state: State
    names: tuple[str, ...]
    groups: list[int]
    windows: list[npt.NDArray[np.float32]]
    recorded: npt.NDArray[np.int64]

    @classmethod
    def of(cls, state: State) -> Rows:
        """The rows of a state."""
        groups = [i for i, group in enumerate(state.groups) for _ in group.lengths]
        return cls(state, state.row_names, groups, *state.by_row())

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def settings(self) -> list[GroupSettings] | None:
        """The settings of each row; None if the rule is not registered in this process."""
        by_group = [settings_of(self.state.rule, group) for group in self.state.groups]
        known = [settings for settings in by_group if settings is not None]
        return [known[i] for i in self.groups] if len(known) == len(by_group) else None

    @property
    def shows_clipping(self) -> bool:
        """True if the norms show clipping: not if they were recorded after it."""
        return self.settings is not None and all(each.record == "raw" for each in self.settings)

    def only(self, row: int) -> Rows:
        """One row alone."""
        return replace(
            self,
            names=(self.names[row],),
            groups=[self.groups[row]],
            windows=[self.windows[row]],
            recorded=self.recorded[[row]],
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
        some = ", ".join(f"'{printable(each)}'" for each in shown[:5]) + ", …" * (len(shown) > 5)
        if found:
            raise KeyError(f"{len(found)} rows have {row!r} in their names: {some}.")
        raise KeyError(f"There is no row {row!r}, only {some}.")

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """float64[rows]: `Replay.shares`; NaN if the norms do not show clipping."""
        if self.replay is None or not self.shows_clipping:
            return np.full(len(self), np.nan)
        return self.replay.shares

    @property
    def coefficients(self) -> npt.NDArray[np.float64]:
        """float64[rows]: `Replay.coefficients`; NaN if the norms do not show clipping."""
        if self.replay is None or not self.shows_clipping:
            return np.full(len(self), np.nan)
        return self.replay.coefficients

    def hardest_first(self) -> npt.NDArray[np.int64]:
        """int64[rows]: all rows, lowest mean coefficient first; empty windows come last."""
        return np.argsort(self.coefficients, kind="stable")  # NaN comes last
