"""Multiplying gradients by their coefficients, in at least float32."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from autoclip.tf._norms import Gradient

__all__ = ["scale"]


def scale(
    gradients: Sequence[Gradient], factors: tf.Tensor, xla: bool, may_be_zero: bool
) -> list[Gradient]:
    """The gradients times their factors, of the same dtypes and kinds.

    Args:
        gradients: tensors and IndexedSlices; of these only the stored values are multiplied.
        factors: float64[n].
        xla: whether the operations are compiled by XLA. Otherwise nothing is read or written
            unless some factor is below 1.
        may_be_zero: whether a factor can be 0; that makes zeros of NaN too.
    """
    values = [tf.convert_to_tensor(_values_of(gradient)) for gradient in gradients]
    wide = [tf.float32 if value.dtype.size < 4 else value.dtype for value in values]
    multiply = tf.math.multiply_no_nan if may_be_zero else tf.multiply

    def multiplied() -> list[tf.Tensor]:
        # Unpacked in here: a condition gets one tensor instead of one for each gradient.
        each = {
            dtype: tf.unstack(tf.cast(factors, dtype), num=len(values))
            for dtype in dict.fromkeys(wide)
        }
        return [
            tf.cast(multiply(tf.cast(value, dtype), each[dtype][i]), value.dtype)
            for i, (value, dtype) in enumerate(zip(values, wide))
        ]

    if xla:  # a condition costs more there than the multiplication
        scaled = multiplied()
    else:
        scaled = tf.cond(tf.reduce_any(factors < 1.0), multiplied, lambda: list(values))
    return [_with_values(gradient, value) for gradient, value in zip(gradients, scaled)]


def _values_of(gradient: Gradient) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(gradient: Gradient, values: tf.Tensor) -> Gradient:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values
