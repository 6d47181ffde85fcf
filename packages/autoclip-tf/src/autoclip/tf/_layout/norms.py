"""The true L2 norms of a list of gradients, as tensor operations.

Each operation costs milliseconds to trace and microseconds to run, so small gradients are
summed in float64 with few operations, those of equal shapes together. Each large gradient takes one
operation that reads it once, in float32.

Norms leave this module as float64: wide enough that the norm of finite float32 elements is always
finite, so that a norm which is not finite means a gradient which is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from autoclip.tf._layout.conditional import Conditional
from autoclip.tf._private import compiled_by_xla, numerics_are_checked

Gradient: TypeAlias = Any
"""A `tf.Tensor` or `tf.IndexedSlices` of any floating or complex dtype."""

# Up to this many elements, starting an operation costs more than its work.
_SMALL = 2**12
# Below this mean square the squares of single elements may underflow in float32.
_SMALL_MEAN_SQUARE = 2.0**-105
# XLA sums long vectors slowly on the CPU, and rows of this length, as a product, fast.
_BLOCK = 512
# From this many on, arrays of one shape take fewer operations stacked than one by one.
_MANY = 3
# Above this size, the copy into the stack costs more than the operations that it saves.
_STACKED = 2**9
_LARGEST = np.finfo(np.float64).max  # a NumPy float64: TensorFlow takes a Python float for float32


class Norms:
    """The norms of gradients, measured in three kinds: stacks of one shape, small, and large ones.

    Args:
        gradients: gradients with the shapes and dtypes to come; None for none.
    """

    def __init__(self, gradients: Sequence[Gradient | None]) -> None:
        by_shape: dict[Any, list[int]] = {}
        self._large: list[int] = []
        absent = []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                absent.append(i)
            elif is_small(gradient.dtype, static_shape(gradient)):
                kind = gradient.dtype, static_shape(gradient), type(gradient)
                by_shape.setdefault(kind, []).append(i)
            else:
                self._large.append(i)
        self._stacks: list[list[int]] = []
        self._small: list[int] = []
        for (_, shape, _), same in by_shape.items():
            if len(same) >= _MANY and math.prod(shape) <= _STACKED:
                self._stacks.append(same)
            else:
                self._small += same
        self._small.sort()  # often all there are; then in order, which takes no gather
        self._absent = len(absent)
        measured = [*chain(*self._stacks), *self._small, *self._large, *absent]
        self._order = index_of(np.argsort(measured), len(gradients))

    def of(self, gradients: Sequence[Gradient | None]) -> tf.Tensor:
        """float64[n]: the norm of each gradient; see `Layout.measure`."""

        def values(index: Iterable[int]) -> list[tf.Tensor]:
            return [dense_values(gradients[i]) for i in index]

        parts = [stacked_norms(values(stack)) for stack in self._stacks]
        if self._small:
            parts.append(small_norms(values(self._small)))
        if self._large:
            parts.append(large_norms(values(self._large), compiled_by_xla()))
        if self._absent:
            parts.append(tf.zeros([self._absent], tf.float64))
        return at(parts[0] if len(parts) == 1 else tf.concat(parts, axis=0), self._order)


def index_of(index: Iterable[int], count: int) -> list[int] | None:
    """An index into `count` values; None for all of them in order, which takes no operation."""
    found = [int(i) for i in index]
    return None if found == list(range(count)) else found


def at(values: tf.Tensor, index: list[int] | None) -> tf.Tensor:
    """The values at an index that `index_of` returned."""
    return values if index is None else tf.gather(values, index)


def root_of_squares(norms: tf.Tensor) -> tf.Tensor:
    """The norm of all gradients together, 0-d, from the norms of each, float64[n].

    Norms outside of 1e-150 … 1e150 count as zero or infinity: float32, in which norms are
    recorded, ends long before.
    """
    return tf.sqrt(tf.reduce_sum(tf.square(norms)))


def static_shape(gradient: Gradient) -> tuple[int | None, ...] | None:
    """The shape as far as it is known while a graph is traced; of `IndexedSlices` the slices'."""
    values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    return None if values.shape.rank is None else tuple(values.shape.as_list())


def is_small(dtype: tf.DType, shape: Sequence[Any] | None) -> bool:
    """True if work on a tensor, in float64 too, costs less than a condition that avoids it."""
    if shape is None or None in shape or dtype in (tf.float64, tf.complex128):
        return False
    return 0 < math.prod(shape) <= _SMALL


def dense_values(gradient: Gradient) -> tf.Tensor:
    """The elements of the dense gradient; of `IndexedSlices` only rows that are not zero."""
    if isinstance(gradient, tf.IndexedSlices):
        return _sum_duplicates(_real(gradient.values), gradient.indices)
    return gradient


def _real(values: tf.Tensor) -> tf.Tensor:
    """The same elements as float32 or float64; complex ones as pairs."""
    if values.dtype.is_complex:
        return tf.stack([tf.math.real(values), tf.math.imag(values)], axis=-1)
    return tf.cast(values, tf.float32) if values.dtype.size < 4 else values


def _sum_duplicates(values: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Slices with different indices, followed by zeros."""
    # tf.unique has no static shape, and so XLA has no tf.unique.
    order = tf.argsort(indices)
    indices = tf.gather(indices, order)
    differs = tf.cast(indices[1:] != indices[:-1], tf.int32)
    segments = tf.concat([tf.zeros_like(indices[:1], tf.int32), tf.cumsum(differs)], axis=0)
    return tf.math.unsorted_segment_sum(
        tf.gather(values, order), segments, num_segments=tf.shape(indices)[0]
    )


def stacked_norms(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    """The norms of arrays of one shape and dtype, of at most 32 bits for each real number."""
    # In float64 the squares of float32 elements neither overflow nor underflow.
    wide = tf.cast(_real(tf.stack(arrays)), tf.float64)
    return tf.sqrt(tf.reduce_sum(tf.square(wide), list(range(1, wide.shape.rank))))


def small_norms(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    """The same for arrays of any shapes and dtypes, of at most 32 bits for each real number."""
    halves = [tf.nn.l2_loss(tf.cast(_real(array), tf.float64)) for array in arrays]
    return tf.sqrt(2.0 * tf.stack(halves))


def large_norms(arrays: Sequence[tf.Tensor], xla: bool) -> tf.Tensor:
    """The norms of arrays of any shapes and dtypes, each of which is read once.

    Args:
        arrays: the elements of the gradients.
        xla: True if the operations are compiled by XLA.
    """
    reals = [_real(array) for array in arrays]
    # A sum of squares in float32 may be infinite until it is looked at more closely.
    is_careful = xla or numerics_are_checked()
    return _careful_norms(reals) if is_careful else _graph_norms(reals)


def _graph_norms(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    # l2_loss reads the gradient once, makes no copy, and its pairwise sums are right to 4e-7.
    losses = [tf.nn.l2_loss(array) for array in arrays]
    if any(loss.dtype != losses[0].dtype for loss in losses):
        losses = [tf.cast(loss, tf.float64) for loss in losses]
    squares = 2.0 * tf.cast(tf.stack(losses), tf.float64)
    sizes = [array.shape.num_elements() for array in arrays]
    if None in sizes:
        sizes = [tf.size(array, tf.int64) for array in arrays]
    # Zero, tiny, huge or not finite: rare enough to be looked at more closely.
    least = _SMALL_MEAN_SQUARE * tf.cast(tf.stack(sizes), tf.float64)
    unsure = ~((squares > least) & tf.math.is_finite(squares))
    norms = tf.sqrt(squares)

    def look_closely() -> tf.Tensor:
        found = []
        for array, doubt, norm in zip(arrays, tf.unstack(unsure), tf.unstack(norms)):
            if not tf.executing_eagerly():
                norm = _careful_norm_if(array.dtype)(doubt, array, norm, shape=[])
            elif doubt:
                norm = _careful_norm(tf.reshape(array, [-1]), tf.nn.l2_loss)
            found.append(norm)
        return tf.stack(found)

    return tf.cond(tf.reduce_any(unsure), look_closely, lambda: norms)


@cache
def _careful_norm_if(dtype: tf.DType) -> Conditional:
    return Conditional(
        lambda array, norm: _careful_norm(tf.reshape(array, [-1]), tf.nn.l2_loss),
        lambda array, norm: norm,
        [dtype, tf.float64],
    )


def _careful_norms(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    # From the start: under XLA a condition would cost more than it saves.
    ones = tf.ones([_BLOCK, 1], tf.float64)

    def half_of_squares(vector: tf.Tensor) -> tf.Tensor:
        length = vector.shape.num_elements()
        if length is None or length < _BLOCK:
            return tf.nn.l2_loss(vector)
        whole = length - length % _BLOCK
        blocks = tf.reshape(vector[:whole] if whole < length else vector, [-1, _BLOCK])
        half = 0.5 * tf.reduce_sum(tf.matmul(tf.square(blocks), ones))
        return half + tf.nn.l2_loss(vector[whole:]) if whole < length else half

    return tf.stack([_careful_norm(tf.reshape(a, [-1]), half_of_squares) for a in arrays])


def _careful_norm(
    vector: tf.Tensor, half_of_squares: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """The norm, float64[], of a vector whose squares may leave the range of its dtype.

    Args:
        vector: float32 or float64[m].
        half_of_squares: half the sum of a float64 vector's squares, as `tf.nn.l2_loss`.
    """
    if vector.dtype == tf.float32:  # its squares are far inside the range of float64
        return tf.sqrt(2.0 * half_of_squares(tf.cast(vector, tf.float64)))
    # With a zero: the maximum of no elements is -inf.
    largest = tf.reduce_max(tf.concat([tf.abs(vector), tf.zeros([1], vector.dtype)], axis=0))
    unit = tf.where((largest > 0.0) & tf.math.is_finite(largest), largest, 1.0)
    root = tf.sqrt(2.0 * half_of_squares(vector / unit))
    # A finite gradient never has the norm "infinity", not even beyond float64.
    return tf.where(tf.math.is_finite(root), tf.minimum(root * unit, _LARGEST), root)
