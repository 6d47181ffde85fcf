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


def lay_out(what: Metadata | str, contents: Tensors) -> tuple[Header, bytes]:
    """A header, and the bytes of the tensors one after the other with room for the digest."""
    text = what if isinstance(what, str) else json.dumps(what)
    header: Header = {"__metadata__": {"autoclip": text}}
    payload = b""
    for name, (dtype, data) in {**contents, "sha256": ("U8", bytes(32))}.items():
        shape = [len(data) // {"U8": 1, "F16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}[dtype]]
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        payload += data
    return header, payload[:-32]


def seal(header: Header | str | bytes, payload: bytes, size: int | None = None) -> bytes:
    """A file with the right digest, and a header that is said to have `size` bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    body = struct.pack("<Q", len(header) if size is None else size) + header + payload
    return body + hashlib.sha256(body).digest()


def reseal(data: bytes) -> bytes:
    """The file with its digest put right."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def with_metadata(what: Metadata | str, contents: Tensors | None = None) -> bytes:
    return seal(*lay_out(what, tensors() if contents is None else contents))


def with_header(change: Callable[[Header], Any]) -> bytes:
    header, payload = lay_out(metadata(), tensors())
    change(header)
    return seal(header, payload)


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
        State.from_bytes(state.to_bytes())


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
            with pytest.raises(StateError, match="is damaged"):
                State.from_bytes(bytes(damaged))


def test_every_truncation_and_a_longer_file_are_noticed() -> None:
    for length in range(len(SMALL)):
        refuse(SMALL[:length], "has only" if length < 40 else "is damaged, cut off")
    for tail in (b"\0", b"\n", SMALL):
        refuse(SMALL + tail, "is damaged")


def test_every_flipped_bit_with_the_digest_put_right_is_read_or_refused() -> None:
    for place in range(len(SMALL) - 32):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[place] ^= 1 << bit
            refuse_or_read(reseal(bytes(damaged)))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    refuse(data, "")
    refuse(reseal(data + bytes(32)), "")


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_arbitrary_headers_are_refused(header: bytes, payload: bytes) -> None:
    refuse(
        seal(header, payload),
        "a header that is not|its only metadata key|does not begin with a header of",
    )


@pytest.mark.parametrize("data", [None, "text", 7, [1], np.zeros(100, np.uint8)])
def test_what_is_no_bytes_is_refused(data: Any) -> None:
    refuse(data, f"takes bytes, but got {type(data).__name__}")


# -- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**28 + 1, 10_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_said_to_be_huge_is_not_read(size: int) -> None:
    data = seal(*lay_out(metadata(), tensors()), size=size)
    says = f"does not begin with a header of at most {len(data) - 40} bytes"
    assert peak_of(lambda: refuse(data, says)) < 1e6


def test_a_header_may_not_reach_into_the_digest() -> None:
    body = struct.pack("<Q", 3) + b"{}"
    refuse(body + hashlib.sha256(body).digest(), "does not begin with a header of at most 2 bytes")


def test_a_header_beyond_the_limit_is_refused() -> None:
    header, payload = lay_out(metadata(), tensors())
    data = seal(json.dumps(header).ljust(2**28 + 1), payload)
    refuse(data, "does not begin with a header of at most 268435456 bytes")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "does not begin with a header of"),
        ("{", "a header that is not valid JSON"),
        ("[]", "does not begin with a header of"),
        ("null", "does not begin with a header of"),
        ('"{}"', "does not begin with a header of"),
        (" {}", "does not begin with a header of"),
        ("{} {}", "a header that is not valid JSON"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1, "a": 1}', "an object has a duplicate key"),
        ('{"a": {"b": 1, "b": 2}}', "an object has a duplicate key"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "a header that is not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "a header that is not valid JSON"),
        ('{"a":' + "[" * 1_000_000, "a header that is not valid JSON"),
        ('{"a": 1e999}', "1e999 is beyond float64"),
        ('{"a": 0.' + "1" * 1_000_000 + "}", "a number has 1000002 characters"),
        ('{"a": ' + "9" * 100_000 + "}", "a header that is not valid JSON"),
        (b'{"a": "\xff\xfe\xfa"}', "a header that is not valid JSON"),
        ("{}", 'its only metadata key must be "autoclip"'),
        ('{"__metadata__": null}', 'its only metadata key must be "autoclip"'),
        ('{"__metadata__": {}}', 'its only metadata key must be "autoclip"'),
        ('{"__metadata__": {"format": "pt"}}', 'its only metadata key must be "autoclip"'),
        ('{"__metadata__": {"autoclip": {}}}', 'its only metadata key must be "autoclip"'),
        ('{"__metadata__": {"autoclip": ""}}', "metadata that is not valid JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_headers(header: str | bytes, says: str) -> None:
    refuse(seal(header, b""), says)


def test_a_second_metadata_key_is_refused() -> None:
    refuse(with_header(lambda header: header["__metadata__"].update(more="x")), "only metadata key")


def test_headers_in_another_encoding_are_refused() -> None:
    """Python's JSON reads UTF-16 and a byte order mark; no other safetensors parser does."""
    header, payload = lay_out(metadata(), tensors())
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig"):
        refuse(
            seal(json.dumps(header).encode(encoding), payload),
            "a header that is not valid|begin with",
        )


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


def test_a_file_of_another_program_is_refused() -> None:
    header, payload = lay_out(metadata(), tensors())
    del header["__metadata__"]
    refuse(seal(header, payload), "is not an AutoClip state")


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("groups.0.values", "F64", 24),
        ("groups.0.values", "F16", 6),
        ("groups.0.values", "I32", 12),
        ("groups.0.lengths", "I32", 8),
        ("groups.0.recorded", "F64", 16),
    ],
)
def test_another_dtype_is_refused(name: str, dtype: str, size: int) -> None:
    refuse(
        with_metadata(metadata(), {**tensors(), name: (dtype, bytes(size))}),
        rf"a tensor '{name}' that is not (F32|I64)\[n\]",
    )


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [3]},
        {"shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": ["3"], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 12, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0.0, 12.0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [None, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": {"0": 12}},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], "compression": "zip"},
        {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]},
    ],
    ids=repr,
)
def test_a_wrong_tensor_entry_is_named(entry: Any) -> None:
    data = with_header(lambda header: header.__setitem__("groups.0.values", entry))
    refuse(data, r"has a tensor 'groups\.0\.values' that is not F32\[n\]")


# values has the bytes 0-12, lengths 12-28, recorded 28-44, and the digest 44-76.
@pytest.mark.parametrize(
    ("name", "shape", "offsets"),
    [
        ("groups.0.lengths", 2, [0, 16]),  # overlaps values
        ("groups.0.lengths", 2, [28, 44]),  # overlaps recorded, and leaves a hole
        ("groups.0.values", 3, [12, 0]),
        ("groups.0.values", 3, [-12, 0]),
        ("groups.0.values", -3, [0, 12]),
        ("groups.0.values", 4, [0, 12]),
        ("groups.0.values", 2, [0, 12]),
        ("groups.0.values", 2, [0, 8]),  # a hole
        ("groups.0.values", 2**62, [0, 2**64]),
        ("groups.0.values", 2**64, [0, 12]),
        ("groups.0.recorded", 2, [2**40, 2**40 + 16]),
        ("groups.0.recorded", 6, [28, 76]),  # reads the digest as its own
        ("sha256", 31, [44, 75]),
        ("sha256", 32, [43, 75]),
        ("sha256", 32, [0, 32]),
        ("sha256", 32, [12, 44]),
        ("sha256", 32, [44, 2**70]),
        ("sha256", 64, [44, 108]),
    ],
)
def test_a_tensor_in_the_wrong_place_is_refused(name: str, shape: int, offsets: list[int]) -> None:
    def move(header: Header) -> None:
        header[name] |= {"shape": [shape], "data_offsets": offsets}

    refuse(
        with_header(move),
        "not a valid safetensors file|does not end with its digest|between its offsets",
    )


def test_the_tensor_of_the_digest_is_where_the_digest_is() -> None:
    """Files without a gap that say otherwise, which safetensors itself has nothing against."""
    says = "does not end with its digest"
    first = lay_out(metadata(), {"sha256": ("U8", bytes(32)), **tensors()})
    refuse(seal(*first), says)
    header, payload = lay_out(metadata(), tensors())
    header["sha256"] |= {"shape": [64], "data_offsets": [44, 108]}
    refuse(seal(header, payload + bytes(32)), says)
    header["groups.0.lengths"] |= {"data_offsets": [0, 16]}
    header["groups.0.recorded"] |= {"data_offsets": [16, 32]}
    header["groups.0.values"] |= {"shape": [7], "data_offsets": [32, 60]}
    header["sha256"] |= {"shape": [16], "data_offsets": [60, 76]}
    refuse(seal(header, payload), says)


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    header, payload = lay_out(metadata(), tensors())
    refuse(seal(header, payload + bytes(8)), "not a valid safetensors file")
    refuse(seal(header, bytes(8) + payload), "not a valid safetensors file")
    refuse(seal(header, payload[:-8]), "not a valid safetensors file")


# -- metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "metadata that is not valid JSON"),
        ("[" * 100_000, "metadata that is not valid JSON"),
        ("null", 'its format is not "autoclip"'),
        ('["format"]', 'its format is not "autoclip"'),
        ("{}", 'its format is not "autoclip"'),
        ('{"format": "autoclip"}', "has the version None"),
        (
            '{"format": "autoclip", "version": 1}',
            r"its metadata has the keys {'format', 'version'}",
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
        ("rule", "standard", "group 0: the standard rule got the unknown setting 'quantile'"),
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
        ("groups.0.settings.quantile", 1.5, r"group 0: quantile takes .* got 1\.5"),
        ("groups.0.settings.quantile", HUGE, "group 0: the setting 'quantile' is 10+"),
        ("groups.0.settings.quantile", True, "group 0: quantile takes .* got True"),
        ("groups.0.settings.quantile", "0.5", "group 0: quantile takes .* got '0.5'"),
        ("groups.0.settings.quantile", "\x1b" * 1000, "group 0: quantile takes .* got '.x1b"),
        ("groups.0.settings.quantile", "\x1b" * 1001, "the setting 'quantile' is '.x1b.*not null"),
        ("groups.0.settings.quantile", None, "group 0: quantile takes .* got None"),
        ("groups.0.settings.quantile", [0.5], r"the setting 'quantile' is \[0\.5\], not null"),
        ("groups.0.settings.quantile", {}, "the setting 'quantile' is {}, not null"),
        ("groups.0.settings.quantile", DELETE, "group 0: it lacks the setting 'quantile'"),
        ("groups.0.settings.history_length", DELETE, "it lacks the setting 'history_length'"),
        ("groups.0.settings.history_length", 0, "group 0: history_length takes .* got 0"),
        ("groups.0.settings.history_length", 4.0, r"group 0: history_length takes .* got 4\.0"),
        ("groups.0.settings.history_length", 2**63, "the setting 'history_length' is 92"),
        ("groups.0.settings.history_length", 1, r"longer than its history_length \(1\)"),
        ("groups.0.settings.lr", 0.1, "the quantile rule got the unknown setting 'lr'"),
        ("groups.0.settings.\x1b[31m", 1, "the quantile rule got the unknown setting '.x1b.31m'"),
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
    header, payload = lay_out(metadata(), tensors())
    entry = '"shape": [3]'
    text = json.dumps(header)
    refuse(seal(text.replace(entry, f"{entry}, {entry}"), payload), "an object has a duplicate key")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_json_does_not_have_are_refused(word: str) -> None:
    text = json.dumps(metadata()).replace("0.5", word)
    refuse(with_metadata(text), "is not a JSON number|is beyond float64")


@pytest.mark.parametrize("path", ["version", "rule", "name", "quantile", "history_length"])
def test_nesting_of_any_depth_is_refused(path: str) -> None:
    """Also such that it can just be parsed, but not be printed in an error any more."""
    text = json.dumps(metadata())
    for depth in range(1, 1100, 3):
        nested = re.sub(rf'("{path}": )[^,}}]+', rf"\1{'[' * depth}{']' * depth}", text, count=1)
        assert nested != text
        refuse(with_metadata(nested), "")


def test_a_rule_that_is_not_registered_is_read_with_any_settings() -> None:
    """It may be a user's; only a clipper with the same rule loads it."""
    what = metadata()
    what["rule"] = "somebody's"
    what["groups"][0]["settings"] = {"history_length": 4} | {
        name: value for name, value in SETTINGS.items() if name not in ("quantile", "factor")
    }
    what["groups"][0]["settings"] |= {"a": "text", "b": None, "c": 2**62, "d": 0.5, "e": True}
    state = State.from_bytes(with_metadata(what))
    assert (state.rule, state.groups[0].settings) == ("somebody's", what["groups"][0]["settings"])
    assert State.from_bytes(state.to_bytes()).groups[0].settings == state.groups[0].settings
    for value in ([], {}, [1]):
        what["groups"][0]["settings"]["a"] = value
        refuse(with_metadata(what), r"the setting 'a' is (\[|{).*, not null")


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
        (tensors(lengths=[5, 0], values=[1] * 5), r"longer than its history_length \(4\)"),
        (tensors(lengths=[2, 1], recorded=[1, 1]), "or than what it recorded"),
        (tensors(lengths=[0, 0], values=[], recorded=[-1, 0]), "or than what it recorded"),
        (tensors(recorded=[LONG + 1, 1]), "recorded more than"),
        (tensors(recorded=[2**63 - 1, 1]), "recorded more than"),
    ],
)
def test_lengths_that_do_not_add_up(contents: Tensors, says: str) -> None:
    refuse(with_metadata(metadata(), contents), says)


def test_lengths_that_overflow_to_the_right_sum_are_refused() -> None:
    """2^62 four times is 0 in int64, and a window may be as long as `history_length` says."""
    what = metadata()
    what["groups"][0]["settings"]["history_length"] = LONG
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
    refuse_or_read(seal(replaced(header, path, value), payload))


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
    """How many bytes it allocates at most."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    ['{"a":[' + "[]," * 10**5 + "[]]}", '{"a":[' + "{}," * 10**5 + "{}]}"],
    ids=["lists", "objects"],
)
def test_small_values_by_the_thousand_take_memory_in_proportion(header: str) -> None:
    data = seal(header, b"")
    assert peak_of(lambda: refuse(data, "only metadata key")) < 60 * len(data)


@pytest.mark.parametrize("settings_of_groups", [SETTINGS, {}])
def test_many_empty_groups(settings_of_groups: dict[str, Any]) -> None:
    count = 20_000
    what = metadata()
    what["groups"] = [{"settings": settings_of_groups, "parameters": []}] * count
    contents: Tensors = {}
    for group in range(count):
        contents |= tensors([], [], [], group=group)
    data = with_metadata(what, contents)
    if settings_of_groups:
        assert len(State.from_bytes(data).groups) == count
    else:
        refuse(data, "group 0: it lacks the setting")
    what["mode"] = "group"
    what["groups"][0] = {"settings": SETTINGS, "parameters": []}
    refuse(with_metadata(what, contents), "group 0 has 1 rows, but lengths of shape|group 1: it")


def test_many_parameters_that_no_tensor_has() -> None:
    what = metadata()
    what["groups"][0]["parameters"] *= 50_000
    refuse(with_metadata(what), "group 0 has 100000 rows, but lengths of shape")


def test_every_other_program_s_safetensors_file_is_refused() -> None:
    """The library's own bytes, with and without a digest put on them."""
    for saved in (
        safetensors.numpy.save({"model.weight": np.ones((2, 3), np.float32)}),
        safetensors.numpy.save({"sha256": np.zeros(32, np.uint8)}, metadata={"format": "pt"}),
        safetensors.numpy.save({}),
    ):
        refuse(saved, "is damaged, cut off, or not an AutoClip state|has only")
        refuse(reseal(saved + bytes(32)), "is not an AutoClip state")


def test_a_pickle_is_refused() -> None:
    class Explosive:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("it was unpickled",)

    data = pickle.dumps({"autoclip": [Explosive()], "padding": bytes(100)})
    refuse(data, "is damaged, cut off, or not an AutoClip state")
    refuse(reseal(data + bytes(32)), "does not begin with a header of")
