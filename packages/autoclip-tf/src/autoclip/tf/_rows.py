"""The rows of a clipper, in batches that are recorded together: few operations a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report
from autoclip.core.adapter import GroupSettings, batches
from autoclip.tf._history import TensorHistory, check_memory, is_resumable
from autoclip.tf._ops import OPS

__all__ = ["RowBatch", "Rows"]


class RowBatch(NamedTuple):
    """Rows that are recorded together: their settings differ in numbers only."""

    history: TensorHistory
    rows: list[int]


class Rows:
    """The histories of all rows of a clipper.

    Args:
        settings: one a row.

    Raises:
        ValueError: the histories are larger than memory.
    """

    def __init__(self, settings: Sequence[GroupSettings]) -> None:
        check_memory(settings)
        self._settings = list(settings)
        self._batches = [
            RowBatch(TensorHistory([settings[row] for row in rows]), rows)
            for rows in batches(settings).values()
        ]
        # The parts of an eager step or a load, while one is at work.
        self._unfinished: Sequence[Callable[[], Any]] = ()
        # Where row i stands when the batches are put one after the other.
        self._places = np.argsort([row for batch in self._batches for row in batch.rows])

    def __len__(self) -> int:
        return len(self._settings)

    def change_settings(self, settings: Sequence[GroupSettings]) -> None:
        """Replace the settings, one a row; graphs that are traced already follow.

        Raises:
            ValueError: they differ from the present ones in what a traced graph cannot change.
                Nothing has changed.
        """
        by_batch = [[settings[row] for row in batch.rows] for batch in self._batches]
        for old, new in zip(self._settings, settings):
            if old.structure != new.structure:
                raise ValueError(_CANNOT_CHANGE)
        for batch, theirs in zip(self._batches, by_batch):
            if not batch.history.fits(theirs):
                raise ValueError(_CANNOT_CHANGE)
        for batch, theirs in zip(self._batches, by_batch):
            batch.history.change_settings(theirs)
        self._settings = list(settings)

    def record(self, norms: tf.Tensor) -> Report[tf.Tensor]:
        """Record a step in all rows, [rows, 1]; see `TensorHistory.record`."""
        self._finish()
        if len(self._batches) == 1:
            return self._batches[0].history.record(norms)
        given = [tf.gather(norms, batch.rows) for batch in self._batches]
        if is_resumable():
            self._unfinished = [
                batch.history.once(each) for batch, each in zip(self._batches, given)
            ]
        parts = [batch.history.record(each) for batch, each in zip(self._batches, given)]
        self._unfinished = ()
        thresholds, coefficients = (
            self._in_order([getattr(part, name) for part in parts])
            for name in ("thresholds", "coefficients")
        )
        return Report(norms, thresholds, coefficients)

    def thresholds(self) -> tf.Tensor:
        """float64[rows]: the thresholds of the windows as they are now; infinite for none."""
        self._finish()
        found = self._in_order([batch.history.thresholds() for batch in self._batches])[:, 0]
        if tf.executing_eagerly():
            # Outside of TensorFlow: under tf.debugging.enable_check_numerics no operation may
            # return an infinity.
            on_host = found.numpy()
            return tf.constant(np.where(on_host < OPS.unlimited, on_host, np.inf))
        return tf.where(found < OPS.unlimited, found, tf.constant(np.inf, tf.float64))

    def _finish(self) -> None:
        """Complete a step or a load that an interrupt has cut short."""
        if self._unfinished:
            with tf.init_scope():
                for part in self._unfinished:
                    part()
            self._unfinished = ()

    def _in_order(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        return parts[0] if len(parts) == 1 else tf.gather(tf.concat(parts, 0), self._places)

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """All windows, oldest norm first, and how many norms each row has ever recorded."""
        self._finish()
        windows = [np.empty(0, np.float32)] * len(self)
        recorded = np.zeros(len(self), np.int64)
        for batch in self._batches:
            found, recorded[batch.rows] = batch.history.read()
            for row, window in zip(batch.rows, found):
                windows[row] = window
        return windows, recorded

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows, or none if interrupted."""
        self._finish()
        self._unfinished = [
            batch.history.stage([windows[row] for row in batch.rows], recorded[batch.rows])
            for batch in self._batches
        ]
        self._finish()


_CANNOT_CHANGE = (
    "This setting cannot change once the clipper knows its variables: graphs that are traced "
    "already would not follow. Numbers of the rule can, and so can max_norm, warmup_steps and "
    "on_spike where a parameter group used them from the start. Make a new clipper, or give the "
    "setting in group_settings."
)
