"""States as bytes: what is saved comes back, and equal states are equal bytes."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import (
    SMALLEST_NORM,
    GroupState,
    History,
    ParameterInfo,
    Quantile,
    Rule,
    Standard,
    State,
    StateError,
)
from autoclip.core._state import MAX_HEADER_BYTES

LARGEST_NORM = float(np.finfo(np.float32).max)

# Half of a surrogate pair, too: Python's strings can hold it, and UTF-8 cannot.
texts = st.text(st.characters(exclude_categories=()), max_size=12)
parameters = st.builds(
    ParameterInfo,
    st.none() | texts,
    st.none() | st.lists(st.integers(0, 2**70), max_size=4).map(tuple),
)
norms = st.floats(SMALLEST_NORM, LARGEST_NORM, width=32)


@st.composite
def groups(draw: st.DrawFn, rule: str, global_clipping: bool) -> GroupState:
    setting = {"quantile": st.floats(0, 1), "standard": st.floats(0, allow_infinity=False)}[rule]
    name = {"quantile": "quantile", "standard": "deviations"}[rule]
    history_length = draw(st.integers(1, 8) | st.integers(1, 2**63 - 1))
    infos = draw(st.lists(parameters, max_size=4))
    rows = 1 if global_clipping else len(infos)
    sizes = st.integers(0, min(8, history_length))
    windows = [draw(npst.arrays(np.float32, draw(sizes), elements=norms)) for _ in range(rows)]
    more = draw(st.lists(st.integers(0, 2**62 - 8), min_size=rows, max_size=rows))
    return GroupState.from_windows(
        {name: draw(setting), "history_length": history_length},
        infos,
        windows,
        [len(window) + extra for window, extra in zip(windows, more)],
    )


@st.composite
def states(draw: st.DrawFn) -> State:
    rule, global_clipping = draw(st.sampled_from(["quantile", "standard"])), draw(st.booleans())
    few = st.lists(groups(rule, global_clipping), min_size=int(global_clipping), max_size=3)
    made = draw(few)[:1] if global_clipping else draw(few)
    return State(rule, global_clipping, draw(texts), tuple(made), draw(texts))


def contents(state: State) -> Any:
    """All that a state holds, as plain values that compare."""
    return (
        (state.rule, state.global_clipping, state.framework, state.library_version),
        [
            (
                dict(group.settings),
                group.parameters,
                [window.tolist() for window in group.windows()],
                group.recorded.tolist(),
            )
            for group in state.groups
        ],
    )


def one_group(**changes: Any) -> State:
    """A state of one group of two rows, with some of its fields replaced."""
    fields: dict[str, Any] = {
        "settings": {"quantile": 0.5, "history_length": 4},
        "parameters": (ParameterInfo("weight", (2, 3)), ParameterInfo("bias", (3,))),
        "values": np.array([1, 2, 3], np.float32),
        "lengths": np.array([2, 1]),
        "recorded": np.array([9, 1]),
    }
    top = {name: changes.pop(name) for name in list(changes) if name not in fields}
    group = GroupState(**{**fields, **changes})
    plain: dict[str, Any] = {"rule": "quantile", "global_clipping": False, "framework": "numpy"}
    return State(**plain | top, groups=(group,))


# -- there and back ----------------------------------------------------------------------------


@given(states())
def test_any_state_comes_back_from_its_bytes(state: State) -> None:
    data = state.to_bytes()
    loaded = State.from_bytes(data)
    assert contents(loaded) == contents(state)
    assert loaded.to_bytes() == data
    assert [
        array.dtype
        for group in loaded.groups
        for array in (group.values, group.lengths, group.recorded)
    ] == [np.float32, np.int64, np.int64] * len(state.groups)


@given(states())
def test_any_state_comes_back_from_its_dict(state: State) -> None:
    state_dict = state.to_dict()
    assert {"format": "autoclip", "version": 1, "data": state.to_bytes()} == state_dict
    assert contents(State.from_dict(state_dict)) == contents(state)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_read(kind: Any) -> None:
    state = one_group()
    assert contents(State.from_bytes(kind(state.to_bytes()))) == contents(state)


def test_a_state_of_no_rows_and_one_of_no_groups() -> None:
    empty = GroupState.from_windows({"quantile": 0.5, "history_length": 1}, [], [], [])
    for made in ((empty,), (empty, empty), ()):
        state = State("quantile", False, "numpy", made)
        assert contents(State.from_bytes(state.to_bytes())) == contents(state)


def test_the_digest_is_that_of_all_that_stands_before_it() -> None:
    data = one_group().to_bytes()
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]


# -- canonical ---------------------------------------------------------------------------------


def test_arrays_are_written_by_their_values_not_as_they_lie_in_memory() -> None:
    plain = one_group().to_bytes()
    for values in (
        np.array([1, 9, 2, 9, 3, 9], np.float32)[::2],
        np.array([3, 2, 1], np.float32)[::-1],
        np.array([[1, 9], [2, 9], [3, 9]], np.float32)[:, 0],
        np.array([1, 2, 3], ">f4"),
        np.array([1, 9, 2, 9, 3, 9], ">f4")[::2],
    ):
        assert one_group(values=values).to_bytes() == plain
    for dtype in (">i8", "<i8", "<i4"):
        lengths, recorded = np.array([1, 0, 2], dtype)[::-2], np.array([9, 0, 1], dtype)[::2]
        assert one_group(lengths=lengths, recorded=recorded).to_bytes() == plain


def test_the_order_of_settings_does_not_matter() -> None:
    turned = {"history_length": 4, "quantile": 0.5}
    assert one_group(settings=turned).to_bytes() == one_group().to_bytes()


@settings(max_examples=50)
@given(
    st.sampled_from([Quantile(0.5), Standard()]),
    st.integers(1, 70),
    st.integers(0, 150),
    st.data(),
)
def test_the_same_past_is_the_same_bytes_whatever_the_ring_buffers(
    rule: Rule, length: int, steps: int, data: st.DataObject
) -> None:
    """One that never stopped, one that was loaded, one whose buffer another row made larger."""
    past = np.random.default_rng(steps).lognormal(size=(steps, 2)).astype(np.float32)
    past[::3, 1] = math.nan
    straight = History(2, rule, length)
    for norms in past:
        straight.record(norms)

    cut = data.draw(st.integers(0, steps))
    loaded = History(2, rule, length)
    windows = [past[:cut, 0], past[:cut, 1][np.isfinite(past[:cut, 1])]]
    loaded.write([0, 1], windows, [len(window) for window in windows])
    for norms in past[cut:]:
        loaded.record(norms)

    larger = History(3, rule, length)
    for _ in range(200):
        larger.record([math.nan, math.nan, 1.0])
    for norms in past:
        larger.record([*norms, math.nan])
    copied = History(2, rule, length)
    copied.write([0, 1], *larger.read([0, 1]))

    expected = straight.state_dict()
    assert loaded.state_dict() == expected
    assert copied.state_dict() == expected


LIKE_A_SIZE: Any = (2.0,)
LIKE_A_NAME: Any = 7

# -- what is not saved -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": "median"}, "it has the rule 'median', and .* knows 'quantile', 'standard'"),
        ({"global_clipping": True}, "group 0 has 1 rows, but lengths of shape"),
        ({"global_clipping": 0}, "global_clipping is 0, not true or false"),
        ({"framework": None}, "framework is None, not a string"),
        ({"library_version": 3}, "library_version is 3, not a string"),
        ({"settings": {"quantile": 0.5}}, "lacks the setting 'history_length'"),
        ({"settings": {"history_length": 4}}, "lacks the setting 'quantile'"),
        ({"settings": {"quantile": math.nan, "history_length": 4}}, "quantile takes .* got nan"),
        ({"settings": {"quantile": 0.5, "history_length": 4, "x": 1}}, "unknown setting 'x'"),
        ({"parameters": (ParameterInfo("a", (2,)),)}, "has 1 rows, but lengths of shape"),
        ({"parameters": (ParameterInfo("a", (-1,)), ParameterInfo("b", ()))}, r"shape \[-1\]"),
        ({"parameters": (ParameterInfo("a", LIKE_A_SIZE), ParameterInfo("b", ()))}, r"\[2\.0\]"),
        ({"parameters": (ParameterInfo(LIKE_A_NAME, ()), ParameterInfo("b", ()))}, "the name 7"),
        ({"values": np.array([1, 2, 0], np.float32)}, "a norm that is zero, negative, NaN or"),
        ({"values": np.array([1, 2], np.float32)}, r"values of shape \(2,\) for \[2, 1\]"),
        ({"lengths": np.array([2, -1])}, "a window is longer .* or is of negative length"),
        ({"lengths": np.array([1, 2])}, "a window is longer than .* what it recorded"),
        ({"recorded": np.array([1, 1])}, "a window is longer than .* what it recorded"),
        ({"settings": {"quantile": 0.5, "history_length": 1}}, r"its history_length \(1\)"),
        ({"recorded": np.array([2**62 + 1, 1])}, "recorded more than 4611686018427387904 norms"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StateError, match=rf"^the state to be saved is not a valid .*{says}"):
        one_group(**changes).to_bytes()


def test_global_clipping_has_one_group() -> None:
    group = GroupState.from_windows({"quantile": 0.5, "history_length": 4}, [], [[1.0]], [1])
    State("quantile", True, "numpy", (group,)).to_bytes()
    with pytest.raises(StateError, match="global clipping has one group, but there are 2"):
        State("quantile", True, "numpy", (group, group)).to_bytes()


def test_a_header_that_would_be_too_large_to_read_is_not_written() -> None:
    def named(characters: int) -> State:
        infos = (ParameterInfo("x" * characters, None), ParameterInfo(None, None))
        return one_group(parameters=infos)

    spare = MAX_HEADER_BYTES - int.from_bytes(named(0).to_bytes()[:8], "little")
    largest = named(spare)
    assert contents(State.from_bytes(largest.to_bytes())) == contents(largest)
    with pytest.raises(StateError, match=r"has a header of \d+ bytes; 4194304 are the most"):
        named(spare + 1).to_bytes()


# -- state dicts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state_dict", "says"),
    [
        (None, 'takes a dict with the keys "format", "version" and "data", .* but got None'),
        ([], "but got []"),
        (b"bytes", "but got b'bytes'"),
        ({}, "but got []"),
        ({"state": {}, "param_groups": []}, r"but got \['param_groups', 'state'\]"),
        ({"format": "pickle", "version": 1, "data": b""}, r"but got \['data', 'format'"),
        ({"format": np.array(["autoclip"] * 2)}, r"but got \['format'\]"),
        ({"format": "autoclip", "data": b""}, "has the version None; a version is an int"),
        ({"format": "autoclip", "version": "1", "data": b""}, "has the version '1'"),
        ({"format": "autoclip", "version": True, "data": b""}, "has the version True"),
        ({"format": "autoclip", "version": 0, "data": b""}, "has the version 0"),
        ({"format": "autoclip", "version": 2, "data": b""}, r"has version 2 .* pip install -U"),
        ({"format": "autoclip", "version": 1}, 'has no "data"'),
        ({"format": "autoclip", "version": 1, "data": None}, "takes bytes, but got NoneType"),
        ({"format": "autoclip", "version": 1, "data": "text"}, "takes bytes, but got str"),
        ({"format": "autoclip", "version": 1, "data": b""}, "has only 0 bytes"),
        ({"format": "autoclip", "version": 1, "data": b"x" * 99}, "is damaged, cut off, or no"),
    ],
)
def test_another_dict_is_refused_and_the_history_is_as_it_was(state_dict: Any, says: str) -> None:
    history = History(1, Quantile(0.5), 10)
    history.record([1.0])
    before = history.state_dict()
    with pytest.raises(StateError, match=f"^state_dict .*{says}".replace("[]", r"\[\]")):
        history.load_state_dict(state_dict)
    assert history.state_dict() == before
