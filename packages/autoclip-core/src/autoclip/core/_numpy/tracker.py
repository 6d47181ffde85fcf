"""Accelerations of rules in NumPy: thresholds that are kept up to date as norms arrive.

A tracker gives the same thresholds as its rule does on whole windows. It follows from the windows,
so it is never saved. The files of the rules know nothing of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autoclip.core._numpy.ring import RingBuffer, Rows
from autoclip.core._rules.rule import Rule


class Tracker(ABC):
    """The thresholds of many rows.

    Attributes:
        thresholds: float64[rows]; infinite for a row that has recorded nothing.
    """

    def __init__(self, rows: int) -> None:
        self.thresholds = np.full(rows, np.inf)

    @abstractmethod
    def update(
        self,
        ring: RingBuffer,
        rows: Rows,
        entered: npt.NDArray[np.float32],
        left: npt.NDArray[np.float32],
    ) -> None:
        """Bring `thresholds[rows]` up to date after each of `rows` recorded a norm.

        Args:
            ring: the windows, which hold the new norms already.
            rows: the rows that recorded.
            entered: float32[n], the norms that came.
            left: float32[n], the norms that fell out of the windows, NaN if none did.
        """

    @abstractmethod
    def rebuild(self, ring: RingBuffer) -> None:
        """Derive everything from the windows."""


class FewRows(ABC):
    """The thresholds of a few rows in Python's numbers, which are faster there."""

    @abstractmethod
    def thresholds(self, ring: RingBuffer) -> list[float]:
        """The threshold of each row; infinite if it has recorded nothing."""

    @abstractmethod
    def update(self, ring: RingBuffer, entered: Sequence[float], left: Sequence[float]) -> None:
        """Bring the thresholds up to date after rows recorded a norm.

        Args:
            ring: the windows, which hold the new norms already.
            entered: a norm of each row, 0 if it recorded none.
            left: the norm that fell out of each row's window, NaN if none did.
        """

    @abstractmethod
    def rebuild(self, ring: RingBuffer) -> None:
        """Derive everything from the windows."""


_Make: TypeAlias = Callable[[Sequence[Any], int], "Tracker | FewRows | None"]
_TRACKERS: dict[type[Rule], _Make] = {}


def register_tracker(rule: type[Rule]) -> Callable[[_Make], _Make]:
    """Decorator of a function that makes the tracker of a rule.

    The function gets the rules, one a row, and `history_length`; it returns None if the windows
    are as fast.
    """

    def register(make: _Make) -> _Make:
        _TRACKERS[rule] = make
        return make

    return register


def tracker_of(rules: Sequence[Rule], history_length: int) -> Tracker | FewRows | None:
    """The tracker of rows with these rules, of one class; None if there is none."""
    kind = type(rules[0]) if rules else Rule
    for known, make in _TRACKERS.items():
        # A subclass may compute something else.
        if (kind.threshold, kind.clip_to) == (known.threshold, known.clip_to):
            return make(rules, history_length)
    return None
