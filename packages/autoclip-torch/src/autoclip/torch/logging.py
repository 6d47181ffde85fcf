"""Values of a clipper to log, and a summary of its history."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from autoclip.core import Report, inspect
from autoclip.core.adapter import log_and_watch, not_a_clipper_message, warn_user
from autoclip.torch._clipper import Clipper
from autoclip.torch._groups import Groups
from autoclip.torch._parameters import names_in
from autoclip.torch._trainers.engine import EngineClipper

__all__ = ["log_values", "summarize"]


def log_values(
    clipper: Clipper | EngineClipper,
    parameters: bool | str = False,
    *,
    model: nn.Module | None = None,
) -> dict[str, float]:
    """Values of the last step and, on request, two for each parameter.

    The callbacks for Lightning and for the Hugging Face Trainer log these. In a custom loop,
    call it on the steps that you log: it waits for the device, once.

    Args:
        clipper: a clipper that has made a step, `optimizer.clipper` if it is attached, or the
            result of `autoclip.torch.deepspeed.attach` or `autoclip.torch.fsdp.attach`.
        parameters: True to add values for each parameter; under group clipping, for each group.
            A string is a regular expression that is searched in their names.
        model: gives their names to parameters that the clipper got without names, as from
            `torch.optim.Adam(model.parameters())`.

    Returns:
        The values by name.

        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/clipped_norm"`: the same after clipping.
        * `"autoclip/clipped"`: of the rows that recorded a norm in this step, the share whose norm
          was above its threshold, 0 … 1: the gradients that were clipped, zeroed or skipped.
        * `"autoclip/threshold"`: the threshold of the total norm, if there is one row: under global
          clipping, or with a single parameter.
        * `"autoclip/norm/NAME"` and `"autoclip/threshold/NAME"` for each parameter that recorded a
          norm, on request; none with global clipping.

        Only the first two if no row recorded a norm, nothing if there was no gradient at all.

    Warns:
        UserWarning: once, if the total norm does not vary, since something clips first; once, if no
            norm was recorded for many logged steps; once, if the weights change many times, but the
            clipper has made no step; once, if parameters have no names to match.

    Raises:
        TypeError: `clipper` is not a clipper, or `parameters` is neither a bool nor a string.
        ValueError: `parameters` is not a regular expression.

    >>> import torch
    >>> from autoclip.torch import QuantileClip
    >>> from autoclip.torch.logging import log_values
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = QuantileClip([("weight", weight)], quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> round(log_values(clipper)["autoclip/clipped_norm"], 6)
    2.0
    >>> log_values(clipper, parameters=r"weight$")["autoclip/norm/weight"]
    9.0
    """
    report = _report(clipper, None if parameters is False else model)
    if report is not None:
        return log_and_watch(clipper, report, parameters)
    if isinstance(clipper, Clipper):
        _look_for_other_updates(clipper)
    return {}


# Versions of the weights, as torch counts changes in place, that clippers without a step have seen.
_VERSIONS: WeakKeyDictionary[Clipper, set[int]] = WeakKeyDictionary()
_MANY = 10


def _look_for_other_updates(clipper: Clipper) -> None:
    """Warn, once, if the weights change again and again while the clipper makes no step."""
    if clipper._norm is not None or len(seen := _VERSIONS.setdefault(clipper, set())) == _MANY:
        return
    seen.add(sum(parameter._version for parameter in clipper._groups.parameters()))
    if len(seen) == _MANY:
        warn_user(
            f"The weights have changed {_MANY - 1} times, but this {type(clipper).__name__} has "
            "made no step. If it is attached, its optimizer's step() is not called, or has been "
            "replaced by one without hooks: another optimizer was made of its groups, as Horovod's "
            "DistributedOptimizer does. Attach a clipper to the optimizer that updates the weights."
        )


def summarize(
    clipper: Clipper | EngineClipper, *, model: nn.Module | None = None
) -> inspect.Summary:
    """Summarize a clipper's history and its last step; `print` shows a table.

    See `autoclip.core.inspect.summarize`. It waits for the device and reads all histories.

    Args:
        clipper: as for `log_values`.
        model: as for `log_values`.

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
    report = _report(clipper, model)
    state = clipper.export_state()
    if model is not None and isinstance(clipper, Clipper):
        state = _groups(clipper, model).state(*state.by_row())
    return inspect.summarize(state, report)


def _report(clipper: Clipper | EngineClipper, model: nn.Module | None) -> Report[Any] | None:
    """The last step in NumPy's arrays."""
    if isinstance(clipper, EngineClipper):
        return clipper._last
    if not isinstance(clipper, Clipper):
        raise TypeError(not_a_clipper_message(clipper))
    if not clipper._reports:
        return None
    last = clipper.last
    # One transfer for all three.
    together = torch.stack([last.norms, last.thresholds, last.coefficients])
    norms, thresholds, coefficients = together.cpu().numpy()
    names = last.names if model is None else _groups(clipper, model).row_names()
    return Report(norms, thresholds, coefficients, names)


def _groups(clipper: Clipper, model: nn.Module) -> Groups:
    """A copy of the clipper's groups, in which parameters without a name have the model's."""
    groups = copy.copy(clipper._groups)
    groups.name_parameters(names_in(model))
    return groups
