"""The core's rules as tensor operations: sorted windows in, thresholds out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from autoclip.core import Quantile, Rule, Standard

__all__ = ["TensorRule", "tensor_rule"]


class TensorRule(ABC):
    """One kind of rule for the rows of a `TensorHistory`.

    Args:
        rules: one rule a row.
    """

    @abstractmethod
    def __init__(self, rules: Sequence[Any]) -> None: ...

    @abstractmethod
    def thresholds(self, ordered: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """The rows' thresholds.

        Args:
            ordered: float32[rows, history_length], windows in ascending order, infinite past the
                end.
            lengths: int64[rows].

        Returns:
            float64[rows]; anything at all for an empty row.
        """

    RULES: ClassVar[dict[type[Rule], type[TensorRule]]] = {}
    """Which tensor rule computes which of the core's rules."""

    def __init_subclass__(cls, rule: type[Rule]) -> None:
        TensorRule.RULES[rule] = cls


def tensor_rule(rules: Sequence[Rule]) -> TensorRule:
    """The tensor rule for `rules`, all of one class."""
    return TensorRule.RULES[type(rules[0])](rules)


class _TensorQuantile(TensorRule, rule=Quantile):
    def __init__(self, rules: Sequence[Quantile]) -> None:
        self._quantiles = np.array([rule.quantile for rule in rules], np.float64)

    def thresholds(self, ordered: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        last = tf.maximum(lengths - 1, 0)
        position = self._quantiles * tf.cast(last, tf.float64)
        lower = tf.cast(position, tf.int64)
        upper = tf.minimum(lower + 1, last)
        found = tf.gather(ordered, tf.stack([lower, upper], axis=1), batch_dims=1)
        a, b = tf.unstack(tf.cast(found, tf.float64), axis=1)
        return a + (b - a) * (position - tf.cast(lower, tf.float64))


class _TensorStandard(TensorRule, rule=Standard):
    def __init__(self, rules: Sequence[Standard]) -> None:
        self._deviations = np.array([rule.deviations for rule in rules], np.float64)

    def thresholds(self, ordered: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        valid = tf.range(ordered.shape[1], dtype=tf.int64) < lengths[:, None]
        values = tf.where(valid, tf.cast(ordered, tf.float64), 0.0)
        count = tf.cast(tf.maximum(lengths, 1), tf.float64)
        mean = tf.reduce_sum(values, axis=1) / count
        deviations = tf.where(valid, values - mean[:, None], 0.0)
        variance = tf.reduce_sum(tf.square(deviations), axis=1) / count
        return mean + self._deviations * tf.sqrt(variance)
