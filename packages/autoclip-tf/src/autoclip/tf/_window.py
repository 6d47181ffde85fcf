"""What a rule sees of the recorded norms, as tensors of the graph."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from autoclip.core.adapter import Window

__all__ = ["TensorWindow"]


class TensorWindow(Window[tf.Tensor]):
    """Windows as tensors; see `autoclip.core.Window`. All results are float64.

    Args:
        values: float32[rows, history_length], infinite where a slot is unused. The norm that a row
            recorded as its k-th (from 0) is in slot `k % history_length`.
        ordered: the same in ascending order, or None if it is not kept.
        lengths: int64[rows, 1], how many norms each window holds.
        recorded: int64[rows, 1], how many norms each row has ever recorded.
    """

    def __init__(
        self, values: tf.Tensor, ordered: tf.Tensor | None, lengths: tf.Tensor, recorded: tf.Tensor
    ) -> None:
        self._values = values
        self._ordered = ordered
        self._recorded = recorded
        self._last = tf.maximum(lengths - 1, 0)
        self.count = tf.cast(self._last + 1, tf.float64)

    @cached_property
    def norms(self) -> tf.Tensor:
        """See `Window`; converted only for rules that ask."""
        return tf.cast(self._values, tf.float64)

    @cached_property
    def age(self) -> tf.Tensor:
        """See `Window`; computed only for rules that ask."""
        slots = tf.range(self._values.shape[1], dtype=tf.int64)
        ages = tf.math.floormod(self._recorded - 1 - slots, self._values.shape[1])
        return tf.cast(ages, tf.float64)

    @cached_property
    def _valid(self) -> tf.Tensor:
        return self._values < np.inf

    def sum(self, values: Any = None) -> tf.Tensor:
        """See `Window.sum`."""
        given = self.norms if values is None else tf.convert_to_tensor(values, tf.float64)
        zero = tf.zeros((), tf.float64)
        return tf.reduce_sum(tf.where(self._valid, given, zero), axis=1, keepdims=True)

    def quantile(self, q: Any, values: Any = None) -> tf.Tensor:
        """See `Window.quantile`."""
        if values is not None:
            given = tf.convert_to_tensor(values, tf.float64)
            infinity = tf.constant(np.inf, tf.float64)
            ordered = tf.sort(tf.where(self._valid, given, infinity), axis=1)
        else:
            ordered = tf.sort(self._values, axis=1) if self._ordered is None else self._ordered
        position = tf.convert_to_tensor(q, tf.float64) * tf.cast(self._last, tf.float64)
        lower = tf.cast(position, tf.int64)
        places = tf.minimum(lower + np.arange(2), self._last)
        found = tf.gather(ordered, places, batch_dims=1)
        a, b = tf.split(tf.cast(found, tf.float64), 2, axis=1)
        # Right to float64's rounding. numpy.quantile starts from the nearer one, for its last bit.
        return a + (b - a) * (position - tf.cast(lower, tf.float64))
