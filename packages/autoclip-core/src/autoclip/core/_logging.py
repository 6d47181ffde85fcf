"""What there is to log about a step: three numbers, under the same names in every framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoclip.core._history import Report
from autoclip.core._windows import SMALLEST_NORM

__all__ = ["log_values"]


def log_values(report: Report[Any]) -> dict[str, float]:
    """A step in three numbers.

    Args:
        report: of the step, with arrays of any float dtype.

    Returns:
        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/threshold"`: the median of the thresholds of the rows that recorded a norm in
          this step; with one row, the threshold.
        * `"autoclip/clipped"`: of these rows, the share whose gradient was scaled down, 0 … 1.

        Only the first one if no row recorded a norm.

    >>> from autoclip.core import History, Quantile, log_values
    >>> history = History(rows=1, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 9.0):
    ...     report = history.record([norm])
    >>> log_values(report)
    {'autoclip/total_norm': 9.0, 'autoclip/threshold': 2.0, 'autoclip/clipped': 1.0}
    """
    norms = np.asarray(report.norms, np.float64)
    values = {"autoclip/total_norm": float(np.sqrt(np.square(norms).sum()))}
    recorded = np.isfinite(norms) & (norms >= SMALLEST_NORM)
    if recorded.any():
        thresholds = np.asarray(report.thresholds, np.float64)
        values["autoclip/threshold"] = float(np.median(thresholds[recorded]))
        values["autoclip/clipped"] = float((np.asarray(report.coefficients)[recorded] < 1).mean())
    return values
