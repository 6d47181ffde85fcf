"""The rules, settings and modes that tests share: every table once.

Nothing here needs a framework. A clipper is named by its class, which both frameworks have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from autoclip.core import Quantile, Rule, Standard, register_rule, setting

MANY_ROWS = 150
"""A history of that many rows has NumPy's trackers, not those for a few rows."""


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


@register_rule
@dataclass(frozen=True)
class Recent(Rule):
    """Some exponentially weighted deviations above the weighted mean, and a lower target."""

    deviations: float = setting(1.0, ge=0)
    decay: float = setting(0.9, gt=0, lt=1)
    halves: bool = setting(False)
    name: ClassVar[str] = "tests_recent"

    @staticmethod
    def threshold(window: Any, deviations: Any, decay: Any, halves: bool) -> Any:
        weights = decay**window.age
        mean = window.sum(weights * window.norms) / window.sum(weights)
        square = window.sum(weights * (window.norms - mean) ** 2) / window.sum(weights)
        return mean + deviations * square**0.5

    @staticmethod
    def clip_to(
        window: Any, norm: Any, threshold: Any, deviations: Any, decay: Any, halves: bool
    ) -> Any:
        return threshold / 2 if halves else threshold


@register_rule
@dataclass(frozen=True)
class Exponential(Rule):
    """A multiple of an exponential average; it shrinks what is far above."""

    decay: float = setting(0.5, gt=0, lt=1)
    factor: float = setting(1.25, gt=1)
    name: ClassVar[str] = "tests_exponential"

    @staticmethod
    def threshold(window: Any, decay: Any, factor: Any) -> Any:
        weights = decay**window.age
        return factor * window.sum(weights * window.norms) / window.sum(weights)

    @staticmethod
    def clip_to(window: Any, norm: Any, threshold: Any, decay: Any, factor: Any) -> Any:
        return threshold * (threshold / norm) ** 0.5


# -- modes ---------------------------------------------------------------------------------------

MODES: dict[str, dict[str, bool]] = {
    "parameter": {},
    "group": {"group_clipping": True},
    "global": {"global_clipping": True},
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

# -- rules ---------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    "quantile": Quantile(0.3),
    "factor": Quantile(0.6, factor=1.5),
    "standard": Standard(0.5),
    "decay": Standard(1.0, decay=0.8),
    "shrink": Standard(0.5, factor=1.2, shrink=True),
    "log": Standard(0.5, decay=0.9, log=True),
    "own": Mad(1.0),
    "own, decay": Recent(0.5),
    "own, another target": Recent(0.5, 0.7, halves=True),
}
"""Every mechanism of a rule that a history knows: built in, and a user's own."""
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

# -- settings ------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Rule, dict[str, Any]]] = {
    "quantile": (RULES["quantile"], {}),
    "past only, a ceiling, warm-up": (
        Quantile(0.3, factor=1.5),
        {"include_current": False, "max_norm": 7.0, "warmup_steps": 2},
    ),
    "zero": (Quantile(0.6), {"on_spike": "zero"}),
    "clipped": (
        Quantile(0.5, factor=1.5),
        {"include_current": False, "record": "clipped", "warmup_steps": 1},
    ),
    "standard": (RULES["standard"], {"warmup_steps": 2}),
    "standard, current": (RULES["standard"], {"warmup_steps": 0, "include_current": True}),
    "zclip": (
        Standard(1.0, decay=0.75, shrink=True),
        {"record": "clipped", "warmup_steps": 2, "max_norm": 100.0},
    ),
    "log": (Standard(1.0, decay=0.75, log=True), {"warmup_steps": 2}),
    "mad": (RULES["own"], {"include_current": False}),
    "exponential": (Exponential(), {"include_current": False, "record": "clipped"}),
}
"""Rules with settings, so that each setting stands in some of them."""

PRESENT: dict[str, Any] = {"include_current": True, "warmup_steps": 0}
"""Every step counts, whatever the rule's defaults are."""

WRONG_SETTINGS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("QuantileClip", {"quantile": 1.5}, ValueError, r"quantile must be a real number in \[0, 1\]"),
    ("QuantileClip", {"quantile": "0.5"}, TypeError, "quantile must be"),
    ("QuantileClip", {"factor": "2"}, TypeError, "factor must be"),
    ("StandardClip", {"deviations": -1.0}, ValueError, "deviations must be a finite real number ≥"),
    ("StandardClip", {"history_length": 0}, ValueError, "history_length must be an int ≥ 1"),
    ("QuantileClip", {"history_length": 10.0}, TypeError, "history_length must be an int ≥ 1"),
    ("QuantileClip", {"max_norm": 0.0}, ValueError, "max_norm must be"),
    ("QuantileClip", {"record": "clipped"}, ValueError, "record"),
    ("QuantileClip", {"on_nonfinite": "ignore"}, ValueError, 'one of "keep", "zero", "raise"'),
    ("QuantileClip", {"global_clipping": 1}, TypeError, "global_clipping must be True or False"),
    ("QuantileClip", {"group_clipping": 1}, TypeError, "group_clipping must be True or False"),
    (
        "StandardClip",
        {"global_clipping": True, "group_clipping": True},
        ValueError,
        "Choose one of the two",
    ),
    ("QuantileClip", {"quantle": 0.5}, TypeError, "unexpected keyword argument 'quantle'"),
    ("StandardClip", {"percentile": 10}, TypeError, "unexpected keyword argument 'percentile'"),
]
"""A clipper's class, settings that it refuses, the error, and a pattern of its message."""

FACTORIES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "quantile": ("QuantileClip", (), {"quantile": 0.5, "history_length": 16}),
    "positional": ("QuantileClip", (0.5, 16, True), {}),
    "standard": ("StandardClip", (), {"deviations": 0.5, "warmup_steps": 2}),
    "rule": ("Clipper", (Standard(0.5),), {"group_clipping": True, "warmup_steps": 2}),
}
"""A clipper's class, and arguments of its `optimizer_factory` or `as_optimizer` that follow."""
