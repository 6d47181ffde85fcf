"""The layout of gradients: everything that follows from their shapes, dtypes and rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from autoclip.core.adapter import Storage
from autoclip.tf._groups import Groups
from autoclip.tf._histories import Histories, TensorHistory
from autoclip.tf._layout.norms import (
    Gradient,
    dense_values,
    is_small,
    large_norms,
    root_of_squares,
    small_norms,
    stacked_norms,
    static_shape,
)
from autoclip.tf._layout.scaling import scale
from autoclip.tf._private import compiled_by_xla

__all__ = ["Layout"]

# From this many on, arrays of one shape take fewer operations stacked than one by one.
_MANY = 3
# Above this size, the copy into the stack costs more than the operations that it saves.
_STACKED = 2**9


class Layout:
    """Measures and scales gradients, and knows the row of each.

    Made from the gradients of one step, it serves all steps whose gradients it `fits`.

    Args:
        gradients: of each variable; None for no gradient.
        groups: the variables.
        histories: the rows.

    Attributes:
        storages: the histories of the rows.
        present: the indices of the gradients that there are.
    """

    def __init__(
        self, gradients: Sequence[Gradient | None], groups: Groups, histories: Histories
    ) -> None:
        self._kinds = [_kind(gradient) for gradient in gradients]
        self.storages = histories.storages
        self._count, self._joins = len(histories), groups.mode.joins
        row_of = np.array(groups.row_of_parameters())
        self._members = [np.flatnonzero(row_of == row) for row in range(self._count)]
        self.present = [i for i, kind in enumerate(self._kinds) if kind is not None]
        self._present_rows = _index(row_of[self.present], self._count)
        self._present_index = _index(self.present, len(gradients))
        self._arrange()

    def _arrange(self) -> None:
        """Sort the gradients by how their norms are computed."""
        by_shape: dict[Any, list[int]] = {}
        self._large: list[int] = []
        for i in self.present:
            if is_small(*self._kinds[i][:2]):
                by_shape.setdefault(self._kinds[i], []).append(i)
            else:
                self._large.append(i)
        self._stacks, self._small = [], []
        for (_, shape, _), same in by_shape.items():
            if len(same) >= _MANY and math.prod(shape) <= _STACKED:
                self._stacks.append(same)
            else:
                self._small += same
        self._small.sort()  # often all there are; then in order, which takes no gather
        absent = [i for i, kind in enumerate(self._kinds) if kind is None]
        self._absent = len(absent)
        measured = [*(i for stack in self._stacks for i in stack), *self._small, *self._large]
        self._order = _index(np.argsort([*measured, *absent]), len(self._kinds))

    def fits(self, gradients: Sequence[Gradient | None]) -> bool:
        """True if gradients have the shapes and dtypes that this layout was made for."""
        return self._kinds == [_kind(gradient) for gradient in gradients]

    # -- norms -------------------------------------------------------------------------------

    def measure(self, gradients: Sequence[Gradient | None]) -> tf.Tensor:
        """The norms of gradients.

        Args:
            gradients: None for none. Slices of `tf.IndexedSlices` with equal indices are summed.

        Returns:
            float64[n]: within 1e-6 of the exact norm for float32 and float64, and within 1e-5 for
            16-bit and complex dtypes. 0 for None, and not finite exactly if the gradient holds a
            NaN or an infinity. TensorFlow takes float32 elements below 1.2e-38 for zero, so these
            bounds hold for norms above 4e-35 times the square root of the number of elements, and
            for zero.
        """

        def values(index: Iterable[int]) -> list[tf.Tensor]:
            return [dense_values(gradients[i]) for i in index]

        parts = [stacked_norms(values(stack)) for stack in self._stacks]
        if self._small:
            parts.append(small_norms(values(self._small)))
        if self._large:
            parts.append(large_norms(values(self._large), compiled_by_xla()))
        if self._absent:
            parts.append(tf.zeros([self._absent], tf.float64))
        return _at(parts[0] if len(parts) == 1 else tf.concat(parts, axis=0), self._order)

    def rows(self, norms: tf.Tensor) -> list[tuple[Storage[TensorHistory], tf.Tensor]]:
        """The norms of the rows in each storage, float64[rows, 1], from those of all gradients."""
        if not self._joins:
            by_row = norms
        elif self._count == 1:
            by_row = self.total(norms)
        else:
            by_row = tf.stack([self.total(tf.gather(norms, each)) for each in self._members])
        column = tf.reshape(by_row, [-1, 1])
        if len(self.storages) == 1:
            return [(self.storages[0], column)]
        return [(storage, tf.gather(column, storage.rows)) for storage in self.storages]

    @staticmethod
    def total(norms: tf.Tensor) -> tf.Tensor:
        """The norm of several gradients together, 0-d, from the norms of each."""
        return root_of_squares(norms)

    # -- scaling -----------------------------------------------------------------------------

    def scale(
        self,
        gradients: Sequence[Gradient | None],
        coefficients: tf.Tensor,
        zeroed: tf.Tensor | None = None,
    ) -> list[Gradient | None]:
        """The gradients times the coefficients of their rows.

        Args:
            gradients: of each variable.
            coefficients: float64[rows, 1].
            zeroed: bool[n], the gradients that become zero, NaN and infinity too; None for none.
        """
        if self._count == 1:  # a scalar costs no operation for each gradient
            factors = tf.reshape(coefficients, [])
        else:
            factors = _at(tf.reshape(coefficients, [-1]), self._present_rows)
        if zeroed is not None:
            zero = tf.zeros((), tf.float64)
            factors = tf.where(_at(zeroed, self._present_index), zero, factors)
        # Constants to a tape, eagerly and in a graph: eagerly they have been on the host.
        factors = tf.stop_gradient(factors)
        given = [gradients[i] for i in self.present]
        products = scale(given, factors, compiled_by_xla(), may_be_zero=zeroed is not None)
        scaled = list(gradients)
        for i, product in zip(self.present, products):
            scaled[i] = product
        return scaled


def _kind(gradient: Gradient | None) -> Any:
    """The dtype and shape of a gradient, and True if it is sparse; None for no gradient."""
    if gradient is None:
        return None
    sparse = isinstance(gradient, tf.IndexedSlices)
    values = gradient.values if sparse else gradient
    return values.dtype, static_shape(values), sparse


def _index(index: Iterable[int], count: int) -> list[int] | None:
    """An index into `count` values; None for all of them in order, which takes no operation."""
    found = [int(i) for i in index]
    return None if found == list(range(count)) else found


def _at(values: tf.Tensor, index: list[int] | None) -> tf.Tensor:
    return values if index is None else tf.gather(values, index)
