"""Reading what may be damaged or hostile: a valid state comes out, or a StateError does.

A digest keeps no attacker out, so most files here are made by hand and carry the right one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
import struct
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import History, Quantile, State, StateError

SETTINGS = {
    "quantile": 0.5,
    "factor": 1.0,
    "history_length": 4,
    "max_norm": None,
    "warmup_steps": 0,
    "include_current": True,
    "record": "raw",
    "on_spike": "clip",
    "on_nonfinite": "keep",
}

# -- files made by hand ------------------------------------------------------------------------

Tensors = dict[str, tuple[str, bytes]]
Header = dict[str, Any]
Metadata = dict[str, Any]


def metadata() -> Metadata:
    """That of a state with one group of two rows."""
    return {
        "format": "autoclip",
        "version": 1,
        "rule": "quantile",
        "mode": "parameter",
        "framework": "numpy",
        "library_version": "0.3.0",
        "groups": [
            {
                "settings": dict(SETTINGS),
                "parameters": [
                    {"name": "weight", "shape": [2, 3]},
                    {"name": None, "shape": None},
                ],
            }
        ],
    }


def tensors(
    values: Any = (1, 2, 3), lengths: Any = (2, 1), recorded: Any = (9, 1), group: int = 0
) -> Tensors:
    """The dtype and the bytes of each tensor of a group."""
    return {
        f"groups.{group}.values": ("F32", np.array(values, "<f4").tobytes()),
        f"groups.{group}.lengths": ("I64", np.array(lengths, "<i8").tobytes()),
        f"groups.{group}.recorded": ("I64", np.array(recorded, "<i8").tobytes()),
    }


def sealed(what: Metadata, contents: Tensors) -> str:
    """The metadata as text, with the right digest unless it has one of its own."""
    if "sha256" in what:
        return json.dumps(what)
    text = json.dumps({**what, "sha256": "0" * 64})
    digest = hashlib.sha256(text.encode())
    for name in sorted(contents):
        digest.update(contents[name][1])
    before, _, after = text.rpartition("0" * 64)
    return before + digest.hexdigest() + after


def lay_out(what: Metadata | str, contents: Tensors) -> tuple[Header, bytes]:
    """A header, and the bytes of the tensors one after the other."""
    text = what if isinstance(what, str) else sealed(what, contents)
    header: Header = {"__metadata__": {"autoclip": text}}
    payload = b""
    for name, (dtype, data) in contents.items():
        size = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}[dtype]
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": dtype, "shape": [len(data) // size], "data_offsets": offsets}
        payload += data
    return header, payload


def file_of(header: Header | str | bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    """A file with a header that is said to have `size` bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + payload


def with_metadata(what: Metadata | str, contents: Tensors | None = None) -> bytes:
    return file_of(*lay_out(what, tensors() if contents is None else contents))


def resealed(data: bytes) -> bytes:
    """The file with its digest put right, if it is a file whose metadata has one."""
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        text = json.loads(data[8:end])["__metadata__"]["autoclip"]
        tensors = safetensors.numpy.load(data)
        old = json.loads(text)["sha256"]
    except Exception:  # whatever is wrong with it
        return data
    digest = hashlib.sha256(text.replace(old, "0" * 64).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return data.replace(old.encode(), digest.hexdigest().encode())


def refuse(data: bytes, says: str) -> None:
    """It must be refused with few printable words that name the source and match `says`."""
    with pytest.raises(StateError, match=rf"my\.file.*{says}") as caught:
        State.from_bytes(data, source="my.file")
    assert len(str(caught.value)) <= 500
    assert str(caught.value).isprintable()


def refuse_or_read(data: bytes) -> None:
    """It may be valid after all; then it is a state like any other."""
    try:
        state = State.from_bytes(data, source="my.file")
    except StateError:
        refuse(data, "")
    else:
        assert State.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()


def test_a_file_made_by_hand_is_read() -> None:
    """Otherwise all the refusals below would say nothing."""
    state = State.from_bytes(with_metadata(metadata()))
    assert [window.tolist() for window in state.groups[0].windows()] == [[1.0, 2.0], [3.0]]
    assert state.groups[0].recorded.tolist() == [9, 1]
    assert state.groups[0].parameters[0].shape == (2, 3)


# -- damage ------------------------------------------------------------------------------------

SMALL = State.from_bytes(with_metadata(metadata())).to_bytes()


def test_every_flipped_bit_is_noticed() -> None:
    for place in range(len(SMALL)):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[place] ^= 1 << bit
            with pytest.raises(StateError):
                State.from_bytes(bytes(damaged))


def test_every_truncation_and_a_longer_file_are_noticed() -> None:
    for length in range(len(SMALL)):
        refuse(SMALL[:length], "has only" if length < 10 else "is damaged(,| or) cut off")
    for tail in (b"\0", b"\n", SMALL):
        refuse(SMALL + tail, "is damaged or cut off")


def test_every_flipped_bit_with_the_digest_put_right_is_read_or_refused() -> None:
    changed = 0
    for place in range(len(SMALL)):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[place] ^= 1 << bit
            data = resealed(bytes(damaged))
            changed += data != damaged
            refuse_or_read(data)
    assert changed > len(SMALL)


def test_tensors_that_change_places_are_noticed() -> None:
    """Of one size, they would otherwise be exchanged in silence."""
    header, payload = lay_out(metadata(), tensors(recorded=(2, 1)))
    header["groups.0.lengths"], header["groups.0.recorded"] = (
        header["groups.0.recorded"],
        header["groups.0.lengths"],
    )
    State.from_bytes(file_of(header, payload))  # they are equal
    header, payload = lay_out(metadata(), tensors(lengths=(1, 2), recorded=(2, 2)))
    header["groups.0.lengths"], header["groups.0.recorded"] = (
        header["groups.0.recorded"],
        header["groups.0.lengths"],
    )
    refuse(file_of(header, payload), "is damaged: its contents do not have the SHA-256 digest")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    refuse(data, "")


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_arbitrary_headers_are_refused(header: bytes, payload: bytes) -> None:
    says = "has only|does not begin with a safetensors header|holds no AutoClip history"
    refuse(file_of(header, payload), says)
    data = file_of(b'{"__metadata__":{"autoclip":"' + header, payload)
    refuse(data, "not a valid safetensors file|not valid JSON|not an AutoClip|no AutoClip")


@pytest.mark.parametrize("data", [None, "text", 7, [1], np.zeros(100, np.uint8)])
def test_what_is_no_bytes_is_refused(data: Any) -> None:
    refuse(data, f"must be bytes, but got {type(data).__name__}")


# -- the container -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100_000_001, 10_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_said_to_be_huge_is_not_read(size: int) -> None:
    data = file_of(*lay_out(metadata(), tensors()), size=size)
    says = f"does not begin with a safetensors header of at most {len(data) - 8} bytes"
    assert peak_of(lambda: refuse(data, says)) < 1e6


def test_a_header_beyond_the_limit_is_refused() -> None:
    header, payload = lay_out(metadata(), tensors())
    data = file_of(json.dumps(header).ljust(100_000_001), payload)
    refuse(data, "does not begin with a safetensors header of at most 100000000 bytes")


KEY = '{"__metadata__":{"autoclip":"{}"},'


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "has only|does not begin with a safetensors header"),
        ("[]", "does not begin with a safetensors header"),
        ("null", "does not begin with a safetensors header"),
        (" {}", "does not begin with a safetensors header"),
        ("{", "has only|holds no AutoClip history"),
        ('{"__metadata__": {"format": "pt"}}', "holds no AutoClip history"),
        ('{"autoclip"', "its header is not valid JSON"),
        ('{"autoclip": NaN}', "NaN is not a JSON number"),
        ('{"autoclip": 1, "a": {"b": 1, "b": 2}}', "an object has a duplicate key"),
        ('{"__metadata__": "autoclip"}', "not a valid safetensors file"),
        ('{"__metadata__": {"autoclip": {}}}', "not a valid safetensors file"),
        (KEY + '"a": 1}', "not a valid safetensors file"),
        (KEY + '"a": [0, [1]]}', "not a valid safetensors file"),
        (KEY + '"a":' + "[" * 100_000, "its header has too many lists and objects"),
        (KEY + '"a":' + "[" * 70, "its header is not valid JSON"),
        (KEY + '"a":' * 100_000, "its header is not valid JSON"),
        (KEY.encode() + b'"\xff": 1}', "its header is not valid JSON"),
        (KEY + '"\x1b[31m": 1}', "Invalid control character"),
        ('{"__metadata__":{"autoclip":"", "more": ""}}', "its only metadata key must be"),
        ('{"__metadata__":{"autoclip":"", "autoclip":""}}', "an object has a duplicate key"),
        ('{"__metadata__":{"autoclip":""}}', "its metadata is not valid JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_headers(header: str | bytes, says: str) -> None:
    refuse(file_of(header), says)


@pytest.mark.parametrize("name", ["groups.0.values", "groups.0.lengths", "groups.0.recorded"])
def test_a_missing_tensor_is_named(name: str) -> None:
    contents = tensors()
    del contents[name]
    refuse(with_metadata(metadata(), contents), rf"lacks the tensors \['{name}'\]")


@pytest.mark.parametrize(
    "name", ["groups.1.values", "groups.00.values", "model.weight", "", "\x1b[31m", "x" * 10**6]
)
def test_an_extra_tensor_is_named(name: str) -> None:
    contents = {**tensors(), name: ("F32", bytes(4))}
    says = rf"unknown tensors \['{re.escape(repr(name)[1:20])}"
    refuse(with_metadata(metadata(), contents), says)


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("groups.0.values", "F64", 24),
        ("groups.0.values", "F16", 6),
        ("groups.0.values", "BF16", 6),
        ("groups.0.values", "I32", 12),
        ("groups.0.lengths", "I32", 8),
        ("groups.0.recorded", "F64", 16),
    ],
)
def test_another_dtype_is_refused(name: str, dtype: str, size: int) -> None:
    refuse(
        with_metadata(metadata(), {**tensors(), name: (dtype, bytes(size))}),
        rf"its tensor '{name}' is {dtype}\[\d\], not (F32|I64)\[n\]",
    )


@pytest.mark.parametrize("shape", [[], [3, 1], [1, 3], [1] * 50 + [3]])
def test_another_rank_is_refused(shape: list[int]) -> None:
    header, payload = lay_out(metadata(), tensors(values=[1, 2, 3] if shape else [1]))
    header["groups.0.values"]["shape"] = shape
    refuse(file_of(header, payload), r"its tensor 'groups.0.values' is F32\[.*\], not F32\[n\]")


# values has the bytes 0-12, lengths 12-28 and recorded 28-44.
@pytest.mark.parametrize(
    ("name", "shape", "offsets"),
    [
        ("groups.0.lengths", 2, [0, 16]),  # overlaps values
        ("groups.0.lengths", 2, [28, 44]),  # overlaps recorded, and leaves a hole
        ("groups.0.values", 3, [12, 0]),
        ("groups.0.values", 4, [0, 12]),
        ("groups.0.values", 2, [0, 8]),  # a hole
        ("groups.0.values", 2**62, [0, 2**63]),
        ("groups.0.recorded", 2, [2**40, 2**40 + 16]),
        ("groups.0.recorded", 6, [28, 76]),
    ],
)
def test_a_tensor_in_the_wrong_place_is_refused(name: str, shape: int, offsets: list[int]) -> None:
    header, payload = lay_out(metadata(), tensors())
    header[name] |= {"shape": [shape], "data_offsets": offsets}
    refuse(file_of(header, payload), "not a valid safetensors file")


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    header, payload = lay_out(metadata(), tensors())
    refuse(file_of(header, payload + bytes(8)), "not a valid safetensors file")
    refuse(file_of(header, bytes(8) + payload), "not a valid safetensors file")
    refuse(file_of(header, payload[:-8]), "not a valid safetensors file")


# -- metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "its metadata is not valid JSON"),
        ("[" * 100_000, "its metadata has too many lists and objects for 100000"),
        ("[" * 70, "its metadata is not valid JSON"),
        ("null", 'its format is not "autoclip"'),
        ('["format"]', 'its format is not "autoclip"'),
        ("{}", 'its format is not "autoclip"'),
        ('{"format": "autoclip"}', "has the version None"),
        (
            '{"format": "autoclip", "version": 1}',
            "sha256 is None, not a string of 64 hexadecimal digits",
        ),
        ('{"format": "autoclip", "version": 1, "version": 1}', "an object has a duplicate key"),
        ('{"format": "autoclip", "version": Infinity}', "Infinity is not a JSON number"),
        ('{"format": "autoclip", "version": 1e999}', "1e999 is beyond float64"),
        ('{"format": "autoclip", "version": ' + "9" * 5000 + "}", "a number has 5000 characters"),
    ],
    ids=lambda value: value[:40],
)
def test_wrong_metadata(text: str, says: str) -> None:
    refuse(with_metadata(text), says)


DELETE = object()
HUGE = 10**99  # beyond int64; as long as a number in JSON may be here


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", "pickle", 'its format is not "autoclip"'),
        ("format", ["autoclip"], 'its format is not "autoclip"'),
        ("version", 0, "has the version 0; a version is an int ≥ 1"),
        ("version", -1, "has the version -1; a version is an int ≥ 1"),
        ("version", 2, r"has version 2 of .* reads up to 1\. Upgrade it: pip install -U"),
        ("version", HUGE, r"has version 10+\.\.\.0+ of .* Upgrade it"),
        ("version", "1", "has the version '1'; a version is an int"),
        ("version", 1.0, r"has the version 1\.0; a version is an int"),
        ("version", True, "has the version True; a version is an int"),
        ("version", DELETE, "has the version None; a version is an int"),
        ("more", 1, "its metadata has the keys"),
        ("library_version", DELETE, "its metadata has the keys"),
        ("rule", None, "rule is None, not a string of at most 100 characters"),
        ("rule", ["quantile"], r"rule is \['quantile'\], not a string"),
        ("rule", "x" * 101, "rule is 'x+\\.\\.\\.x+', not a string of at most 100"),
        ("mode", DELETE, "its metadata has the keys"),
        ("mode", None, "mode is None, not one of"),
        ("mode", "layer", "mode is 'layer', not one of"),
        ("mode", ["global"], r"mode is \['global'\], not one of"),
        ("mode", "global", "group 0 has 1 rows, but lengths of shape"),
        ("mode", "group", "group 0 has 1 rows, but lengths of shape"),
        ("framework", 3, "framework is 3, not a string"),
        ("library_version", None, "library_version is None, not a string"),
        ("library_version", "1" * 10**6, "library_version is '1+\\.\\.\\.1+', not a string"),
        ("groups", {}, "groups is {}, not a list"),
        ("groups", [None], "group 0 is None, not an object of settings"),
        ("groups", [], r"lacks the tensors \[\] and has the unknown tensors \['groups\.0\.len"),
        ("groups.0.more", 1, "group 0 is {.*, not an object of settings"),
        ("groups.0.settings", DELETE, "group 0 is {.*, not an object of settings"),
        ("groups.0.settings", [], "group 0 is {.*, not an object of settings"),
        ("groups.0.parameters", {}, "group 0 is {.*, not an object of settings"),
        ("groups.0.parameters", [], r"group 0 has 0 rows, but lengths of shape \(2,\)"),
        ("groups.0.parameters.1", "weight", "parameter 1 of group 0 is 'weight', not an object"),
        ("groups.0.parameters.1.name", DELETE, "parameter 1 of group 0 is {.*, not an object"),
        ("groups.0.parameters.1.dtype", "f4", "parameter 1 of group 0 is {.*, not an object"),
        ("groups.0.parameters.1.name", 3, "has the name 3, not a string or null"),
        ("groups.0.parameters.1.shape", 3, "has the shape 3, not null or"),
        ("groups.0.parameters.1.shape", [-1], r"has the shape \[-1\], not null or"),
        ("groups.0.parameters.1.shape", [2**63], r"has the shape \[92\d+\], not null or"),
        ("groups.0.parameters.1.shape", [HUGE], r"has the shape \[10+\.\.\.0+\], not null or"),
        ("groups.0.parameters.1.shape", [2.0], r"has the shape \[2\.0\], not null or"),
        ("groups.0.parameters.1.shape", [True], r"has the shape \[True\], not null or"),
        ("groups.0.parameters.1.shape", [None], r"has the shape \[None\], not null or"),
        ("groups.0.parameters.1.shape", [1] * 65, "has the shape .*not null or at most 64 sizes"),
        ("groups.0.parameters.1.shape", [9] * 45_000, "has the shape .*not null or at most 64"),
        ("groups.0.settings.quantile", [[[[[0.5]]]]], "the setting 'quantile' is .*not null"),
        ("groups.0.settings.quantile", "\x1b" * 1001, "the setting 'quantile' is '.x1b.*not null"),
        ("groups.0.settings.quantile", [1] * 101, "the setting 'quantile' is .*not null"),
        ("groups.0.settings.quantile", {"x" * 101: 1}, "the setting 'quantile' is .*not null"),
        ("sha256", None, "sha256 is None, not a string of 64 hexadecimal digits"),
        ("sha256", ["0"], r"sha256 is \['0'\], not a string of 64"),
        ("sha256", "", "sha256 is '', not a string of 64"),
        ("sha256", "0" * 63, "sha256 is '0+\\.\\.\\.0+', not a string of 64"),
        ("sha256", "0" * 64, "is damaged: its contents do not have the SHA-256 digest"),
        ("groups.0.settings." + "x" * 101, 1, "a setting is called 'x+.*, not a string of at most"),
        ("groups.0.settings", {str(n): n for n in range(101)}, "it has 101 settings"),
    ],
)
def test_wrong_values_in_the_metadata(path: str, value: Any, says: str) -> None:
    what = metadata()
    *folders, name = path.split(".")
    place: Any = what
    for folder in folders:
        place = place[int(folder) if isinstance(place, list) else folder]
    if value is DELETE:
        del place[name]
    else:
        place[int(name) if isinstance(place, list) else name] = value
    refuse(with_metadata(what), says)


def test_a_duplicate_key_anywhere_is_refused() -> None:
    text = json.dumps(metadata())
    twice = '"quantile": 0.5, "quantile": 0.5'
    assert text.replace('"quantile": 0.5', twice) != text
    refuse(with_metadata(text.replace('"quantile": 0.5', twice)), "an object has a duplicate key")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_json_does_not_have_are_refused(word: str) -> None:
    text = json.dumps(metadata()).replace("0.5", word)
    refuse(with_metadata(text), "is not a JSON number|is beyond float64")


@pytest.mark.parametrize("path", ["version", "rule", "name", "quantile", "history_length"])
def test_nesting_of_any_depth_is_refused(path: str) -> None:
    """Also such that it can just be parsed, but not be printed in an error any more."""
    text = sealed(metadata(), tensors())
    for depth in range(5, 1100, 3):
        nested = re.sub(rf'("{path}": )[^,}}]+', rf"\1{'[' * depth}{']' * depth}", text, count=1)
        assert nested != text
        data = with_metadata(nested)
        refuse(data, "")
        refuse(resealed(data), "")


def test_any_rule_and_any_settings_are_read() -> None:
    """They are information: a user's rule, or those of an earlier or later release."""
    what = metadata()
    for rule, chosen in [
        ("somebody's", {"a": "text", "b": None, "c": 2**62, "d": 0.5, "e": True}),
        ("quantile", {}),
        ("quantile", {**SETTINGS, "a": [1, {"b": [None]}], "\x1b[31m": {}}),
        ("quantile", {"quantile": 1.5, "history_length": "long", "factor": HUGE}),
        ("standard", SETTINGS),
        ("", {"": ""}),
    ]:
        what["rule"], what["groups"][0]["settings"] = rule, chosen
        state = State.from_bytes(with_metadata(what))
        assert (state.rule, state.groups[0].settings) == (rule, chosen)
        assert State.from_bytes(state.to_bytes()).groups[0].settings == chosen


@pytest.mark.parametrize("mode", ["group", "global"])
def test_the_other_modes_have_one_row_a_group(mode: str) -> None:
    what = metadata()
    what["mode"] = mode
    state = State.from_bytes(with_metadata(what, tensors([1, 2, 3], [3], [3])))
    assert [window.tolist() for window in state.groups[0].windows()] == [[1.0, 2.0, 3.0]]
    what["groups"][0]["parameters"] = []
    State.from_bytes(with_metadata(what, tensors([1], [1], [1])))


def test_global_clipping_with_two_groups_is_refused() -> None:
    what = metadata()
    what["mode"] = "global"
    what["groups"] *= 2
    contents = {**tensors([1], [1], [1]), **tensors([1], [1], [1], group=1)}
    refuse(with_metadata(what, contents), "global clipping has one group, but there are 2")


# -- histories ---------------------------------------------------------------------------------

LONG = 2**62


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (tensors(lengths=[3]), r"2 rows, but lengths of shape \(1,\)"),
        (tensors(recorded=[9, 1, 1]), r"recorded of shape \(3,\)"),
        (tensors(values=[1, 2]), r"values of shape \(2,\), but its lengths sum to 3"),
        (tensors(values=[1, 2, 3, 4]), r"values of shape \(4,\), but its lengths sum to 3"),
        (tensors(lengths=[4, -1]), "of negative length"),
        (
            tensors(lengths=[2, 1], recorded=[1, 1]),
            "than the number of norms that its row",
        ),
        (
            tensors(lengths=[0, 0], values=[], recorded=[-1, 0]),
            "than the number of norms that its row",
        ),
        (tensors(recorded=[LONG + 1, 1]), "recorded more than"),
        (tensors(recorded=[2**63 - 1, 1]), "recorded more than"),
    ],
)
def test_lengths_that_do_not_add_up(contents: Tensors, says: str) -> None:
    refuse(with_metadata(metadata(), contents), says)


def test_lengths_that_overflow_to_the_right_sum_are_refused() -> None:
    """2^62 four times is 0 in int64."""
    what = metadata()
    what["groups"][0]["parameters"] = [{"name": None, "shape": None}] * 5
    lengths = [LONG] * 4 + [3]
    refuse(with_metadata(what, tensors(lengths=lengths, recorded=lengths)), "values of shape")


@pytest.mark.parametrize("norm", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 1e-38])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_norms_that_no_history_records_are_refused(norm: float, place: int) -> None:
    values = [1.0, 2.0, 3.0]
    values[place] = norm
    data = with_metadata(metadata(), tensors(values=values))
    refuse(data, "group 0 holds a norm that is zero, negative, NaN or infinite")


def test_a_signaling_nan_is_refused_without_a_warning() -> None:
    contents = tensors() | {
        "groups.0.values": ("F32", struct.pack("<3I", 0x7F800001, 1 << 29, 1 << 29))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse(with_metadata(metadata(), contents), "a norm that is zero, negative, NaN")


def test_a_row_that_recorded_as_much_as_is_allowed_can_go_on() -> None:
    what = metadata()
    what["groups"][0]["parameters"].pop()
    data = with_metadata(what, tensors([1, 2], [2], [LONG]))
    history = History(1, Quantile(0.5), 4)
    history.load_state_dict({"format": "autoclip", "version": 1, "data": data})
    for norm in (3.0, 4.0, 5.0):
        history.record([norm])
    assert history.recorded.tolist() == [LONG + 3]
    assert history.read([0])[0][0].tolist() == [2.0, 3.0, 4.0, 5.0]


# -- anything ----------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """The paths to all values in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, inner in items:
        below = paths(inner) if isinstance(inner, (dict, list)) else []
        found += [(key,), *((key, *path) for path in below)]
    return found


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    result = copy.deepcopy(value)
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = by
    return result


@settings(max_examples=300)
@given(st.sampled_from(paths(metadata())), json_values)
def test_any_value_anywhere_in_the_metadata(path: tuple[Any, ...], value: Any) -> None:
    refuse_or_read(with_metadata(replaced(metadata(), path, value)))


@settings(max_examples=300)
@given(st.sampled_from(paths(lay_out(metadata(), tensors())[0])), json_values)
def test_any_value_anywhere_in_the_header(path: tuple[Any, ...], value: Any) -> None:
    header, payload = lay_out(metadata(), tensors())
    refuse_or_read(file_of(replaced(header, path, value), payload))


@given(
    st.lists(st.floats(width=32), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), min_size=1, max_size=3),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), min_size=1, max_size=3),
)
def test_any_contents_of_the_tensors(
    values: list[float], lengths: list[int], recorded: list[int]
) -> None:
    refuse_or_read(with_metadata(metadata(), tensors(values, lengths, recorded)))


# -- large, and valid in part ------------------------------------------------------------------


def peak_of(read: Callable[[], Any]) -> int:
    """Peak memory of a call, in bytes."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_small_values_by_the_thousand_take_memory_in_proportion() -> None:
    """Lists and objects take the most, up to 53 times their text, and are counted first."""
    for kind in ("[],", "{},", "[[[[[[[[]]]]]]]],", '{"":{"":{"":[]}}},'):
        what = metadata()
        text = json.dumps({**what, "more": None}).replace("null", "[" + kind * 10**4 + "0]", 1)
        for data in (with_metadata(text), file_of(f'{{"autoclip":{{"x":{json.dumps(text)}}}}}')):
            assert peak_of(lambda data=data: refuse(data, "")) < 8 * len(data)  # type: ignore[misc]
    for kind in ("0,", "999,", "1.5,", '"ab",', "[0,0,0,0],", '{"a":"bc"},', '"\\ud83d\\ude00",'):
        what = metadata()
        text = json.dumps({**what, "more": None}).replace("null", "[" + kind * 10**4 + "0]", 1)
        data = with_metadata(text)
        # An object takes 184 bytes, and 232 in Python 3.10.
        objects = 10**4 * (sys.getsizeof({"a": ""}) - 184) if "{" in kind else 0
        peak = peak_of(lambda data=data: refuse(data, ""))  # type: ignore[misc]
        assert peak < 20 * len(data) + objects


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("settings_of_groups", [SETTINGS, {}])
def test_many_empty_groups(settings_of_groups: dict[str, Any], count: int) -> None:
    what = metadata()
    what["groups"] = [{"settings": settings_of_groups, "parameters": []}] * count
    contents: Tensors = {}
    for group in range(count):
        contents |= tensors([], [], [], group=group)
    assert len(State.from_bytes(with_metadata(what, contents)).groups) == count
    what["mode"] = "group"
    refuse(with_metadata(what, contents), "group 0 has 1 rows, but lengths of shape")


def test_many_parameters_that_no_tensor_has() -> None:
    what = metadata()
    what["groups"][0]["parameters"] *= 50_000
    refuse(with_metadata(what), "group 0 has 100000 rows, but lengths of shape")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8, None])
@pytest.mark.parametrize("key", [None, "format", "autoclip"])
def test_another_programs_safetensors_file_holds_no_history(dtype: Any, key: str | None) -> None:
    contents = {} if dtype is None else {"model.weight": np.ones((2, 3), dtype)}
    saved = safetensors.numpy.save(contents, metadata=None if key is None else {key: "pt"})
    says = "holds no AutoClip history" if key != "autoclip" else "its metadata is not valid JSON"
    refuse(saved, says)


def test_a_model_in_bfloat16_holds_no_history() -> None:
    """NumPy does not know the dtype."""
    header, payload = lay_out("{}", {"model.weight": ("BF16", bytes(6))})
    del header["__metadata__"]
    refuse(file_of(header, payload), "holds no AutoClip history: it is a safetensors file of")


def test_tensors_called_autoclip_are_no_history() -> None:
    saved = safetensors.numpy.save({"autoclip": np.ones(3, np.float32)})
    refuse(saved, "holds no AutoClip history: its only metadata key must be")


def test_a_pickle_is_refused() -> None:
    class Explosive:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("it was unpickled",)

    data = pickle.dumps({"autoclip": [Explosive()], "padding": bytes(100)})
    refuse(data, "is damaged, cut off, or not an AutoClip state: it does not begin with")
