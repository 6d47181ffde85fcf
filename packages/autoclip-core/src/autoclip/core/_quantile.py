"""The quantile rule: the threshold is a quantile of the window (AutoClip, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from autoclip.core._rules import Rows, Rule, Tracker, register_rule
from autoclip.core._settings import DEFAULT_QUANTILE, check_quantile
from autoclip.core._windows import Windows

__all__ = ["Quantile"]


@register_rule
@dataclass(frozen=True)
class Quantile(Rule):
    """The threshold is the `quantile` of the window, with linear interpolation.

    The position `quantile * (length - 1)` is computed in float64, as `numpy.quantile` does at its
    default method (Hyndman and Fan's type 7). Seetharaman et al., 2020, arXiv:2007.14469.

    Args:
        quantile: a real number in [0, 1]; 1 never clips, 0 clips to the smallest norm kept.

    Raises:
        TypeError, ValueError: `quantile` is something else.

    >>> from autoclip.core import History
    >>> history = History(rows=1, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 9.0):
    ...     report = history.record([norm])
    >>> report.thresholds
    array([2.])
    """

    quantile: float = DEFAULT_QUANTILE
    name: ClassVar[str] = "quantile"

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantile", check_quantile(self.quantile))

    @classmethod
    def track(cls, rules: Sequence[Quantile], windows: Windows) -> Tracker:
        return _BandTracker(rules, windows)


_LARGEST_ROOT = 1024
"""Of a `history_length` beyond 2^20 that nobody fills, the band does not grow any wider."""


class _BandTracker(Tracker):
    """Quantiles from a band of each window: the values around the one that is asked for.

    A threshold needs two neighbouring order statistics, not a sorted window. For every row we
    keep a *band*, a run of the sorted window around them, and the number of values *below* it. A
    value that comes or goes outside the band only changes that number; one inside changes the
    band, by one sort of a few dozen values. Only when the order statistics have wandered out of
    the band is it cut anew from the window. The thresholds are exact throughout, and the cost of
    a step depends on the band's width, which is about `2 * sqrt(history_length)`: a random walk
    then leaves the band after `history_length` steps, the fastest trend after half its width.

    Ends: a band that has nothing below (above) it takes in whatever comes on that side.
    Otherwise a value equal to an end counts as inside, where an equal one is sure to be found
    when it leaves.
    """

    def __init__(self, rules: Sequence[Quantile], windows: Windows) -> None:
        super().__init__(rules, windows)
        rows = len(rules)
        self._quantiles = np.array([rule.quantile for rule in rules], np.float64)
        self._width = max(16, 2 * min(math.isqrt(windows.history_length), _LARGEST_ROOT))
        # One column more than the width: room for a value that comes before another is dropped.
        self._band = np.full((rows, self._width + 1), np.inf, np.float32)
        self._sizes = np.zeros(rows, np.int64)
        self._below = np.zeros(rows, np.int64)
        self._low = np.full(rows, -np.inf, np.float32)
        self._high = np.full(rows, np.inf, np.float32)

    def update(
        self, rows: Rows, entered: npt.NDArray[np.float32], left: npt.NDArray[np.float32]
    ) -> None:
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
        # The value that comes takes the place of the one that goes; the sort does the rest.
        place = np.where(goes, (band < left[:, None]).sum(axis=1), sizes)
        band[index, place] = np.where(comes, entered, np.float32(np.inf))
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
        above = self.windows.lengths[rows] - below - sizes
        last = self._band[rows, np.maximum(sizes - 1, 0)]
        self._low[rows] = np.where(below > 0, self._band[rows, 0], np.float32(-np.inf))
        self._high[rows] = np.where(above > 0, last, np.float32(np.inf))

    def _positions(self, rows: Rows) -> npt.NDArray[np.float64]:
        return self._quantiles[rows] * (self.windows.lengths[rows] - 1)

    def _interpolate(self, rows: Rows) -> None:
        lengths = self.windows.lengths[rows]
        positions = self._quantiles[rows] * (lengths - 1)
        lower = positions.astype(np.int64)
        upper = np.minimum(lower + 1, lengths - 1)
        below = self._below[rows]
        outside = np.flatnonzero((lower < below) | (upper >= below + self._sizes[rows]))
        index = np.arange(len(self.rules)) if isinstance(rows, slice) else rows
        if len(outside):
            self._cut_bands(index[outside])
            below = self._below[rows]
        a = self._band[index, lower - below].astype(np.float64)
        b = self._band[index, upper - below].astype(np.float64)
        self.thresholds[rows] = a + (b - a) * (positions - lower)

    def _cut_bands(self, rows: npt.NDArray[np.int64]) -> None:
        for row, position in zip(rows.tolist(), self._positions(rows).tolist()):
            window = self.windows.read(row)
            size = min(self._width, len(window))
            start = min(max(0, int(position) + 1 - size // 2), len(window) - size)
            if size < len(window):
                window.partition((start, start + size - 1))
            self._band[row, :size] = np.sort(window[start : start + size])
            self._band[row, size:] = np.inf
            self._sizes[row], self._below[row] = size, start
        self._set_ends(rows)

    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        self._cut_bands(rows)
        self._interpolate(rows)
