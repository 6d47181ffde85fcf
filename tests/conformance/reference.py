"""The algorithm in float64, one norm at a time, as plainly as it can be written.

Everything that computes thresholds is compared with this. It shares no code with the packages:
settings are plain values by name, under the names that a saved state uses.
"""

from __future__ import annotations

import math
from functools import cache
from operator import mul
from typing import Any

import numpy as np

SMALLEST = 2.0**-126  # float32's smallest normal number

COMMON: dict[str, Any] = {
    "history_length": 1000,
    "max_norm": None,
    "warmup_steps": 0,
    "include_current": True,
    "record": "raw",
    "on_spike": "clip",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "quantile": {"quantile": 0.9, "factor": 1.0},
    "standard": {
        "deviations": 2.0,
        "decay": None,
        "factor": 1.0,
        "shrink": False,
        "log": False,
        "include_current": False,
        "warmup_steps": 25,
    },
    "mad": {"deviations": 3.0},
    "exponential_mean": {"decay": 0.99, "factor": 2.0, "include_current": False},
}


def threshold_of(rule: str, settings: dict[str, Any], window: list[float]) -> tuple[float, float]:
    """The threshold of a window that is not empty, oldest norm first, and the window's mean."""
    if rule == "quantile":
        found = np.quantile(np.array(window), settings["quantile"])
        return settings["factor"] * float(found), math.nan
    if rule == "mad":
        median = np.median(np.array(window))
        spread = np.median(np.abs(np.array(window) - median))
        return float(median + settings["deviations"] * spread), math.nan
    weights, total = weights_of(settings["decay"], len(window))
    logs = settings.get("log")
    if logs:
        window = [math.log(norm) for norm in window]
    mean = math.fsum(map(mul, weights, window)) / total
    if rule == "exponential_mean":
        return settings["factor"] * mean, mean
    variance = math.fsum([w * (x - mean) ** 2 for w, x in zip(weights, window)]) / total
    limit = mean + settings["deviations"] * math.sqrt(variance)
    return settings["factor"] * (math.exp(limit) if logs else limit), mean


@cache
def weights_of(decay: float | None, count: int) -> tuple[list[float], float]:
    """The weights of a window's norms, oldest first, and their sum."""
    weights = [1.0 if decay is None else decay**age for age in reversed(range(count))]
    return weights, math.fsum(weights)


class Row:
    """One row: its window, and what each norm is compared with."""

    def __init__(self, rule: str, **settings: Any) -> None:
        self.rule = rule
        self.settings = {**COMMON, **DEFAULTS[rule], **settings}
        self.window: list[float] = []
        self.recorded = 0

    def step(self, norm: float) -> tuple[float, float]:
        """The threshold of one norm and its coefficient; the norm is recorded."""
        threshold, coefficient, target = self.compare(norm)
        if target is not None:
            self.append(target)
        return threshold, coefficient

    def compare(self, norm: float) -> tuple[float, float, float | None]:
        """As `step`; what a past-only row is to `append` next is returned instead."""
        exact = norm
        with np.errstate(over="ignore"):
            norm = float(np.float32(norm))
        counts = SMALLEST <= norm < math.inf
        warm = self.recorded >= self.settings["warmup_steps"]
        current = self.settings["include_current"]
        if counts and current:
            self.append(norm)

        threshold = math.inf
        mean = math.nan
        if self.window and warm:
            threshold, mean = threshold_of(self.rule, self.settings, self.window)
        target = threshold
        if self.settings.get("shrink") and norm > threshold:
            target = mean + (threshold - mean) ** 2 / (norm - mean)
        if self.settings["max_norm"] is not None:
            threshold = min(threshold, self.settings["max_norm"])
            target = min(target, self.settings["max_norm"])

        ceiling = self.settings["max_norm"]
        beyond = norm == math.inf and exact < math.inf and ceiling is not None
        if not counts and not beyond:
            return threshold, 1.0, None
        if beyond:  # float32 does not hold it: it is clipped to the ceiling and not recorded
            threshold = target = ceiling
            norm = exact
        coefficient = min(1.0, target / norm)
        entering = norm * coefficient if self.settings["record"] == "clipped" else norm
        if coefficient < 1.0 and self.settings["on_spike"] != "clip":
            coefficient = 0.0
        return threshold, coefficient, None if current or beyond else entering

    def append(self, norm: float) -> None:
        """Record a norm, rounded to float32, unless that is too small to record."""
        norm = float(np.float32(norm))
        if norm >= SMALLEST:
            self.window = [*self.window, norm][-self.settings["history_length"] :]
            self.recorded += 1
