"""The step: norms in, thresholds and coefficients out, norms recorded.

Each row's norm is compared with a threshold that a rule computes of the row's window, and recorded
(Seetharaman et al., 2020, arXiv:2007.14469, Algorithm 1). Backends supply the operations (`Ops`)
and keep the windows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from autoclip.core._ops import LARGEST_NORM, SMALLEST_NORM, Ops, is_recorded, refuse_negative
from autoclip.core._rules.rule import Rule
from autoclip.core._settings.settings import GroupSettings

ArrayT = TypeVar("ArrayT")


class AnyWindows(Protocol):
    """The part of `Windows` that a step needs."""

    @property
    def ops(self) -> Ops: ...

    @property
    def recorded(self) -> Any: ...

    def push(self, norms: Any, usable: Any) -> Any: ...

    def apply(self, rule: Rule, arguments: Mapping[str, Any], norm: Any = None) -> Any: ...


WindowsT = TypeVar("WindowsT", bound=AnyWindows)


@dataclass(eq=False)
class Report(Generic[ArrayT]):
    """One step, row by row.

    Attributes:
        norms: [rows], the norms that were given; 0 for a row without a gradient.
        thresholds: [rows], compared with the norms; infinite while nothing is recorded.
        coefficients: [rows], the gradients' factors, `min(1, threshold / norm)`; 1
            for a row that recorded nothing in this step. Where `on_spike` is `"zero"` or `"skip"`,
            0 for a norm above its threshold.
        names: of the rows: parameters' names, groups, or all parameters.
    """

    norms: ArrayT
    thresholds: ArrayT
    coefficients: ArrayT
    names: tuple[str, ...] = ()

    @property
    def spikes(self) -> ArrayT:
        """bool[rows]: whether the norm was above its threshold, regardless of `on_spike`."""
        return self.coefficients < 1.0  # type: ignore[operator, return-value]


NUMBERS: dict[str, tuple[Callable[[GroupSettings], Any], Any]] = {
    "max_norm": (lambda settings: settings.max_norm or np.inf, np.inf),
    "warmup_steps": (lambda settings: settings.warmup_steps, 0),
    "drops": (lambda settings: settings.on_spike != "clip", False),
}
"""The numbers that a step needs of a row, and the number of a row that does not use the setting."""


def numbers_of(
    settings: Sequence[GroupSettings], always: Collection[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """The settings that are numbers, which rows have of their own.

    Args:
        settings: one a row, of equal `structure`.
        always: names of numbers that are wanted even if no row uses the setting.

    Returns:
        [rows, 1] by name; nothing for a setting that no row uses, so that it costs nothing. Those
        of the rule are `"rule/<name>"`.
    """
    found: dict[str, Any] = {}
    for name, (number, unused) in NUMBERS.items():
        column = [number(each) for each in settings]
        if name in always or any(each != unused for each in column):
            found[name] = column
    for name, value in settings[0].rule.settings.items() if settings else ():
        if isinstance(value, float):
            found[f"rule/{name}"] = [getattr(each.rule, name) for each in settings]
    return {name: np.array(values)[:, None] for name, values in found.items()}


def record(
    settings: GroupSettings, numbers: Mapping[str, Any], windows: WindowsT, norms: Any
) -> tuple[WindowsT, Report[Any]]:
    """Compare one norm a row with its threshold, and append it to the row's window.

    A norm that is zero (below `SMALLEST_NORM`), NaN or infinite stands for a gradient that says
    nothing: its row records nothing and its coefficient is 1. A finite norm beyond float32's range
    cannot be recorded; `max_norm` clips it.

    Args:
        settings: of the rows; `numbers` replaces those that are numbers.
        numbers: as `numbers_of` returns them, in arrays of the framework.
        windows: the rows' windows, donated.
        norms: [rows, 1] in the type of `ops.wide`, L2 norms ≥ 0.

    Returns:
        The windows after the step, and a report of [rows, 1] each.
    """
    ops = windows.ops
    rounded = ops.narrow(norms)
    # The ratio to the *rounded* norm, the one in the window: so the largest never clips.
    norm, usable = ops.wide(rounded), is_recorded(rounded)
    warm = _warm(numbers, windows)
    if settings.include_current:
        windows = windows.push(rounded, usable)
    found, target = windows.apply(settings.rule, _arguments(settings, numbers), norm)
    thresholds = apply_limits(ops, numbers, warm, found)
    targets = thresholds if target is found else apply_limits(ops, numbers, warm, target)
    coefficients = ops.where(usable, ops.divide(ops.minimum(targets, norm), norm), 1.0)
    if not settings.include_current:
        if settings.record == "clipped":
            rounded = ops.narrow(norm * coefficients)
            windows = windows.push(rounded, usable & is_recorded(rounded))
        else:
            windows = windows.push(rounded, usable)
    if "max_norm" in numbers and not ops.are_all(usable):
        ceilings = numbers["max_norm"]
        beyond = (norm > LARGEST_NORM) & (norms < ops.unlimited)
        thresholds = ops.where(beyond, ceilings, thresholds)
        ratio = ops.divide(ops.minimum(ceilings, norms), norms)
        coefficients = ops.where(beyond, ratio, coefficients)
    if "drops" in numbers:
        coefficients = ops.where(numbers["drops"] & (coefficients < 1.0), 0.0, coefficients)
    return windows, Report(norms, thresholds, coefficients)


def thresholds_of(settings: GroupSettings, numbers: Mapping[str, Any], windows: AnyWindows) -> Any:
    """[rows, 1]: the thresholds of the windows as they are; see `record`."""
    found, _ = windows.apply(settings.rule, _arguments(settings, numbers))
    return apply_limits(windows.ops, numbers, _warm(numbers, windows), found)


def _warm(numbers: Mapping[str, Any], windows: AnyWindows) -> Any:
    """Mask of the rows that have recorded enough norms; None if no row warms up."""
    return windows.recorded >= numbers["warmup_steps"] if "warmup_steps" in numbers else None


def apply_limits(ops: Ops, numbers: Mapping[str, Any], warm: Any, thresholds: Any) -> Any:
    """A rule's thresholds, but none while a row warms up, and none above `max_norm`."""
    if warm is not None:
        thresholds = ops.where(warm, thresholds, ops.unlimited)
    return ops.minimum(thresholds, numbers["max_norm"]) if "max_norm" in numbers else thresholds


def _arguments(settings: GroupSettings, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rule as `Rule.threshold` takes them."""
    return {
        name: numbers.get(f"rule/{name}", value) for name, value in settings.rule.settings.items()
    }


def record_few(windows: Any, norms: npt.NDArray[np.float64]) -> Report[npt.NDArray[np.float64]]:
    """`record` in Python's numbers, which is faster for a few rows in NumPy.

    Args:
        windows: NumPy's, with their settings and a tracker for a few rows.
        norms: [rows], L2 norms ≥ 0.
    """
    settings, listed = windows.settings[0], norms.tolist()
    rounded = array("f", listed)  # infinite beyond float32
    entered = [norm if SMALLEST_NORM <= norm <= LARGEST_NORM else 0.0 for norm in rounded]
    if 0.0 in entered:
        refuse_negative(norms)
    ceilings, warmups, drops = windows.lists
    cold = warmups and (windows.ring.recorded < warmups).tolist()
    if settings.include_current:
        windows.push_each(entered)
    limits, compared = windows.few.thresholds(windows.ring), entered
    if cold:
        limits = [math.inf if is_cold else limit for limit, is_cold in zip(limits, cold)]
    if ceilings:
        limits, compared = [*map(min, limits, ceilings)], entered.copy()
        for row, norm in enumerate(rounded):
            if norm > LARGEST_NORM and listed[row] < math.inf:
                limits[row], compared[row] = ceilings[row], listed[row]
    coefficients = [limit / norm if limit < norm else 1.0 for limit, norm in zip(limits, compared)]
    if not settings.include_current:
        if settings.record == "clipped":
            clipped = array("f", map(mul, entered, coefficients))
            entered = [norm if norm >= SMALLEST_NORM else 0.0 for norm in clipped]
        windows.push_each(entered)
    if drops:
        coefficients = [0.0 if c < 1.0 and d else c for c, d in zip(coefficients, drops)]
    return Report(norms, np.array(limits), np.array(coefficients))
