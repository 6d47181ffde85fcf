"""Loading a state into a clipper: what fits, what is kept, and what is said when it does not."""

from __future__ import annotations

import warnings
from pathlib import Path

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

HALF = Quantile(0.5)


def state_of(
    *groups: list[ParameterInfo],
    framework: str = "torch",
    global_clipping: bool = False,
    rule: Rule = HALF,
) -> State:
    """A state whose rows each hold one norm, 1, 2, 3, ..., in order."""
    made, start = [], 1
    every = {**rule.settings, "history_length": 10}
    for group in groups:
        rows = 1 if global_clipping else len(group)
        windows = [[float(start + row)] for row in range(rows)]
        made.append(GroupState.from_windows(every, group, windows, [7] * rows))
        start += rows
    return State(rule.name, global_clipping, framework, tuple(made))


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
        (weight(2**40, 2**40), weight(2**80), False, True),  # beyond int64
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
            fitted = theirs.fit_to(ours)
            assert fitted.framework == framework
            assert fitted.groups[0].parameters == (current,)
            assert fitted.groups[0].recorded.tolist() == [7]
        else:
            with pytest.raises(StateError, match="does not match"):
                theirs.fit_to(ours)


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
            "holds a clipper with the standard rule, but it is loaded into one with the quantile "
            "rule. Load it into a clipper of the same class.",
        ),
        (
            state_of(NUMPY_ROWS, global_clipping=True),
            "was saved with global_clipping=True, but it is loaded into a clipper with "
            "global_clipping=False.",
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
        saved.fit_to(ours, "my.file")
    assert str(caught.value) == says


def test_an_unknown_shape_is_said_to_be_unknown() -> None:
    assert str(UNKNOWN) == "'weight' of unknown shape"
    assert str(ParameterInfo(None, ())) == "an unnamed parameter of shape ()"


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
        f"{source} was saved with other settings, and the clipper's own stay in force: "
        "quantile=0.5 there and 0.25 here (group 0); "
        "history_length=10 there and 20 here (group 0); "
        "history_length=10 there and 20 here (group 1)."
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
    saved, history = History(1, rule, length), History(1, rule, other_length)
    norms = np.random.default_rng(steps).lognormal(size=steps + 100).astype(np.float32)
    for norm in norms[:steps]:
        saved.record([norm])
    history.load_state_dict(saved.state_dict())
    kept = norms[:steps][-min(length, other_length) :]
    assert history.read([0])[0][0].tolist() == kept.tolist()
    assert history.recorded.tolist() == [steps]

    # And it goes on as one that has just these norms behind it.
    fresh = History(1, rule, other_length)
    fresh.write([0], [kept], [len(kept)])
    for norm in norms[steps:]:
        expected = fresh.record([norm]).thresholds
        assert history.record([norm]).thresholds == pytest.approx(expected, rel=1e-14, abs=0)
    assert history.read([0])[0][0].tolist() == fresh.read([0])[0][0].tolist()
