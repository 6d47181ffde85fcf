"""A rule of a user's own, for all tests that need one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from autoclip.core import Rule, register_rule, setting


@register_rule
@dataclass(frozen=True)
class Mad(Rule):
    """Median plus some median absolute deviations."""

    deviations: float = setting(3.0, ge=0)
    name: ClassVar[str] = "tests_mad"

    @staticmethod
    def threshold(window: Any, deviations: Any) -> Any:
        median = window.quantile(0.5)
        return median + deviations * window.quantile(0.5, abs(window.norms - median))
