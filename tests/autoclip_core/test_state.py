"""States as bytes: what is saved comes back, and equal states are equal bytes."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import (
    MAX_FILE_BYTES,
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
from autoclip.core.adapter import GroupSettings

LARGEST_NORM = float(np.finfo(np.float32).max)

# Half of a surrogate pair, too: Python's strings can hold it, and UTF-8 cannot.
texts = st.text(st.characters(exclude_categories=()), max_size=12)
parameters = st.builds(
    ParameterInfo,
    st.none() | texts,
    st.none() | st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple),
)
norms = st.floats(SMALLEST_NORM, LARGEST_NORM, width=32)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
# Another release may have settings of any JSON type.
values = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(texts, scalars | st.lists(st.lists(scalars, max_size=2), max_size=2))
)
factors = st.floats(SMALLEST_NORM, LARGEST_NORM)
built_in_rules = st.builds(Quantile, st.floats(0, 1), factor=factors) | st.builds(
    Standard,
    st.floats(0, LARGEST_NORM),
    decay=st.none() | st.floats(0.125, 0.875),
    factor=st.floats(1, LARGEST_NORM),
    shrink=st.booleans(),
)


@st.composite
def settings_of(draw: st.DrawFn, rule: Rule | None) -> dict[str, Any]:
    """Those of this release, or of another one: some missing, some more."""
    length = draw(st.integers(1, 8) | st.integers(1, 2**63 - 1))
    ceiling = draw(st.none() | factors)
    warmup = draw(st.integers(0, 2**63 - 1))
    ours = GroupSettings(rule or Quantile(), length, max_norm=ceiling, warmup_steps=warmup).settings
    missing = draw(st.sets(st.sampled_from(sorted(ours))))
    more = draw(st.dictionaries(texts, values, max_size=3))
    return {name: value for name, value in ours.items() if name not in missing} | more


@st.composite
def groups(draw: st.DrawFn, rule: Rule | None, mode: str) -> GroupState:
    every = draw(settings_of(rule))
    infos = draw(st.lists(parameters, max_size=4))
    rows = len(infos) if mode == "parameter" else 1
    sizes = st.integers(0, 8)
    windows = [draw(npst.arrays(np.float32, draw(sizes), elements=norms)) for _ in range(rows)]
    more = draw(st.lists(st.integers(0, 2**62 - 8), min_size=rows, max_size=rows))
    recorded = [len(window) + extra for window, extra in zip(windows, more)]
    return GroupState.from_windows(every, infos, windows, recorded)


@st.composite
def states(draw: st.DrawFn) -> State:
    mode: Any = draw(st.sampled_from(["parameter", "group", "global"]))
    count = 1 if mode == "global" else draw(st.integers(0, 3))
    rule = draw(st.none() | built_in_rules)
    name = draw(texts) if rule is None else rule.name
    made = tuple(draw(groups(rule, mode)) for _ in range(count))
    return State(name, mode, draw(texts), made, draw(texts))


def contents(state: State) -> Any:
    """All that a state holds, as plain values that compare."""
    return (
        (state.rule, state.mode, state.framework, state.library_version),
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


HALF = GroupSettings(Quantile(0.5), 4).settings


def one_group(**changes: Any) -> State:
    """A state of one group of two rows, with some of its fields replaced."""
    fields: dict[str, Any] = {
        "settings": HALF,
        "parameters": (ParameterInfo("weight", (2, 3)), ParameterInfo("bias", (3,))),
        "values": np.array([1, 2, 3], np.float32),
        "lengths": np.array([2, 1]),
        "recorded": np.array([9, 1]),
    }
    top = {name: changes.pop(name) for name in list(changes) if name not in fields}
    group = GroupState(**{**fields, **changes})
    plain: dict[str, Any] = {"rule": "quantile", "mode": "parameter", "framework": "numpy"}
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
    empty = GroupState.from_windows(HALF, [], [], [])
    for made in ((empty,), (empty, empty), ()):
        state = State("quantile", "parameter", "numpy", made)
        assert contents(State.from_bytes(state.to_bytes())) == contents(state)


@given(states())
def test_the_digest_is_that_of_everything_else(state: State) -> None:
    """The metadata's own digits count as zeros; the tensors follow in the order of their names."""
    data = state.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header["__metadata__"]["autoclip"]
    digest = json.loads(text)["sha256"]
    expected = hashlib.sha256(text.replace(digest, "0" * 64).encode())
    for _, tensor in sorted(safetensors.numpy.load(data).items()):
        expected.update(tensor.tobytes())
    assert digest == expected.hexdigest()


@given(states())
def test_the_safetensors_library_reads_the_same_and_would_write_the_same(state: State) -> None:
    data = state.to_bytes()
    tensors = safetensors.numpy.load(data)
    for i, group in enumerate(state.groups):
        for name in ("values", "lengths", "recorded"):
            found = tensors[f"groups.{i}.{name}"]
            assert found.dtype == getattr(group, name).dtype
            assert found.tolist() == getattr(group, name).tolist()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert safetensors.numpy.save(tensors, metadata=header["__metadata__"]) == data


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
    turned = dict(reversed(HALF.items()))
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
        ({"rule": None}, "rule is None, not a string"),
        ({"mode": "global"}, "group 0 has 1 rows, but lengths of shape"),
        ({"mode": "layer"}, "mode is 'layer', not one of"),
        ({"framework": None}, "framework is None, not a string"),
        ({"framework": "x" * 101}, "framework is 'x+...x+', not a string of at most 100"),
        ({"library_version": 3}, "library_version is 3, not a string"),
        ({"settings": HALF | {"quantile": math.nan}}, "the setting 'quantile' is nan, not null"),
        (
            {"settings": HALF | {"x": [0.5, [math.inf]]}},
            r"the setting 'x' is \[0.5, \[inf\]",
        ),
        ({"settings": HALF | {"x": (1, 2)}}, r"the setting 'x' is \(1, 2\), not null"),
        ({"settings": HALF | {"x": {1: 2}}}, r"the setting 'x' is {1: 2}, not null"),
        ({"settings": HALF | {"x": [[[[[]]]]]}}, "the setting 'x' is .* 4 deep"),
        ({"settings": HALF | {"x": [0] * 101}}, "the setting 'x' is .* at most 100 of these"),
        ({"settings": HALF | {"x": "y" * 1001}}, "a string of at most 1000 characters"),
        ({"settings": HALF | {"x": 10**100}}, "the setting 'x' is 10+"),
        ({"settings": HALF | {1: 1}}, "a setting is called 1, not a string"),
        ({"settings": {str(n): n for n in range(101)}}, "it has 101 settings"),
        ({"parameters": (ParameterInfo("a", (2,)),)}, "has 1 rows, but lengths of shape"),
        ({"parameters": (ParameterInfo("a", (-1,)), ParameterInfo("b", ()))}, r"shape \[-1\]"),
        ({"parameters": (ParameterInfo("a", (2**63,)), ParameterInfo("b", ()))}, r"shape \[92"),
        ({"parameters": (ParameterInfo("a", (1,) * 65), ParameterInfo("b", ()))}, "at most 64"),
        ({"parameters": (ParameterInfo("a", LIKE_A_SIZE), ParameterInfo("b", ()))}, r"\[2\.0\]"),
        ({"parameters": (ParameterInfo(LIKE_A_NAME, ()), ParameterInfo("b", ()))}, "the name 7"),
        ({"values": np.array([1, 2, 0], np.float32)}, "a norm that is zero, negative, NaN or"),
        ({"values": np.array([1, 2, math.nan], np.float32)}, "a norm that is zero, negative, NaN"),
        ({"values": np.array([1, 2, math.inf], np.float32)}, "a norm that is zero, negative, NaN"),
        ({"values": np.array([1, 2], np.float32)}, r"values of shape \(2,\), but .* sum to 3"),
        ({"values": np.array([[1, 2, 3]], np.float32)}, r"values of shape \(1, 3\), but"),
        ({"values": np.array([1.0, 2.0, 3.0])}, "values of dtype float64, not float32"),
        ({"lengths": np.array([2.0, 1.0])}, "lengths of dtype float64, not int64"),
        ({"recorded": np.array([9, 1], np.uint64)}, "recorded of dtype uint64, not int64"),
        ({"lengths": np.array([2, -1])}, "a window is longer .* or is of negative length"),
        ({"lengths": np.array([1, 2])}, "a window is longer than .* that its row recorded"),
        ({"recorded": np.array([1, 1])}, "a window is longer than .* that its row recorded"),
        ({"recorded": np.array([2**62 + 1, 1])}, "recorded more than 4611686018427387904 norms"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_could_not_be_loaded_is_not_saved(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StateError, match=rf"^the state to be saved is not a valid .*{says}"):
        one_group(**changes).to_bytes()


def test_global_clipping_has_one_group() -> None:
    group = GroupState.from_windows(HALF, [], [[1.0]], [1])
    State("quantile", "global", "numpy", (group,)).to_bytes()
    State("quantile", "group", "numpy", (group, group)).to_bytes()
    for count in (0, 2):
        with pytest.raises(StateError, match=f"global clipping has one group, but .* are {count}"):
            State("quantile", "global", "numpy", (group,) * count).to_bytes()


# -- large models ------------------------------------------------------------------------------


def test_the_names_of_69120_parameters() -> None:
    """60 layers of 384 experts with three weights each."""
    infos = [
        ParameterInfo(f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", (7168, 2048))
        for layer in range(60)
        for expert in range(384)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    group = GroupState.from_windows(HALF, infos, [[1.0]] * len(infos), [1] * len(infos))
    state = State("quantile", "parameter", "torch", (group,))
    data = state.to_bytes()
    loaded = State.from_bytes(data)
    assert loaded.groups[0].parameters == tuple(infos)
    assert loaded.to_bytes() == data


def test_a_header_that_would_be_too_large_to_read_is_not_written() -> None:
    infos = (ParameterInfo("x" * 10**8, None), ParameterInfo(None, None))
    says = r"needs a header of more than 100000000 bytes, the limit of safetensors files\. Shorten"
    with pytest.raises(StateError, match=says):
        one_group(parameters=infos).to_bytes()


def test_a_state_that_would_be_too_large_to_read_is_not_written() -> None:
    """All its norms are one norm in memory."""
    count = MAX_FILE_BYTES // 4
    state = one_group(
        settings=HALF | {"history_length": count},
        values=np.broadcast_to(np.float32(1), (count,)),
        lengths=np.array([count, 0]),
        recorded=np.array([count, 0]),
    )
    says = rf"has {4 * count + 32} bytes, but a state has at most {MAX_FILE_BYTES}\. A shorter"
    with pytest.raises(StateError, match=says):
        state.to_bytes()


# -- state dicts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state_dict", "says"),
    [
        (None, 'must be a dict with the keys "format", "version" and "data", .* but got None'),
        ([], "but got []"),
        (b"bytes", "but got b'bytes'"),
        ({}, "but got one with the keys []"),
        ({"state": {}, "param_groups": []}, r"with the keys \['state', 'param_groups'\]"),
        ({"\x1b" * 10**6: 1}, r"with the keys \['.x1b"),
        ({"format": "pickle", "version": 1, "data": b""}, r"with the keys \['format', 'version'"),
        ({"format": np.array(["autoclip"] * 2)}, r"with the keys \['format'\]"),
        ({"format": "autoclip", "data": b""}, "has the version None; a version is an int"),
        ({"format": "autoclip", "version": "1", "data": b""}, "has the version '1'"),
        ({"format": "autoclip", "version": True, "data": b""}, "has the version True"),
        ({"format": "autoclip", "version": 0, "data": b""}, "has the version 0"),
        ({"format": "autoclip", "version": 2, "data": b""}, r"has version 2 .* pip install -U"),
        ({"format": "autoclip", "version": 1}, 'has no "data"'),
        ({"format": "autoclip", "version": 1, "data": None}, "must be bytes, but got NoneType"),
        ({"format": "autoclip", "version": 1, "data": "text"}, "must be bytes, but got str"),
        ({"format": "autoclip", "version": 1, "data": b""}, "has only 0 bytes"),
        ({"format": "autoclip", "version": 1, "data": b"x" * 99}, "is damaged, cut off, or not"),
    ],
)
def test_another_dict_is_refused_and_the_history_is_as_it_was(state_dict: Any, says: str) -> None:
    history = History(1, Quantile(0.5), 10)
    history.record([1.0])
    before = history.state_dict()
    says = f"^state_dict .*{says}".replace("[]", r"\[\]")
    with pytest.raises(StateError, match=says) as caught:
        history.load_state_dict(state_dict)
    assert len(str(caught.value)) <= 500
    assert history.state_dict() == before
