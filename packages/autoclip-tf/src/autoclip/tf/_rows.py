"""The rows of a clipper, grouped so that a step costs few operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report, Rule
from autoclip.tf._histories import TensorHistory

__all__ = ["Rows"]


class _Bank(NamedTuple):
    """Rows that are recorded together: one history length."""

    history: TensorHistory
    rows: list[int]


class Rows:
    """The histories of all rows of a clipper.

    Args:
        rules: one rule a row.
        history_lengths: how many norms each row keeps.
    """

    def __init__(self, rules: Sequence[Rule], history_lengths: Sequence[int]) -> None:
        self._count = len(rules)
        members: dict[int, list[int]] = {}
        for row, history_length in enumerate(history_lengths):
            members.setdefault(history_length, []).append(row)
        self._banks = [
            _Bank(TensorHistory([rules[row] for row in rows], history_length), rows)
            for history_length, rows in members.items()
        ]
        # Where row i stands when the banks are put one after the other.
        self._places = np.argsort([row for bank in self._banks for row in bank.rows])

    def __len__(self) -> int:
        return self._count

    def record(self, norms: tf.Tensor) -> Report[tf.Tensor]:
        """Record a step in all rows; see `TensorHistory.record`."""
        if len(self._banks) == 1:
            return self._banks[0].history.record(norms)
        parts = [bank.history.record(tf.gather(norms, bank.rows)) for bank in self._banks]
        return Report(
            *(
                tf.gather(tf.concat([getattr(part, name) for part in parts], 0), self._places)
                for name in ("norms", "thresholds", "coefficients")
            )
        )

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """All windows, oldest norm first, and how many norms each row has ever recorded."""
        windows = [np.empty(0, np.float32)] * len(self)
        recorded = np.zeros(len(self), np.int64)
        for bank in self._banks:
            found, recorded[bank.rows] = bank.history.read()
            for row, window in zip(bank.rows, found):
                windows[row] = window
        return windows, recorded

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows."""
        for bank in self._banks:
            bank.history.write([windows[row] for row in bank.rows], recorded[bank.rows])
