"""Histories: what they remember, the thresholds and coefficients that follow, and what is saved.

A few rows have other trackers than many; the properties cover both.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Row
from rules import MANY_ROWS

from autoclip.core import SMALLEST_NORM, History, Quantile, Rule, Standard, State
from autoclip.core.adapter import GroupSettings

Norms = npt.NDArray[np.float64]
Shape = tuple[int, int]
Random = np.random.Generator


# -- streams of norms, good and bad ------------------------------------------------------------


def rising(random: Random, shape: Shape) -> Norms:
    return np.arange(1.0, shape[0] + 1)[:, None] * random.lognormal(size=shape[1])


def levels(random: Random, shape: Shape) -> Norms:
    level = np.where(np.arange(shape[0]) // 40 % 2, 1e3, 1.0)
    return level[:, None] * random.lognormal(size=shape)


def alternating(random: Random, shape: Shape) -> Norms:
    return np.where(np.arange(shape[0]) % 2, 1e3, 1e-3)[:, None] * random.uniform(1, 2, shape)


KINDS: dict[str, Callable[[Random, Shape], Norms]] = {
    "noise": lambda random, shape: random.lognormal(size=shape),
    "any size": lambda random, shape: 10.0 ** random.uniform(-37, 38, shape),
    "ties": lambda random, shape: random.integers(1, 5, shape).astype(np.float64),
    "constant": lambda random, shape: np.full(shape, random.lognormal()),
    "rising": rising,
    "falling": lambda random, shape: 1.0 / rising(random, shape),
    "walk": lambda random, shape: np.exp(np.cumsum(random.normal(0, 0.1, shape), axis=0)),
    "spikes": lambda random, shape: np.where(
        random.random(shape) < 0.02, 1e18, random.lognormal(size=shape)
    ),
    "levels": levels,
    "alternating": alternating,
}
MODERATE = sorted(set(KINDS) - {"any size", "spikes"})

# What stands for a gradient that says nothing: no norm, an overflow, or less than float32 knows.
NOTHING = [np.nan, np.inf, 0.0, -0.0, 1e-40, 1e39]


def make_stream(kind: str, seed: int, steps: int, rows: int, bad: float = 0.0) -> Norms:
    """float64[steps, rows]: norms of one kind, of which the share `bad` says nothing."""
    random = np.random.default_rng(seed)
    norms = KINDS[kind](random, (steps, rows))
    return np.where(random.random(norms.shape) < bad, random.choice(NOTHING, norms.shape), norms)


def usable(norms: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The norms that a history is to remember, as it is to remember them."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(norms, np.float64).astype(np.float32)
    return rounded[np.isfinite(rounded) & (rounded >= np.finfo(np.float32).tiny)]


def threshold(rule: Rule, window: npt.NDArray[np.float32]) -> float:
    """The threshold of a window, computed with NumPy."""
    values = window.astype(np.float64)
    if isinstance(rule, Quantile):
        return rule.factor * float(np.quantile(values, rule.quantile))
    assert isinstance(rule, Standard)
    return rule.factor * float(values.mean() + rule.deviations * values.std())


def at_once(rows: int, rule: Any, length: int = 1000, **settings: Any) -> History:
    """A history that compares each norm with a window that holds it, from the first step on."""
    settings = {"include_current": True, "warmup_steps": 0, **settings}
    return History(rows, rule, length, **settings)


def record_all(history: History, stream: Norms) -> Norms:
    """float64[steps, rows]: the thresholds after each step."""
    return np.array([history.record(norms).thresholds for norms in stream])


def saved(history: History) -> bytes:
    data: bytes = history.state_dict()["data"]
    return data


kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.0, 0.1, 0.9])
history_lengths = st.integers(1, 20) | st.integers(21, 300)
row_counts = st.sampled_from([1, 3, 9])
few_and_many = st.sampled_from([2, MANY_ROWS])
copies_of_rows = st.sampled_from([1, MANY_ROWS])
quantiles = st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]) | st.floats(0, 1)
factors = st.sampled_from([1.0, 1.5])
quantile_rules = st.builds(Quantile, quantiles, factors)
standard_rules = st.builds(Standard, st.sampled_from([0.0, 2.0]) | st.floats(0, 10))
# Without a tracker: evaluated from the whole windows.
untracked_rules = st.builds(
    Standard,
    st.floats(0, 10),
    decay=st.none() | st.floats(0.25, 0.999),
    factor=factors,
    shrink=st.just(True),
) | st.builds(Standard, st.floats(0, 10), decay=st.floats(0.25, 0.999))
plain_rules = st.builds(Quantile, quantiles) | standard_rules
rules = quantile_rules | standard_rules | untracked_rules
settings_of_rows = st.fixed_dictionaries(
    {
        "history_length": history_lengths,
        "max_norm": st.sampled_from([None, 2.0, 1e-3]),
        "warmup_steps": st.sampled_from([0, 1, 30]),
        "include_current": st.booleans(),
        "on_spike": st.sampled_from(["clip", "zero", "skip"]),
    }
)
pasts = st.fixed_dictionaries({"include_current": st.booleans(), "warmup_steps": st.just(0)})


# -- everything against the reference ----------------------------------------------------------


def follows(settings: list[GroupSettings], stream: Norms, cuts: set[int], copies: int) -> None:
    """Check each threshold and coefficient; at `cuts` go on with a copy of the history."""
    rows = [Row(each.rule.name, **each.settings) for each in settings]
    count, settings = len(rows), settings * copies
    history = History.of(settings)
    tolerance = 0.0 if isinstance(settings[0].rule, Quantile) else 1e-12
    drops = [each.on_spike != "clip" for each in settings]

    def near(ours: float, expected: float) -> bool:
        return ours == expected or abs(ours - expected) <= tolerance * abs(expected)

    for step, norms in enumerate(stream):
        if step in cuts:
            history = resume(history, settings, how=step % 3)
        found = history.record(np.tile(norms, copies))
        for column in (found.thresholds, found.coefficients):
            np.testing.assert_array_equal(column, np.tile(column[:count], copies))
        limits, coefficients, entering = zip(*[row.compare(norm) for row, norm in zip(rows, norms)])
        assert all(map(near, found.thresholds[:count].tolist(), limits)), (step, found, limits)
        ours = found.coefficients.tolist()
        with np.errstate(over="ignore"):
            rounded = norms.astype(np.float32).tolist()
        for row, norm in enumerate(rounded):
            # A norm that equals its threshold but for the last bit may be dropped or kept.
            tied = tolerance and drops[row] and abs(norm - limits[row]) <= 1e-9 * norm
            assert tied or near(ours[row], coefficients[row]), (step, row, found, coefficients)
        for row, norm in enumerate(entering):
            if norm is not None and settings[row].record == "clipped" and tolerance:
                # Rounded to float32, the last bit of a coefficient may count: take over ours.
                (window,), _ = history.read([row])
                assert window[-1] == pytest.approx(norm, rel=2.0**-23)
                norm = float(window[-1])
            if norm is not None:
                rows[row].append(norm)
    windows, recorded = history.read(range(history.rows))
    assert [window.tolist() for window in windows] == [row.window for row in rows] * copies
    assert recorded.tolist() == [row.recorded for row in rows] * copies


def resume(history: History, settings: list[GroupSettings], how: int) -> History:
    if how == 0:
        return pickle.loads(pickle.dumps(history))  # type: ignore[no-any-return]
    resumed = History.of(settings)
    if how == 1:
        resumed.load_state_dict(history.state_dict())
    else:
        resumed.write(range(history.rows), *history.read(range(history.rows)))
    return resumed


@settings(max_examples=100)
@given(
    kinds,
    seeds,
    shares,
    st.data(),
    settings_of_rows,
    row_counts,
    st.sets(st.integers(1, 149)),
    copies_of_rows,
)
def test_every_rule_and_setting_follows_the_reference(
    kind: str,
    seed: int,
    bad: float,
    data: st.DataObject,
    common: dict[str, Any],
    rows: int,
    cuts: set[int],
    copies: int,
) -> None:
    """Quantiles with the same bits, means and deviations to 1e-12; whenever saved and loaded."""
    rule = data.draw(rules)
    each = [GroupSettings(rule, **common)] * rows
    follows(each, make_stream(kind, seed, 150, rows, bad), cuts, copies)


@settings(max_examples=60)
@given(
    kinds,
    seeds,
    shares,
    st.builds(Quantile, quantiles, st.just(1.5)) | standard_rules | untracked_rules,
    history_lengths,
    row_counts,
    st.sampled_from([None, 2.0]),
    st.sets(st.integers(1, 149)),
    copies_of_rows,
)
def test_recording_clipped_norms_follows_the_reference(
    kind: str,
    seed: int,
    bad: float,
    rule: Rule,
    length: int,
    rows: int,
    max_norm: float | None,
    cuts: set[int],
    copies: int,
) -> None:
    if rule.thresholds_only_fall:
        rule = Standard(1.0)
    each = [
        GroupSettings(
            rule, length, max_norm=max_norm, warmup_steps=5, include_current=False, record="clipped"
        )
    ] * rows
    follows(each, make_stream(kind, seed, 150, rows, bad), cuts, copies)


@settings(max_examples=20)
@given(
    kinds, seeds, shares, history_lengths, st.booleans(), st.sampled_from([4, 12]), copies_of_rows
)
def test_rows_have_numbers_of_their_own(
    kind: str, seed: int, bad: float, length: int, current: bool, rows: int, copies: int
) -> None:
    random = np.random.default_rng(seed)
    for rule in (
        lambda: Quantile(random.uniform(), random.uniform(0.5, 2)),
        lambda: Standard(random.uniform(0, 3), random.uniform(0.5, 1), random.uniform(0.5, 2)),
        lambda: Standard(random.uniform(0, 3), factor=random.uniform(0.5, 2)),
    ):
        each = [
            GroupSettings(
                rule(),
                length,
                max_norm=random.uniform(1, 5),
                warmup_steps=int(random.integers(9)),
                include_current=current,
            )
            for _ in range(rows)
        ]
        follows(each, make_stream(kind, seed, 60, rows, bad), {13, 30, 44}, copies)


# -- thresholds --------------------------------------------------------------------------------


@given(
    st.lists(st.floats(min_value=0) | st.sampled_from([*NOTHING, 1.0, 2.0, 1e38]), min_size=1),
    quantiles,
    st.integers(1, 8),
    row_counts,
)
def test_any_few_norms_have_numpys_quantile(
    norms: list[float], q: float, length: int, rows: int
) -> None:
    history = History(rows, Quantile(q), length)
    for k, norm in enumerate(norms):
        found = set(history.record([norm] * rows).thresholds.tolist())
        window = usable(norms[: k + 1])[-length:]
        assert found == {threshold(Quantile(q), window) if len(window) else math.inf}


@settings(max_examples=60)
@given(kinds, seeds, shares, quantile_rules, history_lengths, st.sampled_from([1, 9]))
def test_thresholds_are_numpys_quantiles_of_the_last_usable_norms(
    kind: str, seed: int, bad: float, rule: Quantile, length: int, rows: int
) -> None:
    """Windows up to several times the band that a row keeps, through all of its life."""
    history = History(rows, rule, length)
    stream = np.repeat(make_stream(kind, seed, min(3 * length + 20, 500), 1, bad), rows, axis=1)
    for k, found in enumerate(record_all(history, stream)):
        window = usable(stream[: k + 1, 0])[-length:]
        assert set(found) == {threshold(rule, window) if len(window) else math.inf}
    windows, recorded = history.read(range(rows))
    assert windows[-1].tolist() == usable(stream[:, 0])[-length:].tolist()
    assert recorded.tolist() == [len(usable(stream[:, 0]))] * rows


@settings(max_examples=60)
@given(kinds, seeds, shares, standard_rules, history_lengths, row_counts)
def test_thresholds_are_numpys_mean_and_deviation_of_the_last_usable_norms(
    kind: str, seed: int, bad: float, rule: Standard, length: int, rows: int
) -> None:
    history = at_once(rows, rule, length)
    stream = make_stream(kind, seed, min(3 * length + 20, 500), rows, bad)
    for k, found in enumerate(record_all(history, stream)[:, -1]):
        window = usable(stream[: k + 1, -1])[-length:]
        if len(window):
            assert found == pytest.approx(threshold(rule, window), rel=1e-12, abs=0)


def test_bands_that_are_a_small_part_of_their_windows() -> None:
    """Every kind of stream at once; checked now and then, since NumPy takes its time."""
    qs = [0.0, 0.25, 0.9, 1.0]
    stream = np.hstack([make_stream(kind, 0, 8000, len(qs)) for kind in KINDS])
    each = [Quantile(q) for q in qs] * len(KINDS)
    copies = -(-MANY_ROWS // len(each))
    history = History(copies * len(each), each * copies, 2500)
    for k, norms in enumerate(stream):
        found = history.record(np.tile(norms, copies)).thresholds
        if k % 397 == 0:
            window = stream[max(0, k - 2499) : k + 1]
            expected = [threshold(rule, usable(window[:, row])) for row, rule in enumerate(each)]
            assert found.tolist() == expected * copies


@given(seeds, st.integers(1, 120), st.sampled_from([1e18, 1e30, 3e38]), st.sampled_from([1, 9]))
def test_a_spike_that_has_left_leaves_nothing_behind(
    seed: int, length: int, spike: float, rows: int
) -> None:
    """Running sums would have lost the norms beside it, and gone negative afterwards."""
    rule = Standard(2.0)
    history = at_once(rows, rule, length)
    calm = make_stream("noise", seed, length, rows)
    assert set(history.record([spike] * rows).thresholds) == {np.float32(spike)}
    found = record_all(history, calm)[-1]
    expected = [threshold(rule, usable(calm[:, row])) for row in range(rows)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    undisturbed = at_once(rows, rule, length)
    undisturbed.write(range(rows), [usable(norms) for norms in calm.T], [length + 1] * rows)
    assert found.tolist() == undisturbed.thresholds.tolist()  # bit for bit


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("include_current", [True, False])
def test_a_constant_norm_has_no_deviation(rows: int, include_current: bool) -> None:
    history = at_once(rows, Standard(2.0), 100, include_current=include_current)
    reports = [history.record([0.1] * rows) for _ in range(300)]
    if not include_current:  # nothing is known at the first step
        assert reports.pop(0).thresholds.tolist() == [math.inf] * rows
    assert {report.thresholds[-1] for report in reports} == {np.float32(0.1)}
    assert {report.coefficients[-1] for report in reports} == {1.0}


@pytest.mark.parametrize("include_current", [True, False])
def test_whether_a_spike_is_among_the_norms_that_it_is_compared_with(include_current: bool) -> None:
    """The example of DESIGN and docs/algorithm.md: 999 ones, then a 1000."""
    history = at_once(1, Standard(2.0), include_current=include_current)
    for _ in range(999):
        history.record([1.0])
    report = history.record([1000.0])
    assert report.thresholds[0] == pytest.approx(65.15, abs=0.01) if include_current else 1.0
    assert report.spikes.tolist() == [True]


# -- what the settings do ----------------------------------------------------------------------


def test_what_the_rules_default_to() -> None:
    (quantile,) = History(1, Quantile()).settings
    (standard,) = History(1, Standard()).settings
    assert (quantile.include_current, quantile.warmup_steps) == (True, 0)
    assert (standard.include_current, standard.warmup_steps) == (False, 25)


@given(kinds, seeds, shares, rules, history_lengths, row_counts, st.integers(0, 40))
def test_nothing_is_clipped_during_warm_up(
    kind: str, seed: int, bad: float, rule: Rule, length: int, rows: int, steps: int
) -> None:
    """Each row counts what it has recorded itself."""
    history = History(rows, rule, length, warmup_steps=steps)
    for norms in make_stream(kind, seed, 50, rows, bad):
        cold = history.recorded < steps
        report = history.record(norms)
        assert (report.thresholds[cold] == math.inf).all()
        assert (report.coefficients[cold] == 1.0).all()
        warm_and_filled = ~cold & (history.recorded > 0)
        if history.settings[0].include_current or steps:
            assert (report.thresholds[warm_and_filled] < math.inf).all()


@settings(max_examples=40)
@given(kinds, seeds, shares, rules, history_lengths, row_counts, pasts, st.floats(1e-3, 1e3))
def test_a_ceiling_limits_every_threshold(
    kind: str,
    seed: int,
    bad: float,
    rule: Rule,
    length: int,
    rows: int,
    past: dict[str, Any],
    ceiling: float,
) -> None:
    """Also where nothing is known yet; the windows are those that there are without it."""
    free = History(rows, rule, length, **past)
    limited = History(rows, rule, length, max_norm=ceiling, **past)
    for norms in make_stream(kind, seed, 50, rows, bad):
        thresholds = np.minimum(free.thresholds, ceiling)
        assert limited.thresholds.tolist() == thresholds.tolist()
        a, b = free.record(norms), limited.record(norms)
        # A norm that float32 does not hold is compared with the ceiling alone.
        beyond = np.isfinite(norms) & (norms > 3.5e38)
        expected = np.where(beyond, ceiling, np.minimum(a.thresholds, ceiling))
        assert b.thresholds.tolist() == expected.tolist()
    assert [w.tolist() for w in free.read(range(rows))[0]] == [
        w.tolist() for w in limited.read(range(rows))[0]
    ]


@given(kinds, seeds, shares, rules, history_lengths, row_counts)
def test_compared_with_the_past_is_compared_with_the_thresholds_before(
    kind: str, seed: int, bad: float, rule: Rule, length: int, rows: int
) -> None:
    """Thresholds as 0.2.1 makes them; the windows do not depend on it."""
    past = at_once(rows, rule, length, include_current=False)
    now = at_once(rows, rule, length)
    for norms in make_stream(kind, seed, 50, rows, bad):
        before = past.thresholds
        assert before.tolist() == now.thresholds.tolist()
        assert past.record(norms).thresholds.tolist() == before.tolist()
        now.record(norms)
    assert [w.tolist() for w in past.read(range(rows))[0]] == [
        w.tolist() for w in now.read(range(rows))[0]
    ]


@pytest.mark.parametrize("rows", [1, 9])
def test_clipped_norms_are_recorded_as_they_are_after_clipping(rows: int) -> None:
    history = at_once(rows, Quantile(0.5, 2.0), include_current=False, record="clipped")
    for norm in (1.0, 100.0, 100.0, 1.5):
        history.record([norm] * rows)
    assert history.read([0])[0][0].tolist() == [1.0, 2.0, 3.0, 1.5]


@pytest.mark.parametrize("on_spike", ["zero", "skip"])
def test_a_spike_that_is_dropped_has_the_coefficient_0(on_spike: Any) -> None:
    """The recorded norm does not depend on the gradient's fate."""
    each = GroupSettings(
        Quantile(0.5, 2.0), include_current=False, record="clipped", on_spike=on_spike
    )
    history = History.of([each] * 2)
    history.record([1.0, 1.0])
    report = history.record([8.0, 2.0])
    assert report.thresholds.tolist() == [2.0, 2.0]
    assert report.coefficients.tolist() == [0.0, 1.0]
    assert report.spikes.tolist() == [True, False]
    assert [window.tolist() for window in history.read([0, 1])[0]] == [[1.0, 2.0], [1.0, 2.0]]


def test_shrinking_scales_a_larger_spike_to_a_smaller_norm() -> None:
    history = at_once(3, Standard(2.0, shrink=True), include_current=False)
    for norm in (1.0, 3.0):  # mean 2, deviation 1
        history.record([norm] * 3)
    report = history.record([6.0, 10.0, 3.5])
    assert report.thresholds.tolist() == [4.0, 4.0, 4.0]
    clipped = report.norms * report.coefficients
    assert clipped.tolist() == pytest.approx([2 + 4 / 4, 2 + 4 / 8, 3.5], rel=1e-12)


# -- coefficients ------------------------------------------------------------------------------


@given(kinds, seeds, shares, quantile_rules | standard_rules, history_lengths, row_counts, pasts)
def test_a_coefficient_is_the_threshold_over_the_norm_and_at_most_one(
    kind: str, seed: int, bad: float, rule: Rule, length: int, rows: int, past: dict[str, Any]
) -> None:
    history = History(rows, rule, length, **past)
    for norms in make_stream(kind, seed, 60, rows, bad):
        before = history.recorded
        report = history.record(norms)
        counted = history.recorded > before
        assert counted.tolist() == [len(usable(norm)) == 1 for norm in norms]
        assert (report.coefficients[~counted] == 1.0).all()
        rounded = usable(norms)
        expected = np.minimum(1.0, report.thresholds[counted] / rounded.astype(np.float64))
        assert report.coefficients[counted].tolist() == expected.tolist()
        assert report.spikes.tolist() == (report.coefficients < 1).tolist()
        # The gradient has the norm itself, which the rounded one differs from by 2^-24 of it.
        clipped = norms[counted] * report.coefficients[counted]
        assert (clipped <= report.thresholds[counted] * (1 + 2.0**-23)).all()


@given(kinds, seeds, shares, history_lengths, row_counts)
def test_the_largest_norm_as_a_threshold_never_clips(
    kind: str, seed: int, bad: float, length: int, rows: int
) -> None:
    history = History(rows, Quantile(1.0), length)
    for norms in make_stream(kind, seed, 100, rows, bad):
        assert history.record(norms).coefficients.tolist() == [1.0] * rows


@given(plain_rules, history_lengths, st.floats(SMALLEST_NORM, 3e38), row_counts)
def test_the_first_norm_is_its_own_threshold(
    rule: Rule, length: int, norm: float, rows: int
) -> None:
    report = at_once(rows, rule, length).record([norm] * rows)
    assert set(report.thresholds) == {np.float32(norm)}
    assert set(report.coefficients) == {1.0}


@given(
    st.sampled_from(MODERATE),
    seeds,
    rules,
    history_lengths,
    pasts,
    st.integers(-40, 40),  # 1e-12 to 1e12
)
@pytest.mark.parametrize("rows", [2, 9])
def test_a_power_of_two_changes_no_coefficient(
    rows: int, kind: str, seed: int, rule: Rule, length: int, past: dict[str, Any], exponent: int
) -> None:
    plain, scaled = History(rows, rule, length, **past), History(rows, rule, length, **past)
    for norms in make_stream(kind, seed, 50, rows):
        a, b = plain.record(norms), scaled.record(norms * 2.0**exponent)
        assert (a.thresholds * 2.0**exponent).tolist() == b.thresholds.tolist()
        assert a.coefficients.tolist() == b.coefficients.tolist()


@given(
    st.sampled_from(MODERATE),
    seeds,
    quantile_rules | st.builds(Standard, st.floats(0, 3)),
    history_lengths,
    st.floats(-12, 12),
    pasts,
)
def test_any_constant_changes_coefficients_by_rounding_only(
    kind: str, seed: int, rule: Rule, length: int, exponent: float, past: dict[str, Any]
) -> None:
    """Each norm is rounded to float32, by 2^-24 of it; each deviation adds as much again."""
    scale = 10.0**exponent
    plain, scaled = History(2, rule, length, **past), History(2, rule, length, **past)
    for norms in make_stream(kind, seed, 50, 2):
        a, b = plain.record(norms), scaled.record(norms * scale)
        np.testing.assert_allclose(b.thresholds, a.thresholds * scale, rtol=8 * 2.0**-24)
        np.testing.assert_allclose(b.coefficients, a.coefficients, rtol=12 * 2.0**-24)


# -- what is recorded --------------------------------------------------------------------------


@given(kinds, seeds, rules, history_lengths, st.lists(st.integers(0, 60), max_size=10), row_counts)
def test_a_storm_of_bad_norms_leaves_the_history_of_the_clean_steps(
    kind: str, seed: int, rule: Rule, length: int, storms: list[int], rows: int
) -> None:
    clean, stormy = History(rows, rule, length), History(rows, rule, length)
    for step, norms in enumerate(make_stream(kind, seed, 60, rows)):
        for k in range(storms.count(step)):
            before = stormy.thresholds.tolist()
            report = stormy.record([NOTHING[(k + row) % len(NOTHING)] for row in range(rows)])
            assert report.thresholds.tolist() == before
            assert report.coefficients.tolist() == [1.0] * rows
        assert clean.record(norms).thresholds.tolist() == stormy.record(norms).thresholds.tolist()
    assert saved(clean) == saved(stormy)


@pytest.mark.parametrize("more", [0, 9])
def test_the_smallest_norm_that_counts(more: int) -> None:
    """float32's smallest normal number; what is below may be zero on one device and not another."""
    below = float(np.nextafter(np.float32(SMALLEST_NORM), np.float32(0)))
    largest = float(np.finfo(np.float32).max)
    history = History(5 + more, Quantile(0.5), 10)
    norms = [SMALLEST_NORM, below, largest, largest * (1 + 2.0**-26), 2.0**128]
    report = history.record(norms + [1.0] * more)
    assert history.recorded.tolist()[:5] == [1, 0, 1, 1, 0]
    inf = math.inf
    assert report.thresholds.tolist()[:5] == [SMALLEST_NORM, inf, largest, largest, inf]


@pytest.mark.parametrize("rule", [Quantile(0.5), Standard(), Standard(decay=0.9, shrink=True)])
@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_a_finite_norm_beyond_float32_is_clipped_to_the_ceiling(rule: Rule, rows: int) -> None:
    limited, free = (History(rows, rule, 10, max_norm=each) for each in (4.0, None))
    for history, coefficient in ((limited, 4.0 / 3e39), (free, 1.0)):
        history.record([2.0] * rows)
        report = history.record([3e39, math.inf, math.nan] + [1.0] * (rows - 3))
        assert report.coefficients.tolist()[:3] == [coefficient, 1.0, 1.0]
        assert history.recorded.tolist() == [1, 1, 1] + [2] * (rows - 3)
        dropping = History.of([replace(each, on_spike="zero") for each in history.settings])
        assert dropping.record([3e39] * rows).coefficients[0] == (coefficient == 1.0)
    assert limited.record([3e39] * rows).thresholds.tolist() == [4.0] * rows


@settings(max_examples=40)
@given(kinds, seeds, shares, rules, history_lengths, pasts, st.data())
@pytest.mark.parametrize("rows", [4, 12])
def test_rows_do_not_leak_into_one_another(
    rows: int,
    kind: str,
    seed: int,
    bad: float,
    rule: Rule,
    length: int,
    past: dict[str, Any],
    data: st.DataObject,
) -> None:
    """Each row is as if it were alone, whichever rows record and in whatever order they are."""
    order = data.draw(st.permutations(range(rows)))
    stream = make_stream(kind, seed, 60, rows, bad)
    chosen = [0, rows // 2, rows - 1]
    together, shuffled, *alone = (
        History(rows, rule, length, **past) for _ in range(2 + len(chosen))
    )
    for norms in stream:
        report, other = together.record(norms), shuffled.record(norms[order])
        assert report.thresholds[order].tolist() == other.thresholds.tolist()
        for row, history in zip(chosen, alone):
            only = np.full(rows, np.nan)
            only[row] = norms[row]
            assert history.record(only).thresholds[row] == report.thresholds[row]
    for row, history in zip(chosen, alone):
        (window,), (recorded,) = together.read([row])
        assert window.tolist() == usable(stream[:, row])[-length:].tolist()
        assert (len(window), recorded) == (history.lengths[row], history.recorded[row])
        assert (len(window), recorded) == (together.lengths[row], together.recorded[row])


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard(), Standard(decay=0.9)])
@pytest.mark.parametrize("more", [[], [1.0] * 9])
@pytest.mark.parametrize(
    "norms", [[1.0, -1.0], [np.nan, -1e-300], [-math.inf, 1.0], [-5e-324, math.inf]]
)
def test_a_negative_norm_raises_and_records_nothing(
    rule: Rule, more: list[float], norms: list[float]
) -> None:
    norms = norms + more
    history = History(len(norms), rule, 10)
    history.record([1.0, 2.0, *more])
    before = saved(history)
    with pytest.raises(ValueError, match=rf"never negative, but got {np.nanmin(norms)}\."):
        history.record(norms)
    assert saved(history) == before


@pytest.mark.parametrize("norms", [1.0, [], [1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], [[1.0], [2.0]]])
def test_a_wrong_shape_raises_and_records_nothing(norms: Any) -> None:
    history = History(2, Quantile(0.9), 10)
    before = saved(history)
    says = f"norms must have one number per row, shape (2,), got {np.shape(norms)}."
    with pytest.raises(ValueError, match=re.escape(says)):
        history.record(norms)
    assert saved(history) == before


@pytest.mark.parametrize("rule", [Quantile(0.5), Standard(0.0), Standard(0, 0.5)])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_report_keeps_what_it_said(rule: Rule, rows: int) -> None:
    """Neither later steps nor the caller's own buffer change it, nor does it change the history."""
    history = at_once(rows, rule, 1)
    buffer = np.full(rows, 3.0)
    report = history.record(buffer)
    buffer[:] = 1.0
    history.record(buffer)
    assert report.norms.tolist() == [3.0] * rows
    assert report.thresholds.tolist() == [3.0] * rows
    history.record(buffer).thresholds[:] = 0.0
    history.record([math.nan] * rows).thresholds[:] = 0.0
    history.thresholds[:] = 0.0
    history.recorded[:] = 0
    history.lengths[:] = 0
    assert history.thresholds.tolist() == [1.0] * rows
    assert history.recorded.tolist() == [3] * rows
    assert history.lengths.tolist() == [1] * rows


# -- memory and work ---------------------------------------------------------------------------


def allocated(history: History) -> int:
    """Bytes of the windows, with their room to grow."""
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(history, protocol=5, buffer_callback=buffers.append)
    arrays = [memoryview(each) for each in buffers]
    return sum(each.nbytes for each in arrays if each.format == "f")  # norms are float32


def peak_bytes(action: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard(), Standard(decay=0.9)])
@pytest.mark.parametrize("length", [10**6, 10**9, 2**63 - 1])
def test_a_long_history_costs_memory_only_once_it_is_filled(rule: Rule, length: int) -> None:
    made = []

    def record_once() -> None:
        made.append(at_once(100, rule, length))
        made[0].record(np.arange(1.0, 101))

    assert peak_bytes(record_once) < 10e6
    assert made[0].thresholds.tolist() == list(range(1, 101))


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard(), Standard(decay=0.9)])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("length", [10**9, 10**12, 2**62])
def test_two_norms_of_a_long_past_take_no_memory(rule: Rule, rows: int, length: int) -> None:
    """Whatever number of norms a state says were recorded."""
    history = at_once(rows, rule, length)

    def load_and_go_on() -> None:
        history.write(range(rows), [np.float32([1.0, 2.0])] * rows, [2**62] * rows)
        history.record([3.0] * rows)

    assert peak_bytes(load_and_go_on) < 1e6
    assert history.read([rows - 1])[0][0].tolist() == [1.0, 2.0, 3.0]
    assert history.recorded.tolist() == [2**62 + 1] * rows


def test_memory_follows_what_is_held() -> None:
    """161 rows of 1,000 norms, in histories that could hold a thousand times as many."""
    history = History(161, Quantile(0.9), 10**6)
    stream = make_stream("noise", 0, 1000, 161)
    assert peak_bytes(lambda: record_all(history, stream)) < 8 * 161 * 1000 * 4 + stream.nbytes
    assert allocated(history) <= 2 * 161 * 1000 * 4


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard(), Standard(decay=0.999)])
def test_one_long_row_beside_many_empty_ones(rule: Rule) -> None:
    """It does not make all of them long, whether it was loaded or filled."""
    rows, held = 3000, 100_000
    history = at_once(rows, rule, 10**6)
    windows = [np.empty(0, np.float32)] * (rows - 1) + [np.arange(1, held + 1, dtype=np.float32)]

    def load_and_go_on() -> None:
        history.write(range(rows), windows, [len(window) for window in windows])
        for norm in (1.0, 2.0):
            history.record([norm] + [math.nan] * (rows - 2) + [norm])

    # All rows as long as the longest would be 1.2 GB.
    assert peak_bytes(load_and_go_on) < 40e6
    assert allocated(history) <= 2 * held * 4 + rows * 16 * 4
    assert history.lengths.tolist() == [2] + [0] * (rows - 2) + [held + 2]


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 700), few_and_many)
def test_windows_grow_by_doubling_up_to_the_history_length(
    length: int, steps: int, rows: int
) -> None:
    history = History(rows, Quantile(0.5), length)
    for _ in range(steps):
        history.record([1.0] + [math.nan] * (rows - 1))
    first = allocated(history) // 4 - (rows - 1) * min(16, length)
    assert min(steps, length) <= first <= min(max(16, 2 * steps), length)


ADVERSARIES: dict[str, Callable[[int, Random, int], Norms]] = {
    "falling": lambda step, random, rows: np.full(rows, 1e-3 * 0.99**step),
    "rising": lambda step, random, rows: np.full(rows, 100.0 + step),
    "alternating": lambda step, random, rows: np.full(rows, [1e-3, 1e3][step % 2] + 1e-6 * step),
    "jumping": lambda step, random, rows: random.lognormal(size=rows) * 10.0 ** (step // 50 % 3),
    "together": lambda step, random, rows: np.full(rows, random.lognormal()),
}


@pytest.mark.parametrize("rows", [60, 161])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_no_single_step_cuts_all_bands_anew(
    adversary: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a model move together, but their bands are cut a few at a time."""
    length = 1000
    cut: list[int] = []
    original = np.sort

    def counted(values: npt.NDArray[np.float32], **options: Any) -> npt.NDArray[np.float32]:
        cut[-1] += values.size // values.shape[-1]
        return original(values, **options)

    history = History(rows, Quantile(0.9), length)
    random = np.random.default_rng(0)
    for step in range(2 * length):
        cut.append(0)
        norms = ADVERSARIES[adversary](step, random, rows)
        with monkeypatch.context() as patch:
            patch.setattr(np, "sort", counted)
            found = history.record(norms)
        if step % 499 == 0:
            windows, _ = history.read(range(rows))
            expected = [threshold(Quantile(0.9), window) for window in windows]
            assert found.thresholds.tolist() == expected
    width = 2 * math.isqrt(length)
    assert 0 < max(cut) <= math.ceil(rows / (width // 4))
    # As work: a band is cut once in as many steps as its order statistics take to cross it.
    assert sum(cut[length:]) <= rows * length / (width // 8)


# -- rows --------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(kinds, seeds, rules, history_lengths, st.data(), pasts)
@pytest.mark.parametrize("count", [4, 12])
def test_what_is_read_from_some_rows_can_be_written_to_others(
    count: int,
    kind: str,
    seed: int,
    rule: Rule,
    length: int,
    data: st.DataObject,
    past: dict[str, Any],
) -> None:
    chosen = data.draw(st.sets(st.integers(0, count - 1)))
    source, target = (History(count, rule, length, **past) for _ in range(2))
    record_all(source, make_stream(kind, seed, 50, count))
    record_all(target, make_stream(kind, seed + 1, 50, count))
    before, expected = target.thresholds, source.thresholds
    rows = sorted(chosen)
    target.write(rows, *source.read(rows))
    others = [row for row in range(count) if row not in chosen]
    assert target.thresholds[rows].tolist() == expected[rows].tolist()
    assert target.thresholds[others].tolist() == before[others].tolist()
    windows, recorded = target.read(rows)
    for window, original in zip(windows, source.read(rows)[0]):
        assert window.tolist() == original.tolist()
    assert recorded.tolist() == [50] * len(rows)


@pytest.mark.parametrize("more", [0, 9])
def test_of_a_longer_window_the_newest_norms_stay(more: int) -> None:
    history = History(2 + more, Quantile(0.0), 3)
    history.write([1], [np.arange(1, 8, dtype=np.float32)], [100])
    windows, recorded = history.read([1, 0])
    assert [window.tolist() for window in windows] == [[5.0, 6.0, 7.0], []]
    assert recorded.tolist() == [100, 0]
    assert history.thresholds.tolist()[:2] == [math.inf, 5.0]
    history.record([math.nan, 9.0] + [math.nan] * more)  # 5 leaves
    assert history.thresholds.tolist()[:2] == [math.inf, 6.0]


@pytest.mark.parametrize(
    ("rows", "windows", "recorded", "error", "says"),
    [
        ([0, 1], [[1.0]], [1, 1], ValueError, "2 rows, 1 windows and 2 numbers"),
        ([0], [[1.0]], [], ValueError, "1 rows, 1 windows and 0 numbers"),
        ([], [[1.0]], [1], ValueError, "0 rows, 1 windows and 1 numbers"),
        ([0, 1], [[1.0], [2.0, 0.0]], [1, 2], ValueError, "window of row 1 is not .* one is zero"),
        ([1], [[np.nan]], [1], ValueError, "window of row 1 .* zero, negative, NaN or infinite"),
        ([1], [[np.inf]], [1], ValueError, "window of row 1 is not"),
        ([1], [[-1.0]], [1], ValueError, "window of row 1 is not"),
        ([1], [[1.0, 1e39]], [2], ValueError, "window of row 1 is not"),
        ([1], [[1e-39]], [1], ValueError, "window of row 1 is not"),
        ([1], [[[1.0]]], [1], ValueError, "window of row 1 is not"),
        ([0], [[1.0, 2.0]], [1], ValueError, "row 0 has 2 norms, .* recorded 1; .* from 2 to 2"),
        ([0], [[1.0]], [2**62 + 1], ValueError, r"must be from 1 to 2\*\*62"),
        ([0], [[1.0]], [-1], ValueError, r"must be from 1 to 2\*\*62"),
        ([0], [[1.0]], [2.7], TypeError, "recorded must be ints, but got 2.7 for row 0"),
        ([0], [[1.0]], [True], TypeError, "recorded must be ints, but got True for row 0"),
    ],
)
def test_what_no_history_could_hold_is_not_written(
    rows: list[int],
    windows: list[Any],
    recorded: list[Any],
    error: type[Exception],
    says: str,
) -> None:
    history = History(2, Quantile(0.5), 3)
    history.record([1.0, 2.0])
    before = saved(history)
    with pytest.raises(error, match=says):
        history.write(rows, [np.array(window) for window in windows], recorded)
    assert saved(history) == before
    assert history.thresholds.tolist() == [1.0, 2.0]


@settings(max_examples=40)
@given(kinds, seeds, rules, history_lengths, row_counts, pasts)
def test_after_a_reset_it_is_as_new(
    kind: str, seed: int, rule: Rule, length: int, rows: int, past: dict[str, Any]
) -> None:
    used, new = (History(rows, rule, length, **past) for _ in range(2))
    stream = make_stream(kind, seed, 40, rows, 0.1)
    record_all(used, stream)
    used.reset()
    assert saved(used) == saved(new)
    assert record_all(used, stream).tolist() == record_all(new, stream).tolist()


def test_a_history_without_rows() -> None:
    history = History(0, Quantile(0.5), 10)
    assert history.record([]).coefficients.tolist() == []
    assert history.thresholds.tolist() == []
    assert history.read([])[0] == []
    with pytest.raises(ValueError, match="without rows has no state"):
        history.state_dict()


@pytest.mark.parametrize(
    ("rows", "rule", "error", "says"),
    [
        (2, [Quantile()], ValueError, "one rule, or one a row: 2, but got 1"),
        (-1, Quantile(), ValueError, "one a row: -1, but got 0"),
        (
            1,
            0.9,
            TypeError,
            r"must be a Rule such as Quantile\(0\.9\), .* but got 0\.9 of type float",
        ),
        (1, Quantile, TypeError, "must be a Rule such as"),
        (
            1,
            [0.9],
            TypeError,
            r"must be a Rule such as Quantile\(0\.9\), but got 0\.9 of type float",
        ),
        (1, [Quantile], TypeError, "must be a Rule such as"),
        (2, [Quantile(), Standard()], TypeError, r"of one class, .* got Quantile\(.* and Standard"),
        (
            2,
            [Standard(), Standard(decay=0.9)],
            TypeError,
            "of one class, with settings that differ in",
        ),
    ],
)
def test_wrong_rules_are_refused(rows: int, rule: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        History(rows, rule)


def test_repr_names_what_it_was_made_with() -> None:
    assert repr(History(2, Quantile(0.5), 10)) == (
        "History(rows=2, rule=Quantile(quantile=0.5, factor=1.0), history_length=10)"
    )
    assert repr(History(3, [Quantile(0.5), Quantile(0.9), Quantile(0.5)])) == (
        "History(rows=3, rule=Quantile(quantile=0.5, factor=1.0), "
        "Quantile(quantile=0.9, factor=1.0), history_length=1000)"
    )


# -- settings that change ----------------------------------------------------------------------


@settings(max_examples=40)
@given(kinds, seeds, st.data(), history_lengths, row_counts, st.integers(0, 60))
def test_new_numbers_count_from_the_next_step_on_and_keep_the_windows(
    kind: str, seed: int, data: st.DataObject, length: int, rows: int, change: int
) -> None:
    decay = data.draw(st.sampled_from([None, 0.5]))
    others = [Quantile(0.2), Quantile(0.7, 2.0)] if decay is None else [Standard(1.0, 0.5)] * 2
    old = GroupSettings(others[0], length)
    new = GroupSettings(others[1], length, max_norm=3.0, warmup_steps=4)
    before, after = History.of([old] * rows), History.of([new] * rows)
    stream = make_stream(kind, seed, 70, rows, 0.1)
    record_all(before, stream[:change])
    record_all(after, stream[:change])
    before.settings = [new] * rows
    assert before.settings == (new,) * rows
    assert before.thresholds.tolist() == after.thresholds.tolist()
    assert (
        record_all(before, stream[change:]).tolist() == record_all(after, stream[change:]).tolist()
    )
    assert saved(before) == saved(after)


@pytest.mark.parametrize(
    "other",
    [
        [GroupSettings(Quantile(0.5), 10)],
        [GroupSettings(Quantile(0.5), 10), GroupSettings(Quantile(0.5), 11)],
        [GroupSettings(Standard(), 10)] * 2,
        [GroupSettings(Quantile(0.5), 10, include_current=False)] * 2,
    ],
)
def test_settings_that_differ_in_more_than_numbers_change_nothing(
    other: list[GroupSettings],
) -> None:
    history = History(2, Quantile(0.5), 10)
    history.record([1.0, 2.0])
    before = saved(history)
    with pytest.raises(ValueError, match="Make a new History for others"):
        history.settings = other
    assert saved(history) == before


# -- saved and loaded --------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    kinds, seeds, shares, rules, history_lengths, st.lists(st.integers(0, 150), max_size=4), pasts
)
@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_to_save_load_and_go_on_is_never_to_have_stopped(
    rows: int,
    kind: str,
    seed: int,
    bad: float,
    rule: Rule,
    length: int,
    cuts: list[int],
    past: dict[str, Any],
) -> None:
    straight, resumed = (History(rows, rule, length, **past) for _ in range(2))
    for step, norms in enumerate(make_stream(kind, seed, 150, rows, bad)):
        if step in cuts:
            state_dict = resumed.state_dict()
            resumed = History(rows, rule, length, **past)
            resumed.load_state_dict(state_dict)
        a, b = straight.record(norms), resumed.record(norms)
        assert a.thresholds.tolist() == b.thresholds.tolist()
        assert a.coefficients.tolist() == b.coefficients.tolist()
    assert saved(straight) == saved(resumed)


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard(), Standard(decay=0.999)])
@pytest.mark.parametrize("rows", [2, 9])
def test_the_same_through_a_file_with_long_windows(rule: Rule, rows: int, tmp_path: Path) -> None:
    """A window of 1,500 has dozens of blocks or a band that is a fraction of it."""
    stream = make_stream("walk", 5, 2_200, rows, bad=0.1)
    straight, resumed = History(rows, rule, 1500), History(rows, rule, 1500)
    record_all(resumed, stream[:1_823])
    resumed.save(tmp_path / "history")
    resumed = History(rows, rule, 1500)
    resumed.load(tmp_path / "history")
    expected = record_all(straight, stream)[1_823:]
    assert record_all(resumed, stream[1_823:]).tolist() == expected.tolist()
    assert saved(straight) == saved(resumed)


@settings(max_examples=30)
@given(kinds, seeds, plain_rules, st.integers(1, 80), st.integers(1, 80), few_and_many)
def test_a_window_goes_on_in_a_history_of_another_length(
    kind: str, seed: int, rule: Rule, first: int, second: int, rows: int
) -> None:
    """A norm's place in the ring changes then; sums over places must still be right."""
    source, target = at_once(rows, rule, first), at_once(rows, rule, second)
    stream = make_stream(kind, seed, 240, rows)
    record_all(source, stream[:90])
    with (
        pytest.warns(UserWarning, match="other settings")
        if first != second
        else contextlib.nullcontext()
    ):
        target.load_state_dict(source.state_dict())
    held = [usable(norms[max(0, 90 - first) : 90])[-second:] for norms in stream.T]
    for step in range(90, 240):
        found = target.record(stream[step]).thresholds
        for row in (0, rows - 1):
            window = np.concatenate([held[row], usable(stream[90 : step + 1, row])])[-second:]
            assert found[row] == pytest.approx(threshold(rule, window), rel=1e-12, abs=0)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("rule", [Quantile(0.9), Standard(), Standard(decay=0.9, shrink=True)])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_copy_goes_on_by_itself(
    make_copy: Callable[[History], History], rule: Rule, rows: int
) -> None:
    stream = make_stream("noise", 3, 100, rows)
    history = History(rows, rule, 40, max_norm=9.0)
    record_all(history, stream[:60])
    other, before = make_copy(history), saved(history)
    assert other.settings == history.settings
    expected = record_all(other, stream[60:])
    assert saved(history) == before
    assert record_all(history, stream[60:]).tolist() == expected.tolist()


def test_runs_of_equal_rules_are_the_groups_of_the_state() -> None:
    each = [Quantile(0.5), Quantile(0.5), Quantile(0.9), Quantile(0.5)]
    history = History(4, each, 10)
    history.record([1.0, 2.0, 3.0, 4.0])
    state = State.from_dict(history.state_dict())
    assert (state.rule, state.framework, state.mode) == ("quantile", "numpy", "parameter")
    assert [(g.settings["quantile"], g.values.tolist()) for g in state.groups] == [
        (0.5, [1.0, 2.0]),
        (0.9, [3.0]),
        (0.5, [4.0]),
    ]
    loaded = History(4, each, 10)
    loaded.load_state_dict(history.state_dict())
    assert loaded.thresholds.tolist() == [1.0, 2.0, 3.0, 4.0]
