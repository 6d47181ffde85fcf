"""A step or a load that is interrupted at any line counts wholly or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interrupts import interrupted
from rules import MANY_ROWS, RULES

from autoclip.core import History, Rule

LENGTH = 20
OF_EACH_KIND = [RULES[name] for name in ("quantile", "standard", "shrink", "log", "own")]
each_rule = pytest.mark.parametrize("rule", OF_EACH_KIND, ids=str)
# Bands and whole windows of a few rows; bands and blocks of many.
each_size = pytest.mark.parametrize("rows", [2, MANY_ROWS])
each_past = pytest.mark.parametrize("include_current", [True, False])
# Where a ring grows, and where it is full.
each_length = pytest.mark.parametrize("held", [16, 45])


def contents(history: History) -> Any:
    windows, recorded = history.read(range(history.rows))
    return [window.tolist() for window in windows], recorded.tolist()


def past(rows: int, held: int) -> Any:
    """Windows, and how many norms each row has recorded; the first row has fewer."""
    norms = np.random.default_rng(held).lognormal(size=(rows, held)).astype(np.float32)
    counts = [held - 2 * (row == 0) for row in range(rows)]
    return [norms[row, :count][-LENGTH:] for row, count in enumerate(counts)], counts


def new(rule: Rule, rows: int, include_current: bool = True, held: int = 0) -> History:
    history = History(rows, rule, LENGTH, warmup_steps=1, include_current=include_current)
    history.write(range(rows), *past(rows, held))
    return history


def goes_on(history: History, *possible: Any) -> int:
    """Check that a history is in one of some states, and that it goes on as a new one does."""
    index = possible.index(contents(history))
    other = History.of(history.settings)
    other.write(range(history.rows), *history.read(range(history.rows)))
    for norm in (0.5, 2.0):
        found, expected = (each.record([norm] * each.rows) for each in (history, other))
        assert found.thresholds.tolist() == expected.thresholds.tolist()
        assert found.coefficients.tolist() == expected.coefficients.tolist()
    assert contents(history) == contents(other)
    return index


@each_rule
@each_size
@each_past
@each_length
def test_a_step_counts_wholly_or_not_at_all(
    rule: Rule, rows: int, include_current: bool, held: int
) -> None:
    norms = [np.nan, *np.linspace(0.5, 2.0, rows - 1)]
    before, after = (new(rule, rows, include_current, held) for _ in range(2))
    after.record(norms)
    states = contents(before), contents(after)
    found = [
        goes_on(history, *states)
        for history in interrupted(
            lambda: new(rule, rows, include_current, held),
            lambda history: history.record(norms),
        )
    ]
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)


@each_rule
@each_size
def test_a_load_counts_wholly_or_not_at_all(rule: Rule, rows: int) -> None:
    before, after = new(rule, rows, held=16), new(rule, rows, held=45)
    states = contents(before), contents(after)
    saved = after.state_dict()
    found = [
        goes_on(history, *states)
        for history in interrupted(
            lambda: new(rule, rows, held=16),
            lambda history: history.write(range(rows), *past(rows, 45)),
        )
    ]
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)
    before.load_state_dict(saved)
    assert goes_on(before, *states) == 1


@each_rule
@each_size
def test_new_settings_count_wholly_or_not_at_all(rule: Rule, rows: int) -> None:
    old = new(rule, rows, held=16)
    changed = [each.merged({"max_norm": 0.5}) for each in old.settings]

    def change(history: History) -> None:
        history.settings = changed

    for history in interrupted(lambda: new(rule, rows, held=16), change):
        assert history.settings in (old.settings, tuple(changed))
        goes_on(history, contents(old))
