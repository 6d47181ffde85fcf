"""The settings: what each takes, and what it says to anything else."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip.core import (
    DEFAULT_DEVIATIONS,
    DEFAULT_HISTORY_LENGTH,
    DEFAULT_QUANTILE,
    History,
    Quantile,
    Standard,
    check_flag,
    check_history_length,
    check_known_settings,
    check_on_nonfinite,
)
from autoclip.core._settings import check_deviations, check_quantile

NO_NUMBERS = [
    True,
    False,
    np.True_,
    "0.5",
    b"1",
    None,
    1j,
    [1],
    (1,),
    np.array(1.0),
    np.array([1]),
    decimal.Decimal(1),
]


def exactly(text: str) -> str:
    """The pattern that matches `text` and nothing else."""
    return f"^{re.escape(text)}$"


def test_the_defaults_are_settings() -> None:
    assert check_quantile(DEFAULT_QUANTILE) == 0.9
    assert check_deviations(DEFAULT_DEVIATIONS) == 2.0
    assert check_history_length(DEFAULT_HISTORY_LENGTH) == 1000


# -- quantile and deviations -------------------------------------------------------------------


@given(st.floats(0, 1) | st.fractions(0, 1) | st.integers(0, 1))
def test_any_real_number_from_0_to_1_is_a_quantile(value: float | Fraction) -> None:
    checked = check_quantile(value)
    assert type(checked) is float
    assert checked == float(value)


@given(st.floats(0, allow_infinity=False) | st.fractions(0, 10**300) | st.integers(0, 10**300))
def test_any_finite_real_number_from_0_is_a_number_of_deviations(value: float | Fraction) -> None:
    checked = check_deviations(value)
    assert type(checked) is float
    assert checked == float(value)


@pytest.mark.parametrize("check", [check_quantile, check_deviations])
@pytest.mark.parametrize(
    "value", [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.uint8(1)]
)
def test_numpy_scalars_are_numbers(check: Callable[[Any], float], value: Any) -> None:
    assert type(check(value)) is float
    assert check(value) == value


@given(
    st.floats(max_value=0, exclude_max=True)
    | st.floats(min_value=1, exclude_min=True)
    | st.just(math.nan)
)
def test_a_quantile_outside_0_to_1_is_a_wrong_value(value: float) -> None:
    says = f"quantile takes a real number in [0, 1], but got {value!r}."
    with pytest.raises(ValueError, match=exactly(says)):
        check_quantile(value)


@given(st.floats(max_value=0, exclude_max=True) | st.sampled_from([math.nan, math.inf]))
def test_deviations_below_0_or_not_finite_are_a_wrong_value(value: float) -> None:
    says = f"deviations takes a finite real number ≥ 0, but got {value!r}."
    with pytest.raises(ValueError, match=exactly(says)):
        check_deviations(value)


@pytest.mark.parametrize("value", [10**400, -(10**400), Fraction(10**400, 3)])
@pytest.mark.parametrize("check", [check_quantile, check_deviations])
def test_a_number_beyond_float64_is_a_wrong_value(
    check: Callable[[Any], float], value: Any
) -> None:
    """Not Python's OverflowError, which a hostile file could raise otherwise."""
    with pytest.raises(ValueError, match=r"^(quantile|deviations) takes .* but got "):
        check(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("check", "says"),
    [
        (check_quantile, "quantile takes a real number in [0, 1]"),
        (check_deviations, "deviations takes a finite real number ≥ 0"),
        (check_history_length, "history_length takes an int ≥ 1 and < 2**63"),
    ],
)
def test_what_is_no_number_is_a_wrong_type(
    check: Callable[[Any], float], says: str, value: Any
) -> None:
    with pytest.raises(TypeError) as caught:
        check(value)
    assert str(caught.value) == f"{says}, but got {value!r} of type {type(value).__name__}."


# -- history_length ----------------------------------------------------------------------------


@given(st.integers(1, 2**63 - 1))
def test_any_int_from_1_is_a_history_length(value: int) -> None:
    assert check_history_length(value) == value


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(200), np.int32(1)])
def test_numpy_integers_are_history_lengths(value: Any) -> None:
    assert type(check_history_length(value)) is int
    assert check_history_length(value) == value


@given(st.integers(max_value=0) | st.integers(min_value=2**63))
def test_a_history_length_below_1_or_beyond_int64_is_a_wrong_value(value: int) -> None:
    says = f"history_length takes an int ≥ 1 and < 2**63, but got {value!r}."
    with pytest.raises(ValueError, match=exactly(says)):
        check_history_length(value)


@pytest.mark.parametrize("value", [1000.0, np.float64(3), Fraction(3), math.nan, math.inf])
def test_a_float_is_no_history_length_even_a_whole_one(value: Any) -> None:
    with pytest.raises(TypeError, match="history_length takes an int ≥ 1"):
        check_history_length(value)


# -- words, flags, names -----------------------------------------------------------------------


@pytest.mark.parametrize("word", ["keep", "zero", "raise"])
def test_on_nonfinite_takes_its_three_words(word: str) -> None:
    assert check_on_nonfinite(word) == word


@pytest.mark.parametrize("word", ["", "Keep", "ignore", "keep "])
def test_another_word_is_a_wrong_value(word: str) -> None:
    says = f'on_nonfinite takes one of "keep", "zero", "raise", but got {word!r}.'
    with pytest.raises(ValueError, match=exactly(says)):
        check_on_nonfinite(word)


@pytest.mark.parametrize("value", [None, True, 0, b"keep", ["keep"]])
def test_what_is_no_word_is_a_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        check_on_nonfinite(value)
    assert str(caught.value) == (
        'on_nonfinite takes one of "keep", "zero", "raise", but got '
        f"{value!r} of type {type(value).__name__}."
    )


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_takes_true_and_false(value: bool) -> None:
    assert check_flag("global_clipping", value) is value


@pytest.mark.parametrize("value", [None, 0, 1, 1.0, "True", np.True_])
def test_a_flag_takes_nothing_else(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        check_flag("global_clipping", value)
    assert str(caught.value) == (
        f"global_clipping takes True or False, but got {value!r} of type {type(value).__name__}."
    )


def test_known_settings_pass() -> None:
    check_known_settings(iter(["b", "a"]), iter(["a", "b", "c"]), "the clipper")


def test_unknown_settings_are_named_with_the_known_ones() -> None:
    says = "group 3 got the unknown setting 'quantil'. It takes 'quantile', 'history_length'."
    with pytest.raises(ValueError, match=exactly(says)):
        check_known_settings(["quantil"], ["quantile", "history_length"], "group 3")
    says = "group 0 got the unknown settings 'a', 'c'. It takes 'b'."
    with pytest.raises(ValueError, match=exactly(says)):
        check_known_settings(["a", "b", "c"], ["b"], "group 0")


# -- where they are used -----------------------------------------------------------------------


def test_rules_and_histories_check_their_settings() -> None:
    with pytest.raises(ValueError, match=r"quantile takes .* got 1.5"):
        Quantile(1.5)
    with pytest.raises(TypeError, match=r"quantile takes .* got True"):
        Quantile(True)
    with pytest.raises(ValueError, match=r"deviations takes .* got -1"):
        Standard(-1)
    with pytest.raises(ValueError, match=r"history_length takes .* got 0"):
        History(1, Quantile(), 0)
    with pytest.raises(TypeError, match=r"history_length takes .* got 10.0"):
        History(1, Quantile(), 10.0)  # type: ignore[arg-type]


def test_a_rule_keeps_a_plain_float() -> None:
    """A NumPy scalar would find its way into the JSON of a saved state."""
    assert type(Quantile(np.float32(0.5)).quantile) is float  # type: ignore[arg-type]
    assert type(Standard(3).deviations) is float
