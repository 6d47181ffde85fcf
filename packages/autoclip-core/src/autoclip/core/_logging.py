"""The values of a step to log, under the same names in every framework."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from autoclip.core._history import Report
from autoclip.core._ring import is_recorded

__all__ = ["check_parameters", "log_values"]


def log_values(report: Report[Any], parameters: bool | str = False) -> dict[str, float]:
    """Three numbers about a step and, on request, two for each parameter.

    Args:
        report: of the step, with arrays of any float dtype.
        parameters: whether to add values for each parameter; under group clipping, for each group.
            A string is a regular expression that is searched in their names.

    Returns:
        The values by name.

        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/threshold"`: the median of the thresholds of the rows that recorded a norm in
          this step; with one row, the threshold.
        * `"autoclip/clipped"`: of these rows, the share whose norm was above its threshold, 0 … 1:
          the gradients that were clipped, zeroed or skipped.
        * `"autoclip/norm/NAME"` and `"autoclip/threshold/NAME"` for each parameter that recorded a
          norm, on request. With `global_clipping` the one history belongs to no parameter, and
          there are none.

        Only the first one if no row recorded a norm.

    Raises:
        TypeError, ValueError: `parameters` is neither a bool nor a regular expression.

    >>> from autoclip.core import History, Quantile, log_values
    >>> history = History(rows=1, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 9.0):
    ...     report = history.record([norm])
    >>> log_values(report)
    {'autoclip/total_norm': 9.0, 'autoclip/threshold': 2.0, 'autoclip/clipped': 1.0}
    """
    check_parameters(parameters)
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
        if parameters is not False and report.names != ("all parameters",):
            for row, name in enumerate(report.names):
                if recorded[row] and (parameters is True or re.search(parameters, name)):
                    values[f"autoclip/norm/{name}"] = float(norms[row])
                    values[f"autoclip/threshold/{name}"] = float(thresholds[row])
    return values


def check_parameters(parameters: object) -> None:
    """Refuse what does not say which parameters to log.

    Raises:
        TypeError, ValueError: it is neither a bool nor a regular expression.
    """
    if isinstance(parameters, bool):
        return
    if not isinstance(parameters, str):
        raise TypeError(
            "Which parameters to log is True, False or a regular expression that is searched in "
            f"their names, but got {parameters!r:.200} of type {type(parameters).__name__}."
        )
    try:
        re.compile(parameters)
    except re.error as error:
        raise ValueError(
            f"{parameters!r:.200} is not a regular expression: {error}. Log all parameters with "
            "True."
        ) from error
