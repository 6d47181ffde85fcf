"""What a tracker is: a rule's thresholds in NumPy, kept up to date as norms arrive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._ring import RingBuffer, Rows

__all__ = ["FEW_ROWS", "FewRowsTracker", "Tracker"]

FEW_ROWS = 8
"""Up to so many rows Python's own numbers are quicker than NumPy's arrays."""


class Tracker(ABC):
    """The thresholds of many rows under one kind of rule.

    What a tracker remembers follows from the windows, so it is never saved.

    Args:
        rules: one a row.
        ring: the rows' windows.

    Attributes:
        thresholds: float64[rows]; infinite for a row that has recorded nothing.
    """

    def __init__(self, rules: Sequence[Any], ring: RingBuffer) -> None:
        self.ring = ring
        self.thresholds: Any = np.full(len(rules), np.inf)

    @abstractmethod
    def update(
        self, rows: Rows, entered: npt.NDArray[np.float32], left: npt.NDArray[np.float32]
    ) -> None:
        """Bring `thresholds[rows]` up to date after each of `rows` recorded a norm.

        Args:
            rows: the rows that recorded. Their windows hold the new norm already.
            entered: float32[n], the norms that came.
            left: float32[n], the norms that fell out of the windows, NaN where none did.
        """

    @abstractmethod
    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        """Derive everything about `rows`, none of them empty, from their windows."""


class FewRowsTracker(Tracker):
    """A tracker for at most `FEW_ROWS` rows, one norm at a time.

    Attributes:
        thresholds: a list of floats, one a row.
    """

    def __init__(self, rules: Sequence[Any], ring: RingBuffer) -> None:
        super().__init__(rules, ring)
        self.thresholds = [np.inf] * len(rules)

    @abstractmethod
    def update_one(self, row: int, entered: float, left: float | None) -> None:
        """Bring one row's threshold up to date; see `Tracker.update`."""

    def update(
        self, rows: Rows, entered: npt.NDArray[np.float32], left: npt.NDArray[np.float32]
    ) -> None:
        """See `Tracker.update`."""
        index = range(self.ring.rows) if isinstance(rows, slice) else rows.tolist()
        for row, came, went in zip(index, entered.tolist(), left.tolist()):
            self.update_one(row, came, None if went != went else went)
