"""Sums of the values that a callback logs, in the graph, read once an epoch.

A read in every batch makes the host wait for the device, and under gradient accumulation or a loss
scaler it finds the report of an older update again.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import SMALLEST_NORM
from autoclip.tf._histories import make_variable
from autoclip.tf._ops import OPS

_LARGEST_NORM = float(np.finfo(np.float32).max)
_TOTALS = 7
_PER_ROW = 4


class Sums:
    """Sums over the steps since they were last cleared; means are NaN over nothing."""

    def __init__(self) -> None:
        self._values: npt.NDArray[np.float64] = np.zeros(_TOTALS)

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Add values that `StepSums` has read."""
        self._values = self._values + values if len(self._values) == len(values) else values

    def clear(self) -> None:
        """Start again."""
        self._values = np.zeros(_TOTALS)

    @property
    def steps(self) -> int:
        """The number of steps with a gradient."""
        return int(self._values[0])

    @property
    def recorded(self) -> int:
        """The number of those in which a row recorded a norm."""
        return int(self._values[6])

    @property
    def total_norm(self) -> float:
        """Mean of the norm of all gradients together, over the steps where it was finite."""
        return float(_means(self._values[1], self._values[4]))

    @property
    def clipped_norm(self) -> float:
        """The same after clipping."""
        return float(_means(self._values[3], self._values[4]))

    @property
    def spread(self) -> float:
        """Relative standard deviation of the total norm, as exact as 1e-7."""
        mean, square = self.total_norm, float(_means(self._values[2], self._values[4]))
        return float(np.sqrt(max(0.0, square / mean**2 - 1.0))) if mean else np.nan

    @property
    def clipped(self) -> float:
        """Mean share of the rows that recorded whose norm was above the threshold."""
        return float(_means(self._values[5], self._values[6]))

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """float64[rows]: mean of the norms that each row recorded."""
        sums, counts, _, _ = self._by_row
        return _means(sums, counts)

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """float64[rows]: mean of the thresholds; infinite if a row recorded without any."""
        _, recorded, sums, counts = self._by_row
        return np.where((counts == 0) & (recorded > 0), np.inf, _means(sums, counts))

    @property
    def _by_row(self) -> npt.NDArray[np.float64]:
        return self._values[_TOTALS:].reshape(_PER_ROW, -1)


class StepSums:
    """The sums of a clipper, in a variable once it knows its variables.

    Attributes:
        enabled: True if steps that are traced from now on add to the sums. Without a callback they
            cost nothing.
        models: those whose training step was traced since.
    """

    def __init__(self) -> None:
        self._variable: tf.Variable | None = None
        self._readers: WeakSet[Sums] = WeakSet()
        self.enabled = False
        self.models: WeakSet[Any] = WeakSet()

    def build(self, rows: int) -> None:
        """Make the variable.

        Args:
            rows: the number of rows of the clipper.
        """
        self._variable = make_variable(np.zeros(_TOTALS + _PER_ROW * rows), "sums")

    def add(self, report: tf.Tensor) -> None:
        """Add a step; part of the graph.

        Args:
            report: float64[rows, 3], norms, thresholds (`OPS.unlimited` for none) and coefficients.
        """
        assert self._variable is not None
        norms, thresholds, coefficients = tf.unstack(report, axis=1)
        one = tf.ones((), tf.float64)
        held = tf.cast((norms >= SMALLEST_NORM) & (norms <= _LARGEST_NORM), tf.float64)
        limited = held * tf.cast(thresholds < OPS.unlimited, tf.float64)
        # Before and after clipping. No overflow: norms are those of float32.
        squares = tf.reduce_sum(tf.square(tf.stack([norms, norms * coefficients])), axis=1)
        finite = tf.cast(tf.math.is_finite(squares[0]), tf.float64)
        both = tf.math.multiply_no_nan(tf.sqrt(squares), finite)
        count = tf.reduce_sum(held)
        spikes = tf.reduce_sum(held * tf.cast(coefficients < 1.0, tf.float64))
        totals = [
            *(one, both[0], both[0] * both[0], both[1], finite),
            *(tf.math.divide_no_nan(spikes, count), tf.minimum(count, one)),
        ]
        by_row = [
            tf.math.multiply_no_nan(norms, held),
            held,
            tf.math.multiply_no_nan(thresholds, limited),
            limited,
        ]
        self._variable.assign_add(tf.concat([tf.stack(totals), *by_row], axis=0))

    def open(self) -> Sums:
        """Sums of the steps from now on, as of each `read`.

        Every reader has its own, so several callbacks can log one clipper.
        """
        self.read()
        sums = Sums()
        self._readers.add(sums)
        return sums

    def read(self) -> None:
        """Move the sums from the device to all that are open; outside of any graph."""
        if self._variable is None:
            return
        values = self._variable.read_value().numpy()
        self._variable.assign(np.zeros_like(values))
        for sums in self._readers:
            sums.add(values)


def _means(totals: Any, counts: Any) -> npt.NDArray[np.float64]:
    """The quotients, NaN where there is nothing to divide by."""
    return np.where(counts > 0, totals / np.maximum(counts, 1.0), np.nan)
