"""The last norms of many rows, in one ring buffer that grows with use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from autoclip.core._rules import Rows

__all__ = ["SMALLEST_NORM", "Windows"]

SMALLEST_NORM = float(np.finfo(np.float32).tiny)
"""A norm below float32's smallest normal number, 1.18e-38, counts as zero: never recorded."""

_FIRST_CAPACITY = 16


class Windows:
    """The last `history_length` recorded norms of each row.

    The norm that a row records as its k-th (from 0) lies in slot `k % history_length`. Where a
    value lies so depends on its past alone, not on when the buffer grew or was loaded: a rule
    that sums over slots gives the same bits after a load as without one.

    Attributes:
        history_length: how many norms a row keeps at most.
        values: float32[rows, capacity], the slots; the capacity grows by doubling up to
            `history_length`, so that a long history costs memory only once it is filled.
        lengths: int64[rows], how many norms the window of each row holds.
        recorded: int64[rows], how many norms each row has ever recorded.
    """

    def __init__(self, rows: int, history_length: int) -> None:
        self.history_length = history_length
        self.values: npt.NDArray[np.float32] = np.zeros(
            (rows, min(_FIRST_CAPACITY, history_length)), np.float32
        )
        self.lengths: npt.NDArray[np.int64] = np.zeros(rows, np.int64)
        self.recorded: npt.NDArray[np.int64] = np.zeros(rows, np.int64)

    def add_rows(self, count: int) -> None:
        """Append `count` empty rows."""
        self.values = np.pad(self.values, ((0, count), (0, 0)))
        self.lengths = np.pad(self.lengths, (0, count))
        self.recorded = np.pad(self.recorded, (0, count))

    def push(self, rows: Rows, entered: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Append one norm to each of `rows`.

        Args:
            rows: which rows.
            entered: float32[n], one norm a row.

        Returns:
            float32[n]: the norms that fell out of the windows, NaN where none did.
        """
        recorded = self.recorded[rows]
        slots = recorded % self.history_length
        self._reserve(recorded)
        index = np.arange(len(self.lengths)) if isinstance(rows, slice) else rows
        full = self.lengths[rows] == self.history_length
        left: npt.NDArray[np.float32] = np.where(
            full, self.values[index, slots], np.float32(np.nan)
        )
        self.values[index, slots] = entered
        self.recorded[rows] += 1
        self.lengths[rows] += ~full
        return left

    def slots(self, row: int) -> npt.NDArray[np.int64]:
        """int64[length]: the slots of a row's window, oldest norm first."""
        end = int(self.recorded[row])
        return np.arange(end - int(self.lengths[row]), end) % self.history_length

    def read(self, row: int) -> npt.NDArray[np.float32]:
        """float32[length]: a copy of a row's window, oldest norm first."""
        window: npt.NDArray[np.float32] = self.values[row, self.slots(row)]
        return window

    def write(self, row: int, values: npt.NDArray[np.float32], recorded: int) -> None:
        """Replace a row's window by `values`, float32[length], oldest norm first."""
        self.recorded[row] = recorded
        self.lengths[row] = len(values)
        if recorded:
            self._reserve(np.asarray([recorded - 1]))
        self.values[row, self.slots(row)] = values

    def _reserve(self, recorded: npt.NDArray[np.int64]) -> None:
        """Make room for the slots of norms that were recorded as these from 0."""
        capacity = self.values.shape[1]
        if capacity == self.history_length:
            return
        needed = min(int(recorded.max(initial=0)) + 1, self.history_length)
        while capacity < needed:
            capacity *= 2
        capacity = min(capacity, self.history_length)
        if capacity > self.values.shape[1]:
            self.values = np.pad(self.values, ((0, 0), (0, capacity - self.values.shape[1])))
