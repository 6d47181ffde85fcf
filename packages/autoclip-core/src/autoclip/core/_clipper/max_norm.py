"""A threshold as a schedule, for engines that measure and clip gradients themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._numpy.history import History
from autoclip.core._rules.rule import Rule
from autoclip.core._settings.mode import ALL_PARAMETERS, Mode
from autoclip.core._settings.settings import ClipperSettings, Record
from autoclip.core._state.saving import Saveable
from autoclip.core._state.state import ParameterInfo, State
from autoclip.core._step import Report


class MaxNorm(Saveable):
    """A `max_norm` that follows the history of the total gradient norm.

    DeepSpeed, FSDP1 and Megatron-LM measure the norm of all gradients together and clip to a
    constant that may change at every step. Give them `max_norm` before a step, and `record` the
    norm that they measured after it: the result is that of global clipping that compares each norm
    with the ones before it, `QuantileClip(..., global_clipping=True, include_current=False)`.

    Args:
        rule: the rule that turns the window into a threshold.
        history_length: the number of norms kept, the newest ones.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up; None for
            none.
        warmup_steps: the number of norms recorded before the rule counts; None for the rule's
            default.
        record: `"raw"` records the norms as given, `"clipped"` as they are after clipping.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value, or the rule does not scale gradients to its
            threshold, as `Standard(shrink=True)`: a constant cannot express that.

    >>> from autoclip.core import MaxNorm, Quantile
    >>> schedule = MaxNorm(Quantile(0.5))
    >>> schedule.max_norm
    inf
    >>> for total_norm in (1.0, 2.0, 9.0):
    ...     report = schedule.record(total_norm)
    >>> schedule.max_norm
    2.0
    """

    def __init__(
        self,
        rule: Rule,
        history_length: int = 1000,
        *,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        record: Record = "raw",
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a Rule such as Quantile(0.9), but got {rule!r}.")
        self._set_up(
            ClipperSettings.make(
                type(self).__name__,
                rule,
                global_clipping=True,
                history_length=history_length,
                max_norm=max_norm,
                warmup_steps=warmup_steps,
                include_current=False,
                record=record,
            )
        )

    def _set_up(self, settings: ClipperSettings) -> None:
        _refuse_other_targets(settings.default.rule)
        self._settings = settings
        self._history = History.of([settings.default])
        self._last: Report[npt.NDArray[np.float64]] | None = None

    @property
    def rule(self) -> Rule:
        """The rule that computes the threshold from the window."""
        return self._settings.default.rule

    @property
    def max_norm(self) -> float:
        """The threshold for the next step's total norm; infinite while nothing is recorded."""
        return float(self._history.thresholds[0])

    def record(self, norm: Any) -> Report[npt.NDArray[np.float64]]:
        """Record the total norm that was measured in a step, before clipping.

        A norm that is zero, NaN, infinite or negative (some engines report -1 for a step that they
        skipped) is never recorded.

        Args:
            norm: a number, or a 0-d array or tensor.

        Returns:
            The step's norm, the threshold that it was clipped to, and the coefficient, [1] each.
        """
        value = float(norm)
        report = self._history.record([value if value >= 0.0 else np.nan])
        self._last = replace(report, names=ALL_PARAMETERS)
        return self._last

    @property
    def last(self) -> Report[npt.NDArray[np.float64]]:
        """The report that the last `record` returned.

        Raises:
            RuntimeError: nothing was recorded since the schedule was made.
        """
        if self._last is None:
            raise RuntimeError("There is nothing to report: no step has been recorded yet.")
        return self._last

    def reset(self) -> None:
        """Forget all norms."""
        self._history.reset()
        self._last = None

    def export_state(self) -> State:
        return self._state(*self._history.read([0]))

    def describe_state(self) -> State:
        return self._state()

    def _state(self, *contents: Any) -> State:
        infos = [[ParameterInfo(None, None)]]
        return State.of("numpy", Mode.GLOBAL, [self._settings.default], infos, *contents)

    def commit_state(self, state: State) -> None:
        self._history.write([0], *state.by_row())

    def __repr__(self) -> str:
        return self._settings.describe()


def _refuse_other_targets(rule: Rule) -> None:
    """Refuse a rule whose gradients are scaled to something else than its threshold."""
    if type(rule).clip_to is Rule.clip_to:
        return
    # Whether a rule's `clip_to` does something depends on its settings, so ask it.
    probe = History(1, rule, warmup_steps=0, include_current=False)
    for norm in (1.0, 2.0, 4.0):
        probe.record([norm])
    spike = probe.record([1e38])
    if spike.coefficients[0] != min(1.0, spike.thresholds[0] / np.float32(1e38)):
        raise ValueError(
            f"{rule} scales a gradient above its threshold to something else than the threshold, "
            "which depends on the gradient's own norm. An engine that clips to a constant cannot "
            "do that. Use a rule that scales to its threshold."
        )
