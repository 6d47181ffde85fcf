"""Faults outside of AutoClip that recorded norms give away.

A framework that clips first leaves norms that are all equal, and weights that have become NaN leave
none at all. Both are looked for where numbers are read, never in a step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from autoclip.core._clipper.logging import log_values, recorded_rows
from autoclip.core._state.saving import Saveable
from autoclip.core._state.state import State, parameter_names
from autoclip.core._step import Report
from autoclip.core._warnings import warn_user

EQUAL = 1e-5
"""Relative difference up to which norms count as equal: float32 and clipping's epsilon allow it."""

MANY = 20
"""More equal norms than this are no coincidence."""

_SHARE = 0.1
"""The share of a window that they must make up: less happens where norms are bounded anyway."""

_IDLE_READS = 10
"""After how many logged steps without any recorded norm there is a warning."""


def state_notices(state: State) -> list[str]:
    """Notices about a history: whether its largest total norms are all equal."""
    norms = _total_norms(state)
    if len(norms) < MANY:
        return []
    largest = norms.max()
    count = int((norms >= largest * (1 - EQUAL)).sum())
    if count < max(MANY, _SHARE * len(norms)):
        return []
    return [constant_notice(f"{count} of the newest {len(norms)} total norms", float(largest))]


def constant_notice(which: str, norm: float) -> str:
    """A notice that total norms are equal.

    Args:
        which: the norms, such as `"20 of the newest 50 total norms"`.
        norm: their value.
    """
    return (
        f"The total norm does not vary: {which} are {norm:.6g}, and none is larger. Something "
        "clips first: AutoClip sees gradients that are clipped to a constant already, and has "
        "next to no effect. Switch the other clipping off, such as max_grad_norm, "
        "gradient_clip_val, global_clipnorm or a call of clip_grad_norm_."
    )


def idle_notice(which: str, total_norm: float) -> str:
    """A notice that nothing was recorded.

    Args:
        which: the steps that recorded nothing, such as `"The last step"`.
        total_norm: of all gradients in the last step.
    """
    reason = (
        "no gradient was above zero"
        if total_norm == 0
        else "the norm of the gradients was NaN or infinite. Unless a loss scaler skips such "
        "steps, the weights are NaN since the first one"
    )
    return f"{which} recorded no norm: {reason}."


def _total_norms(state: State) -> npt.NDArray[np.float64]:
    """The norms of all gradients together in the newest steps; empty if the state has none.

    With several rows, those of equal age are taken for one step. Rows that have skipped steps make
    these sums vary, so constant ones are right.
    """
    if any(group.settings.get("record", "raw") != "raw" for group in state.groups):
        return np.empty(0)
    windows = [window for group in state.groups for window in group.windows()]
    windows = [window for window in windows if len(window) >= MANY]
    length = min(map(len, windows), default=0)
    squares = np.zeros(length)
    for window in windows:
        squares += np.square(window[-length:], dtype=np.float64)
    return np.sqrt(squares)


# The first parameter, if it has no name of its own.
[_UNNAMED] = parameter_names([[None]])


def log_and_watch(
    clipper: Saveable, report: Report[Any], parameters: bool | str = False
) -> dict[str, float]:
    """`log_values` of a clipper's last step; warns, once each, of faults that the values show.

    Args:
        clipper: the clipper. Its history is read only if two values in a row are suspicious.
        report: of its last step, in NumPy's arrays.
        parameters: see `log_values`.

    Raises:
        TypeError, ValueError: see `log_values`.
    """
    values = log_values(report, parameters)
    watch = _WATCHES.setdefault(clipper, _Watch())
    watch.look(clipper, report, values["autoclip/total_norm"])
    if isinstance(parameters, str) and report.names[0] == _UNNAMED:
        watch.look_at_names(parameters, report.names)
    return values


class _Watch:
    """The values of one clipper that have been logged so far."""

    def __init__(self) -> None:
        self._norms: npt.NDArray[Any] = np.empty(0)
        self._total = 0.0
        # Reads in a row with equal totals, and those of them that are surely different steps.
        self._equal = self._distinct = 1
        self._idle = 0
        self._recorded = -1
        self._said_constant = self._said_idle = self._said_unnamed = False

    def look(self, clipper: Saveable, report: Report[Any], total: float) -> None:
        if recorded_rows(report).any():
            self._idle = 0
            if not self._said_constant:
                self._look_at_total(clipper, report, total)
        elif not self._said_idle:
            self._look_whether_idle(clipper, total)

    def look_at_names(self, parameters: str, names: Sequence[str]) -> None:
        if self._said_unnamed or any(re.search(parameters, name) for name in names):
            return
        self._said_unnamed = True
        warn_user(
            f"No norm of a parameter is logged: {parameters!r:.200} matches no name such as "
            f"{names[0]!r}. For the model's own names, give log_values the model, or the optimizer "
            "model.named_parameters()."
        )

    def _look_at_total(self, clipper: Saveable, report: Report[Any], total: float) -> None:
        norms = np.asarray(report.norms)
        if abs(total - self._total) <= EQUAL * total:
            self._equal += 1
            self._distinct += not np.array_equal(norms, self._norms)
        else:
            self._equal = self._distinct = 1
        self._norms, self._total = norms.copy(), total
        found = []
        if self._equal == 2 or self._equal % MANY == 0:
            found = state_notices(clipper.export_state())
        if not found and self._distinct >= MANY:
            found = [constant_notice(f"the last {self._distinct} that were logged", total)]
        if found:
            self._said_constant = True
            warn_user(found[0])

    def _look_whether_idle(self, clipper: Saveable, total: float) -> None:
        self._idle += 1
        if self._idle not in (1, _IDLE_READS):
            return
        recorded = sum(int(group.recorded.sum()) for group in clipper.export_state().groups)
        if self._idle == 1:
            self._recorded = recorded
        elif recorded == self._recorded:
            self._said_idle = True
            warn_user(idle_notice(f"The last {self._idle} logged steps, and all between,", total))
        else:
            self._idle = 0


_WATCHES: WeakKeyDictionary[Saveable, _Watch] = WeakKeyDictionary()
