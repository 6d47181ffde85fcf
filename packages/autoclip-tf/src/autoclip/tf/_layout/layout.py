"""The layout of gradients: everything that follows from their shapes, dtypes and rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from autoclip.core.adapter import Storage
from autoclip.tf._groups import Groups
from autoclip.tf._histories import Histories, TensorHistory
from autoclip.tf._layout.norms import Gradient, Norms, root_of_squares, static_shape
from autoclip.tf._layout.rows import RowMap
from autoclip.tf._layout.scaling import Scaling


class Layout:
    """Measures and scales gradients, and knows the row of each.

    Made from the gradients of one step, it serves all steps whose gradients it `fits`.

    Args:
        gradients: of each variable; None for no gradient.
        groups: the variables.
        histories: the rows.
    """

    def __init__(
        self, gradients: Sequence[Gradient | None], groups: Groups, histories: Histories
    ) -> None:
        self._types = [*map(type, gradients)]
        present = [gradient for gradient in gradients if gradient is not None]
        self._dtypes = [gradient.dtype for gradient in present]
        self._shapes = [*map(static_shape, present)]
        rows = groups.row_of_parameters()
        self._norms = Norms(gradients)
        self._maps = [RowMap(storage, rows, groups.mode) for storage in histories.storages]
        self._scaling = Scaling(gradients, rows, len(histories))

    def fits(self, gradients: Sequence[Gradient | None]) -> bool:
        """True if gradients have the shapes and dtypes that this layout was made for."""
        if [*map(type, gradients)] != self._types:
            return False
        present = [gradient for gradient in gradients if gradient is not None]
        return self._dtypes == [gradient.dtype for gradient in present] and self._shapes == [
            *map(static_shape, present)
        ]

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
        return self._norms.of(gradients)

    def rows(self, norms: tf.Tensor) -> list[tuple[Storage[TensorHistory], tf.Tensor]]:
        """The norms of the rows in each storage, float64[rows, 1], from those of all gradients."""
        return [(each.storage, each.norms(norms)) for each in self._maps]

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
        return self._scaling.apply(gradients, coefficients, zeroed)
