"""A step, a load or a reset that is interrupted at any line counts in all rows, or in none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, module_of
from interrupts import data, interrupted
from rules import RULES

from autoclip.core import Rule

# XLA and graphs run without Python. The numbers of steps are those where a ring grows, and where it
# is full; TensorFlow's windows have their size from the start, and its steps take longer.
STEPS = {
    ("torch", "numpy"): [2, 16, 30],
    ("torch", "device"): [2, 16, 30],
    ("tensorflow", "eager"): [2],
}
CASES = [
    pytest.param(
        way,
        rule,
        marks=[pytest.mark.nightly] * (way[0] == "tensorflow" and rule != "quantile"),
        id=", ".join((*way, rule)),
    )
    for way in STEPS
    for rule in ("quantile", "decay")
    if way[0] in FRAMEWORKS
]


class Clippers:
    """Clippers whose rows are recorded in two parts: their windows have other lengths."""

    def __init__(self, framework: str, way: str, rule: Rule) -> None:
        self._loop, self._way, self._rule = module_of(framework).loop, way, rule

    def new(self, steps: int = 0) -> Any:
        groups = [(2, {"history_length": 3}), (2, {"history_length": 20})]
        settings = {"include_current": False, "warmup_steps": 1}
        made = {"way": self._way, "shapes": [(1,)] * 4, "groups": groups, "shared": False}
        run = self._loop("Clipper", self._rule, **made, **settings)
        for size in range(1, steps + 1):
            self.step(run, size)
        return run

    def step(self, run: Any, size: float) -> None:
        run(*[np.float32([size])] * 4)

    def check(self, steps: int, act: Callable[[Any], object], after: Any) -> None:
        """Interrupt `act` after some steps: the clipper goes on as one that loads what it holds.

        Args:
            steps: before it.
            act: is given the clipper, as `new` makes it.
            after: the clipper's data, if it is not interrupted.
        """
        before = data(self.new(steps).clipper)
        found = []
        for run in interrupted(lambda: self.new(steps), act):
            found.append((before, after).index(data(run.clipper)))
            other = self.new()
            other.clipper.load_state_dict(run.clipper.state_dict())
            for each in (run, other):
                self.step(each, 9.0)
            np.testing.assert_array_equal(
                run.clipper.last.thresholds, other.clipper.last.thresholds
            )
            assert data(run.clipper) == data(other.clipper)
        assert (found[0], found[-1]) == (0, 1)
        assert found == sorted(found)


@pytest.fixture
def clippers(way: tuple[str, str], rule: str) -> Iterator[Clippers]:
    framework = module_of(way[0])
    with framework.way(way[1]), framework.interruptible():
        yield Clippers(*way, RULES[rule])


each_case = pytest.mark.parametrize(("way", "rule"), CASES)


@each_case
def test_a_step_counts_in_all_rows_or_in_none(clippers: Clippers, way: tuple[str, str]) -> None:
    for steps in STEPS[way]:
        after = data(clippers.new(steps + 1).clipper)
        clippers.check(steps, lambda run, size=steps + 1: clippers.step(run, size), after)


@each_case
def test_a_load_counts_in_all_rows_or_in_none(clippers: Clippers) -> None:
    saved = clippers.new(17).clipper.state_dict()
    clippers.check(5, lambda run: run.clipper.load_state_dict(saved), saved["data"])


@each_case
def test_a_reset_counts_in_all_rows_or_in_none(clippers: Clippers) -> None:
    clippers.check(5, lambda run: run.clipper.reset(), data(clippers.new().clipper))
