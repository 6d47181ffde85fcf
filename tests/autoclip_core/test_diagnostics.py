"""Summaries say of a history what happened while it was recorded."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import RULES

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
)
from autoclip.core.inspect import summarize

# Distinct norms, so that none lies on a threshold by more than rounding.
STREAMS = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).lognormal(size=(30, 3)).astype(np.float32)
)
EACH_RULE = st.sampled_from(
    [RULES[name] for name in ("quantile", "factor", "standard", "decay", "log")]
)


def recorded(stream: Any, rule: Any, **options: Any) -> tuple[History, list[Report[Any]]]:
    history = History(rows=stream.shape[1], rule=rule, **options)
    return history, [history.record(norms) for norms in stream]


@settings(max_examples=25)
@given(
    STREAMS,
    EACH_RULE,
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


SETTINGS: dict[str, Any] = {
    "history_length": 10,
    "max_norm": None,
    "warmup_steps": 0,
    "include_current": False,
    "record": "raw",
    "on_spike": "clip",
    "on_nonfinite": "keep",
}
NUMBERS = st.fixed_dictionaries(
    {
        "max_norm": st.sampled_from([None, 0.7]),
        "warmup_steps": st.sampled_from([0, 3]),
        "include_current": st.booleans(),
        "history_length": st.sampled_from([8, 30]),
    }
)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(EACH_RULE, NUMBERS), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), min_size=3, max_size=30),
    st.integers(0, 3),
)
def test_rows_together_are_summarized_as_each_alone(
    seed: int, kinds: list[tuple[Any, Any]], counts: list[int], ties: int
) -> None:
    """Many rows are computed all at once, a single one norm by norm."""
    random = np.random.default_rng(seed)
    states = []
    for k, count in enumerate(counts):
        rule, numbers = kinds[k % len(kinds)]
        if type(rule) is not type(kinds[0][0]):  # a state has one rule
            rule = kinds[0][0]
        history = History(rows=1, rule=rule, **numbers)
        for norm in random.lognormal(size=count).astype(np.float32):
            history.record([np.round(norm, ties)] if ties else [norm])
        states.append(history.export_state())
    together = State(states[0].rule, "parameter", "numpy", tuple(each.groups[0] for each in states))
    for found, single in zip(summarize(together).rows, states):
        [expected] = summarize(single).rows
        for name in ("length", "recorded", "newest", "median", "clipped", "threshold"):
            close = pytest.approx(getattr(expected, name), rel=1e-9, abs=0, nan_ok=True)
            assert getattr(found, name) == close
        assert found.coefficient == pytest.approx(expected.coefficient, rel=1e-9, nan_ok=True)


def test_twenty_thousand_parameters_take_a_second() -> None:
    """Of this process; recorded row by row it takes ten times as long, and more."""
    rows, steps = 20_000, 200
    norms = np.random.default_rng(0).lognormal(size=(rows, steps)).astype(np.float32)
    group = GroupState.from_windows(
        {**SETTINGS, "history_length": 1000, "quantile": 0.9, "factor": 1.0},
        [ParameterInfo(None, (3,))] * rows,
        list(norms),
        np.full(rows, steps),
    )
    start = time.process_time()
    found = summarize(State("quantile", "parameter", "torch", (group,))).rows
    assert time.process_time() - start < 5.0  # about 1 on a quiet machine
    thresholds = np.quantile(norms.astype(np.float64), 0.9, axis=1)
    assert [row.threshold for row in found] == thresholds.tolist()


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
    group = GroupState.from_windows(
        {**SETTINGS, "record": record, **others},
        [ParameterInfo("encoder.weight", (2, 3)), ParameterInfo(None, None)],
        [[1.0, 2.0, 3.0], []],
        [3, 0],
    )
    return State(rule, "parameter", "torch", (group,), "0.3.0")


def test_a_rule_that_is_not_registered_here() -> None:
    summary = summarize(state("somebodys_rule", strength=3))
    assert [row.name for row in summary.rows] == ["encoder.weight", "group 0 parameter 1"]
    assert all(math.isnan(row.threshold) and math.isnan(row.clipped) for row in summary.rows)
    assert math.isnan(summary.clipped_at()[0.5])
    text = str(summary)
    assert "The rule 'somebodys_rule' is not registered in this process: no thresholds." in text
    assert "strength=3" in text
    assert "2x3" in summary.describe(width=120)


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
    assert "last step  total_norm 10.2, clipped_norm 2.828, clipped 0.5" in text
    assert text.endswith("clipped hardest  a * 0.2")


@given(st.lists(st.sampled_from(["w", "b", "w_2", "w_2_2", None]), min_size=1, max_size=8))
def test_equal_names_are_numbered(given_names: list[str | None]) -> None:
    parameters = [ParameterInfo(name, ()) for name in given_names]
    windows = [[2.0, row + 3.0] for row in range(len(parameters))]
    group = GroupState.from_windows({"quantile": 0.0}, parameters, windows, [2] * len(parameters))
    state = State("quantile", "parameter", "tensorflow", (group,))
    assert len(set(state.row_names)) == len(parameters)
    for first, name in zip(given_names, state.row_names):
        assert first is None or name == first or name.startswith(f"{first}_")
    norms = np.array([window[-1] for window in windows])
    report = Report(norms, np.full_like(norms, 2.0), 2.0 / norms, state.row_names)
    summary = summarize(state, report)
    assert summary.last_coefficients == dict(zip(state.row_names, 2.0 / norms))
    values = log_values(report, True)
    assert [values[f"autoclip/norm/{name}"] for name in state.row_names] == norms.tolist()


def test_many_rows_make_a_short_text() -> None:
    stream = np.random.default_rng(0).lognormal(size=(20, 50))
    summary = summarize(recorded(stream, Quantile(0.5))[0])
    assert "50 rows, the 30 clipped hardest (the lowest coefficient first):" in str(summary)
    assert len(summary.describe(max_rows=None).splitlines()) == len(str(summary).splitlines()) + 20


def clipped_first(norms: Any, constant: float) -> Any:
    """The part of gradients that `clip_grad_norm_(max_norm=constant)` leaves: [steps, rows]."""
    total = np.linalg.norm(norms, axis=1, keepdims=True)
    return norms * np.minimum(1.0, constant / (total + 1e-6))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("constant", [0.5, 10.0, 12.0])
def test_norms_that_something_else_has_clipped_are_noticed(rows: int, constant: float) -> None:
    norms = 20 * constant * np.random.default_rng(0).lognormal(size=(50, rows))
    history, _ = recorded(clipped_first(norms, constant), Quantile(0.9))
    summary = summarize(history)
    [notice] = summary.notices
    assert notice.startswith("The total norm does not vary: 50 of the newest 50 total norms are")
    assert float(notice.split(" total norms are ")[1].split(",")[0]) == pytest.approx(
        constant, rel=1e-4
    )
    assert f"notice  {notice}" in str(summary).replace("\n    ", " ")
    assert summary.to_dict()["notices"] == [notice]


def test_also_if_it_clips_some_of_the_steps_only() -> None:
    norms = np.random.default_rng(0).lognormal(size=(300, 3))
    limit = float(np.quantile(np.linalg.norm(norms, axis=1), 0.8))
    [notice] = summarize(recorded(clipped_first(norms, limit), Quantile(0.9))[0]).notices
    assert "60 of the newest 300 total norms" in notice


@settings(max_examples=25)
@given(STREAMS, EACH_RULE, st.booleans())
def test_norms_that_vary_are_not(stream: Any, rule: Any, equal_rows: bool) -> None:
    if equal_rows:
        stream[:] = stream[:, :1]
    assert summarize(recorded(stream, rule)[0]).notices == ()


def test_norms_recorded_after_our_own_clipping_may_be_constant() -> None:
    settings: Any = {"max_norm": 1.0, "record": "clipped", "include_current": False}
    history, _ = recorded(np.full((50, 1), 4.0), Quantile(0.9, 1.1), **settings)
    assert summarize(history).notices == ()


@pytest.mark.parametrize(("norm", "reason"), [(math.nan, "NaN or infinite"), (0.0, "above zero")])
def test_a_last_step_without_a_norm_is_noticed(norm: float, reason: str) -> None:
    history, _ = recorded(np.array([[1.0, 2.0], [2.0, 1.0]]), Quantile(0.5))
    assert summarize(history, history.record([norm, 1.0])).notices == ()
    [notice] = summarize(history, history.record([norm, norm])).notices
    assert notice.startswith("The last step recorded no norm") and reason in notice


@given(st.lists(st.sampled_from([0.5, 1.0, 3.0, 7.0]), min_size=1, max_size=4), st.booleans())
def test_what_is_logged_together_can_be_compared(
    norms: list[float], spikes_are_zeroed: bool
) -> None:
    history = History(rows=len(norms), rule=Quantile(0.5))
    history.record([1.0] * len(norms))
    report = history.record(norms)
    if spikes_are_zeroed:
        report = replace(report, coefficients=np.floor(report.coefficients))
    values = log_values(report)
    after = np.linalg.norm(np.array(norms) * report.coefficients)
    assert values["autoclip/total_norm"] == pytest.approx(np.linalg.norm(norms), rel=1e-12)
    assert values["autoclip/clipped_norm"] == pytest.approx(after, rel=1e-12)
    # Nothing clipped: both norms are the same bits.
    assert (values["autoclip/clipped"] == 0) == (
        values["autoclip/clipped_norm"] == values["autoclip/total_norm"]
    )
    assert ("autoclip/threshold" in values) == (len(norms) == 1)
    if len(norms) == 1 and values["autoclip/clipped"] and not spikes_are_zeroed:
        assert values["autoclip/clipped_norm"] == pytest.approx(values["autoclip/threshold"])


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
    with pytest.raises(TypeError, match="must be a bool or a regular expression"):
        log_values(report, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a regular expression"):
        log_values(report, "*weight")


def test_a_summary_is_of_a_clipper_a_state_or_a_file() -> None:
    says = r"source must be a clipper, .* a State or the path of a file, got dict"
    with pytest.raises(TypeError, match=says):
        summarize(History(1, Quantile(0.5)).state_dict())  # type: ignore[arg-type]
