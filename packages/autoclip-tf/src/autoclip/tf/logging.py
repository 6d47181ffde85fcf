"""Values to log of a clipper, and a summary of its history."""

from __future__ import annotations

from typing import Any

from autoclip.core import Report, inspect
from autoclip.core.adapter import log_and_watch, not_a_clipper_message
from autoclip.tf._clipper import Clipper

__all__ = ["log_values", "summarize"]


def log_values(clipper: Clipper, parameters: bool | str = False) -> dict[str, float]:
    """Values of the last step and, on request, two for each variable.

    `AutoClipCallback` logs these in `fit`. In a custom loop, call it outside of any
    `tf.function`, on the steps that you log: it waits for the device.

    Args:
        clipper: a clipper, `optimizer.clipper` if it is attached.
        parameters: True to add values for each variable; under group clipping, for each group.
            A string is a regular expression that is searched in their names.

    Returns:
        The values by name.

        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/clipped_norm"`: the same after clipping.
        * `"autoclip/clipped"`: of the rows that recorded a norm in this step, the share whose norm
          was above its threshold, 0 … 1: the gradients that were clipped or zeroed.
        * `"autoclip/threshold"`: the threshold of the total norm, if there is one row: under global
          clipping, or with a single variable.
        * `"autoclip/norm/NAME"` and `"autoclip/threshold/NAME"` for each variable that recorded a
          norm, on request; none with global clipping.

        Only the first two if no row recorded a norm; nothing before the first step, or if the last
        step had no gradient at all.

    Warns:
        UserWarning: once, if the total norm does not vary, since something clips first; once, if no
            norm was recorded for many logged steps.

    Raises:
        TypeError: `clipper` is not a clipper, or `parameters` is neither a bool nor a string.
        ValueError: `parameters` is not a regular expression.

    >>> import tensorflow as tf
    >>> from autoclip.tf import QuantileClip
    >>> from autoclip.tf.logging import log_values
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = QuantileClip(quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     pairs = clipper([(tf.fill([4], size / 2), weight)])  # a norm of 1, 2, 9
    >>> round(log_values(clipper)["autoclip/clipped_norm"], 6)
    2.0
    """
    report = _report(clipper)
    return {} if report is None else log_and_watch(clipper, report, parameters)


def summarize(clipper: Clipper) -> inspect.Summary:
    """Summarize a clipper's history and its last step; `print` shows a table.

    See `autoclip.core.inspect.summarize`. It waits for the device and reads all histories.

    Args:
        clipper: a clipper that knows its variables, `optimizer.clipper` if it is attached.

    Raises:
        ValueError: the clipper does not know its variables yet.

    >>> import tensorflow as tf
    >>> from autoclip.tf import QuantileClip
    >>> from autoclip.tf.logging import summarize
    >>> weight = tf.Variable(tf.zeros(4), name="weight")
    >>> clipper = QuantileClip(quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     pairs = clipper([(tf.fill([4], size / 2), weight)])  # a norm of 1, 2, 9
    >>> [row.name for row in summarize(clipper).hardest()]
    ['weight']
    """
    return inspect.summarize(clipper, _report(clipper))


def _report(clipper: Clipper) -> Report[Any] | None:
    if not isinstance(clipper, Clipper):
        raise TypeError(not_a_clipper_message(clipper))
    return None if clipper._last is None else clipper._last.read()
