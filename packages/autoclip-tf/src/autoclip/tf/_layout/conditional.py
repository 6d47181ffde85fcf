"""A condition for each of many tensors, cheap to trace and to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


class Conditional:
    """A choice between two functions, made each time a graph runs.

    `tf.cond` traces its two functions again at each call, for tens of milliseconds. Here they are
    traced once, with shapes unknown, and a call adds one operation to the graph.

    Args:
        if_true: a function of tensors that returns one tensor.
        if_false: another with the same arguments, whose result has the same dtype.
        dtypes: of the arguments.
    """

    def __init__(
        self,
        if_true: Callable[..., tf.Tensor],
        if_false: Callable[..., tf.Tensor],
        dtypes: Sequence[tf.DType],
    ) -> None:
        specs = [tf.TensorSpec(None, dtype) for dtype in dtypes]
        # Outside of the graph under construction, whose device must not become the functions'.
        with tf.init_scope(), tf.device(None):
            self._if_true, self._if_false = (
                tf.function(function, autograph=False).get_concrete_function(*specs)
                for function in (if_true, if_false)
            )

    def __call__(self, condition: tf.Tensor, *arguments: tf.Tensor, shape: Any) -> tf.Tensor:
        """Add the choice to the graph under construction.

        Args:
            condition: bool[].
            *arguments: of the function.
            shape: of the result, for shape inference.
        """
        [result] = tf.raw_ops.StatelessIf(
            cond=condition,
            input=list(arguments),
            Tout=[self._if_true.outputs[0].dtype],
            then_branch=self._if_true,
            else_branch=self._if_false,
            output_shapes=[shape],
        )
        return result
