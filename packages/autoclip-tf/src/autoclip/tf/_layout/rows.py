"""From the norms of gradients to those of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from autoclip.core.adapter import Mode, Storage
from autoclip.tf._histories import TensorHistory
from autoclip.tf._layout.norms import at, index_of, root_of_squares


class RowMap:
    """The gradients that the rows of one storage stand for.

    Args:
        storage: the storage.
        rows: the row of each gradient.
        mode: the meaning of a row.

    Attributes:
        storage: see above.
    """

    def __init__(self, storage: Storage[TensorHistory], rows: Sequence[int], mode: Mode) -> None:
        self.storage = storage
        row_of = np.array(rows)
        members = [np.flatnonzero(row_of == row) for row in storage.rows] if mode.joins else []
        self._members = [index_of(each, len(rows)) for each in members]
        self._own = index_of(storage.rows, len(rows))

    def norms(self, norms: tf.Tensor) -> tf.Tensor:
        """The norms of the rows, float64[rows, 1], from those of all gradients."""
        joined = [root_of_squares(at(norms, each)) for each in self._members]
        if not joined:
            by_row = at(norms, self._own)
        else:
            by_row = joined[0] if len(joined) == 1 else tf.stack(joined)
        return tf.reshape(by_row, [-1, 1])
