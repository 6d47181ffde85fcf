"""The base of histories: windows of rows that are recorded together, in any framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from autoclip.core._settings.settings import GroupSettings
from autoclip.core._step import Report
from autoclip.core._window import Windows, unpack


class BaseHistory(ABC):
    """The windows of some rows, whose settings have equal `structure`."""

    changes_at_once: ClassVar[bool] = True
    """True if numbers in the settings take effect at once: a captured graph may read them."""

    @property
    @abstractmethod
    def _settings(self) -> Sequence[GroupSettings]:
        """The settings of each row."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._settings)

    @property
    def history_length(self) -> int:
        """The most norms that a row keeps."""
        return self._settings[0].history_length if self._settings else 1

    @property
    def settings(self) -> tuple[GroupSettings, ...]:
        """The settings of each row. Setting them keeps the windows.

        Raises:
            ValueError: the new ones are not one a row, or differ in more than numbers.
        """
        return tuple(self._settings)

    @settings.setter
    def settings(self, settings: Sequence[GroupSettings]) -> None:
        present = self._settings
        # A schedule writes thousands of groups one by one: a write must not look at all of them.
        changed = [k for k, (new, old) in enumerate(zip(settings, present)) if new is not old]
        structure = present[0].structure if changed else None
        if len(settings) != self.rows or any(settings[k].structure != structure for k in changed):
            raise ValueError(
                "settings must be one GroupSettings a row that differs from the present one in "
                "numbers only. Make a new History for others, and write the windows into it."
            )
        if changed:
            self._change(tuple(settings), changed)

    @abstractmethod
    def _change(self, settings: tuple[GroupSettings, ...], rows: list[int]) -> None:
        """Adopt settings that differ from the present ones in some rows; repeatable."""

    @property
    @abstractmethod
    def thresholds(self) -> Any:
        """The thresholds of the windows as they are now."""

    @abstractmethod
    def record(self, norms: Any) -> Report[Any]:
        """Compare one norm a row with its threshold, and append it to the row's window."""

    def once(self, norms: Any) -> Callable[[], Any]:
        """A function that records norms unless that has happened since; it may be called twice."""
        # No closure: a copy of the history has a copy of the function.
        return partial(self._record_once, self._mark(), norms)

    def _record_once(self, before: Any, norms: Any) -> None:
        if np.array_equal(self._to_host(self._mark()), self._to_host(before)):
            self.record(norms)

    @abstractmethod
    def _mark(self) -> Any:
        """A copy of the counts, on the device: another one after each step that records."""

    @staticmethod
    def _to_host(tensor: Any) -> npt.NDArray[Any]:
        """A tensor as an array of NumPy."""
        return np.asarray(tensor)

    @abstractmethod
    def read(
        self, rows: Sequence[int]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy the windows of `rows`.

        Returns:
            One float32[length] a row, oldest norm first, and int64[len(rows)], how many norms
            each has ever recorded.
        """

    def write(
        self,
        rows: Sequence[int],
        windows: Sequence[npt.NDArray[np.float32]],
        recorded: Sequence[int] | npt.NDArray[np.int64],
    ) -> None:
        """Replace the windows of `rows`; of one longer than `history_length` the newest stay.

        An interrupt leaves all windows as they were or as they are to be.

        Args:
            rows: the rows' numbers.
            windows: one float32[length] a row, oldest norm first.
            recorded: [len(rows)], how many norms each row has ever recorded.

        Raises:
            TypeError: a number of recorded norms is not an int.
            ValueError: there is not one window and one number for each row, a norm could not have
                been recorded, or a window is longer than its row's record. Nothing changed.
        """
        self.stage(rows, windows, recorded)()

    def stage(
        self,
        rows: Sequence[int],
        windows: Sequence[npt.NDArray[np.float32]],
        recorded: Sequence[int] | npt.NDArray[np.int64],
    ) -> Callable[[], None]:
        """A function that does the work of `write` and cannot fail; it may be called twice."""
        index, length = list(rows), self.history_length
        kept, counts = list(windows), np.asarray(recorded, np.int64)
        if index != list(range(self.rows)):
            kept, counts = self.read(range(self.rows))
            for row, window in zip(index, windows):
                kept[row] = window
            counts[index] = recorded
        return self._stage_all([window[-length:] for window in kept], counts)

    @abstractmethod
    def _stage_all(
        self, windows: list[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> Callable[[], None]:
        """`stage` for all rows, with windows that are not too long."""

    def reset(self) -> None:
        """Forget all norms, as if nothing had been recorded."""
        empty = [np.empty(0, np.float32)] * self.rows
        self.write(range(self.rows), empty, [0] * self.rows)


class BaseTensorHistory(BaseHistory):
    """A history whose windows are tensors, as `Windows` describes."""

    _settings: Sequence[GroupSettings] = ()

    @abstractmethod
    def _read_windows(self) -> Windows:
        """The windows, after a step that an interrupt has cut short has been completed."""

    def read(
        self, rows: Sequence[int]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy the windows of `rows` to the host; see `History.read`."""
        held, index = self._read_windows(), list(rows)
        values, counts, before = (
            self._to_host(each)[index] for each in (held.values, held.counts, held.before)
        )
        return unpack(values, counts, before, self.history_length)
