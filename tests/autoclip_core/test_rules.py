"""Rules: what is registered, and a third one that no other file knows of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from autoclip.core import (
    RULES,
    History,
    Quantile,
    Rule,
    Standard,
    StateError,
    Tracker,
    Windows,
    register_rule,
)


@dataclass(frozen=True)
class Multiple(Rule):
    """The threshold is a multiple of the window's mean."""

    factor: float = 2.0
    name: ClassVar[str] = "multiple"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor takes a number > 0, but got {self.factor!r}.")

    @classmethod
    def track(cls, rules: Sequence[Multiple], windows: Windows) -> Tracker:
        return MultipleTracker(rules, windows)


class MultipleTracker(Tracker):
    def update(
        self,
        rows: slice | npt.NDArray[np.int64],
        entered: npt.NDArray[np.float32],
        left: npt.NDArray[np.float32],
    ) -> None:
        self.rebuild(np.arange(len(self.rules))[rows])

    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        for row in rows:
            mean = self.windows.read(row).mean(dtype=np.float64)
            self.thresholds[row] = self.rules[row].factor * mean


@pytest.fixture
def registered() -> Iterator[None]:
    register_rule(Multiple)
    yield
    del RULES[Multiple.name]


def filled(factor: float) -> History:
    history = History(2, Multiple(factor), 2)
    for norms in ([9.0, math.nan], [1.0, math.nan], [2.0, 6.0]):
        history.record(norms)
    return history


def test_two_rules_are_registered() -> None:
    assert dict(RULES) == {"quantile": Quantile, "standard": Standard}


@pytest.mark.usefixtures("registered")
def test_a_third_rule_records_saves_and_loads(tmp_path: Path) -> None:
    history = filled(0.5)
    assert history.thresholds.tolist() == [0.75, 3.0]
    assert history.record([1.0, 4.0]).coefficients.tolist() == [0.75, 0.625]

    history.save(tmp_path / "multiple")
    loaded = History(2, Multiple(0.5), 2)
    loaded.load(tmp_path / "multiple")
    assert loaded.thresholds.tolist() == history.thresholds.tolist() == [0.75, 2.5]
    assert loaded.record([5.0, 5.0]).thresholds.tolist() == [1.5, 2.25]

    other = History(2, Multiple(4.0), 2)
    with pytest.warns(UserWarning, match=r"factor=0\.5 there and 4\.0 here \(group 0\)"):
        other.load(tmp_path / "multiple")
    assert other.thresholds.tolist() == [6.0, 20.0]


@pytest.mark.usefixtures("registered")
def test_a_third_rules_own_checks_hold_for_what_is_loaded() -> None:
    data = filled(0.5).state_dict()
    broken = Multiple(0.5)
    object.__setattr__(broken, "factor", -1.0)
    with pytest.raises(StateError, match=r"group 0: factor takes a number > 0, but got -1\.0"):
        History(2, broken, 2).state_dict()
    with pytest.raises(StateError, match="with the multiple rule, but it is loaded into one with"):
        History(2, Quantile(), 2).load_state_dict(data)


def test_a_rule_that_is_not_registered_can_be_used_but_not_saved() -> None:
    history = filled(2.0)
    assert history.thresholds.tolist() == [3.0, 12.0]
    with pytest.raises(StateError, match="has the rule 'multiple', and this version of autoclip"):
        history.state_dict()


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    assert register_rule(Multiple) is Multiple  # the same class again, as a reload may do

    class Impostor(Multiple):
        pass

    with pytest.raises(ValueError, match="A rule named 'multiple' is registered already"):
        register_rule(Impostor)
    assert RULES["multiple"] is Multiple


@pytest.mark.parametrize("rule", [Quantile(0.25), Standard(3.0), Multiple(0.5)])
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
