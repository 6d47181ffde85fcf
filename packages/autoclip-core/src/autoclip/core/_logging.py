"""What there is to log about a step: three numbers, under the same names in every framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoclip.core._history import Report
from autoclip.core._ring import is_recorded

__all__ = ["log_values"]


def log_values(report: Report[Any]) -> dict[str, float]:
    """A step in three numbers.

    Args:
        report: of the step, with arrays of any float dtype.

    Returns:
        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/threshold"`: the median of the thresholds of the rows that recorded a norm in
          this step; with one row, the threshold.
        * `"autoclip/clipped"`: of these rows, the share whose norm was above its threshold, 0 … 1:
          the gradients that were clipped, zeroed or skipped.

        Only the first one if no row recorded a norm.

    >>> from autoclip.core import History, Quantile, log_values
    >>> history = History(rows=1, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 9.0):
    ...     report = history.record([norm])
    >>> log_values(report)
    {'autoclip/total_norm': 9.0, 'autoclip/threshold': 2.0, 'autoclip/clipped': 1.0}
    """
    norms = np.asarray(report.norms, np.float64)
    largest = norms.max(initial=0.0)
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    scale = largest if 0.0 < largest < np.inf else 1.0
    values = {"autoclip/total_norm": float(np.sqrt(np.square(norms / scale).sum()) * scale)}
    with np.errstate(over="ignore"):
        recorded = is_recorded(norms.astype(np.float32))
    if recorded.any():
        thresholds = np.asarray(report.thresholds, np.float64)
        values["autoclip/threshold"] = float(np.median(thresholds[recorded]))
        values["autoclip/clipped"] = float(np.asarray(report.spikes)[recorded].mean())
    return values
