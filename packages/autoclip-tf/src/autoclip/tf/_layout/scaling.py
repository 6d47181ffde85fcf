"""Multiplying gradients by their coefficients, in at least float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import tensorflow as tf

from autoclip.tf._layout.conditional import Conditional
from autoclip.tf._layout.norms import Gradient, at, index_of, is_small, static_shape
from autoclip.tf._private import compiled_by_xla


class Scaling:
    """Multiplies gradients by the coefficients of their rows.

    Args:
        gradients: gradients with the shapes and dtypes to come; None for none.
        rows: the row of each gradient.
        count: the number of rows.
    """

    def __init__(
        self, gradients: Sequence[Gradient | None], rows: Sequence[int], count: int
    ) -> None:
        self._present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self._index = index_of(self._present, len(gradients))
        self._rows = index_of([rows[i] for i in self._present], count)
        self._is_one_for_all = count == 1

    def apply(
        self,
        gradients: Sequence[Gradient | None],
        coefficients: tf.Tensor,
        zeroed: tf.Tensor | None,
    ) -> list[Gradient | None]:
        """The products; see `Layout.scale`."""
        if self._is_one_for_all:  # a scalar costs no operation for each gradient
            factors = tf.reshape(coefficients, [])
        else:
            factors = at(tf.reshape(coefficients, [-1]), self._rows)
        if zeroed is not None:
            factors = tf.where(at(zeroed, self._index), tf.zeros((), tf.float64), factors)
        # Constants to a tape, eagerly and in a graph: eagerly they have been on the host.
        factors = tf.stop_gradient(factors)
        given = [gradients[i] for i in self._present]
        scaled = list(gradients)
        for i, product in zip(self._present, _products(given, factors, zeroed is not None)):
            scaled[i] = product
        return scaled


def _products(
    gradients: Sequence[Gradient], factors: tf.Tensor, may_be_zero: bool
) -> list[Gradient]:
    """The gradients times their factors, of the same dtypes and kinds.

    Args:
        gradients: tensors and IndexedSlices; of these only the stored values are multiplied.
        factors: float64[n] in 0 … 1, or float64[] for one that all gradients share. XLA multiplies
            all gradients; elsewhere large ones with the factor 1 are returned as they are.
        may_be_zero: True if a factor can be 0, which turns NaN and infinity into 0 too.
    """
    values = [tf.convert_to_tensor(_values_of(gradient)) for gradient in gradients]
    if tf.executing_eagerly():
        products = _multiplied_eagerly(values, factors, may_be_zero)
    elif compiled_by_xla():
        products = _all_multiplied(values, factors, may_be_zero)
    elif tf.config.list_logical_devices("GPU"):
        # The host would wait for the device at each condition, so there is one for all.
        products = tf.cond(
            tf.reduce_any(factors < 1.0),
            lambda: _all_multiplied(values, factors, may_be_zero),
            lambda: list(values),
        )
    else:
        products = _clipped_multiplied(values, factors, may_be_zero)
    return [_with_values(gradient, value) for gradient, value in zip(gradients, products)]


def _multiplied_eagerly(
    values: Sequence[tf.Tensor], factors: tf.Tensor, may_be_zero: bool
) -> list[tf.Tensor]:
    on_host = np.broadcast_to(factors.numpy(), len(values)).tolist()
    return [
        _product(value, tf.constant(factor, _wide(value.dtype)), may_be_zero)
        if factor < 1.0
        else value
        for value, factor in zip(values, on_host)
    ]


def _all_multiplied(
    values: Sequence[tf.Tensor], factors: tf.Tensor, may_be_zero: bool
) -> list[tf.Tensor]:
    each = {
        dtype: _each(tf.cast(factors, dtype), len(values))
        for dtype in {_wide(value.dtype): None for value in values}
    }
    return [
        _product(value, each[_wide(value.dtype)][i], may_be_zero) for i, value in enumerate(values)
    ]


def _clipped_multiplied(
    values: Sequence[tf.Tensor], factors: tf.Tensor, may_be_zero: bool
) -> list[tf.Tensor]:
    """The products; no large value whose factor is 1 is read or written."""
    narrow = _each(tf.cast(factors, tf.float32), len(values))
    wide = _each(factors, len(values))
    clips = _each(factors < 1.0, len(values))
    return [
        _product(value, narrow[i], may_be_zero)
        if value.dtype == tf.float32 and is_small(value.dtype, static_shape(value))
        else _product_if(value.dtype, may_be_zero)(clips[i], value, wide[i], shape=value.shape)
        for i, value in enumerate(values)
    ]


@cache
def _product_if(dtype: tf.DType, may_be_zero: bool) -> Conditional:
    return Conditional(
        lambda value, factor: _product(value, tf.cast(factor, _wide(dtype)), may_be_zero),
        lambda value, factor: value,
        [dtype, tf.float64],
    )


def _each(factors: tf.Tensor, count: int) -> list[tf.Tensor]:
    return [factors] * count if factors.shape.rank == 0 else tf.unstack(factors, num=count)


def _wide(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype.size < 4 else dtype


def _product(value: tf.Tensor, factor: tf.Tensor, may_be_zero: bool) -> tf.Tensor:
    multiply = tf.math.multiply_no_nan if may_be_zero else tf.multiply
    return tf.cast(multiply(tf.cast(value, factor.dtype), factor), value.dtype)


def _values_of(gradient: Gradient) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(gradient: Gradient, values: tf.Tensor) -> Gradient:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values
