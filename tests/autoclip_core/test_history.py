"""Histories: what they remember, the thresholds and coefficients that follow, and what is saved."""

from __future__ import annotations

import copy
import math
import pickle
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import SMALLEST_NORM, History, Quantile, Rule, Standard, State

Norms = npt.NDArray[np.float64]
Shape = tuple[int, int]
Random = np.random.Generator


# -- streams of norms, good and bad ------------------------------------------------------------


def rising(random: Random, shape: Shape) -> Norms:
    return np.arange(1.0, shape[0] + 1)[:, None] * random.lognormal(size=shape[1])


def levels(random: Random, shape: Shape) -> Norms:
    level = np.where(np.arange(shape[0]) // 40 % 2, 1e3, 1.0)
    return level[:, None] * random.lognormal(size=shape)


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
}

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
    """What NumPy says that the threshold of a window is."""
    values = window.astype(np.float64)
    if isinstance(rule, Quantile):
        return float(np.quantile(values, rule.quantile))
    return float(values.mean() + rule.settings["deviations"] * values.std())


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
quantiles = st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]) | st.floats(0, 1)
quantile_rules = st.builds(Quantile, quantiles)
standard_rules = st.builds(Standard, st.sampled_from([0.0, 2.0]) | st.floats(0, 10))
rules = quantile_rules | standard_rules

# NumPy interpolates from the other end where that is nearer, with one more rounding.
ROUNDING = 4 * sys.float_info.epsilon


# -- thresholds --------------------------------------------------------------------------------


@given(
    st.lists(st.floats(min_value=0) | st.sampled_from([*NOTHING, 1.0, 2.0, 1e38]), min_size=1),
    quantiles,
    st.integers(1, 8),
)
def test_any_few_norms_have_numpys_quantile(norms: list[float], q: float, length: int) -> None:
    history = History(1, Quantile(q), length)
    for k, norm in enumerate(norms):
        found = history.record([norm]).thresholds[0]
        window = usable(norms[: k + 1])[-length:]
        if len(window):
            assert found == pytest.approx(threshold(Quantile(q), window), rel=ROUNDING, abs=0)
        else:
            assert found == math.inf


@settings(max_examples=60)
@given(kinds, seeds, shares, quantile_rules, history_lengths)
def test_thresholds_are_numpys_quantiles_of_the_last_usable_norms(
    kind: str, seed: int, bad: float, rule: Quantile, length: int
) -> None:
    """Windows up to several times the band that a row keeps, through all of its life."""
    history = History(1, rule, length)
    stream = make_stream(kind, seed, min(3 * length + 20, 500), 1, bad)
    for k, found in enumerate(record_all(history, stream)[:, 0]):
        window = usable(stream[: k + 1])[-length:]
        if len(window):
            assert found == pytest.approx(threshold(rule, window), rel=ROUNDING, abs=0)
    (window,), recorded = history.read([0])
    assert window.tolist() == usable(stream)[-length:].tolist()
    assert recorded.tolist() == [len(usable(stream))]


@settings(max_examples=60)
@given(kinds, seeds, shares, standard_rules, history_lengths)
def test_thresholds_are_numpys_mean_and_deviation_of_the_last_usable_norms(
    kind: str, seed: int, bad: float, rule: Standard, length: int
) -> None:
    history = History(1, rule, length)
    stream = make_stream(kind, seed, min(3 * length + 20, 500), 1, bad)
    for k, found in enumerate(record_all(history, stream)[:, 0]):
        window = usable(stream[: k + 1])[-length:]
        if len(window):
            assert found == pytest.approx(threshold(rule, window), rel=1e-12, abs=0)


def test_bands_that_are_a_small_part_of_their_windows() -> None:
    """Every kind of stream at once; checked now and then, since NumPy takes its time."""
    qs = [0.0, 0.25, 0.9, 1.0]
    stream = np.hstack([make_stream(kind, 0, 8000, len(qs)) for kind in KINDS])
    each = [Quantile(q) for q in qs] * len(KINDS)
    history = History(len(each), each, 2500)
    for k, norms in enumerate(stream):
        found = history.record(norms).thresholds
        if k % 397 == 0:
            window = stream[max(0, k - 2499) : k + 1]
            expected = [threshold(rule, usable(window[:, row])) for row, rule in enumerate(each)]
            assert found.tolist() == pytest.approx(expected, rel=ROUNDING, abs=0)


@given(seeds, st.integers(1, 120), st.sampled_from([1e18, 1e30, 3e38]))
def test_a_spike_that_has_left_leaves_nothing_behind(seed: int, length: int, spike: float) -> None:
    """Running sums would have lost the norms beside it, and gone negative afterwards."""
    history = History(1, Standard(2.0), length)
    calm = make_stream("noise", seed, length, 1)
    assert history.record([spike]).thresholds[0] == np.float32(spike)
    found = record_all(history, calm)[-1, 0]
    assert found == pytest.approx(threshold(Standard(2.0), usable(calm)), rel=1e-12, abs=0)
    undisturbed = History(1, Standard(2.0), length)
    undisturbed.write([0], [usable(calm)], [length + 1])
    assert found == undisturbed.thresholds[0]  # bit for bit


def test_a_constant_norm_has_no_deviation() -> None:
    history = History(1, Standard(2.0), 100)
    reports = [history.record([0.1]) for _ in range(300)]
    assert {report.thresholds[0] for report in reports} == {np.float32(0.1)}
    assert {report.coefficients[0] for report in reports} == {1.0}


def test_rows_have_rules_of_their_own() -> None:
    each = [Quantile(q) for q in (0.0, 0.25, 0.5, 1.0)]
    history = History(4, each, 50)
    assert history.rules == tuple(each)
    stream = make_stream("walk", 1, 120, 4)
    record_all(history, stream)
    for row, rule in enumerate(each):
        expected = threshold(rule, usable(stream[-50:, row]))
        assert history.thresholds[row] == pytest.approx(expected, rel=ROUNDING)


# -- coefficients ------------------------------------------------------------------------------


@given(kinds, seeds, shares, rules, history_lengths)
def test_a_coefficient_is_the_threshold_over_the_norm_and_at_most_one(
    kind: str, seed: int, bad: float, rule: Rule, length: int
) -> None:
    history = History(3, rule, length)
    for norms in make_stream(kind, seed, 60, 3, bad):
        before = history.recorded
        report = history.record(norms)
        counted = history.recorded > before
        assert counted.tolist() == [len(usable(norm)) == 1 for norm in norms]
        assert (report.coefficients[~counted] == 1.0).all()
        rounded = usable(norms)
        expected = np.minimum(1.0, report.thresholds[counted] / rounded.astype(np.float64))
        assert report.coefficients[counted].tolist() == expected.tolist()
        # The gradient has the norm itself, which the rounded one differs from by 2^-24 of it.
        clipped = norms[counted] * report.coefficients[counted]
        assert (clipped <= report.thresholds[counted] * (1 + 2.0**-23)).all()


@given(kinds, seeds, shares, history_lengths)
def test_the_largest_norm_as_a_threshold_never_clips(
    kind: str, seed: int, bad: float, length: int
) -> None:
    history = History(2, Quantile(1.0), length)
    for norms in make_stream(kind, seed, 100, 2, bad):
        assert history.record(norms).coefficients.tolist() == [1.0, 1.0]


@given(rules, history_lengths, st.floats(SMALLEST_NORM, 3e38))
def test_the_first_norm_is_its_own_threshold(rule: Rule, length: int, norm: float) -> None:
    report = History(1, rule, length).record([norm])
    assert report.thresholds.tolist() == [np.float32(norm)]
    assert report.coefficients.tolist() == [1.0]


@given(kinds.filter(lambda kind: kind not in ("any size", "spikes")), seeds, rules, history_lengths)
@pytest.mark.parametrize("exponent", [-40, -23, 1, 40])  # 1e-12 to 1e12
def test_a_power_of_two_changes_no_coefficient(
    exponent: int, kind: str, seed: int, rule: Rule, length: int
) -> None:
    plain, scaled = History(2, rule, length), History(2, rule, length)
    for norms in make_stream(kind, seed, 50, 2):
        a, b = plain.record(norms), scaled.record(norms * 2.0**exponent)
        assert (a.thresholds * 2.0**exponent).tolist() == b.thresholds.tolist()
        assert a.coefficients.tolist() == b.coefficients.tolist()


@given(
    kinds.filter(lambda kind: kind not in ("any size", "spikes")),
    seeds,
    quantile_rules | st.builds(Standard, st.floats(0, 3)),
    history_lengths,
    st.floats(-12, 12),
)
def test_any_constant_changes_coefficients_by_rounding_only(
    kind: str, seed: int, rule: Rule, length: int, exponent: float
) -> None:
    """Each norm is rounded to float32, by 2^-24 of it; each deviation adds as much again."""
    scale = 10.0**exponent
    plain, scaled = History(2, rule, length), History(2, rule, length)
    for norms in make_stream(kind, seed, 50, 2):
        a, b = plain.record(norms), scaled.record(norms * scale)
        np.testing.assert_allclose(b.thresholds, a.thresholds * scale, rtol=8 * 2.0**-24)
        np.testing.assert_allclose(b.coefficients, a.coefficients, rtol=12 * 2.0**-24)


# -- what is recorded --------------------------------------------------------------------------


@given(kinds, seeds, rules, history_lengths, st.lists(st.integers(0, 60), max_size=10))
def test_a_storm_of_bad_norms_leaves_the_history_of_the_clean_steps(
    kind: str, seed: int, rule: Rule, length: int, storms: list[int]
) -> None:
    clean, stormy = History(2, rule, length), History(2, rule, length)
    for step, norms in enumerate(make_stream(kind, seed, 60, 2)):
        for k in range(storms.count(step)):
            before = stormy.thresholds.tolist()
            report = stormy.record([NOTHING[k % len(NOTHING)], NOTHING[-1 - k % len(NOTHING)]])
            assert report.thresholds.tolist() == before
            assert report.coefficients.tolist() == [1.0, 1.0]
        assert clean.record(norms).thresholds.tolist() == stormy.record(norms).thresholds.tolist()
    assert saved(clean) == saved(stormy)


def test_the_smallest_norm_that_counts() -> None:
    """float32's smallest normal number; what is below may be zero on one device and not another."""
    below = float(np.nextafter(np.float32(SMALLEST_NORM), np.float32(0)))
    largest = float(np.finfo(np.float32).max)
    history = History(5, Quantile(0.5), 10)
    report = history.record([SMALLEST_NORM, below, largest, largest * (1 + 2.0**-26), 2.0**128])
    assert history.recorded.tolist() == [1, 0, 1, 1, 0]
    inf = math.inf
    assert report.thresholds.tolist() == [SMALLEST_NORM, inf, largest, largest, inf]


@settings(max_examples=40)
@given(kinds, seeds, shares, rules, history_lengths, st.permutations(range(4)))
def test_rows_do_not_leak_into_one_another(
    kind: str, seed: int, bad: float, rule: Rule, length: int, order: list[int]
) -> None:
    """Whoever records when, and in whatever order the rows stand: each is as if it were alone."""
    stream = make_stream(kind, seed, 80, 4, bad)
    together, shuffled = History(4, rule, length), History(4, rule, length)
    alone = [History(1, rule, length) for _ in range(4)]
    # Sums over blocks of slots may be split otherwise where another row has more of them.
    tolerance = 0.0 if isinstance(rule, Quantile) else ROUNDING
    for norms in stream:
        report, other = together.record(norms), shuffled.record(norms[order])
        assert report.thresholds[order].tolist() == other.thresholds.tolist()
        single = [history.record([norm]).thresholds[0] for history, norm in zip(alone, norms)]
        assert report.thresholds.tolist() == pytest.approx(single, rel=tolerance, abs=0)
    for row, history in enumerate(alone):
        (window,), (recorded,) = together.read([row])
        assert window.tolist() == usable(stream[:, row])[-length:].tolist()
        assert (len(window), recorded) == (history.lengths[0], history.recorded[0])
        assert (len(window), recorded) == (together.lengths[row], together.recorded[row])


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard()])
@pytest.mark.parametrize(
    "norms", [[1.0, -1.0], [np.nan, -1e-300], [-math.inf, 1.0], [-5e-324, math.inf]]
)
def test_a_negative_norm_raises_and_records_nothing(rule: Rule, norms: list[float]) -> None:
    history = History(2, rule, 10)
    history.record([1.0, 2.0])
    before = saved(history)
    with pytest.raises(ValueError, match=rf"never negative, but got {np.nanmin(norms)}\."):
        history.record(norms)
    assert saved(history) == before


@pytest.mark.parametrize("norms", [1.0, [], [1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], [[1.0], [2.0]]])
def test_a_wrong_shape_raises_and_records_nothing(norms: Any) -> None:
    history = History(2, Quantile(0.9), 10)
    before = saved(history)
    says = f"record takes one norm a row, shape (2,), but got shape {np.shape(norms)}."
    with pytest.raises(ValueError, match=re.escape(says)):
        history.record(norms)
    assert saved(history) == before


def test_a_report_keeps_what_it_said() -> None:
    """Neither later steps nor the caller's own buffer change it, nor does it change the history."""
    history = History(2, Quantile(0.5), 10)
    buffer = np.array([3.0, 4.0])
    report = history.record(buffer)
    buffer[:] = 1.0
    history.record(buffer)
    assert report.norms.tolist() == [3.0, 4.0]
    assert report.thresholds.tolist() == [3.0, 4.0]
    history.record(buffer).thresholds[:] = 0.0
    history.thresholds[:] = 0.0
    history.recorded[:] = 0
    history.lengths[:] = 0
    assert history.thresholds.tolist() == [1.0, 1.0]
    assert history.recorded.tolist() == history.lengths.tolist() == [3, 3]


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard()])
@pytest.mark.parametrize("length", [10**6, 10**9, 2**63 - 1])
def test_a_long_history_costs_memory_only_once_it_is_filled(rule: Rule, length: int) -> None:
    tracemalloc.start()
    history = History(100, rule, length)
    history.record(np.arange(1.0, 101))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert history._windows.values.nbytes <= 100 * 16 * 4
    assert peak < 10e6
    assert history.thresholds.tolist() == list(range(1, 101))


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 700))
def test_windows_grow_by_doubling_up_to_the_history_length(length: int, steps: int) -> None:
    history = History(2, Quantile(0.5), length)
    for _ in range(steps):
        history.record([1.0, math.nan])
    capacity = history._windows.values.shape[1]
    assert min(steps, length) <= capacity <= min(max(16, 2 * steps), length)


# -- rows --------------------------------------------------------------------------------------


@given(kinds, seeds, rules, history_lengths, st.integers(0, 60), st.integers(0, 3))
def test_added_rows_are_empty_and_change_nothing_for_the_others(
    kind: str, seed: int, rule: Rule, length: int, steps: int, count: int
) -> None:
    history, alone = History(2, rule, length), History(2, rule, length)
    stream = make_stream(kind, seed, steps + 20, 2 + count)
    record_all(history, stream[:steps, :2])
    record_all(alone, stream[:steps, :2])
    history.add_rows([rule] * count)
    assert history.rows == 2 + count
    assert history.recorded.tolist() == [steps] * 2 + [0] * count
    assert history.thresholds.tolist() == alone.thresholds.tolist() + [math.inf] * count
    for norms in stream[steps:]:
        found = history.record(norms).thresholds
        assert found[:2].tolist() == alone.record(norms[:2]).thresholds.tolist()
    late = History(count, rule, length) if count else None
    if late:
        found = record_all(late, stream[steps:, 2:])[-1]
        assert history.thresholds[2:].tolist() == pytest.approx(found.tolist(), rel=ROUNDING, abs=0)


def test_added_rows_of_another_class_change_nothing() -> None:
    history = History(1, Quantile(0.5), 10)
    before = saved(history)
    with pytest.raises(TypeError, match="rules of one class, but got Quantile and Standard"):
        history.add_rows([Standard()])
    assert history.rows == 1
    assert saved(history) == before


@given(kinds, seeds, rules, history_lengths, st.sets(st.integers(0, 3)))
def test_what_is_read_from_some_rows_can_be_written_to_others(
    kind: str, seed: int, rule: Rule, length: int, chosen: set[int]
) -> None:
    source, target = History(4, rule, length), History(4, rule, length)
    record_all(source, make_stream(kind, seed, 50, 4))
    record_all(target, make_stream(kind, seed + 1, 50, 4))
    before, expected = target.thresholds, source.thresholds
    rows = sorted(chosen)
    target.write(rows, *source.read(rows))
    others = [row for row in range(4) if row not in chosen]
    assert target.thresholds[rows].tolist() == expected[rows].tolist()
    assert target.thresholds[others].tolist() == before[others].tolist()
    windows, recorded = target.read(rows)
    for window, original in zip(windows, source.read(rows)[0]):
        assert window.tolist() == original.tolist()
    assert recorded.tolist() == [50] * len(rows)


def test_of_a_longer_window_the_newest_norms_stay() -> None:
    history = History(2, Quantile(0.0), 3)
    history.write([1], [np.arange(1, 8, dtype=np.float32)], [100])
    windows, recorded = history.read([1, 0])
    assert [window.tolist() for window in windows] == [[5.0, 6.0, 7.0], []]
    assert recorded.tolist() == [100, 0]
    assert history.thresholds.tolist() == [math.inf, 5.0]
    history.record([math.nan, 9.0])  # 5 leaves
    assert history.thresholds.tolist() == [math.inf, 6.0]


@pytest.mark.parametrize(
    ("rows", "windows", "recorded", "says"),
    [
        ([0, 1], [[1.0]], [1, 1], "2 rows, 1 windows and 2 numbers"),
        ([0], [[1.0]], [], "1 rows, 1 windows and 0 numbers"),
        ([], [[1.0]], [1], "0 rows, 1 windows and 1 numbers"),
        ([0, 1], [[1.0], [2.0, 0.0]], [1, 2], "window of row 1 holds a norm that is zero"),
        ([1], [[np.nan]], [1], "window of row 1 holds a norm that is zero, negative, NaN or"),
        ([1], [[np.inf]], [1], "window of row 1 holds"),
        ([1], [[-1.0]], [1], "window of row 1 holds"),
        ([0], [[1.0, 2.0]], [1], "window of row 0 has 2 norms, which is more than the 1"),
    ],
)
def test_what_no_history_could_hold_is_not_written(
    rows: list[int], windows: list[list[float]], recorded: list[int], says: str
) -> None:
    history = History(2, Quantile(0.5), 3)
    history.record([1.0, 2.0])
    before = saved(history)
    with pytest.raises(ValueError, match=says):
        history.write(rows, [np.array(window, np.float32) for window in windows], recorded)
    assert saved(history) == before


def test_a_history_without_rows() -> None:
    history = History(0, Quantile(0.5), 10)
    assert history.record([]).coefficients.tolist() == []
    assert history.thresholds.tolist() == []
    with pytest.raises(ValueError, match="without rows has no state"):
        history.state_dict()
    history.add_rows([Quantile(0.5)])
    assert history.record([2.0]).thresholds.tolist() == [2.0]


@pytest.mark.parametrize(
    ("rows", "rule", "error", "says"),
    [
        (2, [Quantile()], ValueError, "one rule, or one a row: 2, but got 1"),
        (-1, Quantile(), ValueError, "one a row: -1, but got 0"),
        (1, [0.9], TypeError, r"takes a Rule such as Quantile\(0\.9\), but got 0\.9 of type float"),
        (1, [Quantile], TypeError, "takes a Rule such as"),
        (2, [Quantile(), Standard()], TypeError, "of one class, but got Quantile and Standard"),
    ],
)
def test_wrong_rules_are_refused(rows: int, rule: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        History(rows, rule)


def test_repr_names_what_it_was_made_with() -> None:
    assert repr(History(2, Quantile(0.5), 10)) == (
        "History(rows=2, rule=Quantile(quantile=0.5), history_length=10)"
    )
    assert repr(History(3, [Quantile(0.5), Quantile(0.9), Quantile(0.5)])) == (
        "History(rows=3, rule=Quantile(quantile=0.5), Quantile(quantile=0.9), history_length=1000)"
    )


# -- saved and loaded --------------------------------------------------------------------------


@settings(max_examples=60)
@given(kinds, seeds, shares, rules, history_lengths, st.lists(st.integers(0, 150), max_size=4))
def test_to_save_load_and_go_on_is_never_to_have_stopped(
    kind: str, seed: int, bad: float, rule: Rule, length: int, cuts: list[int]
) -> None:
    straight, resumed = History(3, rule, length), History(3, rule, length)
    for step, norms in enumerate(make_stream(kind, seed, 150, 3, bad)):
        if step in cuts:
            state_dict = resumed.state_dict()
            resumed = History(3, rule, length)
            resumed.load_state_dict(state_dict)
        a, b = straight.record(norms), resumed.record(norms)
        assert a.thresholds.tolist() == b.thresholds.tolist()
        assert a.coefficients.tolist() == b.coefficients.tolist()
    assert saved(straight) == saved(resumed)


@pytest.mark.parametrize("rule", [Quantile(0.9), Standard()])
def test_the_same_through_a_file_with_long_windows(rule: Rule, tmp_path: Path) -> None:
    """A window of 3,000 has more than a hundred blocks or a band that is a fraction of it."""
    stream = make_stream("walk", 5, 10_000, 2, bad=0.1)
    straight, resumed = History(2, rule, 3000), History(2, rule, 3000)
    record_all(resumed, stream[:7_123])
    resumed.save(tmp_path / "history")
    resumed = History(2, rule, 3000)
    resumed.load(tmp_path / "history")
    expected = record_all(straight, stream)[7_123:]
    assert record_all(resumed, stream[7_123:]).tolist() == expected.tolist()
    assert saved(straight) == saved(resumed)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("rule", [Quantile(0.9), Standard()])
def test_a_copy_goes_on_by_itself(make_copy: Callable[[History], History], rule: Rule) -> None:
    stream = make_stream("noise", 3, 100, 2)
    history = History(2, rule, 40)
    record_all(history, stream[:60])
    other, before = make_copy(history), saved(history)
    expected = record_all(other, stream[60:])
    assert saved(history) == before
    assert record_all(history, stream[60:]).tolist() == expected.tolist()


def test_runs_of_equal_rules_are_the_groups_of_the_state() -> None:
    each = [Quantile(0.5), Quantile(0.5), Quantile(0.9), Quantile(0.5)]
    history = History(4, each, 10)
    history.record([1.0, 2.0, 3.0, 4.0])
    state = State.from_dict(history.state_dict())
    assert (state.rule, state.framework, state.global_clipping) == ("quantile", "numpy", False)
    assert [(g.settings["quantile"], g.values.tolist()) for g in state.groups] == [
        (0.5, [1.0, 2.0]),
        (0.9, [3.0]),
        (0.5, [4.0]),
    ]
    loaded = History(4, each, 10)
    loaded.load_state_dict(history.state_dict())
    assert loaded.thresholds.tolist() == [1.0, 2.0, 3.0, 4.0]
