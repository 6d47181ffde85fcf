"""The standard-deviation rule: the threshold lies some deviations above the window's mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from autoclip.core._rules import Rows, Rule, Tracker, register_rule
from autoclip.core._settings import DEFAULT_DEVIATIONS, check_deviations
from autoclip.core._windows import Windows

__all__ = ["Standard"]


@register_rule
@dataclass(frozen=True)
class Standard(Rule):
    """The threshold is `mean + deviations * std` of the window (population deviation).

    Args:
        deviations: a finite real number ≥ 0.

    Raises:
        TypeError, ValueError: `deviations` is something else.

    >>> from autoclip.core import History
    >>> history = History(rows=1, rule=Standard(deviations=2.0))
    >>> for norm in (1.0, 3.0):
    ...     report = history.record([norm])
    >>> report.thresholds
    array([4.])
    """

    deviations: float = DEFAULT_DEVIATIONS
    name: ClassVar[str] = "standard"

    def __post_init__(self) -> None:
        object.__setattr__(self, "deviations", check_deviations(self.deviations))

    @classmethod
    def track(cls, rules: Sequence[Standard], windows: Windows) -> Tracker:
        return _BlockTracker(rules, windows)


_LARGEST_BLOCK = 1024
"""Of a `history_length` beyond 2^20 that nobody fills, no block is ever larger."""


class _BlockTracker(Tracker):
    """Mean and deviation from blocks of slots, of which a new norm changes one.

    Running sums drift, and after a spike has left they can go negative. Here each block's mean
    and sum of squared deviations are computed afresh, in two passes, whenever a value in it
    changes, and the blocks are combined as in Chan, Golub and LeVeque (1983): only sums of
    squares, so never negative, and a function of the slots alone, so the same bits after a load.
    With blocks of about `sqrt(history_length)` slots a step reads `2 * sqrt(history_length)`
    numbers a row.
    """

    def __init__(self, rules: Sequence[Standard], windows: Windows) -> None:
        super().__init__(rules, windows)
        self._deviations = np.array([rule.deviations for rule in rules], np.float64)
        self._block = max(16, min(math.isqrt(windows.history_length), _LARGEST_BLOCK))
        self._counts = np.zeros((len(rules), 0))
        self._means = np.zeros((len(rules), 0))
        self._squares = np.zeros((len(rules), 0))

    def _reserve(self) -> None:
        blocks = -(-self.windows.values.shape[1] // self._block)
        more = ((0, 0), (0, blocks - self._counts.shape[1]))
        if more[1][1]:
            self._counts = np.pad(self._counts, more)
            self._means = np.pad(self._means, more)
            self._squares = np.pad(self._squares, more)

    def update(
        self, rows: Rows, entered: npt.NDArray[np.float32], left: npt.NDArray[np.float32]
    ) -> None:
        index = np.arange(len(self.rules)) if isinstance(rows, slice) else rows
        newest = (self.windows.recorded[index] - 1) % self.windows.history_length
        self._reserve()
        self._summarise(index, newest // self._block)
        self._combine(index)

    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        self._reserve()
        for block in range(self._counts.shape[1]):
            self._summarise(rows, np.full(len(rows), block))
        self._combine(rows)

    def _summarise(self, rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]) -> None:
        windows = self.windows
        slots = blocks[:, None] * self._block + np.arange(self._block)
        # How many norms ago a slot was written; the slots that count are younger than the window.
        age = (windows.recorded[rows, None] - 1 - slots) % windows.history_length
        valid = (age < windows.lengths[rows, None]) & (slots < windows.history_length)
        values = windows.values[rows[:, None], np.minimum(slots, windows.values.shape[1] - 1)]
        values = np.where(valid, values.astype(np.float64), 0.0)
        counts = valid.sum(axis=1)
        means = values.sum(axis=1) / np.maximum(counts, 1)
        squares = np.where(valid, (values - means[:, None]) ** 2, 0.0).sum(axis=1)
        self._counts[rows, blocks] = counts
        self._means[rows, blocks] = means
        self._squares[rows, blocks] = squares

    def _combine(self, rows: npt.NDArray[np.int64]) -> None:
        counts, means = self._counts[rows], self._means[rows]
        lengths = self.windows.lengths[rows]
        mean = (counts * means).sum(axis=1) / lengths
        between = (counts * (means - mean[:, None]) ** 2).sum(axis=1)
        variance = (self._squares[rows].sum(axis=1) + between) / lengths
        self.thresholds[rows] = mean + self._deviations[rows] * np.sqrt(variance)
