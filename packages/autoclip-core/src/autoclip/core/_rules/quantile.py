"""The quantile rule: the threshold is a quantile of the window (AutoClip, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from autoclip.core._rules.rule import Rule, register_rule
from autoclip.core._settings.fields import setting


@register_rule
@dataclass(frozen=True)
class Quantile(Rule):
    """The threshold is `factor` times the `quantile` of the window.

    Quantiles are interpolated linearly between order statistics in float64, with the same bits as
    `numpy.quantile` at its default method (Hyndman and Fan's type 7). Seetharaman et al., 2020,
    arXiv:2007.14469, Algorithm 1.

    Args:
        quantile: a real number in [0, 1]; 1 never clips, 0 clips to the smallest norm kept.
        factor: a finite real number > 0; the quantile is multiplied by it.

    Raises:
        TypeError, ValueError: an argument is something else.

    >>> from autoclip.core import History
    >>> history = History(rows=1, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 9.0):
    ...     report = history.record([norm])
    >>> report.thresholds
    array([2.])
    """

    quantile: float = setting(0.9, ge=0, le=1)
    factor: float = setting(1.0, gt=0)
    name: ClassVar[str] = "quantile"

    @staticmethod
    def threshold(window: Any, quantile: Any, factor: Any) -> Any:
        """See `Rule.threshold`."""
        return factor * window.quantile(quantile)

    @property
    def thresholds_only_fall(self) -> bool:
        """See `Rule.thresholds_only_fall`."""
        return self.factor <= 1.0
