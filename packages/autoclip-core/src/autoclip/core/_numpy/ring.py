"""Windows of many rows in NumPy: ring buffers of different lengths that grow with use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autoclip.core._ops import NumpyOps
from autoclip.core._window import Windows, counts_of, slots_of

Rows: TypeAlias = slice | npt.NDArray[np.int64]
"""Some rows: an index array without duplicates, or `slice(None)` for all of them."""

OPS = NumpyOps()
FIRST_CAPACITY = 16


class RingBuffer:
    """The last `history_length` recorded norms of each row, laid out as `Windows` describes.

    Each row has a ring of its own in one flat array. A ring grows by doubling up to
    `history_length`, so memory follows the contents.

    Args:
        windows: one float32[length] a row, oldest norm first, at most `history_length` long.
        recorded: int64[rows], how many norms each row has ever recorded.
        history_length: the maximum number of norms a row keeps.

    Attributes:
        history_length: see above.
        counts: int64[rows], how many norms have come into each window.
        is_full: True if all windows are known to hold `history_length` norms.
    """

    def __init__(
        self,
        windows: Sequence[npt.NDArray[np.float32]],
        recorded: npt.NDArray[np.int64],
        history_length: int,
    ) -> None:
        lengths = np.array([len(window) for window in windows], np.int64)
        self.history_length = history_length
        self.counts = counts_of(lengths, np.asarray(recorded, np.int64), history_length)
        self._before: npt.NDArray[np.int64] = recorded - self.counts
        self._lay_out(self.widths())
        for start, window, count in zip(self._row_starts, windows, self.counts.tolist()):
            self._values[start + slots_of(count, history_length)] = window

    def _lay_out(self, capacities: npt.NDArray[np.int64]) -> None:
        self._capacities = capacities
        self._starts = np.cumsum(capacities) - capacities
        self._row_starts: list[int] = self._starts.tolist()
        self._values = np.zeros(int(capacities.sum()), np.float32)
        self.is_full = False
        # An interrupt may come between two writes: norms that are about to be recorded, 0 for a row
        # without one, and `counts` before.
        self._unfinished: tuple[Any, Any] | None = None
        self._make_views()

    def _make_views(self) -> None:
        # For one row at a time: Python's numbers, without NumPy's price for a scalar.
        self._values_view: Any = memoryview(self._values.data)
        self._counts_view: Any = memoryview(self.counts.data)

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if not n.endswith("_view")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.counts)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms the window of each row holds."""
        return np.minimum(self.counts, self.history_length)

    @property
    def recorded(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms each row has ever recorded."""
        return self.counts + self._before

    # -- a step ------------------------------------------------------------------------------

    def reserved(self, rows: Rows) -> RingBuffer:
        """This buffer, or a copy that has room for one more norm in each of `rows`."""
        if not self.is_full:
            self.is_full = bool((self.lengths == self.history_length).all())
        if self.is_full:
            return self
        slots = self.counts % self.history_length
        if (slots[rows] < self._capacities[rows]).all():
            return self
        # Rows that are nearly full grow along, so that rows which fill up one after the other do
        # not each copy everything.
        grows = 4 * (slots + 1) > 3 * self._capacities
        doubled = np.minimum(2 * self._capacities, self.history_length)
        grown = RingBuffer.__new__(RingBuffer)
        grown.history_length = self.history_length
        grown.counts, grown._before = self.counts.copy(), self._before
        grown._lay_out(np.where(grows, doubled, self._capacities))
        kept = zip(self._row_starts, grown._row_starts, self._capacities.tolist())
        for old, new, count in kept:
            grown._values[new : new + count] = self._values[old : old + count]
        return grown

    def push(self, rows: Rows, entered: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Append one norm to each of `rows`, for which there is room.

        Args:
            rows: the rows' numbers.
            entered: float32[n], one norm a row.

        Returns:
            float32[n]: the norms that fell out of the windows, 0 if none did.
        """
        slots = self._starts[rows] + self.counts[rows] % self.history_length
        left: npt.NDArray[np.float32] = self._values[slots]
        coming = entered
        if not isinstance(rows, slice):
            coming = np.zeros(self.rows, np.float32)
            coming[rows] = entered
        self._unfinished = coming, self.counts.copy()
        self._values[slots] = entered
        self.counts[rows] += 1
        self._unfinished = None
        return left

    def push_each(self, entered: Sequence[float]) -> list[float]:
        """Append a norm to each row for which there is room, in Python's numbers.

        Args:
            entered: one norm a row, 0 for a row that records nothing.

        Returns:
            The norm that fell out of each row's window, NaN if none did.
        """
        fallen = [math.nan] * len(entered)
        values, counts, length = self._values_view, self._counts_view, self.history_length
        before = counts.tolist()
        self._unfinished = entered, before
        for row, norm, start, count in zip(itertools.count(), entered, self._row_starts, before):
            if norm:
                slot = start + count % length
                if count >= length:
                    fallen[row] = values[slot]
                values[slot] = norm
                counts[row] = count + 1
        self._unfinished = None
        return fallen

    def finish(self) -> None:
        """Complete a step that an interrupt has cut short."""
        if self._unfinished is not None:
            entered, before = map(np.array, self._unfinished)
            rows = np.flatnonzero(entered)
            self._values[self._starts[rows] + before[rows] % self.history_length] = entered[rows]
            self.counts[:] = before + (entered > 0)
            self._unfinished = None

    # -- contents ----------------------------------------------------------------------------

    def read(self, row: int) -> npt.NDArray[np.float32]:
        """float32[length]: a copy of a row's window, oldest norm first."""
        slots = slots_of(int(self.counts[row]), self.history_length)
        window: npt.NDArray[np.float32] = self._values[self._row_starts[row] + slots]
        return window

    def norms(self, row: int) -> npt.NDArray[np.float64]:
        """float64[length]: a row's window, in the order of the slots."""
        start = self._row_starts[row]
        held = self._values[start : start + int(self._capacities[row])].astype(np.float64)
        return held if self.is_full else held[held > 0]

    def matrix(self, rows: Rows, width: int) -> npt.NDArray[np.float32]:
        """float32[n, width]: the first slots of some rows, zeros for unused ones."""
        capacities = self._capacities
        whole = isinstance(rows, slice) or len(rows) == self.rows
        if whole and (self.is_full or (capacities == capacities[0]).all()):
            return self._values.reshape(self.rows, -1)[:, :width]
        held: npt.NDArray[np.float32] = self._values[self._starts[rows, None] + np.arange(width)]
        return held

    def at(
        self, rows: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """float64[n, m]: the norms in some slots, [n, m]; 0 if there is none."""
        there = slots < self._capacities[rows, None]
        held = self._values[self._starts[rows, None] + np.where(there, slots, 0)]
        return np.where(there, held.astype(np.float64), 0.0)

    def padded(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32[n, longest]: the slots of some rows, in no order, zeros for unused ones."""
        capacities = self._capacities[rows]
        if (capacities == capacities[0]).all():
            return self.matrix(rows, int(capacities[0]))
        return self.at(rows, np.arange(capacities.max())[None]).astype(np.float32)

    def widths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: each length, rounded up to a power of two."""
        powers = np.ceil(np.log2(np.maximum(self.lengths, FIRST_CAPACITY))).astype(np.int64)
        widths: npt.NDArray[np.int64] = np.minimum(1 << powers, self.history_length)
        return widths

    def windows(self) -> Iterator[tuple[Rows, Windows]]:
        """All rows and their windows; rows of about one length at a time.

        So one long window among many short ones does not make all of them long. The width of a
        row follows from its own past: sums over it have the same bits after a load, and
        independent of the other rows.
        """
        length, counts, before = self.history_length, self.counts[:, None], self._before[:, None]
        if self.is_full:
            everything = self.matrix(slice(None), length)
            yield slice(None), Windows(OPS, length, everything, None, counts, before)
            return
        widths = self.widths()
        for width in dict.fromkeys(widths.tolist()):
            rows = np.flatnonzero(widths == width)
            matrix = self.matrix(rows, width)
            yield rows, Windows(OPS, length, matrix, None, counts[rows], before[rows])
