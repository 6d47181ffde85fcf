"""The settings: what each takes, what it says to anything else, and what groups override."""

from __future__ import annotations

import copy
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
from rules import KINDS, MANY_ROWS

from autoclip.core import History, ParameterInfo, Quantile, Standard, State
from autoclip.core.adapter import (
    CLIPPER_SETTINGS,
    ClipperSettings,
    GroupSettings,
    Mode,
    ParamGroup,
    rows_by_storage,
)

NO_NUMBERS = [
    True,
    False,
    "0.5",
    b"1",
    1j,
    [1],
    (1,),
    np.array([1]),
    decimal.Decimal(1),
]


def check_quantile(value: Any) -> float:
    return Quantile(value).quantile


def check_deviations(value: Any) -> float:
    return Standard(value).deviations


def check_history_length(value: Any) -> int:
    return GroupSettings(Quantile(), value).history_length


def check_max_norm(value: Any) -> float | None:
    return GroupSettings(Quantile(), max_norm=value).max_norm


def check_warmup_steps(value: Any) -> int | None:
    return GroupSettings(Quantile(), warmup_steps=value).warmup_steps


def exactly(text: str) -> str:
    """The pattern that matches `text` and nothing else."""
    return f"^{re.escape(text)}$"


def test_the_defaults() -> None:
    assert GroupSettings(Quantile()).settings == {
        "quantile": 0.9,
        "factor": 1.0,
        "history_length": 1000,
        "max_norm": None,
        "warmup_steps": 0,
        "include_current": True,
        "record": "raw",
        "on_spike": "clip",
        "on_nonfinite": "keep",
    }
    assert GroupSettings(Standard()).settings | GroupSettings(Quantile()).settings == {
        **GroupSettings(Quantile()).settings,
        "deviations": 2.0,
        "decay": None,
        "shrink": False,
        "log": False,
    }
    assert GroupSettings(Standard()).warmup_steps == 25
    assert GroupSettings(Standard()).include_current is False


def test_each_setting_stands_in_the_table_that_the_tests_share() -> None:
    """Each framework's step is compared with the core's under the table's settings."""
    used = {name for _, options in KINDS.values() for name in options}
    # All of these tests choose a length; gradients that are not finite have tests of their own.
    assert used == {*CLIPPER_SETTINGS} - {"history_length", "on_nonfinite"}


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_and_many_take_the_same_steps(kind: str) -> None:
    """Python's numbers and NumPy's arrays are two ways through one step."""
    rule, options = KINDS[kind]
    few, many = (History.of([GroupSettings(rule, 5, **options)] * rows) for rows in (3, MANY_ROWS))
    norms = np.random.default_rng(1).lognormal(sigma=1.5, size=(40, 3))
    norms[3], norms[7, 1], norms[11, :2], norms[13, 2] = 0.0, np.nan, np.inf, 1e300
    for each in norms:
        one, other = few.record(each), many.record(np.resize(each, MANY_ROWS))
        np.testing.assert_allclose(one.thresholds, other.thresholds[:3], rtol=1e-9)
        np.testing.assert_allclose(one.coefficients, other.coefficients[:3], rtol=1e-9)
    for window, same in zip(few.read(range(3))[0], many.read(range(3))[0], strict=True):
        np.testing.assert_allclose(window, same, rtol=1e-6)


# -- numbers -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("check", [check_quantile, check_deviations, check_max_norm])
@pytest.mark.parametrize(
    "value",
    [
        np.float16(0.5),
        np.float32(0.5),
        np.float64(0.5),
        np.longdouble(0.5),
        np.uint8(1),
        np.array(0.5),
    ],
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
    says = f"quantile must be a real number in [0, 1], but got {value!r}."
    with pytest.raises(ValueError, match=exactly(says)):
        check_quantile(value)


@given(st.floats(max_value=0, exclude_max=True) | st.sampled_from([math.nan, math.inf]))
def test_deviations_below_0_or_not_finite_are_a_wrong_value(value: float) -> None:
    says = f"deviations must be a finite real number ≥ 0, but got {value!r}."
    with pytest.raises(ValueError, match=exactly(says)):
        check_deviations(value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("max_norm", check_max_norm),
        ("factor", lambda value: Quantile(0.5, value)),
        ("factor", lambda value: Standard(factor=value)),
    ],
)
def test_a_ceiling_or_a_factor_is_above_0(
    name: str, make: Callable[[Any], Any], value: Any
) -> None:
    says = f"{name} must be a finite real number > 0"
    with pytest.raises(ValueError, match=rf"^{re.escape(says)}.* but got {value!r}\.$"):
        make(value)


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, math.nan])
def test_a_decay_lies_between_0_and_1(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"decay must be a real number in \(0, 1\) or None, but got"
    ):
        Standard(decay=value)


@pytest.mark.parametrize("value", [10**400, -(10**400), Fraction(10**400, 3)])
@pytest.mark.parametrize("check", [check_quantile, check_deviations, check_max_norm])
def test_a_number_beyond_float64_is_a_wrong_value(
    check: Callable[[Any], float], value: Any
) -> None:
    """Not Python's OverflowError, which a hostile file could raise otherwise."""
    with pytest.raises(ValueError, match=r"^(quantile|deviations|max_norm) must be .* but got "):
        check(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("check", "says"),
    [
        (check_quantile, "quantile must be a real number in [0, 1]"),
        (check_deviations, "deviations must be a finite real number ≥ 0"),
        (check_history_length, "history_length must be an int ≥ 1 and < 2**63"),
        (check_max_norm, "max_norm must be a finite real number > 0 or None"),
        (check_warmup_steps, "warmup_steps must be an int ≥ 0 and < 2**63 or None"),
    ],
)
def test_what_is_not_a_number_is_a_wrong_type(
    check: Callable[[Any], Any], says: str, value: Any
) -> None:
    with pytest.raises(TypeError) as caught:
        check(value)
    assert str(caught.value) == f"{says}, but got {value!r} of type {type(value).__name__}."


@pytest.mark.parametrize("check", [check_quantile, check_history_length, check_max_norm])
def test_numpys_bool_is_a_wrong_type(check: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="but got True of type bool"):
        check(np.True_)


@pytest.mark.parametrize("check", [check_quantile, check_deviations, check_history_length])
def test_none_is_a_wrong_type_for_what_is_not_optional(check: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="but got None of type NoneType"):
        check(None)


@given(st.integers(1, 2**63 - 1))
def test_any_int_from_1_is_a_history_length(value: int) -> None:
    assert check_history_length(value) == value


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(200), np.int32(1)])
def test_numpy_integers_are_history_lengths(value: Any) -> None:
    assert type(check_history_length(value)) is int
    assert check_history_length(value) == value


@given(st.integers(max_value=0) | st.integers(min_value=2**63))
def test_a_history_length_below_1_or_beyond_int64_is_a_wrong_value(value: int) -> None:
    says = f"history_length must be an int ≥ 1 and < 2**63, but got {value!r}."
    with pytest.raises(ValueError, match=exactly(says)):
        check_history_length(value)


@pytest.mark.parametrize("value", [1000.0, np.float64(3), Fraction(3), math.nan, math.inf])
@pytest.mark.parametrize("check", [check_history_length, check_warmup_steps])
def test_a_float_is_not_an_int_even_a_whole_one(check: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(TypeError, match=r"(history_length|warmup_steps) must be an int ≥ "):
        check(value)


# -- words, flags, names -----------------------------------------------------------------------

WORDS = {
    "on_nonfinite": ("keep", "zero", "raise"),
    "on_spike": ("clip", "zero", "skip"),
    "record": ("raw", "clipped"),
}


@pytest.mark.parametrize(("name", "word"), [(n, word) for n in WORDS for word in WORDS[n]])
def test_words(name: str, word: str) -> None:
    made = GroupSettings(Standard(), **{name: word})  # type: ignore[arg-type]
    assert getattr(made, name) == word


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("word", ["", "Keep", "ignore", "keep "])
def test_another_word_is_a_wrong_value(name: str, word: str) -> None:
    known = ", ".join(f'"{each}"' for each in WORDS[name])
    with pytest.raises(
        ValueError, match=exactly(f"{name} must be one of {known}, but got {word!r}.")
    ):
        GroupSettings(Standard(), **{name: word})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("value", [None, True, 0, b"keep", ["keep"]])
def test_what_is_not_a_word_is_a_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        GroupSettings(Standard(), **{name: value})
    known = ", ".join(f'"{each}"' for each in WORDS[name])
    assert str(caught.value) == (
        f"{name} must be one of {known}, but got {value!r} of type {type(value).__name__}."
    )


each_flag = pytest.mark.parametrize("flag", ["global_clipping", "group_clipping"])


@each_flag
@pytest.mark.parametrize("value", [True, False])
def test_a_flag_takes_true_and_false(flag: str, value: bool) -> None:
    made = ClipperSettings.make("Clipper", Quantile(), **{flag: value})
    assert made.mode.arguments[flag] is value
    assert GroupSettings(Quantile(), include_current=value).include_current is value


@each_flag
@pytest.mark.parametrize("value", [0, 1, 1.0, "True", np.True_])
def test_a_flag_takes_nothing_else(flag: str, value: Any) -> None:
    says = f"must be True or False, but got {value!r} of type {type(value).__name__}."
    with pytest.raises(TypeError, match=exactly(f"{flag} {says}")):
        ClipperSettings.make("Clipper", Quantile(), **{flag: value})
    with pytest.raises(TypeError, match="include_current must be True or False or None, but got"):
        GroupSettings(Quantile(), include_current=value)


def test_known_settings_pass() -> None:
    own = ClipperSettings.make("Clipper", Quantile()).for_group({"max_norm": 2.0, "quantile": 0.5})
    assert own == GroupSettings(Quantile(0.5), max_norm=2.0)


def test_unknown_settings_are_named_with_the_known_ones() -> None:
    made = ClipperSettings.make("Mine", Quantile())
    known = ", ".join(map(repr, made.default.settings))
    says = f"A parameter group of Mine got the unknown setting 'quantil'. It takes {known}."
    with pytest.raises(ValueError, match=exactly(says)):
        made.for_group({"quantil": 0.5})
    says = f"A parameter group of Mine got the unknown settings 'a', 'c'. It takes {known}."
    with pytest.raises(ValueError, match=exactly(says)):
        made.for_group({"a": 1, "quantile": 0.5, "c": 2})


# -- the settings of a group -------------------------------------------------------------------


def test_histories_check_their_settings() -> None:
    with pytest.raises(ValueError, match=r"history_length must be .* got 0"):
        History(1, Quantile(), 0)
    with pytest.raises(TypeError, match=r"history_length must be .* got 10.0"):
        History(1, Quantile(), 10.0)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"rule must be a Rule such as Quantile\(0\.9\), .* got 0\.9"
    ):
        GroupSettings(0.9)  # type: ignore[arg-type]


def test_a_rule_keeps_a_plain_float() -> None:
    """A NumPy scalar would find its way into the JSON of a saved state."""
    assert type(Quantile(np.float32(0.5)).quantile) is float  # type: ignore[arg-type]
    assert type(Standard(3).deviations) is float


@pytest.mark.parametrize(
    ("rule", "current", "says"),
    [
        (Quantile(0.5, 2.0), True, 'record="clipped" needs include_current=False'),
        (Quantile(0.5), False, 'record="clipped" does not work with Quantile'),
        (Standard(0.0), False, 'record="clipped" does not work with Standard'),
    ],
)
def test_where_clipped_norms_cannot_be_recorded(rule: Any, current: bool, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GroupSettings(rule, include_current=current, record="clipped")


def test_merged_replaces_settings_by_their_flat_names() -> None:
    before = GroupSettings(Quantile(0.5), 10, max_norm=2.0)
    after = before.merged({"quantile": 0.75, "max_norm": None, "on_spike": "zero"})
    assert after == GroupSettings(Quantile(0.75), 10, on_spike="zero")
    assert before == GroupSettings(Quantile(0.5), 10, max_norm=2.0)
    assert before.merged({}) is before
    with pytest.raises(ValueError, match="quantile must be a real number"):
        before.merged({"quantile": 2.0})


# -- the settings of a clipper -----------------------------------------------------------------


def test_a_clippers_settings_from_a_rule_or_from_its_class() -> None:
    flat = ClipperSettings.make("QuantileClip", Quantile, quantile=0.5, history_length=10)
    whole = ClipperSettings.make("QuantileClip", Quantile(0.5), history_length=10)
    assert flat == whole
    assert flat.mode == "parameter"
    assert flat.default == GroupSettings(Quantile(0.5), 10)


@pytest.mark.parametrize("mode", ["global", "group"])
def test_modes(mode: str) -> None:
    made = ClipperSettings.make("Clipper", Quantile(), **{f"{mode}_clipping": True})
    assert made.mode == mode
    assert made.mode.arguments == {
        "global_clipping": mode == "global",
        "group_clipping": mode == "group",
    }


@pytest.mark.parametrize(
    ("rule", "given", "error", "says"),
    [
        (Quantile, {"quantil": 0.5}, TypeError, "unexpected keyword argument 'quantil'"),
        (Quantile(), {"quantile": 0.5}, TypeError, "unexpected keyword argument 'quantile'"),
        (Quantile, {"quantile": True}, TypeError, "quantile must be a real number"),
        (Quantile, {"global_clipping": 1}, TypeError, "global_clipping must be True or False"),
        (
            Quantile,
            {"global_clipping": True, "group_clipping": True},
            ValueError,
            "Choose one of the two",
        ),
        (Quantile, {"record": "clipped"}, ValueError, "needs include_current=False"),
    ],
)
def test_wrong_arguments_of_a_clipper(
    rule: Any, given: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ClipperSettings.make("Clipper", rule, **given)


def test_groups_override_what_they_name() -> None:
    every = ClipperSettings.make("Clipper", Quantile(0.5), history_length=10)
    assert every.for_group({}) is every.default
    assert every.for_group({"quantile": 0.75}) == GroupSettings(Quantile(0.75), 10)
    assert every.taken_from({"lr": 0.1, "quantile": 0.75}) == GroupSettings(Quantile(0.75), 10)
    with pytest.raises(ValueError, match="A parameter group of Clipper got the unknown setting"):
        every.for_group({"quantil": 0.75})
    whole = ClipperSettings.make("Clipper", Quantile(0.5), global_clipping=True)
    with pytest.raises(ValueError, match="a group cannot have settings of its own, but got 'quant"):
        whole.for_group({"quantile": 0.75})


def test_what_a_clippers_repr_shows() -> None:
    every = ClipperSettings.make("Clipper", Quantile(0.5), group_clipping=True, max_norm=2.0)
    own = every.for_group({"quantile": 0.75})
    assert every.describe([(1, every.default, ""), (3, own, " here")]) == (
        "Clipper(\n"
        "    quantile=0.5, factor=1.0, history_length=1000, max_norm=2.0\n"
        "    group_clipping=True\n"
        "    group 0: 1 parameter\n"
        "    group 1: 3 parameters here, quantile=0.75\n"
        ")"
    )


# -- groups as users see them ------------------------------------------------------------------


def test_writing_to_a_group_goes_through_the_clipper() -> None:
    written: list[tuple[str, Any]] = []

    def write(name: str, value: Any) -> Any:
        written.append((name, value))
        return check_quantile(value)

    group = ParamGroup({"params": [1], "quantile": 0.9}, write)
    group["quantile"] = np.float32(0.5)
    group.update(quantile=0.25)
    assert written == [("quantile", np.float32(0.5)), ("quantile", 0.25)]
    assert group == {"params": [1], "quantile": 0.25}
    with pytest.raises(ValueError, match="quantile must be"):
        group["quantile"] = 2.0
    assert group["quantile"] == 0.25


@pytest.mark.parametrize("name", ["params", "param_names", "quantil"])
def test_what_cannot_be_written_to_a_group(name: str) -> None:
    group = ParamGroup({"params": [], "param_names": [], "quantile": 0.9}, lambda _, value: value)
    with pytest.raises(KeyError, match="The settings of this group are 'quantile'"):
        group[name] = []


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.pop("quantile"),
        lambda group: group.popitem(),
        lambda group: group.clear(),
        lambda group: group.setdefault("quantile", 1),
        lambda group: group.__delitem__("quantile"),
        lambda group: group.__ior__({"quantile": 1}),
    ],
)
def test_settings_of_a_group_are_not_removed(change: Callable[[Any], Any]) -> None:
    group = ParamGroup({"params": [], "quantile": 0.9}, lambda _, value: value)
    with pytest.raises(TypeError, match="can be changed, not removed"):
        change(group)
    assert group == {"params": [], "quantile": 0.9}


def test_a_copy_of_a_group_is_a_plain_dict() -> None:
    group = ParamGroup({"params": [], "quantile": 0.9}, lambda _, value: value)
    copied = copy.deepcopy(group)
    assert type(copied) is dict
    assert copied == group


# -- rows --------------------------------------------------------------------------------------


def test_rows_that_can_be_recorded_together() -> None:
    a, b = GroupSettings(Quantile(0.5), 10), GroupSettings(Quantile(0.9), 10, max_norm=1.0)
    c = GroupSettings(Quantile(0.5), 11)
    assert rows_by_storage([a, c, b, a]) == [[0, 2, 3], [1]]
    assert rows_by_storage([a, c, b, a], "xxxy") == [[0, 2], [1], [3]]


@pytest.mark.parametrize(
    ("mode", "rows", "of_parameters", "names"),
    [
        (Mode.PARAMETER, [[0, 1], [], [2]], [0, 1, 2], ("v", "w", "b")),
        (Mode.GROUP, [[0], [1], [2]], [0, 0, 2], ("group 0", "group 1", "group 2")),
        (Mode.GLOBAL, [[0], [0], [0]], [0, 0, 0], ("all parameters",)),
    ],
)
def test_rows_of_each_mode(mode: Mode, rows: Any, of_parameters: Any, names: Any) -> None:
    sizes = [2, 0, 1]
    assert [list(each) for each in mode.rows_by_group(sizes)] == rows
    assert mode.row_of_parameters(sizes) == of_parameters
    assert mode.row_names(["v", "w", "b"], 3) == names
    expected = {Mode.PARAMETER: "xxz", Mode.GROUP: "xyz", Mode.GLOBAL: "x"}
    assert "".join(mode.by_row(["x", "y", "z"], sizes)) == expected[mode]


@pytest.mark.parametrize("mode", list(Mode))
def test_a_state_splits_into_the_rows_it_was_made_of(mode: Mode) -> None:
    settings = [GroupSettings(Quantile(q), 4) for q in (0.5, 0.9)]
    infos = [[ParameterInfo("a", (2,)), ParameterInfo("b", (3,))], [ParameterInfo("c", ())]]
    count = len(mode.row_names("abc", 2))
    windows = [np.arange(1, row + 2, dtype=np.float32) for row in range(count)]
    recorded = np.arange(7, 7 + count)
    state = State.of("jax", mode, settings, infos, windows, recorded)
    sizes = [len(group.parameters) for group in state.groups]
    assert sizes == ([3] if mode is Mode.GLOBAL else [2, 1])
    again, counts = state.by_row()
    assert [window.tolist() for window in again] == [window.tolist() for window in windows]
    assert counts.tolist() == recorded.tolist()
