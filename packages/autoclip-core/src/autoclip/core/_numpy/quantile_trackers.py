"""Trackers of the quantile rule: bands of windows, in Python's numbers for a few rows."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

from autoclip.core._numpy.ring import OPS, RingBuffer, Rows
from autoclip.core._numpy.tracker import FewRows, Tracker, register_tracker
from autoclip.core._rules.quantile import Quantile
from autoclip.core._window import interpolate

_FEW_ROWS = 140
"""Above this many rows NumPy is faster than Python's numbers.

In a loop of nothing else, see `core_history.py`. In training, NumPy's code has left the caches by
the next step, and Python's numbers stay ahead up to about 250.
"""
_LARGEST_ROOT = 1024
"""The band stops growing there: a `history_length` beyond 2^20 is hardly ever filled."""
_SORTED_AT_ONCE = 2**22


@register_tracker(Quantile)
def _make(rules: Sequence[Quantile], history_length: int) -> Tracker | FewRows:
    return (_FewBands if len(rules) <= _FEW_ROWS else _Bands)(rules, history_length)


def _width(history_length: int) -> int:
    return max(16, 2 * min(math.isqrt(history_length), _LARGEST_ROOT))


class _FewBands(FewRows):
    """The bands that `_Bands` describes, of a few rows."""

    def __init__(self, rules: Sequence[Quantile], history_length: int) -> None:
        self._rules = [(rule.quantile, rule.factor) for rule in rules]
        self._width = _width(history_length)
        self._margin = self._width // 4
        # The number of new bands that may still be cut in this step before they are needed.
        self._cuts = 0
        self._clear()

    def _clear(self) -> None:
        rows = len(self._rules)
        self._thresholds = [math.inf] * rows
        self._bands = [array("f") for _ in range(rows)]
        self._below, self._lengths = [0] * rows, [0] * rows
        self._low, self._high = array("f", [-math.inf]) * rows, array("f", [math.inf]) * rows

    def thresholds(self, ring: RingBuffer) -> list[float]:
        return self._thresholds.copy()

    def update(self, ring: RingBuffer, entered: Sequence[float], left: Sequence[float]) -> None:
        self._cuts = -(-len(entered) // self._margin)
        for row, norm, old, low, high in zip(count(), entered, left, self._low, self._high):
            # Most norms replace one on the same side of the band, which changes nothing.
            if (norm < low and old < low) or (norm > high and old > high) or not norm:
                continue
            band, below = self._bands[row], self._below[row]
            if old < low:
                below -= 1
            elif old <= high:
                del band[bisect_left(band, old)]
            elif old != old:  # NaN: no norm fell out
                self._lengths[row] += 1
            if norm < low:
                below += 1
            elif norm <= high:
                insort(band, norm)
            self._refresh(ring, row, band, below)

    def _refresh(self, ring: RingBuffer, row: int, band: array[float], below: int) -> None:
        """Find the ends and the threshold of a band that has changed.

        Args:
            ring: the windows.
            row: the number of the row.
            band: the norms in its band.
            below: the number of norms below them.
        """
        quantile, factor = self._rules[row]
        length, margin = self._lengths[row], self._margin
        position = quantile * (length - 1)
        lower = int(position)
        if len(band) > self._width:
            # Drop the end that is farther from the order statistics that are asked for.
            if lower - below > self._width // 2:
                del band[0]
                below += 1
            else:
                del band[-1]
        end = below + len(band)
        # How far the order statistics are from the ends, where there is more beyond an end.
        room = lower - below if below else margin
        if end < length:
            room = min(room, end - lower - 2)
        if room < 0 or (room < margin and self._cuts > 0):
            self._cuts -= 1
            ordered = np.sort(ring.read(row))
            size = min(self._width, length)
            below = min(max(lower + 1 - size // 2, 0), length - size)
            end = below + size
            band = self._bands[row] = array("f", ordered[below:end].tobytes())
        self._below[row] = below
        self._low[row] = band[0] if below else -math.inf
        self._high[row] = band[-1] if end < length else math.inf
        a, t = band[lower - below], position - lower
        if t:  # then there is a next one
            b = band[lower - below + 1]
            a = a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)
        self._thresholds[row] = factor * a

    def rebuild(self, ring: RingBuffer) -> None:
        self._clear()
        self._lengths = ring.lengths.tolist()
        for row, length in enumerate(self._lengths):
            if length:
                self._refresh(ring, row, self._bands[row], 0)


class _Bands(Tracker):
    """Quantiles from a band of each window: the values around the one that is asked for.

    A threshold needs two neighboring order statistics, not a sorted window. For every row we
    keep a *band*, a run of the sorted window around them, and the number of values *below* it. A
    value that comes or goes outside the band only changes that number; one inside changes the
    band, by one sort of a few dozen values. The thresholds are exact throughout, and the cost of
    a step depends on the band's width, which is about `2 * sqrt(history_length)`.

    The order statistics move by at most one slot a step. Long before they leave a band, a new
    one is cut from the window, a few rows at a time: no single step has to do it for all rows.

    Ends: a band that has nothing below (above) it takes in all norms on that side.
    Otherwise a value equal to an end counts as inside, where an equal one is sure to be found
    when it leaves.
    """

    def __init__(self, rules: Sequence[Quantile], history_length: int) -> None:
        rows = len(rules)
        super().__init__(rows)
        self._quantiles = np.array([rule.quantile for rule in rules], np.float64)
        self._factors = np.array([rule.factor for rule in rules], np.float64)
        self._scales = bool((self._factors != 1.0).any())
        self._width = _width(history_length)
        # Rows whose order statistics come this close to an end wait for a new band.
        self._margin = self._width // 4
        self._cuts = -(-rows // self._margin)
        # One column more than the width: room for a value that comes before another is dropped.
        self._band = np.full((rows, self._width + 1), np.inf, np.float32)
        self._sizes = np.zeros(rows, np.int64)
        self._below = np.zeros(rows, np.int64)
        self._low = np.full(rows, -np.inf, np.float32)
        self._high = np.full(rows, np.inf, np.float32)
        self._ring: RingBuffer
        self._lengths: npt.NDArray[np.int64]

    def update(
        self,
        ring: RingBuffer,
        rows: Rows,
        entered: npt.NDArray[np.float32],
        left: npt.NDArray[np.float32],
    ) -> None:
        self._ring, self._lengths = ring, ring.lengths
        low, high = self._low[rows], self._high[rows]
        # Comparisons with NaN, "nothing left", are false.
        self._below[rows] += (entered < low).astype(np.int64) - (left < low)
        comes = (entered >= low) & (entered <= high)
        goes = (left >= low) & (left <= high)
        changed = np.flatnonzero(comes | goes)
        if len(changed):
            index = changed if isinstance(rows, slice) else rows[changed]
            self._change_bands(
                index, entered[changed], left[changed], comes[changed], goes[changed]
            )
        self._interpolate(rows)

    def _change_bands(
        self,
        rows: npt.NDArray[np.int64],
        entered: npt.NDArray[np.float32],
        left: npt.NDArray[np.float32],
        comes: npt.NDArray[np.bool_],
        goes: npt.NDArray[np.bool_],
    ) -> None:
        band, sizes = self._band[rows], self._sizes[rows]
        index = np.arange(len(rows))
        # The value that comes replaces the one that goes; the sort does the rest.
        slot = np.where(goes, (band < left[:, None]).sum(axis=1), sizes)
        band[index, slot] = np.where(comes, entered, np.float32(np.inf))
        sizes = sizes + comes - goes
        band.sort(axis=1)

        overfull = np.flatnonzero(sizes > self._width)
        if len(overfull):
            # Drop the end that is farther from the order statistics that are asked for.
            offsets = self._positions(rows[overfull]).astype(np.int64) - self._below[rows[overfull]]
            drop_low = overfull[offsets > self._width // 2]
            band[drop_low, :-1] = band[drop_low, 1:]
            self._below[rows[drop_low]] += 1
            band[overfull, self._width] = np.inf
            sizes[overfull] = self._width

        self._band[rows], self._sizes[rows] = band, sizes
        self._set_ends(rows)

    def _set_ends(self, rows: npt.NDArray[np.int64]) -> None:
        below, sizes = self._below[rows], self._sizes[rows]
        above = self._lengths[rows] - below - sizes
        last = self._band[rows, np.maximum(sizes - 1, 0)]
        self._low[rows] = np.where(below > 0, self._band[rows, 0], np.float32(-np.inf))
        self._high[rows] = np.where(above > 0, last, np.float32(np.inf))

    def _positions(self, rows: Rows) -> npt.NDArray[np.float64]:
        return self._quantiles[rows] * (self._lengths[rows] - 1)

    def _interpolate(self, rows: Rows) -> None:
        lengths = self._lengths[rows]
        positions = self._quantiles[rows] * (lengths - 1)
        lower = positions.astype(np.int64)
        upper = np.minimum(lower + 1, lengths - 1)
        below = self._below[rows]
        index = np.arange(len(self._lengths)) if isinstance(rows, slice) else rows
        # How far the order statistics are from the ends, where there is more beyond an end.
        end = below + self._sizes[rows]
        room = np.minimum(
            np.where(below > 0, lower - below, self._width),
            np.where(end < lengths, end - 1 - upper, self._width),
        )
        close = np.flatnonzero(room < self._margin)
        if len(close):
            self._renew(index[close], room[close])
            below = self._below[rows]
        a = self._band[index, lower - below].astype(np.float64)
        b = self._band[index, upper - below].astype(np.float64)
        found = interpolate(OPS, a, b, positions - lower)
        self.thresholds[rows] = self._factors[rows] * found if self._scales else found

    def _renew(self, rows: npt.NDArray[np.int64], room: npt.NDArray[np.int64]) -> None:
        """Cut new bands for the rows that have left theirs and for a few of those that may soon."""
        outside = int((room < 0).sum())
        count = max(outside, self._cuts)
        if count < len(rows):
            rows = rows[np.argpartition(room, count)[:count]]
        self._cut_bands(rows)

    def _cut_bands(self, rows: npt.NDArray[np.int64]) -> None:
        longest = int(self._lengths[rows].max())
        pieces = -(-len(rows) * longest // _SORTED_AT_ONCE)
        for some in np.array_split(rows, pieces):
            lengths = self._lengths[some]
            ordered = np.sort(self._ring.padded(some), axis=1)  # unused slots, zeros, come first
            sizes = np.minimum(self._width, lengths)
            middle = self._positions(some).astype(np.int64) + 1
            starts = np.minimum(np.maximum(middle - sizes // 2, 0), lengths - sizes)
            columns = np.arange(self._width)
            slots = (starts + ordered.shape[1] - lengths)[:, None] + columns
            band = np.take_along_axis(ordered, np.minimum(slots, ordered.shape[1] - 1), axis=1)
            self._band[some, :-1] = np.where(columns < sizes[:, None], band, np.float32(np.inf))
            self._band[some, -1] = np.inf
            self._sizes[some], self._below[some] = sizes, starts
        self._set_ends(rows)

    def rebuild(self, ring: RingBuffer) -> None:
        self._ring, self._lengths = ring, ring.lengths
        rows = np.flatnonzero(self._lengths)
        if len(rows):
            self._cut_bands(rows)
            self._interpolate(rows)
