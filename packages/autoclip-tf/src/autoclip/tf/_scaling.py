"""Multiplying gradients by their coefficients, in at least float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

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
            unless some factor is below 1, and in a graph on the CPU only what has such a factor.
        may_be_zero: whether a factor can be 0; that makes zeros of NaN too.
    """
    values = [tf.convert_to_tensor(_values_of(gradient)) for gradient in gradients]
    # On a GPU the host would have to wait for each of the factors; and eagerly, calling a function
    # takes longer than most multiplications.
    each_by_itself = not (xla or tf.executing_eagerly() or tf.config.list_logical_devices("GPU"))

    def multiplied() -> list[tf.Tensor]:
        # Unpacked in here: a condition gets one tensor instead of one for each gradient.
        if each_by_itself:
            each = zip(values, tf.unstack(factors, num=len(values)))
            products = [_product_if_below_one(v.dtype, may_be_zero)(v, f) for v, f in each]
            return [tf.ensure_shape(p, value.shape) for p, value in zip(products, values)]
        wide = [_wide(value.dtype) for value in values]
        each_in = {
            dtype: tf.unstack(tf.cast(factors, dtype), num=len(values))
            for dtype in dict.fromkeys(wide)
        }
        return [
            _product(value, each_in[dtype][i], may_be_zero)
            for i, (value, dtype) in enumerate(zip(values, wide))
        ]

    if xla:  # a condition costs more there than the multiplication
        scaled = multiplied()
    else:
        scaled = tf.cond(tf.reduce_any(factors < 1.0), multiplied, lambda: list(values))
    return [_with_values(gradient, value) for gradient, value in zip(gradients, scaled)]


def _wide(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype.size < 4 else dtype


def _product(value: tf.Tensor, factor: tf.Tensor, may_be_zero: bool) -> tf.Tensor:
    multiply = tf.math.multiply_no_nan if may_be_zero else tf.multiply
    return tf.cast(multiply(tf.cast(value, factor.dtype), factor), value.dtype)


@cache
def _product_if_below_one(dtype: tf.DType, may_be_zero: bool) -> Any:
    """A function of a gradient and its factor, traced once and called for each gradient.

    A condition for each of a thousand gradients would take many times as long to trace, and this
    function, if it were inlined, to optimise.
    """

    @tf.function(
        input_signature=[tf.TensorSpec(None, dtype), tf.TensorSpec([], tf.float64)],
        autograph=False,
        experimental_attributes={"_noinline": True},
    )
    def product(value: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        return tf.cond(
            factor < 1.0,
            lambda: _product(value, tf.cast(factor, _wide(dtype)), may_be_zero),
            lambda: value,
        )

    return product


def _values_of(gradient: Gradient) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(gradient: Gradient, values: tf.Tensor) -> Gradient:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values
