"""Trackers of the standard-deviation rule: each window by itself for a few rows, blocks of many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autoclip.core._numpy.ring import RingBuffer, Rows
from autoclip.core._numpy.tracker import FewRows, Tracker, register_tracker
from autoclip.core._rules.standard import Standard

_FEW_ROWS = 12
_SHORT = 4096
"""At or below these sizes whole windows are faster than blocks: see `core_history.py`."""


@register_tracker(Standard)
def _make(rules: Sequence[Standard], history_length: int) -> Tracker | FewRows | None:
    first = rules[0]
    if first.decay is not None or first.shrink or first.log:
        return None
    if len(rules) <= _FEW_ROWS and history_length <= _SHORT:
        return _Moments(rules)
    return _Blocks(rules, history_length)


class _Moments(FewRows):
    """Mean and deviation of one window after the other."""

    def __init__(self, rules: Sequence[Standard]) -> None:
        self._rules = [(rule.deviations, rule.factor) for rule in rules]

    def update(self, ring: RingBuffer, entered: Sequence[float], left: Sequence[float]) -> None: ...

    def rebuild(self, ring: RingBuffer) -> None: ...

    def thresholds(self, ring: RingBuffer) -> list[float]:
        return [self._threshold(ring.norms(row), rule) for row, rule in enumerate(self._rules)]

    @staticmethod
    def _threshold(norms: npt.NDArray[np.float64], rule: tuple[float, float]) -> float:
        if not len(norms):
            return math.inf
        mean = float(np.add.reduce(norms)) / len(norms)
        norms -= mean
        norms *= norms
        deviations, factor = rule
        return factor * (mean + deviations * math.sqrt(float(np.add.reduce(norms)) / len(norms)))


def _block_length(history_length: int) -> int:
    # Blocks stop growing at 1024: a history_length beyond 2^20 is hardly ever filled.
    return max(16, min(math.isqrt(history_length), 1024))


class _Blocks(Tracker):
    """Mean and deviation from blocks of norms, of which a new norm changes one.

    Running sums drift, and after a spike has left they can go negative. Here each block's mean
    and sum of squared deviations are computed again, in two passes, whenever a value in it
    changes, and the blocks are combined as in Chan, Golub and LeVeque (1983): only sums of
    squares, so never negative. A norm that leaves has the slot of the one that comes (see
    `Windows`), so one block changes, and the results follow from the window and `recorded` alone:
    the same bits after a load. With blocks of about `sqrt(history_length)` norms a step reads
    `2 * sqrt(history_length)` numbers a row.
    """

    def __init__(self, rules: Sequence[Standard], history_length: int) -> None:
        super().__init__(len(rules))
        self._deviations = np.array([rule.deviations for rule in rules], np.float64)
        self._factors = np.array([rule.factor for rule in rules], np.float64)
        self._length = _block_length(history_length)
        self._clear()

    def _clear(self) -> None:
        # [blocks, rows]
        self._counts, self._means, self._squares = np.zeros((3, 0, len(self._factors)))

    def update(
        self,
        ring: RingBuffer,
        rows: Rows,
        entered: npt.NDArray[np.float32],
        left: npt.NDArray[np.float32],
    ) -> None:
        newest = (ring.counts[rows] - 1) % ring.history_length
        self._reserve(int(newest.max()))
        index = np.arange(ring.rows) if isinstance(rows, slice) else rows
        self._summarize(ring, index, newest // self._length)
        self._combine(ring, rows)

    def rebuild(self, ring: RingBuffer) -> None:
        self._clear()
        rows = np.flatnonzero(ring.lengths)
        if not len(rows):
            return
        self._reserve(int(ring.widths()[rows].max()) - 1)
        for block in range(len(self._counts)):
            self._summarize(ring, rows, np.full(len(rows), block))
        self._combine(ring, rows)

    def _reserve(self, slot: int) -> None:
        missing = slot // self._length + 1 - len(self._counts)
        if missing > 0:
            more = ((0, missing), (0, 0))
            self._counts = np.pad(self._counts, more)
            self._means = np.pad(self._means, more)
            self._squares = np.pad(self._squares, more)

    def _summarize(
        self, ring: RingBuffer, rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]
    ) -> None:
        values = ring.at(rows, blocks[:, None] * self._length + np.arange(self._length))
        valid = values > 0
        counts = valid.sum(axis=1)
        means = values.sum(axis=1) / np.maximum(counts, 1)
        squares = np.where(valid, (values - means[:, None]) ** 2, 0.0).sum(axis=1)
        self._counts[blocks, rows] = counts
        self._means[blocks, rows] = means
        self._squares[blocks, rows] = squares

    def _combine(self, ring: RingBuffer, rows: Rows) -> None:
        counts, means, squares = self._counts, self._means, self._squares
        if not isinstance(rows, slice):
            # Not by indexing: that may lay columns out one after the other, see `_total`.
            counts, means, squares = (each.take(rows, axis=1) for each in (counts, means, squares))
        lengths = ring.lengths[rows]
        mean = _total(counts * means) / lengths
        between = _total(counts * (means - mean) ** 2)
        variance = (_total(squares) + between) / lengths
        self.thresholds[rows] = self._factors[rows] * (
            mean + self._deviations[rows] * np.sqrt(variance)
        )


def _total(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum over blocks, one after the other; [blocks, rows], in C order.

    So blocks that only other rows have, which are empty at the end, change no bit. NumPy adds up a
    single column, which is contiguous, in another order.
    """
    is_column = values.shape[1] == 1
    total: npt.NDArray[np.float64] = np.cumsum(values, axis=0)[-1] if is_column else values.sum(0)
    return total
