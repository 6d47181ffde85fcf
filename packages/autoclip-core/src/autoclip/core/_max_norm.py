"""A threshold as a schedule, for engines that measure and clip gradients themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoclip.core._history import History
from autoclip.core._ring import is_recorded
from autoclip.core._rows import make_state, split_state
from autoclip.core._rule import Rule
from autoclip.core._saving import Saveable
from autoclip.core._settings import ClipperSettings
from autoclip.core._state import ParameterInfo, State

__all__ = ["MaxNorm"]


class MaxNorm(Saveable):
    """A `max_norm` that follows the history of the total gradient norm.

    DeepSpeed, FSDP1 and Megatron measure the norm of all gradients together and clip to a constant
    that may change at every step. Give them `max_norm` before a step, and `record` the norm that
    they measured after it: the result is that of global clipping that compares each norm with the
    ones before it.

    Args:
        rule: how the window becomes a threshold.
        history_length: how many norms are kept, the newest ones.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up; None for
            none.
        warmup_steps: how many norms are recorded before the rule counts; None for the rule's
            default.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    >>> from autoclip.core import MaxNorm, Quantile
    >>> schedule = MaxNorm(Quantile(0.5))
    >>> schedule.max_norm
    inf
    >>> for total_norm in (1.0, 2.0, 9.0):
    ...     schedule.record(total_norm)
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
    ) -> None:
        self._settings = ClipperSettings.make(
            type(self).__name__,
            rule,
            global_clipping=True,
            history_length=history_length,
            max_norm=max_norm,
            warmup_steps=warmup_steps,
            include_current=False,
        )
        self._history = History.of([self._settings.default])

    @property
    def rule(self) -> Rule:
        """How the window becomes a threshold."""
        return self._settings.default.rule

    @property
    def max_norm(self) -> float:
        """What to clip the next step's total norm to; infinite as long as nothing is known."""
        return float(self._history.thresholds[0])

    def record(self, norm: Any) -> None:
        """Record the total norm that was measured in a step, before clipping.

        A norm that is zero, NaN, infinite or negative (some engines report -1 for a step that they
        skipped) is never recorded.

        Args:
            norm: a number or a 0-d array or tensor.
        """
        value = float(norm)
        if is_recorded(np.float32(min(value, 4e38))):
            self._history.record([value])

    def reset(self) -> None:
        """Forget all norms."""
        self._history.reset()

    def _export_state(self) -> State:
        windows, recorded = self._history.read([0])
        return make_state(
            "numpy",
            self.rule.name,
            "global",
            [self._settings.default],
            [[ParameterInfo(None, None)]],
            [[0]],
            windows,
            recorded,
        )

    def _commit_state(self, state: State) -> None:
        self._history.write([0], *split_state(state, [[0]], 1))

    def __repr__(self) -> str:
        return self._settings.describe()
