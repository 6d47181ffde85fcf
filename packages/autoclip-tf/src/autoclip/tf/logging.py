"""What to log about a clipper's last step: three numbers, under the same names everywhere."""

from __future__ import annotations

from autoclip import core
from autoclip.tf._clipper import Clipper

__all__ = ["log_values"]


def log_values(clipper: Clipper) -> dict[str, float]:
    """The last step in three numbers.

    `AutoClipCallback` logs these at the end of each epoch. In a loop of your own, call it outside
    of any `tf.function`, on the steps that you log: it waits for the device.

    Args:
        clipper: a clipper, `optimizer.clipper` if it is attached.

    Returns:
        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/threshold"`: the median of the thresholds of the rows that recorded a norm in
          this step; with global clipping, the threshold.
        * `"autoclip/clipped"`: of these rows, the share whose norm was above its threshold, 0 … 1:
          the gradients that were clipped or zeroed.

        Only the first one if no row recorded a norm; nothing before the first step, or if the last
        step had no gradient at all.

    >>> import tensorflow as tf
    >>> from autoclip.tf import QuantileClip
    >>> from autoclip.tf.logging import log_values
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = QuantileClip(quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     pairs = clipper([(tf.fill([4], size / 2), weight)])  # a norm of 1, 2, 9
    >>> log_values(clipper)
    {'autoclip/total_norm': 9.0, 'autoclip/threshold': 2.0, 'autoclip/clipped': 1.0}
    """
    report = clipper._report
    return {} if report is None else core.log_values(report)
