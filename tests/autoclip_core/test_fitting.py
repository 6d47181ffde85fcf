"""Loading a state into a clipper: what fits, what is kept, and what is said when it does not."""

from __future__ import annotations

import warnings
from dataclasses import replace
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
from autoclip.core.adapter import GroupSettings, Mode

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


class Named(Standard):
    """A rule of any name."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)


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
            state_of(NUMPY_ROWS, mode="global"),
            "holds one history for all parameters, but it is loaded into a clipper with a history "
            "for each parameter. Make the clipper with global_clipping=True.",
        ),
        (
            state_of(NUMPY_ROWS, mode="group"),
            "holds a history for each parameter group, but it is loaded into a clipper with a "
            "history for each parameter. Make the clipper with group_clipping=True.",
        ),
        (state_of(NUMPY_ROWS, []), "has 2 parameter groups, but the clipper has 1, and no"),
        (state_of(), "has 0 parameter groups, but the clipper has 1, and no"),
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
            weight(3, 2),
            "Parameter 1 of group 1 does not match: my.file has 'weight' of shape (2, 3), the "
            "clipper has 'weight' of shape (3, 2); their shapes differ. Load it for the same "
            "model.",
        ),
        (
            "tensorflow",
            weight(7),
            "Parameter 1 of group 1 does not match: my.file has 'weight' of shape (2, 3), the "
            "clipper has 'weight' of shape (7,); their numbers of elements differ. Load it for "
            "the same model.",
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


def test_messages_are_short_whatever_the_names() -> None:
    for name in ("x" * 10**6, "\x1b[31m" * 10**6):
        saved = state_of([weight(2, name=name)], rule=Named(name[:100]))
        with pytest.raises(StateError) as caught:
            saved.match(state_of([weight(3, name=name)]))
        with pytest.raises(StateError) as more:
            saved.match(state_of([weight(2, name=name + "x")] * 2))
        with pytest.warns(UserWarning, match="in common") as said:
            saved.match(state_of([weight(2, name=name + "x")]))
        for text in map(str, (caught.value, more.value, said[0].message)):
            assert len(text) <= 600
            assert text.isprintable()


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


def test_another_rule_is_said_and_its_own_settings_are_not() -> None:
    """A history of norms is one under any rule."""
    saved = History(2, Standard(3.0), 10, max_norm=9.0)
    for norms in ([1.0, 2.0], [3.0, 4.0]):
        saved.record(norms)
    history = History(2, Quantile(0.5), 10)
    with pytest.warns(UserWarning, match="other settings") as caught:
        history.load_state_dict(saved.state_dict())
    (warning,) = caught
    assert str(warning.message) == (
        "state_dict was saved with other settings, and the clipper's own are used: "
        "rule='standard' there and 'quantile' here; max_norm=9.0 there and None here; "
        "warmup_steps=25 there and 0 here; include_current=False there and True here."
    )
    assert history.thresholds.tolist() == [2.0, 3.0]
    assert history.recorded.tolist() == [2, 2]


def another_release(state: State, **settings: Any) -> State:
    """The state as a release with other settings writes it, read from its bytes."""
    groups = (
        replace(group, settings=group.settings | settings)  # type: ignore[operator]
        for group in state.groups
    )
    return State.from_bytes(replace(state, groups=tuple(groups)).to_bytes())


def test_another_releases_settings_are_said_and_nothing_is_lost() -> None:
    """One with one more setting, and one that does not have one yet, under a rule of any name."""
    ours = History(2, Quantile(0.5), 10)
    ours.record([1.0, 2.0])
    saved = State.from_dict(ours.state_dict())
    later = another_release(saved, smoothing={"kind": "median", "steps": [1, 2, None]})
    older = replace(
        saved,
        groups=tuple(
            replace(group, settings={k: v for k, v in group.settings.items() if k != "on_spike"})
            for group in saved.groups
        ),
    )
    older = State.from_bytes(older.to_bytes())
    odd = another_release(saved, quantile="high", history_length=None, max_norm=[1, [2]])
    unknown = replace(another_release(saved, spread=3), rule="not registered here")
    bare = replace(
        saved, rule="", groups=tuple(replace(group, settings={}) for group in saved.groups)
    )
    for state, says in (
        (later, r"smoothing={'kind': 'median', 'steps': \[1, 2, None\]} there and absent here\.$"),
        (older, r"used: on_spike=absent there and 'clip' here\.$"),
        (odd, r"quantile='high' there and 0.5 here; history_length=None there and 10 here; "),
        (unknown, r"used: rule='not registered here' there and 'quantile' here\.$"),
        (bare, r"used: rule='' there and 'quantile' here; history_length=absent there and 10 "),
    ):
        history = History(2, Quantile(0.5), 10)
        with pytest.warns(UserWarning, match=says) as caught:
            history.load_state_dict(state.to_dict())
        assert len(caught) == 1
        assert history.thresholds.tolist() == [1.0, 2.0]
        assert history.state_dict() == ours.state_dict()


# -- names -------------------------------------------------------------------------------------


def rows(state: State) -> list[tuple[list[float], int]]:
    """Each row's window and how many norms it has recorded."""
    return [
        (window.tolist(), int(recorded))
        for group in state.groups
        for window, recorded in zip(group.windows(), group.recorded)
    ]


def quietly(saved: State, ours: State, **kinds: bool) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return saved.match(ours, "my.file", **kinds)


def shaped(names: str, *shape: int) -> list[ParameterInfo]:
    return [weight(*shape, name=name) for name in names]


def test_rows_follow_their_names_into_any_order_and_group() -> None:
    saved = state_of(shaped("abc", 2), shaped("de", 3))
    ours = state_of(shaped("e", 3), shaped("cab", 2) + shaped("d", 3))
    matched = quietly(saved, ours)
    assert rows(matched) == [([5.0], 7), ([3.0], 7), ([1.0], 7), ([2.0], 7), ([4.0], 7)]
    assert [group.parameters for group in matched.groups] == [g.parameters for g in ours.groups]
    assert State.from_bytes(matched.to_bytes()).to_bytes() == matched.to_bytes()


@given(st.permutations(range(5)), st.integers(0, 5))
def test_any_order_of_names_and_any_grouping(order: list[int], cut: int) -> None:
    names = [weight(2, name=f"layer{i}") for i in range(5)]
    saved, turned = state_of(names), [names[i] for i in order]
    matched = quietly(saved, state_of(turned[:cut], turned[cut:]))
    assert rows(matched) == [([float(i + 1)], 7) for i in order]


@given(
    st.lists(st.sampled_from("abcdef"), unique=True),
    st.lists(st.sampled_from("abcdef"), unique=True),
    st.sampled_from(["torch", "tensorflow"]),
)
def test_a_row_without_a_partner_starts_empty(
    theirs: list[str], mine: list[str], framework: str
) -> None:
    saved = state_of(shaped("".join(theirs), 2, 3))
    ours = state_of(shaped("".join(mine), 2, 3), framework=framework)
    if not {*theirs} & {*mine} and len(theirs) != len(mine):
        with pytest.raises(StateError, match="parameters in group 0, but the clipper has"):
            saved.match(ours, "my.file")
        return
    if not {*theirs} & {*mine}:
        partners = dict(zip(mine, theirs))
    else:
        partners = {name: name for name in mine if name in theirs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matched = saved.match(ours, "my.file")
    assert rows(matched) == [
        ([float(theirs.index(partners[name]) + 1)], 7) if name in partners else ([], 0)
        for name in mine
    ]
    assert len(caught) == ({*theirs} != {*mine})
    State.from_bytes(matched.to_bytes())


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_shared_name_of_another_shape_is_refused_or_starts_empty(framework: str) -> None:
    saved = state_of(shaped("ab", 2, 3))
    # `b` has another number of elements, or in torch the same transposed.
    shape = (3, 2) if framework == "torch" else (2, 2)
    ours = state_of([*shaped("c", 9), *shaped("b", *shape), *shaped("a", 2, 3)])
    ours = replace(ours, framework=framework)
    with pytest.raises(StateError, match="Parameter 1 of group 0 does not match"):
        saved.match(ours, "my.file")
    with pytest.warns(UserWarning, match="start empty: 'c' .*'b' .*not used: 'b' of shape"):
        assert rows(saved.match(ours, partial=True)) == [([], 0), ([], 0), ([1.0], 7)]


def test_one_short_warning_names_what_did_not_match_and_the_settings() -> None:
    saved = state_of([weight(2, name=f"layer{i}") for i in range(100)], quantile=0.25)
    ours = state_of([weight(2, name=f"dense{i}") for i in range(100)] + [weight(2, name="layer0")])
    with pytest.warns(UserWarning, match="does not match") as caught:
        saved.match(ours, "my.file")
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


def test_equal_names_match_in_order_if_there_are_equally_many() -> None:
    """As of two layers of one name in Keras, or of parameters without a name among others."""
    for name in ("x", None):
        twice = [weight(2, name=name), *shaped("a", 3), weight(2, name=name)]
        turned = [twice[0], twice[2], twice[1]]
        matched = quietly(state_of(twice), state_of(turned))
        assert rows(matched) == [([1.0], 7), ([3.0], 7), ([2.0], 7)]
        with pytest.warns(UserWarning, match="start empty: .*not used: ") as caught:
            matched = state_of(twice).match(state_of(twice[:2]))
        assert rows(matched) == [([], 0), ([2.0], 7)]
        assert str(caught[0].message).count("of shape (2,)") == 3


def test_histories_go_to_other_names_only_if_none_is_shared_and_with_a_warning() -> None:
    """A renamed model; or the two clippers of a GAN, exchanged."""
    saved = state_of([weight(2, name=f"layer{i}") for i in range(100)])
    ours = state_of([weight(2, name=f"module.layer{i}") for i in range(100)])
    with pytest.warns(UserWarning, match="no parameter's name in common") as caught:
        matched = saved.match(ours, "my.file")
    (warning,) = caught
    assert rows(matched) == rows(saved)
    text = str(warning.message)
    assert text.startswith(
        "my.file has no parameter's name in common with the clipper, so its histories are matched "
        "by order: 'layer0' → 'module.layer0'; 'layer1' → 'module.layer1'; "
    )
    assert text.endswith(" more. Make sure that these are the same parameters.")
    assert len(text) <= 600
    # One shared name decides that the others are other parameters.
    with pytest.warns(UserWarning, match="does not match the clipper everywhere"):
        matched = saved.match(replace(ours, groups=state_of(saved_names("x", "layer9")).groups))
    assert rows(matched) == [([], 0), ([10.0], 7)]


def saved_names(*names: str) -> list[ParameterInfo]:
    return [weight(2, name=name) for name in names]


def test_without_names_the_order_decides_and_nothing_is_said() -> None:
    saved, nameless = state_of(shaped("ab", 2)), state_of([weight(2, name=None)] * 2)
    for theirs, mine in ((saved, nameless), (nameless, saved), (nameless, nameless)):
        assert rows(quietly(theirs, mine)) == [([1.0], 7), ([2.0], 7)]


def test_without_shared_names_the_groups_must_be_the_same() -> None:
    saved, ours = state_of(shaped("ab", 2), shaped("c", 2)), state_of(shaped("xyz", 2))
    says = "has 2 parameter groups, but the clipper has 1, and no parameter's name is in both"
    with pytest.raises(StateError, match=says):
        saved.match(ours)
    for unfit in (ours, state_of(shaped("x", 2), shaped("yz", 2))):
        with pytest.warns(UserWarning, match="start empty: 'x' .*; 'y' .*not used: 'a' "):
            assert rows(saved.match(unfit, partial=True)) == [([], 0)] * 3
    says = (
        r"2 parameters in group 0, but the clipper has 1 \(only saved: 'a', 'b'; only in the .* 'x'"
    )
    with pytest.raises(StateError, match=says):
        saved.match(state_of(shaped("x", 2), shaped("yz", 2)))


# -- one row for many parameters ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["group", "global"])
def test_the_order_within_a_row_does_not_matter(mode: Mode) -> None:
    saved = state_of(shaped("ab", 2, 3) + shaped("c", 5), mode=mode)
    for same in (shaped("c", 5) + shaped("ba", 2, 3), NUMPY_ROWS):
        assert rows(quietly(saved, state_of(same, mode=mode))) == [([1.0], 7)]
    transposed = state_of(shaped("c", 5) + shaped("ba", 3, 2), mode=mode, framework="tensorflow")
    assert rows(quietly(saved, transposed)) == [([1.0], 7)]


@pytest.mark.parametrize("mode", ["group", "global"])
def test_a_row_of_other_parameters_is_refused_or_starts_empty(mode: Mode) -> None:
    saved = state_of(shaped("ab", 2, 3) + shaped("c", 5), mode=mode)
    for other, says in (
        (shaped("ab", 2, 3), r"3 parameters in group 0, but the clipper has 2 \(only saved: 'c'; "),
        (shaped("abc", 2, 3), "Parameter 2 of group 0 does not match: my.file has 'c' of shape"),
        ([UNKNOWN], "3 parameters in group 0, but the clipper has 1"),
    ):
        ours = state_of(other, mode=mode)
        with pytest.raises(StateError, match=says):
            saved.match(ours, "my.file")
        label = "group 0" if mode == "group" else "all parameters"
        with pytest.warns(UserWarning, match=f"start empty: {label}. Saved .* not used: {label}."):
            assert rows(saved.match(ours, partial=True)) == [([], 0)]


@pytest.mark.parametrize("mode", ["parameter", "group", "global"])
def test_a_history_of_another_parameter_of_the_model_goes_to_no_other(mode: Mode) -> None:
    """The parameters that were trained are frozen now, and others are trained."""
    saved, ours = state_of(shaped("ab", 2), mode=mode), state_of(shaped("cd", 2), mode=mode)
    with pytest.warns(UserWarning, match="start empty: .* not used: "):
        matched = saved.match(ours, others=["a", "b", "e"])
    assert all(row == ([], 0) for row in rows(matched))
    with pytest.warns(UserWarning, match="by order"):
        assert rows(saved.match(ours, others=["e"])) == rows(saved)
    # A shared name decides, as without them.
    ours = state_of(shaped("ab", 2), mode=mode)
    assert rows(quietly(saved, ours)) == rows(saved.match(ours, others=["e"])) == rows(saved)


def test_groups_follow_their_parameters_names() -> None:
    saved = state_of(shaped("ab", 2), shaped("cd", 3), shaped("e", 4), mode="group")
    ours = state_of(shaped("e", 4), shaped("dc", 3), shaped("ab", 2), mode="group")
    assert rows(quietly(saved, ours)) == [([3.0], 7), ([2.0], 7), ([1.0], 7)]
    # A renamed parameter does not hide whose group it is.
    ours = state_of(shaped("e", 4), shaped("cx", 3), shaped("ab", 2), mode="group")
    assert rows(quietly(saved, ours)) == [([3.0], 7), ([2.0], 7), ([1.0], 7)]


def test_a_group_that_was_split_or_joined_starts_empty() -> None:
    whole = state_of(shaped("abcd", 2), shaped("e", 2), mode="group")
    split = state_of(shaped("ab", 2), shaped("cd", 2), shaped("e", 2), mode="group")
    with pytest.warns(UserWarning, match="start empty: group 0; group 1. .* not used: group 0."):
        assert rows(whole.match(split)) == [([], 0), ([], 0), ([2.0], 7)]
    with pytest.warns(UserWarning, match="start empty: group 0. .* not used: group 0; group 1."):
        assert rows(split.match(whole)) == [([], 0), ([3.0], 7)]


@pytest.mark.parametrize("mode", ["group", "global"])
def test_rows_of_renamed_parameters_match_by_order_with_a_warning(mode: Mode) -> None:
    saved, ours = state_of(shaped("ab", 2), mode=mode), state_of(shaped("xy", 2), mode=mode)
    label = "group 0" if mode == "group" else "all parameters"
    says = rf"by order: {label} \('a', …\) → {label} \('x', …\). Make sure"
    with pytest.warns(UserWarning, match=says):
        assert rows(saved.match(ours)) == [([1.0], 7)]


def test_more_or_fewer_groups_without_names() -> None:
    two, one = (state_of(*[[weight(2, name=None)]] * count, mode="group") for count in (2, 1))
    for saved, ours in ((two, one), (one, two)):
        with pytest.raises(StateError, match=r"parameter groups?, but the clipper has"):
            saved.match(ours)
        with pytest.warns(UserWarning, match="start empty: group 0"):
            assert {count for _, count in rows(saved.match(ours, partial=True))} == {0}


def test_another_mode_is_refused_in_any_case() -> None:
    for partial in (False, True):
        with pytest.raises(StateError, match="neither global_clipping nor group_clipping"):
            state_of(shaped("a", 2)).match(state_of(shaped("a", 2), mode="global"), partial=partial)


def test_loading_looks_at_the_description_alone() -> None:
    """To read the windows that are replaced takes longer than the rest of a load."""

    class Slow(History):
        def export_state(self) -> State:
            raise AssertionError("loading has read the windows")

    saved = History(2, Quantile(0.5), 10)
    saved.record([1.0, 2.0])
    loaded = Slow(2, Quantile(0.5), 10)
    loaded.record([7.0, 8.0])
    loaded.load_state_dict(saved.state_dict())
    assert loaded.thresholds.tolist() == [1.0, 2.0]
    described, exported = saved.describe_state(), saved.export_state()
    assert rows(described) == [([], 0)] * 2
    kinds = [(each.rule, each.mode, each.framework) for each in (described, exported)]
    assert kinds[0] == kinds[1]
    for one, other in zip(described.groups, exported.groups, strict=True):
        assert (one.settings, one.parameters) == (other.settings, other.parameters)


# -- windows -----------------------------------------------------------------------------------


def test_a_longer_window_keeps_its_newest_norms() -> None:
    info = weight(2)
    long = GroupSettings(HALF, 10).settings
    saved = GroupState.from_windows(long, [info], [[1.0, 2.0, 3.0]], [7])
    ours = GroupState.from_windows(long | {"history_length": 2}, [info], [[]], [0])
    states = [State("quantile", "parameter", "torch", (group,)) for group in (saved, ours)]
    with pytest.warns(UserWarning, match="history_length=10 there and 2 here"):
        assert rows(states[0].match(states[1])) == [([2.0, 3.0], 7)]


@given(st.data())
def test_windows_of_any_lengths_go_where_their_names_are(data: st.DataObject) -> None:
    names = [f"p{i}" for i in range(6)]
    windows = {name: list(range(1, 1 + data.draw(st.integers(0, 5), label=name))) for name in names}
    length = data.draw(st.integers(1, 5))

    def made(order: list[str], cut: int, **changes: Any) -> State:
        groups = (
            GroupState.from_windows(
                GroupSettings(HALF, 5).settings | changes,
                [weight(2, name=name) for name in part],
                [windows[name] for name in part],
                [len(windows[name]) for name in part],
            )
            for part in (order[:cut], order[cut:])
        )
        return State("quantile", "parameter", "torch", tuple(groups))

    order, cuts = data.draw(st.permutations(names)), st.integers(0, 6)
    saved, ours = made(names, data.draw(cuts)), made(order, data.draw(cuts), history_length=length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the settings
        matched = saved.match(ours)
    expected = [(windows[name][-length:], len(windows[name])) for name in order]
    assert rows(matched) == expected
