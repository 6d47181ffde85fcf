"""What to log about a clipper, and a summary of its history."""

from __future__ import annotations

from typing import Any

import torch

from autoclip import core
from autoclip.core import Report, Summary
from autoclip.torch._clipper import Clipper
from autoclip.torch._engine import EngineClipper

__all__ = ["log_values", "summarize"]


def log_values(
    clipper: Clipper | EngineClipper, parameters: bool | str = False
) -> dict[str, float]:
    """The last step in three numbers and, on request, two for each parameter.

    The callbacks for Lightning and for the Hugging Face Trainer log these. In a loop of your own,
    call it on the steps that you log: it waits for the device, once.

    Args:
        clipper: a clipper that has made a step, `optimizer.clipper` if it is attached, or what
            `attach` of `autoclip.torch.deepspeed` or `autoclip.torch.fsdp` returned.
        parameters: whether to add values for each parameter; under group clipping, for each group.
            A string is a regular expression that is searched in their names.

    Returns:
        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/threshold"`: the median of the thresholds of the rows that recorded a norm in
          this step; with global clipping, the threshold.
        * `"autoclip/clipped"`: of these rows, the share whose norm was above its threshold, 0 … 1.
        * `"autoclip/norm/NAME"` and `"autoclip/threshold/NAME"` for each parameter that recorded a
          norm, on request; none with global clipping.

        Only the first one if no row recorded a norm, nothing if there was no gradient at all.

    Raises:
        TypeError, ValueError: `parameters` is neither a bool nor a regular expression.

    >>> import torch
    >>> from autoclip.torch import QuantileClip
    >>> from autoclip.torch.logging import log_values
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = QuantileClip([("weight", weight)], quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> log_values(clipper)
    {'autoclip/total_norm': 9.0, 'autoclip/threshold': 2.0, 'autoclip/clipped': 1.0}
    >>> log_values(clipper, parameters=r"weight$")["autoclip/norm/weight"]
    9.0
    """
    report = _report(clipper)
    return {} if report is None else core.log_values(report, parameters)


def summarize(clipper: Clipper | EngineClipper) -> Summary:
    """Summarize a clipper's history and its last step; `print` shows a table.

    See `autoclip.core.summarize`. It waits for the device and reads all histories.

    Args:
        clipper: as for `log_values`.

    >>> import torch
    >>> from autoclip.torch import QuantileClip
    >>> from autoclip.torch.logging import summarize
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = QuantileClip([("weight", weight)], quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> [row.name for row in summarize(clipper).hardest()]
    ['weight']
    """
    return core.summarize(clipper, _report(clipper))


def _report(clipper: Clipper | EngineClipper) -> Report[Any] | None:
    """The last step in NumPy's arrays."""
    if isinstance(clipper, EngineClipper):
        return clipper.last if clipper.has_stepped else None
    if not clipper._pipeline.reports:
        return None
    last = clipper.last
    # One transfer for all three.
    together = torch.stack([last.norms, last.thresholds, last.coefficients])
    norms, thresholds, coefficients = together.cpu().numpy()
    return Report(norms, thresholds, coefficients, last.names)
