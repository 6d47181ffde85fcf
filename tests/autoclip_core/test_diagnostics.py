"""Summaries say of a history what happened while it was recorded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import (
    GroupState,
    History,
    MaxNorm,
    ParameterInfo,
    Quantile,
    Report,
    Standard,
    State,
    StateError,
    log_values,
    summarize,
)

# Distinct norms, so that none lies on a threshold by more than rounding.
STREAMS = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).lognormal(size=(30, 3)).astype(np.float32)
)
RULES = st.sampled_from(
    [Quantile(0.5), Quantile(0.9, factor=1.1), Standard(1.0), Standard(0.5, decay=0.9)]
)


def recorded(stream: Any, rule: Any, **options: Any) -> tuple[History, list[Report[Any]]]:
    history = History(rows=stream.shape[1], rule=rule, **options)
    return history, [history.record(norms) for norms in stream]


@settings(max_examples=25)
@given(
    STREAMS,
    RULES,
    st.booleans(),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0, 5]),
    st.integers(0, 29),
)
def test_of_a_whole_history_shares_and_coefficients_are_those_of_the_training(
    stream: Any,
    rule: Any,
    include_current: bool,
    max_norm: float | None,
    warmup_steps: int,
    missing: int,
) -> None:
    stream[:missing, 0] = np.nan  # this row has recorded fewer norms
    history, reports = recorded(
        stream, rule, include_current=include_current, max_norm=max_norm, warmup_steps=warmup_steps
    )
    summary = summarize(history)
    happened = np.isfinite(stream)
    coefficients = np.array([report.coefficients for report in reports])
    for row, found in enumerate(summary.rows):
        of_row = coefficients[happened[:, row], row]
        assert found.clipped == (of_row < 1).mean()
        assert found.coefficient == pytest.approx(of_row.mean(), rel=1e-9)
        assert found.threshold == pytest.approx(history.thresholds[row], rel=1e-9)
        assert (found.length, found.recorded) == (len(of_row), len(of_row))
        assert found.newest == stream[-1, row]
        assert found.median == np.median(np.float64(stream[happened[:, row], row]))
    order = [row.coefficient for row in summary.hardest()]
    assert order == sorted(order)
    assert len(order) == sum(row.coefficient < 1 for row in summary.rows)


@settings(max_examples=25)
@given(STREAMS, st.integers(2, 25), st.sampled_from([0, 15, 28]))
def test_of_a_window_that_has_lost_norms_the_newer_half_counts(
    stream: Any, length: int, warmup_steps: int
) -> None:
    history, _ = recorded(stream, Quantile(0.5), history_length=length, warmup_steps=warmup_steps)
    windows, _ = history.read(range(3))
    for found, window in zip(summarize(history).rows, windows):
        clipped = [
            # How many norms were recorded before counts those that the window has lost.
            30 - length + k >= warmup_steps
            and window[k] > np.quantile(np.float64(window[: k + 1]), 0.5)
            for k in range(length // 2, length)
        ]
        assert found.clipped == np.mean(clipped)
        assert (found.length, found.recorded) == (length, 30)


@settings(max_examples=25)
@given(STREAMS, st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([1.0, 1.5]), st.booleans())
def test_shares_at_other_quantiles(
    stream: Any, present: float, factor: float, include_current: bool
) -> None:
    quantiles = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    history, _ = recorded(stream, Quantile(present, factor), include_current=include_current)
    summary = summarize(history)
    shares = summary.clipped_at(quantiles)
    assert shares[present] == pytest.approx(np.mean([row.clipped for row in summary.rows]))
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    if include_current:
        assert shares[1.0] == 0
    # Another rule is replaced by the quantile, the other settings are kept.
    other, _ = recorded(stream, Standard(), include_current=include_current, warmup_steps=0)
    if factor == 1.0:
        assert summarize(other).clipped_at(quantiles) == shares


def test_many_rows_are_represented_by_some() -> None:
    stream = np.tile(np.random.default_rng(0).lognormal(size=(20, 1)), (1, 500))
    history, _ = recorded(stream, Quantile(0.5))
    summary = summarize(history)
    assert summary.clipped_at([0.5]) == summary.clipped_at([0.5], max_rows=500)


def state(rule: str = "quantile", record: str = "raw", **others: Any) -> State:
    every = {
        "history_length": 10,
        "max_norm": None,
        "warmup_steps": 0,
        "include_current": False,
        "record": record,
        "on_spike": "clip",
        "on_nonfinite": "keep",
    }
    group = GroupState.from_windows(
        {**every, **others},
        [ParameterInfo("encoder.weight", (2, 3)), ParameterInfo(None, None)],
        [[1.0, 2.0, 3.0], []],
        [3, 0],
    )
    return State(rule, "parameter", "torch", (group,), "0.3.0")


def test_a_rule_that_is_not_registered_here() -> None:
    summary = summarize(state("somebodys_rule", strength=3))
    assert [row.name for row in summary.rows] == ["encoder.weight", "group 0, parameter 1"]
    assert all(math.isnan(row.threshold) and math.isnan(row.clipped) for row in summary.rows)
    assert math.isnan(summary.clipped_at()[0.5])
    text = str(summary)
    assert "The rule 'somebodys_rule' is not registered in this process: no thresholds." in text
    assert "strength=3" in text
    assert "2x3" in text


def test_norms_that_were_recorded_after_clipping_show_no_shares() -> None:
    summary = summarize(state(record="clipped", quantile=0.5, factor=2.0))
    assert summary.rows[0].threshold == 4.0
    assert math.isnan(summary.rows[0].clipped)
    assert summary.hardest() == []
    assert 'record="clipped"' in str(summary)


def test_the_last_step_and_the_text() -> None:
    history = History(rows=2, rule=Quantile(0.5))
    for norms in ([1.0, 4.0], [2.0, 3.0], [10.0, 2.0]):
        report = history.record(norms)
    named = Report(report.norms, report.thresholds, report.coefficients, ("a", "b"))
    summary = summarize(history, named)
    assert summary.last == log_values(report)
    assert summary.last_coefficients == {"a": 0.2, "b": 1.0}
    text = str(summary)
    assert "last step  total_norm 10.2, threshold 2.5, clipped 0.5" in text
    assert text.endswith("clipped hardest  a * 0.2")


def test_many_rows_make_a_short_text() -> None:
    stream = np.random.default_rng(0).lognormal(size=(20, 50))
    summary = summarize(recorded(stream, Quantile(0.5))[0])
    assert "50 rows, the 30 clipped hardest:" in str(summary)
    assert len(summary.describe(max_rows=None).splitlines()) == len(str(summary).splitlines()) + 20


@pytest.mark.parametrize("source", [state(quantile=0.5, factor=1.0), state("other")])
def test_the_dict_is_strict_json(source: State) -> None:
    found = json.loads(json.dumps(summarize(source).to_dict(), allow_nan=False))
    assert [row["length"] for row in found["rows"]] == [3, 0]
    assert found["rows"][1]["newest"] is None


def test_sources(tmp_path: Any) -> None:
    schedule = MaxNorm(Quantile(0.5))
    for norm in (1.0, 2.0, 9.0):
        schedule.record(norm)
    schedule.save(tmp_path / "max_norm.autoclip")
    for source in (schedule, schedule.export_state(), tmp_path / "max_norm.autoclip"):
        [row] = summarize(source).rows
        assert (row.name, row.threshold) == ("all parameters", 2.0)
    [row] = summarize(summarize(schedule)).rows
    assert row.threshold == 2.0
    (tmp_path / "other.autoclip").write_bytes(b"something else")
    with pytest.raises(StateError, match=r"other\.autoclip"):
        summarize(tmp_path / "other.autoclip")


NAMES = ("encoder.weight", "encoder.bias", "head.weight")


@given(st.lists(st.sampled_from([0.0, 1.0, 3.0, math.nan]), min_size=3, max_size=3))
def test_values_of_each_parameter_that_recorded(norms: list[float]) -> None:
    history = History(rows=3, rule=Quantile(0.5))
    history.record([1.0, 2.0, 4.0])
    found = history.record(norms)
    report = Report(found.norms, found.thresholds, found.coefficients, NAMES)
    three = log_values(report)
    for parameters, chosen in (
        (True, NAMES),
        ("weight$", NAMES[::2]),
        ("^head", NAMES[2:]),
        ("x", ()),
    ):
        values = log_values(report, parameters)
        expected = dict(three)
        for row, name in enumerate(NAMES):
            if name in chosen and norms[row] > 0:
                expected[f"autoclip/norm/{name}"] = norms[row]
                expected[f"autoclip/threshold/{name}"] = found.thresholds[row]
        assert values == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_the_row_of_all_parameters_is_none_of_them() -> None:
    schedule = MaxNorm(Quantile(0.5))
    report = schedule.record(1.0)
    assert log_values(report, True) == log_values(report)


def test_what_does_not_say_which_parameters() -> None:
    report = MaxNorm(Quantile(0.5)).record(1.0)
    with pytest.raises(TypeError, match="True, False or a regular expression"):
        log_values(report, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a regular expression"):
        log_values(report, "*weight")
