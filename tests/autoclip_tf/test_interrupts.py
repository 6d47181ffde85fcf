"""An eager step or a load that is interrupted at any line counts in all rows, or in none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from interrupts import interrupted

from autoclip.core import Quantile, Rule
from autoclip.tf import Clipper

EVERY = 6  # lines, save in the nightly run: each takes a step or two

each_rule = pytest.mark.parametrize("rule", [Quantile(0.5)], ids=str)
VARIABLES = [tf.Variable([0.0], name=f"row{i}") for i in range(2)]


def new(rule: Rule, steps: int = 0) -> Any:
    """A clipper whose rows are recorded in two parts: their windows have other lengths."""
    lengths = [{"match": "row0", "history_length": 3}, {"match": "row1", "history_length": 6}]
    clipper = Clipper(rule, group_settings=lengths, include_current=False, warmup_steps=1)
    clipper.build(VARIABLES)
    for size in range(1, steps + 1):
        step(clipper, float(size))
    return clipper


def step(clipper: Any, size: float) -> None:
    clipper([(tf.constant([size]), variable) for variable in VARIABLES])


def data(clipper: Any) -> Any:
    return clipper.state_dict()["data"]


def goes_on(clipper: Any, rule: Rule, *possible: bytes) -> int:
    """Check that a clipper is in one of some states, and that it goes on as a new one does."""
    index = possible.index(data(clipper))
    other = new(rule)
    other.load_state_dict(clipper.state_dict())
    for each in (clipper, other):
        step(each, 9.0)
    np.testing.assert_array_equal(clipper.last.thresholds, other.last.thresholds)
    assert data(clipper) == data(other)
    return index


@each_rule
def test_a_step_counts_in_all_rows_or_in_none(rule: Rule) -> None:
    states = data(new(rule, 1)), data(new(rule, 2))
    found = [
        goes_on(clipper, rule, *states)
        for clipper in interrupted(lambda: new(rule, 1), lambda clipper: step(clipper, 2.0), EVERY)
    ]
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)


@each_rule
def test_a_load_counts_in_all_rows_or_in_none(rule: Rule) -> None:
    saved = new(rule, 3).state_dict()
    states = data(new(rule, 1)), saved["data"]
    found = [
        goes_on(clipper, rule, *states)
        for clipper in interrupted(
            lambda: new(rule, 1), lambda clipper: clipper.load_state_dict(saved), EVERY
        )
    ]
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)
