"""The values of a step to log, under the same names in every framework."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._ops import is_recorded
from autoclip.core._settings.mode import ALL_PARAMETERS
from autoclip.core._step import Report


def log_values(report: Report[Any], parameters: bool | str = False) -> dict[str, float]:
    """Values of a step that can be compared with each other, and on request of each parameter.

    Args:
        report: of the step, with arrays of any float dtype.
        parameters: True to add values for each parameter; under group clipping, for each group.
            A string is a regular expression that is searched in their names.

    Returns:
        The values by name.

        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/clipped_norm"`: the same after clipping; equal to the first if nothing was
          clipped.
        * `"autoclip/clipped"`: of the rows that recorded a norm in this step, the share whose norm
          was above its threshold, 0 … 1: the gradients that were clipped, zeroed or skipped.
        * `"autoclip/threshold"`: the threshold of the total norm, if there is one row: under global
          clipping, or with a single parameter. Infinite during warm-up.
        * `"autoclip/norm/NAME"` and `"autoclip/threshold/NAME"` for each parameter that recorded a
          norm, on request. With `global_clipping` the one history belongs to no parameter, and
          there are none.

        Only the first two if no row recorded a norm.

    Raises:
        TypeError, ValueError: `parameters` is neither a bool nor a regular expression.

    >>> from autoclip.core import History, Quantile, log_values
    >>> history = History(rows=2, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 4.0):
    ...     report = history.record([norm, 4.0])
    >>> values = log_values(report)  # the norms are 4 and 4, the thresholds 2 and 4
    >>> {name: round(value, 2) for name, value in values.items()}
    {'autoclip/total_norm': 5.66, 'autoclip/clipped_norm': 4.47, 'autoclip/clipped': 0.5}
    """
    check_parameters(parameters)
    norms = np.asarray(report.norms, np.float64)
    values = {
        "autoclip/total_norm": _joint(norms),
        "autoclip/clipped_norm": _joint(norms * np.asarray(report.coefficients, np.float64)),
    }
    recorded = recorded_rows(report)
    if not recorded.any():
        return values
    thresholds = np.asarray(report.thresholds, np.float64)
    values["autoclip/clipped"] = float(np.asarray(report.spikes)[recorded].mean())
    if len(norms) == 1:
        values["autoclip/threshold"] = float(thresholds[0])
    if parameters is not False and report.names != ALL_PARAMETERS:
        for row, name in enumerate(report.names):
            if recorded[row] and (parameters is True or re.search(parameters, name)):
                values[f"autoclip/norm/{name}"] = float(norms[row])
                values[f"autoclip/threshold/{name}"] = float(thresholds[row])
    return values


def recorded_rows(report: Report[Any]) -> npt.NDArray[np.bool_]:
    """bool[rows]: which rows recorded a norm in the step."""
    with np.errstate(over="ignore"):
        norms: npt.NDArray[np.float32] = np.asarray(report.norms).astype(np.float32)
    recorded: npt.NDArray[np.bool_] = is_recorded(norms)
    return recorded


def _joint(norms: npt.NDArray[np.float64]) -> float:
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    largest = norms.max(initial=0.0)
    scale = largest if 0.0 < largest < np.inf else 1.0
    return float(np.sqrt(np.square(norms / scale).sum()) * scale)


def check_parameters(parameters: object) -> None:
    """Refuse a `log_parameters` that selects no parameters.

    Raises:
        TypeError, ValueError: it is neither a bool nor a regular expression.
    """
    if isinstance(parameters, bool):
        return
    if not isinstance(parameters, str):
        raise TypeError(
            "parameters (log_parameters of a callback) must be a bool or a regular expression, "
            f"searched in their names, got {parameters!r:.200} ({type(parameters).__name__})."
        )
    try:
        re.compile(parameters)
    except re.error as error:
        raise ValueError(
            f"{parameters!r:.200} is not a regular expression: {error}. Log all parameters with "
            "True."
        ) from error
