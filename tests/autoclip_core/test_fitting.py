"""Loading a state into a clipper: what fits, what is kept, and what is said when it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import (
    GroupState,
    History,
    ParameterInfo,
    Quantile,
    Rule,
    Standard,
    State,
    StateError,
)
from autoclip.core._settings import GroupSettings, Mode

HALF = Quantile(0.5)


def state_of(
    *groups: list[ParameterInfo],
    framework: str = "torch",
    mode: Mode = "parameter",
    rule: Rule = HALF,
    **changes: Any,
) -> State:
    """A state whose rows each hold one norm, 1, 2, 3, ..., in order."""
    made, start = [], 1
    every = GroupSettings(rule, 10).settings | changes
    for group in groups:
        rows = len(group) if mode == "parameter" else 1
        windows = [[float(start + row)] for row in range(rows)]
        made.append(GroupState.from_windows(every, group, windows, [7] * rows))
        start += rows
    return State(rule.name, mode, framework, tuple(made))


def weight(*shape: int, name: str | None = "weight") -> ParameterInfo:
    return ParameterInfo(name, shape)


UNKNOWN = ParameterInfo("weight", None)

NUMPY_ROWS = [ParameterInfo(None, None)] * 3


# -- what fits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "current", "same_framework", "across_frameworks"),
    [
        (weight(2, 3), weight(2, 3), True, True),
        (weight(2, 3), weight(3, 2), False, True),  # a Linear weight and a Dense kernel
        (weight(2, 3), weight(6), False, True),
        (weight(2, 3), weight(2, 4), False, False),
        (weight(), weight(1), False, True),
        (weight(0, 5), weight(0), False, True),
        (weight(2**40, 2**40), weight(2**20, 2**60), False, True),  # beyond int64
        (weight(2**32, 2**32), weight(0), False, False),  # 0 in int64
        (UNKNOWN, weight(2, 3), True, True),
        (weight(2, 3), UNKNOWN, True, True),
        (weight(2, 3), weight(2, 3, name="another"), True, True),
        (weight(2, 3), weight(2, 3, name=None), True, True),
    ],
    ids=str,
)
def test_shapes_within_a_framework_and_element_counts_across(
    saved: ParameterInfo, current: ParameterInfo, same_framework: bool, across_frameworks: bool
) -> None:
    theirs = state_of([saved], framework="torch")
    for framework, fits in (("torch", same_framework), ("tensorflow", across_frameworks)):
        ours = state_of([current], framework=framework)
        if fits:
            fitted = theirs.match(ours)
            assert fitted.framework == framework
            assert fitted.groups[0].parameters == (current,)
            assert fitted.groups[0].recorded.tolist() == [7]
        else:
            with pytest.raises(StateError, match="does not match"):
                theirs.match(ours)


@pytest.mark.parametrize("framework", ["torch", "tensorflow", "numpy", "jax"])
def test_a_history_loads_what_any_framework_saved(framework: str, tmp_path: Path) -> None:
    saved = state_of([weight(2, 3), weight(3), weight()], framework=framework)
    (tmp_path / "state").write_bytes(saved.to_bytes())
    history = History(3, Quantile(0.5), 10)
    history.load(tmp_path / "state")
    assert history.thresholds.tolist() == [1.0, 2.0, 3.0]
    assert history.recorded.tolist() == [7, 7, 7]
    again = State.from_dict(history.state_dict())
    assert again.framework == "numpy"
    assert again.groups[0].parameters == tuple(NUMPY_ROWS)


# -- what does not -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (
            state_of(NUMPY_ROWS, rule=Standard(2.0)),
            "holds a clipper with the rule 'standard', but it is loaded into one with the rule "
            "'quantile'. Load it into a clipper with the same rule.",
        ),
        (
            state_of(NUMPY_ROWS, mode="global"),
            "holds one history for all parameters, but it is loaded into a clipper with a history "
            "for each parameter. Make the clipper with global_clipping=True.",
        ),
        (
            state_of(NUMPY_ROWS, mode="group"),
            "holds a history for each parameter group, but it is loaded into a clipper with a "
            "history for each parameter. Make the clipper with group_clipping=True.",
        ),
        (state_of(NUMPY_ROWS, []), "has 2 parameter groups, but the clipper has 1."),
        (state_of(), "has 0 parameter groups, but the clipper has 1."),
        (state_of(NUMPY_ROWS[:2]), "has 2 parameters in group 0, but the clipper has 3."),
        (state_of(NUMPY_ROWS * 2), "has 6 parameters in group 0, but the clipper has 3."),
    ],
)
def test_a_mismatch_is_named_and_the_history_is_as_it_was(
    saved: State, says: str, tmp_path: Path
) -> None:
    history = History(3, Quantile(0.5), 10)
    history.record([4.0, 5.0, 6.0])
    before, thresholds = history.state_dict(), history.thresholds.tolist()
    path = tmp_path / "state"
    path.write_bytes(saved.to_bytes())
    with pytest.raises(StateError) as caught:
        history.load(path)
    assert str(caught.value).startswith(f"{path} {says}")
    with pytest.raises(StateError) as caught:
        history.load_state_dict(saved.to_dict())
    assert str(caught.value).startswith(f"state_dict {says}")
    assert history.state_dict() == before
    assert history.thresholds.tolist() == thresholds


@pytest.mark.parametrize(
    ("framework", "current", "says"),
    [
        (
            "torch",
            weight(3, 2, name="head.weight"),
            "Parameter 1 of group 1 does not match: my.file has 'weight' of shape (2, 3), the "
            "clipper has 'head.weight' of shape (3, 2); their shapes differ. Load it for the same "
            "model.",
        ),
        (
            "tensorflow",
            weight(7, name=None),
            "Parameter 1 of group 1 does not match: my.file has 'weight' of shape (2, 3), the "
            "clipper has an unnamed parameter of shape (7,); their numbers of elements differ. "
            "Load it for the same model.",
        ),
    ],
)
def test_a_wrong_shape_is_said_with_both_names_and_both_shapes(
    framework: str, current: ParameterInfo, says: str
) -> None:
    saved = state_of([weight(2)], [UNKNOWN, weight(2, 3)])
    ours = state_of([weight(2)], [weight(9), current], framework=framework)
    with pytest.raises(StateError) as caught:
        saved.match(ours, "my.file")
    assert str(caught.value) == says


def test_an_unknown_shape_is_said_to_be_unknown() -> None:
    assert str(UNKNOWN) == "'weight' of unknown shape"
    assert str(ParameterInfo(None, ())) == "an unnamed parameter of shape ()"


def test_the_same_names_in_another_order_are_refused() -> None:
    """Equal shapes would not tell: each parameter would get the other's history."""
    names = [weight(2, name="a"), weight(2, name="b"), weight(2, name="c")]
    saved, turned = state_of(names), state_of([names[0], names[2], names[1]])
    says = (
        "my.file has the parameters of group 0 in another order: parameter 1 is 'b' there and 'c' "
        "in the clipper. "
    )
    with pytest.raises(StateError, match=f"^{says}"):
        saved.match(turned, "my.file")
    # Other names may be the same parameters after all: they were renamed.
    renamed = state_of([weight(2, name=name) for name in ("b", "c", "d")])
    assert saved.match(renamed).groups[0].values.tolist() == [1.0, 2.0, 3.0]
    # With one row for all, the order does not matter.
    saved.match(saved)
    for mode in ("group", "global"):
        one = state_of(names, mode=mode)  # type: ignore[arg-type]
        assert one.match(state_of(names[::-1], mode=mode)).groups[0].values.tolist() == [1.0]  # type: ignore[arg-type]


@given(st.permutations(range(4)), st.booleans())
def test_any_other_order_is_refused_and_the_same_one_is_not(order: list[int], known: bool) -> None:
    names = [weight(2, name=f"layer{i}") for i in range(4)]
    if not known:
        names[0] = weight(2, name=None)
    saved, ours = state_of(names), state_of([names[i] for i in order])
    if known and order != sorted(order):
        with pytest.raises(StateError, match="in another order"):
            saved.match(ours)
    else:
        assert saved.match(ours).groups[0].values.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_messages_are_short_whatever_the_names() -> None:
    for name in ("x" * 10**6, "\x1b[31m" * 10**6):
        saved, ours = state_of([weight(2, name=name)]), state_of([weight(3, name=name + "x")])
        with pytest.raises(StateError) as caught:
            saved.match(ours)
        assert len(str(caught.value)) <= 500
        assert str(caught.value).isprintable()


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["load", "load_state_dict"])
def test_other_settings_give_one_warning_that_points_at_the_caller(
    load: str, tmp_path: Path
) -> None:
    each = [Quantile(0.5), Quantile(0.9)]
    saved = History(2, each, 10)
    saved.record([1.0, 2.0])
    saved.save(tmp_path / "state")
    history = History(2, [Quantile(0.25), Quantile(0.9)], 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if load == "load":
            history.load(tmp_path / "state")
        else:
            history.load_state_dict(saved.state_dict())
    (warning,) = caught
    source = tmp_path / "state" if load == "load" else "state_dict"
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert str(warning.message) == (
        f"{source} was saved with other settings, and the clipper's own are used: "
        "quantile=0.5 there and 0.25 here (group 0); "
        "history_length=10 there and 20 here."
    )
    assert history.rules == (Quantile(0.25), Quantile(0.9))
    assert history.history_length == 20
    assert history.thresholds.tolist() == [1.0, 2.0]


def test_the_same_settings_give_no_warning() -> None:
    history = History(2, Quantile(0.5), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history.load_state_dict(history.state_dict())
        history.load_state_dict(state_of(NUMPY_ROWS[:2], framework="torch").to_dict())


def test_a_warning_made_an_error_changes_nothing() -> None:
    saved, history = History(1, Quantile(0.5)), History(1, Quantile(0.9))
    saved.record([1.0])
    before = history.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="other settings"):
            history.load_state_dict(saved.state_dict())
    assert history.state_dict() == before


@pytest.mark.filterwarnings("ignore:.* was saved with other settings")
@settings(max_examples=50)
@given(
    st.sampled_from([Quantile(0.75), Standard(1.0)]),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 100),
)
def test_another_history_length_keeps_the_newest_norms(
    rule: Rule, length: int, other_length: int, steps: int
) -> None:
    saved, history, fresh = (
        History(1, rule, each, warmup_steps=0) for each in (length, other_length, other_length)
    )
    norms = np.random.default_rng(steps).lognormal(size=steps + 100).astype(np.float32)
    for norm in norms[:steps]:
        saved.record([norm])
    history.load_state_dict(saved.state_dict())
    kept = norms[:steps][-min(length, other_length) :]
    assert history.read([0])[0][0].tolist() == kept.tolist()
    assert history.recorded.tolist() == [steps]

    # And it goes on as one that has just these norms behind it.
    fresh.write([0], [kept], [len(kept)])
    for norm in norms[steps:]:
        expected = fresh.record([norm]).thresholds
        assert history.record([norm]).thresholds == pytest.approx(expected, rel=1e-14, abs=0)
    assert history.read([0])[0][0].tolist() == fresh.read([0])[0][0].tolist()


def test_one_short_warning_lists_many_differences() -> None:
    groups = [[weight(2)] for _ in range(200)]
    saved, ours = state_of(*groups, quantile=0.25), state_of(*groups)
    for i, group in enumerate(saved.groups):
        group.settings.update(history_length=11 + i)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="was saved with other settings") as caught:
        saved.match(ours, "my.file")
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        "my.file was saved with other settings, and the clipper's own are used: "
        "quantile=0.25 there and 0.5 here; "
        "history_length=11 there and 10 here (group 0); "
        "history_length=12 there and 10 here (group 1); "
    )
    assert text.endswith(" more.")
    assert len(text) <= 500


def test_a_setting_that_only_one_side_has_is_absent_on_the_other() -> None:
    """Such as one that a user's rule has had added."""
    saved, ours = state_of([weight(2)], old=1), state_of([weight(2)], new="x" * 1000)
    says = r"new=absent there and 'x+\.\.\.x+' here; old=1 there and absent here\.$"
    with pytest.warns(UserWarning, match=says):
        saved.match(ours)


# -- by name -----------------------------------------------------------------------------------


def rows(state: State) -> list[tuple[list[float], int]]:
    """Each row's window and how many norms it has recorded."""
    return [
        (window.tolist(), int(recorded))
        for group in state.groups
        for window, recorded in zip(group.windows(), group.recorded)
    ]


def shaped(names: str, *shape: int) -> list[ParameterInfo]:
    return [weight(*shape, name=name) for name in names]


def test_rows_follow_their_names_into_any_order_and_group() -> None:
    saved = state_of(shaped("abc", 2), shaped("de", 3))
    ours = state_of(shaped("e", 3), shaped("cab", 2) + shaped("d", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matched = saved.match_by_name(ours)
    assert rows(matched) == [([5.0], 7), ([3.0], 7), ([1.0], 7), ([2.0], 7), ([4.0], 7)]
    assert [group.parameters for group in matched.groups] == [g.parameters for g in ours.groups]
    assert State.from_bytes(matched.to_bytes()).to_bytes() == matched.to_bytes()


@given(
    st.lists(st.sampled_from("abcdef"), unique=True),
    st.lists(st.sampled_from("abcdef"), unique=True),
    st.sampled_from(["torch", "tensorflow"]),
)
def test_rows_without_a_partner_start_empty(theirs: str, mine: str, framework: str) -> None:
    saved = state_of(shaped("".join(theirs), 2, 3))
    # `c` is transposed, and `d` has another number of elements.
    infos = [weight(*{"c": (3, 2), "d": (2, 2)}.get(name, (2, 3)), name=name) for name in mine]
    fits = [
        name in theirs and name != "d" and (name != "c" or framework != "torch") for name in mine
    ]
    expected = [
        ([float(theirs.index(name) + 1)], 7) if kept else ([], 0) for name, kept in zip(mine, fits)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matched = saved.match_by_name(state_of(infos, framework=framework), "my.file")
    assert rows(matched) == expected
    assert len(caught) == (not all(fits) or len(mine) < len(theirs))
    State.from_bytes(matched.to_bytes())


def test_one_short_warning_names_what_did_not_match_and_the_settings() -> None:
    saved = state_of([weight(2, name=f"layer{i}") for i in range(100)], quantile=0.25)
    ours = state_of([weight(2, name=f"dense{i}") for i in range(100)] + [weight(2, name="layer0")])
    with pytest.warns(UserWarning, match="does not match") as caught:
        saved.match_by_name(ours, "my.file")
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(
        "my.file was saved with other settings, and the clipper's own are used: quantile=0.25 "
        "there and 0.5 here. my.file does not match the clipper everywhere. Histories that start "
        "empty: 'dense0' of shape (2,); 'dense1' of shape (2,); "
    )
    assert "and 95 more. Saved histories that are not used: 'layer1' of shape (2,); " in text
    assert len(text) <= 700


def test_names_that_are_not_unique_or_not_known_do_not_match() -> None:
    for infos in (shaped("aa", 2), [weight(2, name=None)] * 2):
        state = state_of(infos)
        with pytest.warns(UserWarning, match="start empty: .*not used: "):
            assert rows(state.match_by_name(state)) == [([], 0)] * 2


@pytest.mark.parametrize("mode", ["group", "global"])
def test_groups_match_by_position_if_they_have_the_same_elements(mode: Mode) -> None:
    saved = state_of(shaped("ab", 2, 3) + shaped("c", 5), mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (shaped("x", 5) + shaped("yz", 3, 2), [UNKNOWN] * 3):
            assert rows(saved.match_by_name(state_of(same, mode=mode))) == [([1.0], 7)]
    for other in (shaped("ab", 2, 3), shaped("abc", 2, 3), [UNKNOWN]):
        with pytest.warns(UserWarning, match="start empty: group 0. Saved .* not used: group 0."):
            assert rows(saved.match_by_name(state_of(other, mode=mode))) == [([], 0)]


def test_more_or_fewer_groups() -> None:
    two, one = (state_of(*[shaped("a", 2)] * count, mode="group") for count in (2, 1))
    with pytest.warns(UserWarning, match="start empty: none. Saved .* not used: group 1."):
        assert rows(two.match_by_name(one)) == [([1.0], 7)]
    with pytest.warns(UserWarning, match="start empty: group 1. Saved .* not used: none."):
        assert rows(one.match_by_name(two)) == [([1.0], 7), ([], 0)]


def test_another_rule_or_mode_is_refused_by_name_too() -> None:
    saved = state_of(shaped("a", 2))
    with pytest.raises(StateError, match="with the same rule"):
        saved.match_by_name(state_of(shaped("a", 2), rule=Standard()))
    with pytest.raises(StateError, match="neither global_clipping nor group_clipping"):
        saved.match_by_name(state_of(shaped("a", 2), mode="global"))


def test_a_longer_window_keeps_its_newest_norms_by_name_too() -> None:
    info = weight(2)
    long = GroupSettings(HALF, 10).settings
    saved = GroupState.from_windows(long, [info], [[1.0, 2.0, 3.0]], [7])
    ours = GroupState.from_windows(long | {"history_length": 2}, [info], [[]], [0])
    states = [State("quantile", "parameter", "torch", (group,)) for group in (saved, ours)]
    with pytest.warns(UserWarning, match="history_length=10 there and 2 here"):
        assert rows(states[0].match_by_name(states[1])) == [([2.0, 3.0], 7)]
