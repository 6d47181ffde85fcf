"""Gradients with a NaN or an infinity: kept, set to zero, or refused, as `on_nonfinite` says."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from autoclip.core.adapter import nonfinite_message
from autoclip.tf._groups import Groups
from autoclip.tf._histories import make_variable
from autoclip.tf._private import compiled_by_xla, to_host


class NonfiniteGradients:
    """Finds gradients that are not finite by their norms.

    Args:
        groups: the clipper's variables, their names and `on_nonfinite` of each.
    """

    def __init__(self, groups: Groups) -> None:
        self._names = groups.names()
        policies = np.array(groups.per_parameter("on_nonfinite"))
        self._zeroes, self._raises = policies == "zero", policies == "raise"
        self._faults = (
            make_variable(np.zeros_like(self._raises), "faults") if self._raises.any() else None
        )

    def apply(self, norms: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Refuse or zero gradients that are not finite.

        Args:
            norms: float64[n], of all gradients.

        Returns:
            The norms of the gradients after that, and bool[n], the gradients that become zero; None
            if no policy asks for it.

        Raises:
            FloatingPointError: eagerly; see `Clipper`.
        """
        if not (self._zeroes | self._raises).any():
            return norms, None
        finite = tf.math.is_finite(norms)
        zeroed = ~finite & (self._zeroes | self._raises)
        if self._faults is not None:
            norms = self._refuse(norms, finite | ~self._raises, self._faults)
        if self._zeroes.any():
            norms = tf.where(self._zeroes & ~finite, tf.zeros((), tf.float64), norms)
        return norms, zeroed

    def _refuse(self, norms: tf.Tensor, fine: tf.Tensor, faults: tf.Variable) -> tf.Tensor:
        """Raise, or make an operation of the graph raise, unless all gradients are fine."""
        if tf.executing_eagerly():
            found = fine.numpy()
            if not found.all():
                raise FloatingPointError(self._message(~found))
            return norms
        if compiled_by_xla():
            # No assertion stops the program here. So that the words of the error are true,
            # nothing is recorded in this step either.
            faults.assign(faults.read_value() | ~fine)
            return tf.where(tf.reduce_all(fine), norms, np.nan)
        # The text for one name and that for several, around the names that there will be.
        one, many = (nonfinite_message(["\0"] * n).split(", ".join(["\0"] * n)) for n in (1, 2))
        names = tf.boolean_mask(tf.constant(self._names), ~fine)
        several = tf.size(names) > 1
        joined = tf.strings.reduce_join(names, separator=", ")
        text = tf.where(several, many[0], one[0]) + joined + tf.where(several, many[1], one[1])
        refused = tf.debugging.Assert(tf.reduce_all(fine), [text], name="finite")
        with tf.control_dependencies([refused]):
            return tf.identity(norms)

    def check(self) -> None:
        """Raise for a gradient that XLA could not refuse; see `Clipper.check`."""
        if self._faults is None:
            return
        faults = to_host(self._faults)
        if faults.any():
            self._faults.assign(np.zeros_like(faults))
            raise FloatingPointError(
                self._message(faults) + " XLA cannot stop a step: the gradient was set to zero."
            )

    def _message(self, faults: Any) -> str:
        return nonfinite_message([self._names[i] for i in np.flatnonzero(faults)])
