"""The last step in variables: its report, and a count of all steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report
from autoclip.tf._histories import make_variable
from autoclip.tf._layout import Layout
from autoclip.tf._private import to_host


class LastStep:
    """The report of the last step, which graphs write and users read.

    Args:
        names: of the rows.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        # Norms, thresholds and coefficients in one variable: each assignment costs time. Zeros
        # throughout say that there is nothing to report; a step has coefficients of 1 where norms
        # are 0.
        self._report = make_variable(np.zeros((len(names), 3)), "report")
        self._steps = make_variable(np.zeros((), np.int64), "steps")

    def write(self, numbers: tf.Tensor | None) -> None:
        """Write the report of a step.

        Args:
            numbers: float64[rows, 3], norms, thresholds and coefficients; None if the step had no
                gradient.
        """
        if numbers is None:
            numbers = tf.zeros_like(self._report)
        self._report.assign(numbers)
        with tf.control_dependencies([numbers]):  # a step that is refused does not count
            self._steps.assign_add(1)

    def clear(self) -> None:
        """Forget all steps."""
        self._report.assign(tf.zeros_like(self._report))
        self._steps.assign(0)

    @property
    def steps(self) -> int:
        """The number of steps, with or without gradients, since the clipper was made or reset.

        Waits for the device. The report is a new one exactly if this has changed. If the
        optimizer's iterations grow and this does not, updates pass by the clipper: their graph was
        traced before it was attached.
        """
        return int(to_host(self._steps))

    @property
    def numbers(self) -> tf.Tensor:
        """float64[rows, 3]: norms, thresholds and coefficients, inside of graphs too."""
        return self._report.read_value()

    @property
    def report(self) -> Report[tf.Tensor] | None:
        """The report of the last step, or None if there was none with a gradient.

        In a graph, which cannot know that, it is always the report.
        """
        if tf.executing_eagerly():
            # Made into tensors after the cast: thresholds may be infinite, and under
            # tf.debugging.enable_check_numerics no operation may return that.
            found = self.read()
            if found is None:
                return None
            numbers = (found.norms, found.thresholds, found.coefficients)
            norms, thresholds, coefficients = map(tf.constant, numbers)
        else:
            norms, thresholds, coefficients = tf.unstack(tf.cast(self.numbers, tf.float32), axis=1)
        return Report(norms, thresholds, coefficients, self._names)

    def read(self) -> Report[npt.NDArray[np.float32]] | None:
        """The same in NumPy's arrays, with one read from the device; outside of any graph."""
        values = to_host(self.numbers)
        if not values.any():
            return None
        with np.errstate(over="ignore"):  # the threshold of a row that clips nothing
            norms, thresholds, coefficients = values.astype(np.float32).T
        return Report(norms, thresholds, coefficients, self._names)

    @property
    def total_norm(self) -> tf.Tensor | None:
        """float32[]: the norm of all gradients of the last step together; 0 if it had none.

        None before the first step; in a graph, which cannot know that, it is 0.
        """
        if tf.executing_eagerly() and not self.steps:
            return None
        return tf.cast(Layout.total(self.numbers[:, 0]), tf.float32)
