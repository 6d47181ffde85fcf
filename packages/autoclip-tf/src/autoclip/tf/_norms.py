"""The true L2 norms of a list of gradients, as tensor operations.

Norms leave this module as float64: wide enough that the norm of finite float32 elements is always
finite, so that a norm which is not finite means a gradient which is not. What is recorded is
rounded once, later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

__all__ = ["Gradient", "gradient_norms", "root_of_squares"]

Gradient: TypeAlias = Any
"""A `tf.Tensor` or `tf.IndexedSlices` of any floating or complex dtype."""

# Below this mean square the squares of single elements may underflow in float32.
_SMALL_MEAN_SQUARE = 2.0**-105
# XLA sums long vectors slowly on the CPU, and rows of this length, as a product, fast.
_BLOCK = 512
_LARGEST = np.finfo(np.float64).max  # a NumPy float64: TensorFlow takes a Python float for float32


def gradient_norms(gradients: Sequence[Gradient | None], xla: bool) -> tf.Tensor:
    """The norms of gradients.

    Args:
        gradients: None for none.
        xla: whether the operations are compiled by XLA.

    Returns:
        float64[n]: within 1e-5 of the exact norm, for float32 and float64 within 1e-6. 0 for
        None, and not finite exactly if the gradient holds a NaN or an infinity.
    """
    arrays = [_norm_values(gradient) for gradient in gradients if gradient is not None]
    if not arrays:
        return tf.zeros([len(gradients)], tf.float64)
    found = _xla_norms(arrays) if xla else _graph_norms(arrays)
    if len(arrays) == len(gradients):
        return found
    norms = iter(tf.unstack(found))
    none = tf.zeros((), tf.float64)
    return tf.stack([none if gradient is None else next(norms) for gradient in gradients])


def root_of_squares(norms: tf.Tensor) -> tf.Tensor:
    """The norm of all gradients together, 0-d, from the norms of each, float64[n]."""
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    largest = tf.reduce_max(norms)
    safe = tf.where((largest > 0.0) & tf.math.is_finite(largest), largest, 1.0)
    return tf.sqrt(tf.reduce_sum(tf.square(norms / safe))) * safe


def _norm_values(gradient: Gradient) -> tf.Tensor:
    """The elements of the dense gradient as float32 or float64, rows of zeros left out."""
    values = tf.convert_to_tensor(
        gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    )
    if values.dtype.is_complex:
        values = tf.stack([tf.math.real(values), tf.math.imag(values)], axis=-1)
    elif values.dtype.size < 4:
        values = tf.cast(values, tf.float32)
    if isinstance(gradient, tf.IndexedSlices):
        values = _sum_duplicates(values, gradient.indices)
    return values


def _sum_duplicates(values: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Slices of which none stands for the same place as another, filled up with zeros."""
    # tf.unique has no static shape, and so XLA has no tf.unique.
    order = tf.argsort(indices)
    indices = tf.gather(indices, order)
    differs = tf.cast(indices[1:] != indices[:-1], tf.int32)
    segments = tf.concat([tf.zeros_like(indices[:1], tf.int32), tf.cumsum(differs)], axis=0)
    return tf.math.unsorted_segment_sum(
        tf.gather(values, order), segments, num_segments=tf.shape(indices)[0]
    )


def _graph_norms(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    # Every operation costs time when a model of a thousand variables is traced: few for each one.
    # l2_loss reads the gradient once, makes no copy, and its pairwise sums are right to 4e-7.
    losses = [tf.nn.l2_loss(array) for array in arrays]
    if any(loss.dtype != losses[0].dtype for loss in losses):
        losses = [tf.cast(loss, tf.float64) for loss in losses]
    squares = 2.0 * tf.cast(tf.stack(losses), tf.float64)
    sizes = [array.shape.num_elements() for array in arrays]
    if None in sizes:
        sizes = [tf.size(array, tf.int64) for array in arrays]
    sizes = tf.cast(tf.stack(sizes), tf.int64)
    # Zero, tiny, huge or not finite: rare enough to be looked at more closely.
    least = _SMALL_MEAN_SQUARE * tf.cast(sizes, tf.float64)
    unsure = ~((squares > least) & (squares < np.inf))

    def look_closely() -> tf.Tensor:
        # Of the others nothing is read. A condition for each would cost much more than an
        # operation on nothing.
        start, flat = tf.constant([0], tf.int64), tf.constant([-1])
        lengths = tf.split(tf.where(unsure, sizes, 0), len(arrays))
        parts = [
            tf.slice(tf.reshape(array, flat), start, length)
            for array, length in zip(arrays, lengths)
        ]
        return tf.where(unsure, _careful_norms(parts, tf.nn.l2_loss), tf.sqrt(squares))

    return tf.cond(tf.reduce_any(unsure), look_closely, lambda: tf.sqrt(squares))


def _xla_norms(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    # Carefully from the start: a condition would cost more than it saves.
    flat, ones = tf.constant([-1]), tf.ones([_BLOCK, 1], tf.float64)

    def half_of_squares(vector: tf.Tensor) -> tf.Tensor:
        length = vector.shape.num_elements()
        if length is None or length < _BLOCK:
            return tf.nn.l2_loss(vector)
        whole = length - length % _BLOCK
        blocks = tf.reshape(vector[:whole] if whole < length else vector, [-1, _BLOCK])
        half = 0.5 * tf.reduce_sum(tf.matmul(tf.square(blocks), ones))
        return half + tf.nn.l2_loss(vector[whole:]) if whole < length else half

    return _careful_norms([tf.reshape(array, flat) for array in arrays], half_of_squares)


def _careful_norms(
    vectors: Sequence[tf.Tensor], half_of_squares: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """The norms, float64[n], of vectors whose squares may leave the range of their dtype.

    Args:
        vectors: float32 or float64[m].
        half_of_squares: half the sum of a float64 vector's squares, as `tf.nn.l2_loss`.
    """
    one = tf.ones((), tf.float64)
    units, halves = [], []
    for vector in vectors:
        unit = one
        if vector.dtype == tf.float64:
            unit = _largest(vector)
            vector /= unit
        # The squares of float32 elements are far inside the range of float64.
        halves.append(half_of_squares(tf.cast(vector, tf.float64)))
        units.append(unit)
    unit, root = tf.stack(units), tf.sqrt(2.0 * tf.stack(halves))
    # A finite gradient never has the norm "infinity", not even beyond float64.
    return tf.where(tf.math.is_finite(root), tf.minimum(root * unit, _LARGEST), root)


def _largest(vector: tf.Tensor) -> tf.Tensor:
    """The largest element's size; 1 where nothing can be divided by that."""
    largest = tf.reduce_max(tf.abs(vector))  # -inf if there are no elements
    return tf.where((largest > 0.0) & tf.math.is_finite(largest), largest, 1.0)
