"""The standard-deviation rule: a threshold some deviations above the window's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from autoclip.core._rules.rule import Rule, register_rule
from autoclip.core._settings.fields import setting


@register_rule
@dataclass(frozen=True)
class Standard(Rule):
    """The threshold is `factor * (mean + deviations * std)` of the window.

    The deviation is the population's, `ddof=0`. By default a norm is compared with the norms before
    it: a spike that is counted among them hides itself.

    Args:
        deviations: a finite real number ≥ 0.
        decay: a real number in (0, 1): mean and deviation are weighted by `decay ** age`, an
            exponential average over the window. None weighs all norms alike.
        factor: a finite real number > 0.
        log: take mean and deviation of the norms' logarithms, `factor * exp(mean + deviations *
            std)`. Norms are spread about as log-normal (Chen et al., 2018, arXiv:1804.09849, give
            up a step above four deviations of the log norm).
        shrink: scale a gradient above its threshold down to
            `mean + (threshold - mean)² / (norm - mean)`, the lower the larger it is, instead of
            to the threshold (ZClip, Kumar et al., 2025, arXiv:2504.02507). Needs `factor` ≥ 1 and
            not `log`.

    Raises:
        TypeError, ValueError: an argument is something else.

    >>> from autoclip.core import History
    >>> history = History(rows=1, rule=Standard(deviations=2.0), warmup_steps=2)
    >>> for norm in (1.0, 3.0, 8.0):
    ...     report = history.record([norm])
    >>> report.thresholds
    array([4.])
    """

    deviations: float = setting(2.0, ge=0)
    decay: float | None = setting(None, gt=0, lt=1)
    factor: float = setting(1.0, gt=0)
    shrink: bool = setting(False)
    log: bool = setting(False)
    name: ClassVar[str] = "standard"
    # The deviation of a handful of norms says little; that of a single one is 0.
    defaults: ClassVar[dict[str, Any]] = {"include_current": False, "warmup_steps": 25}

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.shrink and self.factor < 1.0:
            # A threshold below the mean: a norm between the two would get a negative coefficient.
            raise ValueError(
                f"shrink=True needs factor ≥ 1, but got factor={self.factor}: it scales spikes "
                "down towards the mean, and the threshold must not lie below that."
            )
        if self.shrink and self.log:
            raise ValueError(
                "shrink=True and log=True exclude each other: spikes are scaled down towards the "
                "mean of the norms, which log=True does not compute. Choose one of the two."
            )

    @staticmethod
    def threshold(
        window: Any, deviations: Any, decay: Any, factor: Any, shrink: bool, log: bool
    ) -> Any:
        """See `Rule.threshold`."""
        mean, std = _moments(window, window.log(window.norms) if log else window.norms, decay)
        limit = mean + deviations * std
        return factor * (window.exp(limit) if log else limit)

    @staticmethod
    def clip_to(
        window: Any,
        norm: Any,
        threshold: Any,
        deviations: Any,
        decay: Any,
        factor: Any,
        shrink: bool,
        log: bool,
    ) -> Any:
        """See `Rule.clip_to`."""
        if not shrink:
            return threshold
        mean, _ = _moments(window, window.norms, decay)
        return mean + (threshold - mean) ** 2 / (norm - mean)

    @property
    def thresholds_only_fall(self) -> bool:
        """See `Rule.thresholds_only_fall`."""
        return self.deviations == 0.0 and self.factor <= 1.0


def _moments(window: Any, values: Any, decay: Any) -> tuple[Any, Any]:
    """Mean and standard deviation over each window, weighted by age if there is a decay."""
    if decay is None:
        mean = window.mean(values)
        return mean, window.mean((values - mean) ** 2) ** 0.5
    weights = decay**window.age
    total = window.sum(weights)
    mean = window.sum(weights * values) / total
    return mean, (window.sum(weights * (values - mean) ** 2) / total) ** 0.5
