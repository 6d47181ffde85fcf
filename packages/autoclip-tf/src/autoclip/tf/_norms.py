"""The true L2 norms of a list of gradients, as tensor operations.

Norms leave this module as float64: wide enough that the norm of finite float32 elements is always
finite, so that a norm which is not finite means a gradient which is not. What is recorded is
rounded once, later.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    present = [i for i, gradient in enumerate(gradients) if gradient is not None]
    norms = [tf.zeros((), tf.float64)] * len(gradients)
    if present:
        vectors = [_norm_values(gradients[i]) for i in present]
        found = _xla_norms(vectors) if xla else _graph_norms(vectors)
        for i, norm in zip(present, tf.unstack(found)):
            norms[i] = norm
    return tf.stack(norms)


def root_of_squares(norms: tf.Tensor) -> tf.Tensor:
    """The norm of all gradients together, 0-d, from the norms of each, float64[n]."""
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    largest = tf.reduce_max(norms)
    safe = tf.where((largest > 0.0) & tf.math.is_finite(largest), largest, 1.0)
    return tf.sqrt(tf.reduce_sum(tf.square(norms / safe))) * safe


def _norm_values(gradient: Gradient) -> tf.Tensor:
    """The elements of the dense gradient, float32 or float64[m], zeros left out."""
    values = tf.convert_to_tensor(
        gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    )
    if values.dtype.is_complex:
        values = tf.stack([tf.math.real(values), tf.math.imag(values)], axis=-1)
    elif values.dtype.size < 4:
        values = tf.cast(values, tf.float32)
    if isinstance(gradient, tf.IndexedSlices):
        values = _sum_duplicates(values, gradient.indices)
    return tf.reshape(values, [-1])


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


def _graph_norms(vectors: Sequence[tf.Tensor]) -> tf.Tensor:
    # l2_loss reads the gradient once, makes no copy, and its pairwise sums are right to 3e-7.
    squares = 2.0 * tf.stack([tf.cast(tf.nn.l2_loss(vector), tf.float64) for vector in vectors])
    sizes = [vector.shape.num_elements() for vector in vectors]
    if None in sizes:
        sizes = [tf.size(vector, tf.int64) for vector in vectors]
    sizes = tf.cast(tf.stack(sizes), tf.int64)
    # Zero, tiny, huge or not finite: rare enough to be looked at more closely.
    least = _SMALL_MEAN_SQUARE * tf.cast(sizes, tf.float64)
    unsure = ~((squares > least) & (squares < np.inf))

    def look_closely() -> tf.Tensor:
        # Of the others nothing is read. A condition for each would cost much more than an
        # operation on nothing.
        counts = tf.unstack(tf.where(unsure, sizes, 0), num=len(vectors))
        parts = [tf.slice(vector, [0], [count]) for vector, count in zip(vectors, counts)]
        closely = [_careful_norm(tf.cast(part, tf.float64), _sum_of_squares) for part in parts]
        return tf.where(unsure, tf.stack(closely), tf.sqrt(squares))

    return tf.cond(tf.reduce_any(unsure), look_closely, lambda: tf.sqrt(squares))


def _sum_of_squares(vector: tf.Tensor) -> tf.Tensor:
    return 2.0 * tf.nn.l2_loss(vector)


def _xla_norms(vectors: Sequence[tf.Tensor]) -> tf.Tensor:
    # In float64 from the start: a condition would cost more than it saves.
    return tf.stack(
        [
            _careful_norm(vector, _xla_sum_of_squares)
            if vector.dtype == tf.float64
            else tf.sqrt(_xla_sum_of_squares(tf.cast(vector, tf.float64)))
            for vector in vectors
        ]
    )


def _xla_sum_of_squares(vector: tf.Tensor) -> tf.Tensor:
    length = vector.shape.num_elements()
    if length is None:
        return tf.reduce_sum(tf.square(vector))
    whole = length - length % _BLOCK
    total = tf.reduce_sum(tf.square(vector[whole:]))
    if whole:
        blocks = tf.square(tf.reshape(vector[:whole], [-1, _BLOCK]))
        total += tf.reduce_sum(tf.linalg.matvec(blocks, tf.ones([_BLOCK], tf.float64)))
    return total


def _careful_norm(vector: tf.Tensor, sum_of_squares: Any) -> tf.Tensor:
    """The norm of a float64 vector whose squares may leave the range."""
    largest = tf.maximum(tf.reduce_max(tf.abs(vector)), 0.0)  # -inf if there are no elements
    finite = tf.math.is_finite(largest)
    safe = tf.where((largest > 0.0) & finite, largest, 1.0)
    root = tf.sqrt(sum_of_squares(vector / safe))
    # A finite gradient never has the norm "infinity", not even beyond float64.
    overflows = finite & tf.math.is_finite(root) & tf.math.is_inf(root * safe)
    return tf.where(overflows, _LARGEST, root * safe)
