"""Windows of norms as variables: what `autoclip.core.History` does, inside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import SMALLEST_NORM, Report, Rule
from autoclip.tf._rules import tensor_rule

__all__ = ["TensorHistory", "make_variable"]


def make_variable(value: npt.NDArray[Any], name: str) -> tf.Variable:
    """A variable for what a clipper remembers: not trained, the same on every replica."""
    return tf.Variable(
        value,
        trainable=False,
        name=f"autoclip/{name}",
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


class TensorHistory:
    """The windows of many rows; `record` is made of tensor operations alone.

    Besides the ring of norms it keeps the windows sorted: a step moves what lies between the
    norm that leaves and the one that comes by one place, for all rows at once. Rows that do not
    record are masked. Windows are allocated in full: a graph cannot let a variable grow.

    The norm that a row records as its k-th (from 0) lies in slot `k % history_length`.

    Args:
        rules: one rule a row, all of one class.
        history_length: how many norms a row keeps.
    """

    def __init__(self, rules: Sequence[Rule], history_length: int) -> None:
        self.history_length = history_length
        rows = len(rules)
        self._rule = tensor_rule(rules)
        # Unused slots hold infinity: a window that is not full loses one of them at each step.
        unused = np.full((rows, history_length), np.inf, np.float32)
        self._values = make_variable(unused, "values")
        self._ordered = make_variable(unused, "ordered")
        self._lengths = make_variable(np.zeros(rows, np.int64), "lengths")
        self._recorded = make_variable(np.zeros(rows, np.int64), "recorded")

    def record(self, norms: tf.Tensor) -> Report[tf.Tensor]:
        """Append one norm to each row that has a usable one; see `autoclip.core.History.record`.

        Args:
            norms: float64[rows].

        Returns:
            A report of float64 tensors.
        """
        # Read first: XLA cannot gather from a variable, only from what was read.
        values, ordered = self._values.read_value(), self._ordered.read_value()
        lengths, recorded = self._lengths.read_value(), self._recorded.read_value()
        rounded = tf.cast(norms, tf.float32)
        usable = (rounded >= SMALLEST_NORM) & (rounded < np.inf)
        slot = recorded % self.history_length
        # A slot that was never used holds infinity, and so "leaves" without a trace. A row that
        # does not record lets infinity come and go: nothing changes.
        left = tf.where(usable, tf.gather(values, slot, batch_dims=1), np.inf)
        entered = tf.where(usable, rounded, np.inf)
        here = tf.one_hot(slot, self.history_length, on_value=True, off_value=False, dtype=tf.bool)
        values = tf.where(here & usable[:, None], rounded[:, None], values)
        ordered = _replace_in_order(ordered, entered[:, None], left[:, None])
        lengths = tf.minimum(lengths + tf.cast(usable, tf.int64), self.history_length)
        recorded += tf.cast(usable, tf.int64)
        # Dense assignments, never scattered ones: those are not mirrored over replicas.
        self._values.assign(values)
        self._ordered.assign(ordered)
        self._lengths.assign(lengths)
        self._recorded.assign(recorded)
        thresholds = tf.where(lengths > 0, self._rule.thresholds(ordered, lengths), np.inf)
        # The ratio to the *rounded* norm, the one in the window: so the largest never clips.
        ratios = tf.minimum(thresholds / tf.cast(rounded, tf.float64), 1.0)
        return Report(norms, thresholds, tf.where(usable, ratios, 1.0))

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy all windows out; see `autoclip.core.History.read`."""
        values, lengths = self._values.numpy(), self._lengths.numpy()
        recorded = np.array(self._recorded.numpy(), np.int64)
        windows = [
            values[row, np.arange(count - length, count) % self.history_length]
            for row, (length, count) in enumerate(zip(lengths, recorded))
        ]
        return windows, recorded

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows; of one longer than `history_length` the newest norms stay."""
        values = np.full((len(windows), self.history_length), np.inf, np.float32)
        lengths = np.zeros(len(windows), np.int64)
        for row, (window, count) in enumerate(zip(windows, recorded)):
            window = window[-self.history_length :]
            lengths[row] = len(window)
            values[row, np.arange(count - len(window), count) % self.history_length] = window
        self._values.assign(values)
        self._ordered.assign(np.sort(values, axis=1))
        self._lengths.assign(lengths)
        self._recorded.assign(recorded)


def _replace_in_order(ordered: tf.Tensor, entered: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
    """Take `left` out of the sorted windows and put `entered` in; both float32[rows, 1].

    In a sorted row with the value v inserted, place j holds v clamped to what stood at j - 1 and
    at j. Of two neighbours in that, the lower one stays wherever it is smaller than the value
    that leaves, and the upper one moves down everywhere else: no search, no sort.
    """
    end = tf.fill(tf.shape(left), tf.constant(np.inf, tf.float32))
    inserted = tf.maximum(
        tf.minimum(entered, tf.concat([ordered, end], axis=1)),
        tf.concat([-end, ordered], axis=1),
    )
    lower, upper = inserted[:, :-1], inserted[:, 1:]
    return tf.where(lower < left, lower, upper)
