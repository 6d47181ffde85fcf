"""MaxNorm: equal to global clipping by the past, and what it never records."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rules import RULES

from autoclip.core import (
    History,
    MaxNorm,
    Quantile,
    Rule,
    Standard,
    StateError,
    log_values,
)

# Those that scale to their threshold: an engine clips to a constant.
CONSTANT = ("quantile", "factor", "standard", "decay", "log", "own", "own, decay")
NORMS = st.floats(min_value=1e-30, max_value=1e30)
REFUSED = st.sampled_from([0.0, 1e-39, math.nan, math.inf, -1.0, -math.inf])


@given(
    rule=st.sampled_from([RULES[name] for name in CONSTANT]),
    norms=st.lists(st.one_of(NORMS, REFUSED), max_size=30),
    history_length=st.integers(1, 12),
    max_norm=st.one_of(st.none(), NORMS),
    warmup_steps=st.one_of(st.none(), st.integers(0, 5)),
)
def test_each_step_is_that_of_a_history_that_compares_with_the_past(
    rule: Rule,
    norms: list[float],
    history_length: int,
    max_norm: float | None,
    warmup_steps: int | None,
) -> None:
    settings: dict[str, Any] = {"max_norm": max_norm, "warmup_steps": warmup_steps}
    schedule = MaxNorm(rule, history_length, **settings)
    history = History(1, rule, history_length, include_current=False, **settings)
    for norm in norms:
        limit = schedule.max_norm
        ours = schedule.record(norm)
        theirs = history.record([norm if norm >= 0 else math.nan])
        assert limit == ours.thresholds[0] == theirs.thresholds[0]
        assert ours.coefficients[0] == theirs.coefficients[0]
        np.testing.assert_array_equal(ours.norms, theirs.norms)
    assert schedule.max_norm == history.thresholds[0]


def test_what_an_engine_clips_to_is_the_threshold_of_the_step() -> None:
    schedule = MaxNorm(Quantile(0.5))
    limits = []
    for norm in (4.0, 2.0, 9.0, 8.0):
        limits.append(schedule.max_norm)
        schedule.record(norm)
    assert limits == [math.inf, 4.0, 3.0, 4.0]


def test_the_clipped_norm_can_be_recorded() -> None:
    schedule = MaxNorm(Quantile(0.5, factor=2.0), record="clipped")
    for norm in (1.0, 10.0, 10.0):
        schedule.record(norm)
    # 1, then min(10, 2 · 1), then min(10, 2 · 1.5): the median of 1, 2, 3, doubled.
    assert schedule.max_norm == 4.0


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf, -1.0])
def test_the_norm_of_a_skipped_step_is_never_recorded(norm: float) -> None:
    schedule = MaxNorm(Quantile(0.5))
    schedule.record(3.0)
    saved = schedule.state_dict()
    report = schedule.record(norm)
    assert report.coefficients.tolist() == [1.0]
    assert schedule.state_dict() == saved
    assert "autoclip/clipped" not in log_values(report)


def test_a_step_is_reported_and_logged() -> None:
    schedule = MaxNorm(Quantile(0.5))
    with pytest.raises(RuntimeError, match="nothing to report"):
        schedule.last  # noqa: B018
    schedule.record(np.float32(2.0))
    report = schedule.record(np.array(8.0))
    assert schedule.last is report
    assert report.names == ("all parameters",)
    assert log_values(report) == {
        "autoclip/total_norm": 8.0,
        "autoclip/clipped_norm": 2.0,
        "autoclip/threshold": 2.0,
        "autoclip/clipped": 1.0,
    }
    schedule.reset()
    assert schedule.max_norm == math.inf
    with pytest.raises(RuntimeError, match="nothing to report"):
        schedule.last  # noqa: B018


def test_the_history_is_saved_loaded_and_copied(tmp_path: Path) -> None:
    schedule, other = MaxNorm(Quantile(0.5)), MaxNorm(Quantile(0.5))
    for norm in (3.0, 1.0, 2.0):
        schedule.record(norm)
    schedule.save(tmp_path / "history")
    other.load(tmp_path / "history")
    copied = copy.deepcopy(schedule)
    schedule.record(50.0)
    assert other.max_norm == copied.max_norm == 2.0
    assert other.state_dict() == copied.state_dict() != schedule.state_dict()
    standard = MaxNorm(Standard(1.0), warmup_steps=0)
    with pytest.warns(UserWarning, match="rule='quantile' there and 'standard' here"):
        standard.load(tmp_path / "history")
    assert standard.max_norm == pytest.approx(2.0 + (2 / 3) ** 0.5)
    with pytest.raises(StateError, match="one history for all parameters"):
        History(1, Quantile(0.5)).load(tmp_path / "history")


def test_a_rule_that_scales_to_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shrink=True.* cannot do that"):
        MaxNorm(Standard(2.0, shrink=True))
    MaxNorm(Standard(2.0))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rule": Quantile}, TypeError),
        ({"rule": 0.9}, TypeError),
        ({"history_length": 0}, ValueError),
        ({"max_norm": -1.0}, ValueError),
        ({"record": "clipped"}, ValueError),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        MaxNorm(**{"rule": Quantile(0.5), **settings})
