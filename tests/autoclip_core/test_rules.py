"""Rules: the built-in ones, and rules that no file of the packages knows of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Row
from rules import RULES as SHARED

from autoclip.core import (
    History,
    Quantile,
    Rule,
    Standard,
    register_rule,
    setting,
)
from autoclip.core.adapter import RULES, GroupSettings, needs_order, rows_by_storage


@dataclass(frozen=True)
class Mad(Rule):
    """Median plus some median absolute deviations."""

    deviations: float = setting(3.0, ge=0)
    name: ClassVar[str] = "mad"

    @staticmethod
    def threshold(window: Any, deviations: Any) -> Any:
        median = window.quantile(0.5)
        return median + deviations * window.quantile(0.5, abs(window.norms - median))


@dataclass(frozen=True)
class ExponentialMean(Rule):
    """A multiple of the exponentially weighted mean."""

    decay: float = setting(0.99, gt=0, lt=1)
    factor: float = setting(2.0, gt=0)
    name: ClassVar[str] = "exponential_mean"
    defaults: ClassVar[dict[str, Any]] = {"include_current": False, "warmup_steps": 3}

    @staticmethod
    def threshold(window: Any, decay: Any, factor: Any) -> Any:
        weights = decay**window.age
        return factor * window.sum(weights * window.norms) / window.sum(weights)


@dataclass(frozen=True)
class Multiple(Rule):
    """The threshold is a multiple of the window's mean."""

    factor: float = setting(2.0, gt=0)
    name: ClassVar[str] = "multiple"

    @staticmethod
    def threshold(window: Any, factor: Any) -> Any:
        return factor * window.mean()


OWN = [Mad, ExponentialMean, Multiple]


@pytest.fixture
def registered() -> Iterator[None]:
    with patch.dict(RULES):
        for rule in OWN:
            register_rule(rule)
        yield


def filled(factor: float) -> History:
    history = History(2, Multiple(factor), 2)
    for norms in ([9.0, math.nan], [1.0, math.nan], [2.0, 6.0]):
        history.record(norms)
    return history


# -- the built-in ones -------------------------------------------------------------------------


def test_each_built_in_rule_stands_in_the_table_that_the_tests_share() -> None:
    ours = {rule for rule in RULES.values() if rule.__module__.startswith("autoclip.core.")}
    assert {Quantile, Standard} <= ours <= {type(rule) for rule in SHARED.values()}


@pytest.mark.parametrize(
    "rule",
    [
        Quantile(0.25),
        Quantile(0.25, 1.5),
        Standard(3.0),
        Standard(1.0, decay=0.9),
        Standard(1.0, factor=1.5, shrink=True),
        Mad(1.0),
    ],
)
def test_settings_make_the_same_rule_again(rule: Rule) -> None:
    assert type(rule).from_settings(rule.settings) == rule
    assert tuple(rule.settings) == type(rule).setting_names()


def test_a_rule_cannot_be_made_from_unknown_settings() -> None:
    with pytest.raises(ValueError, match="the quantile rule got the unknown setting 'deviations'"):
        Quantile.from_settings({"deviations": 1.0})


def test_a_rule_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Quantile(0.5).quantile = 0.6  # type: ignore[misc]
    assert {Quantile(0.5), Quantile(0.5), Quantile(0.9)} == {Quantile(0.9), Quantile(0.5)}


def test_shrinking_needs_a_threshold_that_is_not_below_the_mean() -> None:
    """A norm between the two would be multiplied by something negative."""
    with pytest.raises(ValueError, match=r"shrink=True needs factor ≥ 1, but got factor=0\.5"):
        Standard(factor=0.5, shrink=True)


def test_logarithms_and_shrinking_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="shrink=True and log=True exclude each other"):
        Standard(shrink=True, log=True)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0, 3),
    st.none() | st.floats(0.25, 0.999),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([1, 20]),
)
def test_mean_and_deviation_of_logarithms(
    seed: int, deviations: float, decay: float | None, length: int, current: bool, rows: int
) -> None:
    """Under any scale: a threshold is multiplied by what the norms are multiplied by."""
    rule = Standard(deviations, decay, 1.25, log=True)
    each = GroupSettings(rule, length, warmup_steps=2, include_current=current)
    histories = [History.of([each] * rows) for _ in range(2)]
    references = [Row(rule.name, **each.settings) for _ in range(rows)]
    random = np.random.default_rng(seed)
    for _ in range(100):
        norms = np.where(random.random(rows) < 0.1, math.nan, random.lognormal(size=rows))
        report, scaled = (
            history.record(norms * scale) for history, scale in zip(histories, (1.0, 2.0**60))
        )
        np.testing.assert_allclose(scaled.thresholds, report.thresholds * 2.0**60, rtol=1e-9)
        for row, reference in enumerate(references):
            expected = reference.step(norms[row])
            found = report.thresholds[row], report.coefficients[row]
            assert found == pytest.approx(expected, rel=1e-11, abs=0)


class PlainQuantile(Quantile):
    """The same thresholds, which no tracker is known for."""

    @staticmethod
    def threshold(window: Any, quantile: Any, factor: Any) -> Any:
        return Quantile.threshold(window, quantile, factor)


class PlainStandard(Standard):
    """The same thresholds, which no tracker is known for."""

    @staticmethod
    def threshold(window: Any, **given: Any) -> Any:
        return Standard.threshold(window, **given)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.builds(Quantile, st.floats(0, 1), st.sampled_from([1.0, 0.7]))
    | st.builds(Standard, st.floats(0, 5), factor=st.sampled_from([1.0, 0.7])),
    st.integers(1, 150),
    st.booleans(),
    st.sampled_from(["raw", "clipped"]),
    st.sampled_from([1, 12, 13, 40, 41]),
)
def test_trackers_and_windows_give_the_same_numbers(
    seed: int, rule: Rule, length: int, current: bool, record: Any, rows: int
) -> None:
    if current or rule.thresholds_only_fall:
        record = "raw"
    common = {"include_current": current, "record": record, "warmup_steps": 3}
    kind = PlainQuantile if isinstance(rule, Quantile) else PlainStandard
    tracked = History(rows, rule, length, **common)
    plain = History(rows, kind(**rule.settings), length, **common)
    random = np.random.default_rng(seed)
    # A last bit of a coefficient may round a clipped norm to another float32.
    near = 1e-7 if record == "clipped" else 1e-12
    tolerance = 0.0 if isinstance(rule, Quantile) else near
    for _ in range(200):
        norms = random.choice([*random.lognormal(size=5), 1.0, math.nan], rows)
        a, b = tracked.record(norms), plain.record(norms)
        np.testing.assert_allclose(a.thresholds, b.thresholds, rtol=tolerance, atol=0)
        np.testing.assert_allclose(a.coefficients, b.coefficients, rtol=tolerance, atol=0)


# -- one's own ---------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.builds(Mad, st.floats(0, 5))
    | st.builds(ExponentialMean, st.floats(0.1, 0.99), st.floats(0.5, 3)),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([1, 9]),
)
def test_rules_of_ones_own_follow_the_reference(
    seed: int, rule: Rule, length: int, current: bool, rows: int
) -> None:
    each = GroupSettings(rule, length, include_current=current)
    history = History.of([each] * rows)
    references = [Row(rule.name, **each.settings) for _ in range(rows)]
    random = np.random.default_rng(seed)
    for _ in range(100):
        norms = np.where(random.random(rows) < 0.1, math.nan, random.lognormal(size=rows))
        report = history.record(norms)
        for row, reference in enumerate(references):
            expected = reference.step(norms[row])
            found = report.thresholds[row], report.coefficients[row]
            assert found == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("rule", [Mad(1.0), ExponentialMean(0.5), Multiple(0.5)])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_rule_of_ones_own_is_saved_and_loaded(rule: Rule, rows: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    straight, resumed = History(rows, rule, 20), History(rows, rule, 20)
    for step in range(60):
        if step in (13, 40):
            resumed.save(tmp_path / "state")
            resumed = History(rows, rule, 20)
            resumed.load(tmp_path / "state")
        norms = random.lognormal(size=rows)
        a, b = straight.record(norms), resumed.record(norms)
        assert a.thresholds.tolist() == b.thresholds.tolist()
    assert straight.state_dict() == resumed.state_dict()


@pytest.mark.usefixtures("registered")
@dataclass(frozen=True)
class DoubleQuantile(Quantile):
    """Another threshold than that which Quantile's trackers compute."""

    name: ClassVar[str] = "double_quantile"

    @staticmethod
    def threshold(window: Any, quantile: Any, factor: Any) -> Any:
        return 2.0 * Quantile.threshold(window, quantile, factor)


@dataclass(frozen=True)
class HalfQuantile(Quantile):
    """Another target than the threshold, which needs the windows."""

    name: ClassVar[str] = "half_quantile"

    @staticmethod
    def clip_to(window: Any, norm: Any, threshold: Any, quantile: Any, factor: Any) -> Any:
        return threshold / 2.0


@pytest.mark.parametrize("rows", [1, 20])
def test_a_subclass_does_not_inherit_a_tracker_for_other_thresholds(rows: int) -> None:
    norms = [[1.0] * rows, [3.0] * rows, [8.0] * rows]

    def last(rule: Rule) -> Any:
        history = History(rows, rule, include_current=False)
        return [history.record(each) for each in norms][-1]

    plain, double, half = (last(rule(0.5)) for rule in (Quantile, DoubleQuantile, HalfQuantile))
    np.testing.assert_array_equal(plain.thresholds, 2.0)
    np.testing.assert_array_equal(double.thresholds, 4.0)
    np.testing.assert_array_equal(half.thresholds, 2.0)
    np.testing.assert_array_equal(half.coefficients, 1.0 / 8.0)


def test_a_rule_goes_on_with_what_was_saved_under_other_numbers(tmp_path: Path) -> None:
    history = filled(0.5)
    assert history.thresholds.tolist() == [0.75, 3.0]
    assert history.record([1.0, 4.0]).coefficients.tolist() == [0.75, 0.625]

    history.save(tmp_path / "multiple")
    loaded = History(2, Multiple(0.5), 2)
    loaded.load(tmp_path / "multiple")
    assert loaded.thresholds.tolist() == history.thresholds.tolist() == [0.75, 2.5]
    assert loaded.record([5.0, 5.0]).thresholds.tolist() == [1.5, 2.25]

    other = History(2, Multiple(4.0), 2)
    with pytest.warns(UserWarning, match=r"factor=0\.5 there and 4\.0 here"):
        other.load(tmp_path / "multiple")
    assert other.thresholds.tolist() == [6.0, 20.0]


@pytest.mark.usefixtures("registered")
def test_any_rule_loads_the_history_of_another_one() -> None:
    other = History(2, Quantile(1.0), 2)
    with pytest.warns(UserWarning, match=r"used: rule='multiple' there and 'quantile' here\.$"):
        other.load_state_dict(filled(0.5).state_dict())
    assert other.read([0, 1])[0][0].tolist() == filled(0.5).read([0, 1])[0][0].tolist()


def test_a_rule_that_is_not_registered_saves_and_loads_by_its_name() -> None:
    history = filled(2.0)
    assert Multiple.name not in RULES
    loaded = History(2, Multiple(2.0), 2)
    loaded.load_state_dict(history.state_dict())
    assert loaded.thresholds.tolist() == history.thresholds.tolist() == [3.0, 12.0]
    with pytest.warns(UserWarning, match="rule='multiple' there and 'quantile' here"):
        History(2, Quantile(), 2).load_state_dict(history.state_dict())


# -- the register ------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    assert register_rule(Multiple) is Multiple

    @dataclass(frozen=True)
    class Impostor(Multiple):
        pass

    with pytest.raises(ValueError, match="A rule named 'multiple' is registered already"):
        register_rule(Impostor)
    assert RULES["multiple"] is Multiple


@pytest.mark.usefixtures("registered")
def test_the_same_class_again_replaces_the_first() -> None:
    """As a notebook's cell that runs twice makes it."""

    def cell() -> type[Rule]:
        @register_rule
        @dataclass(frozen=True)
        class Again(Rule):
            name: ClassVar[str] = "again"

            @staticmethod
            def threshold(window: Any) -> Any:
                return window.mean()

        return Again

    first, second = cell(), cell()
    assert first is not second
    assert RULES["again"] is second
    assert register_rule(first) is first
    assert RULES["again"] is first


class NotFrozen(Rule):
    name = "not_frozen"

    @staticmethod
    def threshold(window: Any) -> Any:
        return window.mean()


@dataclass(frozen=True)
class Nameless(Rule):
    @staticmethod
    def threshold(window: Any) -> Any:
        return window.mean()


@dataclass(frozen=True)
class Taken(NotFrozen):
    max_norm: float = setting(1.0)
    name: ClassVar[str] = "taken"


LongName = make_dataclass(
    "LongName",
    [("factor", float, setting(1.0))],
    bases=(NotFrozen,),
    namespace={"name": "n" * 101},
    frozen=True,
)
LongSetting = make_dataclass(
    "LongSetting",
    [("s" * 101, float, setting(1.0))],
    bases=(NotFrozen,),
    namespace={"name": "long_setting"},
    frozen=True,
)


@pytest.mark.parametrize(
    ("rule", "error", "says"),
    [
        (NotFrozen, TypeError, "a subclass of Rule that is a frozen dataclass, but got"),
        (dataclass(NotFrozen), TypeError, "Put @register_rule above"),
        (dict, TypeError, "a subclass of Rule that is a frozen dataclass"),
        (Mad(), TypeError, "a subclass of Rule that is a frozen dataclass"),
        (Nameless, TypeError, "Nameless has no name"),
        (Taken, ValueError, "Taken has the setting 'max_norm', which is one of every clipper"),
        (LongName, ValueError, "LongName uses the name nnnnnnnnnnnnnnnnnnnn... of 101 characters"),
        (LongSetting, ValueError, r"ssss\.\.\. of 101 characters, but a saved state takes 100"),
    ],
)
def test_what_is_not_registered(rule: Any, error: type[Exception], says: str) -> None:
    before = dict(RULES)
    with pytest.raises(error, match=says):
        register_rule(rule)
    assert before == RULES


# -- what backends ask of a rule ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "order"),
    [(Quantile(), True), (Mad(), True), (Standard(), False), (Standard(decay=0.5), False)],
)
def test_which_rules_need_their_norms_in_order(rule: Rule, order: bool) -> None:
    assert needs_order(rule) is order


def test_rows_that_are_recorded_together_differ_in_floats_alone() -> None:
    rules = [
        Standard(1.0, 0.5),
        Standard(2.0, 0.25, 3.0),
        Standard(),
        Standard(shrink=True),
        Standard(2.0, factor=3.0),
    ]
    together = rows_by_storage([GroupSettings(rule) for rule in rules])
    assert sorted(together) == [[0, 1], [2, 4], [3]]


@pytest.mark.parametrize(
    ("rule", "only_fall"),
    [
        (Quantile(0.5), True),
        (Quantile(0.5, 1.01), False),
        (Standard(0.0), True),
        (Standard(0.0, factor=1.04), False),
        (Standard(0.5, factor=0.5), False),
        (Mad(), False),
    ],
)
def test_which_thresholds_can_only_fall(rule: Rule, only_fall: bool) -> None:
    assert rule.thresholds_only_fall is only_fall
