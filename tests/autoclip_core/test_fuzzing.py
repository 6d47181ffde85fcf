"""Many changes at once to valid states: a valid state comes out, or a StateError does.

The nightly profile draws many more of them. For fuzzing guided by coverage see `tests/fuzzing`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip.core import History, Quantile, State, StateError

GOLDEN = {path.name: path.read_bytes() for path in (Path(__file__).parent / "golden").iterdir()}
assert GOLDEN
NO_DIGEST = "0" * 64

hostile = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**99, 10**101])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["parameter", "group", "global", "quantile", "standard", "F32", "I64", "U8"])
    | st.sampled_from(["x" * 10**5, "\x1b[2J" * 1000, "\ud800"])
    | st.builds(lambda: [0] * 101)
    | st.recursive(st.builds(list), lambda inner: st.lists(inner, max_size=2), max_leaves=8)
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """The container and the key of each value in nested dicts and lists."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def change(draw: st.DrawFn, value: Any) -> None:
    """Change something in nested dicts and lists."""
    container, key = draw(st.sampled_from(places(value)))
    what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "copy", "move"]))
    if what == "replace":
        container[key] = draw(hostile)
    elif what == "remove":
        del container[key]
    elif isinstance(container, list):
        container.append(container[key] if what == "copy" else container.pop(key))
    else:
        other = draw(st.sampled_from([*container, "groups.9.values"]) | st.text(max_size=3))
        container[other] = container[key] if what == "copy" else container.pop(key)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A golden file with changes to metadata, header and tensors, and the right digest."""
    data = GOLDEN[draw(st.sampled_from(sorted(GOLDEN)))]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    payload = bytearray(data[end:])
    metadata = json.loads(header["__metadata__"]["autoclip"])
    del metadata["sha256"]
    for _ in range(draw(st.integers(0, 2))):
        change(draw, metadata)
    header["__metadata__"] = {"autoclip": json.dumps({**metadata, "sha256": NO_DIGEST})}
    for _ in range(draw(st.sampled_from([0, 0, 1]))):
        change(draw, header)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(payload) - 1))
        payload[place : place + 4] = draw(
            st.sampled_from([bytes(4), b"\xff" * 4, b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0\0\x80?"])
        )
    encoded = json.dumps(header)
    before, _, after = encoded.rpartition(NO_DIGEST)
    encoded = before + digest(header, bytes(payload)) + after
    return struct.pack("<Q", len(encoded)) + encoded.encode() + payload


def digest(header: Any, payload: bytes) -> str:
    """The digest of a file, if the header is right enough to have one."""
    try:
        found = hashlib.sha256(header["__metadata__"]["autoclip"].encode())
        for name in sorted(header.keys() - {"__metadata__"}):
            begin, end = header[name]["data_offsets"]
            found.update(payload[begin:end])
    except (TypeError, AttributeError, KeyError, ValueError):
        return NO_DIGEST
    return found.hexdigest()


@given(changed())
def test_a_changed_file_is_refused_in_few_words_or_valid(data: bytes) -> None:
    try:
        state = State.from_bytes(data, "my.file")
    except StateError as error:
        text = str(error)
    else:
        text = "my.file"
        saved = state.to_bytes()
        assert State.from_bytes(saved).to_bytes() == saved
    assert text.startswith("my.file")
    assert len(text) <= 500
    assert text.isprintable()


@given(changed())
def test_what_is_refused_changes_nothing_and_what_is_loaded_is_all_there(data: bytes) -> None:
    history = History(4, [Quantile(0.9)] * 3 + [Quantile(0.5)], 4)
    history.record([1.0, 2.0, 3.0, 4.0])
    before = history.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            history.load_state_dict({"format": "autoclip", "version": 1, "data": data})
        except StateError:
            assert history.state_dict() == before
        else:
            groups = State.from_bytes(data).groups
            expected = [window[-4:].tolist() for group in groups for window in group.windows()]
            assert [window.tolist() for window in history.read(range(4))[0]] == expected


def test_the_unchanged_files_are_loaded() -> None:
    """Otherwise the tests above would see refusals only."""
    history = History(4, [Quantile(0.9)] * 3 + [Quantile(0.5)], 4)
    with pytest.warns(UserWarning, match="was saved with other settings"):
        history.load_state_dict(
            {"format": "autoclip", "version": 1, "data": GOLDEN["quantile.safetensors"]}
        )
    assert history.recorded.tolist() == [1_000_000_007, 2, 0, 3]
