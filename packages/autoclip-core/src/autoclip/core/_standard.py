"""The standard-deviation rule: a threshold some deviations above the window's mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from autoclip.core._fields import setting
from autoclip.core._ring import RingBuffer, Rows
from autoclip.core._rule import Rule, register_rule
from autoclip.core._tracker import FEW_ROWS, FewRowsTracker, Tracker

__all__ = ["Standard"]


@register_rule
@dataclass(frozen=True)
class Standard(Rule):
    """The threshold is `factor * (mean + deviations * std)` of the window.

    The deviation is the population's, `ddof=0`. By default a norm is compared with the norms before
    it: a spike that is counted among them hides itself.

    Args:
        deviations: a finite real number ≥ 0.
        decay: a real number in (0, 1): mean and deviation are weighted by `decay ** age`, an
            exponential average over the window. None weighs all norms alike.
        factor: a finite real number > 0.
        shrink: scale a gradient above its threshold down to
            `mean + (threshold - mean)² / (norm - mean)`, the lower the larger it is, instead of
            to the threshold (ZClip, Kumar et al., 2025, arXiv:2504.02507). Needs `factor` ≥ 1.

    Raises:
        TypeError, ValueError: an argument is something else.

    >>> from autoclip.core import History
    >>> history = History(rows=1, rule=Standard(deviations=2.0), warmup_steps=2)
    >>> for norm in (1.0, 3.0, 8.0):
    ...     report = history.record([norm])
    >>> report.thresholds
    array([4.])
    """

    deviations: float = setting(2.0, ge=0)
    decay: float | None = setting(None, gt=0, lt=1)
    factor: float = setting(1.0, gt=0)
    shrink: bool = setting(False)
    name: ClassVar[str] = "standard"
    # The deviation of a handful of norms says little; that of a single one is 0.
    defaults: ClassVar[Mapping[str, Any]] = {"include_current": False, "warmup_steps": 25}

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.shrink and self.factor < 1.0:
            # A threshold below the mean: a norm between the two would get a negative coefficient.
            raise ValueError(
                f"shrink=True needs factor ≥ 1, but got factor={self.factor}: it scales spikes "
                "down towards the mean, and the threshold must not lie below that."
            )

    @staticmethod
    def threshold(window: Any, deviations: Any, decay: Any, factor: Any, shrink: bool) -> Any:
        """See `Rule.threshold`."""
        mean, std = _moments(window, decay)
        return factor * (mean + deviations * std)

    @staticmethod
    def clip_to(
        window: Any,
        norm: Any,
        threshold: Any,
        deviations: Any,
        decay: Any,
        factor: Any,
        shrink: bool,
    ) -> Any:
        """See `Rule.clip_to`."""
        if not shrink:
            return threshold
        mean, _ = _moments(window, decay)
        return mean + (threshold - mean) ** 2 / (norm - mean)

    @property
    def thresholds_only_fall(self) -> bool:
        """See `Rule.thresholds_only_fall`."""
        return self.deviations == 0.0 and self.factor <= 1.0

    @classmethod
    def track(cls, rules: Sequence[Standard], ring: RingBuffer) -> Tracker | None:
        """See `Rule.track`."""
        if rules[0].decay is not None or rules[0].shrink:
            return None
        if ring.rows <= FEW_ROWS and ring.history_length <= _LONGEST_OF_FEW:
            return _FewBlocksTracker(rules, ring)
        return _BlockTracker(rules, ring)


_LONGEST_OF_FEW = 2**14
"""Beyond this length there are too many blocks for a loop in Python."""


def _moments(window: Any, decay: Any) -> tuple[Any, Any]:
    """Mean and standard deviation of each window, weighted by age if there is a decay."""
    if decay is None:
        mean = window.mean()
        return mean, window.mean((window.norms - mean) ** 2) ** 0.5
    weights = decay**window.age
    total = window.sum(weights)
    mean = window.sum(weights * window.norms) / total
    return mean, (window.sum(weights * (window.norms - mean) ** 2) / total) ** 0.5


def _block_length(history_length: int) -> int:
    # Blocks stop growing at 1024: a history_length beyond 2^20 is hardly ever filled.
    return max(16, min(math.isqrt(history_length), 1024))


class _BlockTracker(Tracker):
    """Mean and deviation from blocks of norms, of which a new norm changes one.

    Running sums drift, and after a spike has left they can go negative. Here each block's mean
    and sum of squared deviations are computed afresh, in two passes, whenever a value in it
    changes, and the blocks are combined as in Chan, Golub and LeVeque (1983): only sums of
    squares, so never negative. A norm that leaves has the place of the one that comes (see
    `RingBuffer`), so one block changes, and the results follow from the window and
    `recorded` alone: the same bits after a load. With blocks of about `sqrt(history_length)` norms
    a step reads `2 * sqrt(history_length)` numbers a row.
    """

    def __init__(self, rules: Sequence[Standard], ring: RingBuffer) -> None:
        super().__init__(rules, ring)
        self._deviations = np.array([rule.deviations for rule in rules], np.float64)
        self._factors = np.array([rule.factor for rule in rules], np.float64)
        self._length = _block_length(ring.history_length)
        # [blocks, rows]
        self._counts = np.zeros((0, len(rules)))
        self._means = np.zeros((0, len(rules)))
        self._squares = np.zeros((0, len(rules)))

    def update(
        self, rows: Rows, entered: npt.NDArray[np.float32], left: npt.NDArray[np.float32]
    ) -> None:
        index = np.arange(self.ring.rows) if isinstance(rows, slice) else rows
        newest = self.ring.newest(index)
        self._reserve(int(newest.max()))
        self._summarize(index, newest // self._length)
        self._combine(rows)
        growing = np.isnan(left)
        if growing.any():
            self.rebuild(self.ring.renumbered(index, growing))

    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        if not len(rows):
            return
        self._reserve(int(self.ring.lengths[rows].max()) - 1)
        for block in range(len(self._counts)):
            self._summarize(rows, np.full(len(rows), block))
        self._combine(rows)

    def _reserve(self, place: int) -> None:
        missing = place // self._length + 1 - len(self._counts)
        if missing > 0:
            more = ((0, missing), (0, 0))
            self._counts = np.pad(self._counts, more)
            self._means = np.pad(self._means, more)
            self._squares = np.pad(self._squares, more)

    def _summarize(self, rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]) -> None:
        values = self.ring.at(rows, blocks[:, None] * self._length + np.arange(self._length))
        valid = values == values
        values = np.where(valid, values, 0.0)
        counts = valid.sum(axis=1)
        means = values.sum(axis=1) / np.maximum(counts, 1)
        squares = np.where(valid, (values - means[:, None]) ** 2, 0.0).sum(axis=1)
        self._counts[blocks, rows] = counts
        self._means[blocks, rows] = means
        self._squares[blocks, rows] = squares

    def _combine(self, rows: Rows) -> None:
        counts, means, squares = self._counts, self._means, self._squares
        if not isinstance(rows, slice):
            # Not by indexing: that may lay columns out one after the other, see `_total`.
            counts, means, squares = (each.take(rows, axis=1) for each in (counts, means, squares))
        lengths = self.ring.lengths[rows]
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
    if values.shape[1] == 1:
        return np.cumsum(values, axis=0)[-1]  # type: ignore[no-any-return]
    total: npt.NDArray[np.float64] = values.sum(axis=0)
    return total


class _FewBlocksTracker(FewRowsTracker):
    """`_BlockTracker` for a few rows, in Python's numbers."""

    def __init__(self, rules: Sequence[Standard], ring: RingBuffer) -> None:
        super().__init__(rules, ring)
        self._rules = [(rule.deviations, rule.factor) for rule in rules]
        self._length = _block_length(ring.history_length)
        # One entry a block: how many norms, their mean, and the sum of their squared deviations.
        self._blocks: list[list[tuple[int, float, float]]] = [[] for _ in rules]

    def update_one(self, row: int, entered: float, left: float | None) -> None:
        only = np.array([row])
        if left is None and len(self.ring.renumbered(only, np.array([True]))):
            self.rebuild(only)
            return
        self._summarize(row, int(self.ring.newest(only)[0]) // self._length)
        self._combine(row)

    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        for row in rows.tolist():
            self._blocks[row] = []
            for block in range(-(-int(self.ring.lengths[row]) // self._length)):
                self._summarize(row, block)
            self._combine(row)

    def _summarize(self, row: int, block: int) -> None:
        values = self.ring.between(row, block * self._length, (block + 1) * self._length)
        count = len(values)
        mean = sum(values) / count
        blocks = self._blocks[row]
        if block == len(blocks):
            blocks.append((0, 0.0, 0.0))
        # A product is rounded correctly, which `** 2` is not: scaled norms keep their bits.
        blocks[block] = count, mean, sum([(d := value - mean) * d for value in values])

    def _combine(self, row: int) -> None:
        blocks = self._blocks[row]
        length = int(self.ring.lengths[row])
        mean = sum([count * each for count, each, _ in blocks]) / length
        square = sum(
            [squares + count * ((d := each - mean) * d) for count, each, squares in blocks]
        )
        deviations, factor = self._rules[row]
        self.thresholds[row] = factor * (mean + deviations * math.sqrt(square / length))
