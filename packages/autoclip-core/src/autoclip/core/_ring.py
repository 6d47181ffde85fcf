"""The last norms of many rows, in ring buffers that grow with use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autoclip.core._window import NumpyWindow

__all__ = ["SMALLEST_NORM", "RingBuffer", "Rows", "is_recorded"]

SMALLEST_NORM = float(np.finfo(np.float32).tiny)
"""A norm below float32's smallest normal number, 1.18e-38, counts as zero: never recorded."""

Rows: TypeAlias = slice | npt.NDArray[np.int64]
"""Which rows: an index array without duplicates, or `slice(None)` for all of them."""

_FIRST_CAPACITY = 16


def is_recorded(norms: Any) -> Any:
    """Which norms enter a history: not zero, not NaN, not infinite.

    Args:
        norms: an array of any framework, rounded to float32 as a history holds them.

    Returns:
        A bool array of the same kind and shape.
    """
    return (norms >= SMALLEST_NORM) & (norms < np.inf)


class RingBuffer:
    """The last `history_length` recorded norms of each row.

    Each row has a ring of its own in one flat array. A ring grows by doubling up to
    `history_length`, so memory follows what is held. A norm has a *place* in its ring: in a full
    window how many norms the row had recorded before it, modulo `history_length`; in a shorter one
    how many norms of the window are older. Places follow from the window and `recorded` alone, so
    that sums over places give the same bits after a load as without one.

    Attributes:
        history_length: how many norms a row keeps at most.
        lengths: int64[rows], how many norms the window of each row holds.
        recorded: int64[rows], how many norms each row has ever recorded.
    """

    def __init__(self, rows: int, history_length: int) -> None:
        self.history_length = history_length
        self.lengths: npt.NDArray[np.int64] = np.zeros(rows, np.int64)
        self.recorded: npt.NDArray[np.int64] = np.zeros(rows, np.int64)
        self._lay_out(np.full(rows, min(_FIRST_CAPACITY, history_length), np.int64))

    def _lay_out(self, capacities: npt.NDArray[np.int64]) -> None:
        self._capacities = capacities
        self._starts = np.cumsum(capacities) - capacities
        self._values: npt.NDArray[np.float32] = np.zeros(int(capacities.sum()), np.float32)
        self._grows = bool((capacities < self.history_length).any())
        self._row_starts = self._starts.tolist()
        self._make_views()

    def _make_views(self) -> None:
        # For one row at a time: Python's numbers, without NumPy's price for a scalar.
        self._values_view: Any = memoryview(self._values.data)
        self._recorded_view: Any = memoryview(self.recorded.data)
        self._lengths_view: Any = memoryview(self.lengths.data)

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if not n.endswith("_view")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """How much memory the norms take, in bytes."""
        return self._values.nbytes

    def push(self, rows: Rows, entered: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Append one norm to each of `rows`.

        Args:
            rows: which rows.
            entered: float32[n], one norm a row.

        Returns:
            float32[n]: the norms that fell out of the windows, NaN where none did.
        """
        recorded, lengths = self.recorded[rows], self.lengths[rows]
        full = lengths == self.history_length
        places = np.where(full, recorded % self.history_length, lengths)
        if self._grows:
            self._reserve(rows, places)
        slots = self._starts[rows] + places
        left: npt.NDArray[np.float32] = np.where(full, self._values[slots], np.float32(np.nan))
        self._values[slots] = entered
        self.recorded[rows] += 1
        self.lengths[rows] += ~full
        if not full.all():
            self._renumber(rows, ~full)
        return left

    def push_one(self, row: int, entered: float) -> float | None:
        """Append one norm to one row; the norm that fell out of the window, or None."""
        recorded, length = self._recorded_view[row], self._lengths_view[row]
        self._recorded_view[row] = recorded + 1
        if length == self.history_length:
            slot = self._row_starts[row] + recorded % length
            left: float = self._values_view[slot]
            self._values_view[slot] = entered
            return left
        if self._grows:
            self._reserve(np.array([row]), np.array([length]))
        self._values_view[self._row_starts[row] + length] = entered
        self._lengths_view[row] = length + 1
        self._renumber(np.array([row]), np.array([True]))
        return None

    def _renumber(self, rows: Rows, grown: npt.NDArray[np.bool_]) -> None:
        """Rotate the windows that have just become full and whose places change by that."""
        for row in self.renumbered(rows, grown).tolist():
            start, length = self._row_starts[row], self.history_length
            window = self._values[start : start + length]
            window[:] = np.roll(window, int(self.recorded[row]) % length)

    def renumbered(self, rows: Rows, grown: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Which of `rows`, where `grown`, got other places when they became full just now.

        A window that was loaded into a longer history, for one.
        """
        full = self.lengths[rows] == self.history_length
        changed = np.flatnonzero(grown & full & (self.recorded[rows] % self.history_length != 0))
        return changed if isinstance(rows, slice) else rows[changed]

    def _reserve(self, rows: Rows, places: npt.NDArray[np.int64]) -> None:
        if (places < self._capacities[rows]).all():
            return
        # Rows that are nearly full grow along, so that rows which fill up one after the other do
        # not each copy everything.
        grows = 4 * self.lengths > 3 * self._capacities
        doubled = np.minimum(2 * self._capacities, self.history_length)
        old, starts, kept = self._values, self._starts.tolist(), self._capacities.tolist()
        self._lay_out(np.where(grows, doubled, self._capacities))
        for start, new, count in zip(starts, self._row_starts, kept):
            self._values[new : new + count] = old[start : start + count]

    def read(self, row: int) -> npt.NDArray[np.float32]:
        """float32[length]: a copy of a row's window, oldest norm first."""
        start, length = self._row_starts[row], int(self.lengths[row])
        held: npt.NDArray[np.float32] = self._values[start : start + length]
        full = length == self.history_length
        return np.roll(held, -(int(self.recorded[row]) % length) if full else 0)

    def write(
        self, windows: list[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows.

        Args:
            windows: one float32[length] a row, oldest norm first, at most `history_length` long.
            recorded: int64[rows].
        """
        self.lengths = np.array([len(window) for window in windows], np.int64)
        self.recorded = np.array(recorded, np.int64)
        self._lay_out(self._widths())
        for start, window, count in zip(self._row_starts, windows, self.recorded.tolist()):
            full = len(window) == self.history_length
            held = np.roll(window, count % len(window)) if full else window
            self._values[start : start + len(window)] = held

    def newest(self, rows: Rows) -> npt.NDArray[np.int64]:
        """int64[n]: the place of each row's newest norm."""
        recorded, lengths = self.recorded[rows], self.lengths[rows]
        full = lengths == self.history_length
        return np.where(full, (recorded - 1) % self.history_length, lengths - 1)

    def at(
        self, rows: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """The norms at `places`, [n, m]; float64[n, m], NaN where the window holds no such norm."""
        held = places < self.lengths[rows, None]
        slots = self._starts[rows, None] + np.where(held, places, 0)
        return np.where(held, self._values[slots].astype(np.float64), np.nan)

    def between(self, row: int, first: int, end: int) -> list[float]:
        """The norms of one row at the places from `first` up to `end`."""
        start = self._row_starts[row]
        end = min(end, int(self.lengths[row]))
        norms: list[float] = self._values_view[start + first : start + end].tolist()
        return norms

    def padded(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32[n, longest]: the windows of rows, in no order, filled up with infinity."""
        matrix, valid = self._matrix(rows, int(self.lengths[rows].max()))
        return matrix if valid is None else np.where(valid, matrix, np.float32(np.inf))

    def _matrix(
        self, rows: npt.NDArray[np.int64], width: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_] | None]:
        lengths, capacities = self.lengths[rows], self._capacities[rows]
        places = np.arange(width)
        if len(rows) == self.rows and (capacities == capacities[0]).all():
            matrix = self._values.reshape(self.rows, -1)[:, :width]
        else:
            slots = self._starts[rows, None] + np.minimum(places, capacities[:, None] - 1)
            matrix = self._values[slots]
        return matrix, None if (lengths == width).all() else places < lengths[:, None]

    def _widths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: each length, rounded up to a power of two; at most the capacity."""
        powers = np.ceil(np.log2(np.maximum(self.lengths, _FIRST_CAPACITY))).astype(np.int64)
        widths: npt.NDArray[np.int64] = np.minimum(1 << powers, self.history_length)
        return widths

    def windows(self) -> Iterator[tuple[npt.NDArray[np.int64], NumpyWindow]]:
        """All rows, and what a rule sees of them; rows of about one length at a time.

        So one long window beside many short ones does not make all of them long. The width of a
        row follows from its length alone: sums over it have the same bits after a load, and
        whatever the other rows hold.
        """
        widths = self._widths()
        for width in dict.fromkeys(widths.tolist()):
            rows = np.flatnonzero(widths == width)
            matrix, valid = self._matrix(rows, width)
            yield rows, NumpyWindow(matrix, valid, self.newest(rows), self.lengths[rows])
