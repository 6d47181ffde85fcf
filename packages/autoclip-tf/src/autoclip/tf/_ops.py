"""TensorFlow's operations for the step and the rules, eager, in graphs and under XLA."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from autoclip.core.adapter import Ops
from autoclip.tf._private import compiled_by_xla, numerics_are_checked


class TensorFlowOps(Ops):
    """Operations on tensors. All results are finite if the inputs are.

    `tf.debugging.enable_check_numerics` accepts a step, therefore.
    """

    # Above any threshold, and finite also as a multiple or a quotient with a norm. As float32, in
    # which reports are read, it is infinite.
    unlimited = 1e250

    def narrow(self, x: Any) -> Any:
        return tf.cast(x, tf.float32)

    def wide(self, x: Any) -> Any:
        return tf.cast(x, tf.float64)

    def whole(self, x: Any) -> Any:
        return tf.cast(x, tf.int64)

    def where(self, condition: Any, x: Any, y: Any, into: Any = None) -> Any:
        dtype = y.dtype if isinstance(x, float) else x.dtype
        return tf.where(condition, tf.convert_to_tensor(x, dtype), tf.convert_to_tensor(y, dtype))

    def minimum(self, x: Any, y: Any) -> Any:
        return tf.minimum(x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        return tf.maximum(x, y)

    def divide(self, x: Any, y: Any) -> Any:
        return tf.math.divide_no_nan(x, y)

    def log(self, x: Any) -> Any:
        return tf.math.log(x)

    def exp(self, x: Any) -> Any:
        return tf.exp(x)

    def sum(self, x: Any) -> Any:
        return tf.reduce_sum(x, axis=1, keepdims=True)

    def sort(self, x: Any) -> Any:
        return tf.sort(x, axis=1)

    def concat(self, parts: list[Any]) -> Any:
        return tf.concat(parts, axis=1)

    def full(self, rows: int, value: float) -> Any:
        return np.full((rows, 1), value, np.float32)

    def column(self, x: Any, rows: int) -> Any:
        x = tf.convert_to_tensor(x, tf.float64)
        return x if x.shape == (rows, 1) else tf.broadcast_to(x, [rows, 1])

    def slots(self, count: int) -> Any:
        return np.arange(count)

    def halves(self, x: Any) -> Any:
        return tf.split(x, 2, axis=1)

    def take(self, x: Any, index: Any) -> Any:
        return tf.gather(x, index, batch_dims=1)

    def put(self, x: Any, index: Any, value: Any) -> Any:
        rows = np.arange(x.shape[0])[:, None]
        indices = tf.concat([rows, index], axis=1)
        return tf.tensor_scatter_nd_update(x, indices, tf.reshape(value, [-1]))

    def insert(self, ordered: Any, came: Any, left: Any) -> Any:
        """See `Ops.insert`; in a graph on the CPU, large windows are read and written once."""
        if _is_fused(ordered.shape.num_elements()):
            return _insert_at_once(ordered, came, left)
        return super().insert(ordered, came, left)


OPS = TensorFlowOps()

# The sorted insertion is eight operations with a pass over the windows each. Compiled, it is one
# pass, but starts more slowly: a step of SGD takes about 0.94 of the time with 400 rows of 1000
# norms, and 1.07 with 6 rows (the cases of `hatch run bench:tensorflow`).
_FUSED = 2**16


def _is_fused(norms: int) -> bool:
    """True if it pays to compile the insertion into windows of this many norms."""
    return (
        norms >= _FUSED
        and not tf.executing_eagerly()
        and not compiled_by_xla()
        and not numerics_are_checked()
        and not tf.config.list_logical_devices("GPU")
    )


@tf.function(jit_compile=True, autograph=False)
def _insert_at_once(ordered: tf.Tensor, came: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
    return Ops.insert(OPS, ordered, came, left)
