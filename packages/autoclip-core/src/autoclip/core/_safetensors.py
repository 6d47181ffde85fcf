"""A safetensors file with JSON metadata and a digest at its end, as canonical bytes.

This module knows the container, `_state.py` what is in it. It does not use the safetensors library,
which neither reads nor writes headers above 100 MB: too few for the names of a million parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from autoclip.core._errors import StateError

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "SealedTensors",
    "brief_repr",
    "check_beginning",
    "check_size",
]

MAX_FILE_BYTES = 2**33
"""The largest state that is written or read, 8 GiB: two million rows of a thousand norms each."""

MAX_HEADER_BYTES = 2**28
"""The largest header, 256 MiB: more than a million parameters with names of 200 characters."""

_METADATA_KEY = "autoclip"
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_MAX_NUMBER_LENGTH = 100
_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
}
_ORDER = tuple(_DTYPES)

_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 4
_repr.maxlong = _repr.maxstring = _repr.maxother = 60


def brief_repr(value: object) -> str:
    """`repr(value)`, shortened to at most 120 characters: what comes from a file may be huge."""
    text = _repr.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass(frozen=True)
class SealedTensors:
    """The bytes of a file of which the digest, the header and the metadata's JSON are right.

    Attributes:
        source: what to call the file in an error.
        metadata: the metadata, parsed; any JSON value.
        entries: the header's entry for each tensor; any JSON value each.
        payload: all that follows the header, with the digest.
    """

    source: str
    metadata: Any
    entries: dict[str, Any]
    payload: memoryview

    @staticmethod
    def dump(
        metadata: Mapping[str, Any],
        tensors: Mapping[str, tuple[str, npt.NDArray[Any]]],
        source: str,
    ) -> bytes:
        """Serialize metadata and one-dimensional tensors: equal ones give equal bytes.

        Args:
            metadata: a JSON object.
            tensors: a dtype, "F32" or "I64", and an array [n] that can be cast to it, by name.
            source: what to call them in an error.

        Raises:
            StateError: the file would be larger than what `parse` reads.
        """
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
        header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: text}}
        parts: list[npt.NDArray[Any]] = []
        end = 0
        # The order of safetensors' own writer: large elements first, then by name.
        for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name][0]), name)):
            dtype, array = tensors[name]
            part = np.ascontiguousarray(array, _DTYPES[dtype])
            begin, end = end, end + part.nbytes
            header[name] = _entry(dtype, len(part), begin, end)
            parts.append(part)
        header[_DIGEST] = _entry("U8", _DIGEST_BYTES, end, end + _DIGEST_BYTES)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        if len(encoded) > MAX_HEADER_BYTES:
            raise StateError(
                f"{source} needs a header of {len(encoded)} bytes, but a state has at most "
                f"{MAX_HEADER_BYTES}. Shorten the parameters' names."
            )
        check_size(8 + len(encoded) + end + _DIGEST_BYTES, source)
        pieces: list[bytes | memoryview] = [
            len(encoded).to_bytes(8, "little"),
            encoded,
            *(part.data for part in parts),
        ]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        return b"".join([*pieces, digest.digest()])

    @classmethod
    def parse(cls, data: bytes, source: str) -> SealedTensors:
        """Check the beginning, the digest, the header and the metadata's JSON, in this order.

        Time and memory are proportional to the size of `data`, whatever it claims.

        Raises:
            StateError: one of them is wrong.
        """
        check_size(len(data), source)
        check_beginning(data[:9], len(data), source)
        view = memoryview(data)
        if hashlib.sha256(view[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
            raise StateError(
                f"{source} is damaged, cut off, or not an AutoClip state: its last {_DIGEST_BYTES} "
                "bytes are not the SHA-256 digest of the bytes before them. "
                "Load another copy or an earlier checkpoint."
            )
        size = _header_size(data)
        # An object, since it begins with "{".
        header: dict[str, Any] = _parse_json(data[8 : 8 + size], source, "a header")
        metadata = header.pop("__metadata__", None)
        if (
            not isinstance(metadata, dict)
            or set(metadata) != {_METADATA_KEY}
            or not isinstance(metadata[_METADATA_KEY], str)
        ):
            raise StateError(
                f"{source} is not an AutoClip state: its only metadata key must be "
                f'"{_METADATA_KEY}", with a string.'
            )
        parsed = _parse_json(metadata[_METADATA_KEY], source, "metadata")
        return cls(source, parsed, header, view[8 + size :])

    def tensors(self, dtypes: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
        """Copy the tensors.

        Args:
            dtypes: the dtype of each tensor that there must be, "F32" or "I64".

        Returns:
            float32[n] and int64[n] arrays by name.

        Raises:
            StateError: there are not exactly these tensors, of one dimension, which together with
                the digest fill the file without gaps.
        """
        dtypes = {**dtypes, _DIGEST: "U8"}
        if self.entries.keys() != dtypes.keys():
            missing = brief_repr(sorted(dtypes.keys() - self.entries.keys()))
            unknown = brief_repr(sorted(self.entries.keys() - dtypes.keys()))
            raise StateError(
                f"{self.source} is not a valid AutoClip state: for its groups it lacks the tensors "
                f"{missing} and has the unknown tensors {unknown}."
            )
        for name, entry in self.entries.items():
            if not _is_entry(entry, dtypes[name]):
                raise StateError(
                    f"{self.source} has a tensor {name!r} that is not {dtypes[name]}[n] with n "
                    "elements between its offsets."
                )
        offsets = {name: entry["data_offsets"] for name, entry in self.entries.items()}
        end = 0
        for name in sorted(offsets, key=offsets.__getitem__):
            if offsets[name][0] != end:
                raise StateError(
                    f"{self.source} is not a valid safetensors file: the tensor {name!r} begins at "
                    f"{offsets[name][0]}, but the tensors before it end at {end}."
                )
            end = offsets[name][1]
        if end != len(self.payload):
            raise StateError(
                f"{self.source} is not a valid safetensors file: its tensors end at {end}, but "
                f"there are {len(self.payload)} bytes after the header."
            )
        if offsets[_DIGEST] != [end - _DIGEST_BYTES, end]:
            raise StateError(
                f"{self.source} does not end with its digest: the tensor {_DIGEST!r} must be the "
                f"last {_DIGEST_BYTES} bytes."
            )
        return {
            name: np.frombuffer(self.payload[begin:end], _DTYPES[dtypes[name]]).astype(
                _DTYPES[dtypes[name]].newbyteorder("=")
            )
            for name, (begin, end) in offsets.items()
            if name != _DIGEST
        }


def check_size(size: int, source: str) -> None:
    """Refuse a state of more than `MAX_FILE_BYTES`.

    Raises:
        StateError: it is larger.
    """
    if size > MAX_FILE_BYTES:
        raise StateError(
            f"{source} has {size} bytes, but a state has at most {MAX_FILE_BYTES}. "
            "A shorter history_length makes it smaller."
        )


def check_beginning(first: bytes, size: int, source: str) -> None:
    """Refuse what cannot be a state, as far as its first bytes show that.

    Args:
        first: the first 9 bytes, or as many as there are.
        size: the number of all bytes.
        source: what to call them in an error.

    Raises:
        StateError: it cannot be a state.
    """
    if size < 8 + _DIGEST_BYTES:
        raise StateError(
            f"{source} is not an AutoClip state: it has only {size} bytes. "
            "It may be empty or cut off."
        )
    available = size - 8 - _DIGEST_BYTES
    if first[8:9] != b"{" or _header_size(first) > min(available, MAX_HEADER_BYTES):
        raise StateError(
            f"{source} is damaged, cut off, or not an AutoClip state: it does not begin with a "
            f"header of at most {min(available, MAX_HEADER_BYTES)} bytes. "
            "Load another copy or an earlier checkpoint."
        )


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _entry(dtype: str, count: int, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [begin, end]}


def _is_entry(entry: Any, dtype: str) -> bool:
    if (
        not isinstance(entry, dict)
        or entry.keys() != {"dtype", "shape", "data_offsets"}
        or entry["dtype"] != dtype
        or not isinstance(entry["shape"], list)
        or not isinstance(entry["data_offsets"], list)
        or list(map(type, entry["shape"])) != [int]
        or list(map(type, entry["data_offsets"])) != [int, int]
    ):
        return False
    (count,), (begin, end) = entry["shape"], entry["data_offsets"]
    return bool(count >= 0 and end - begin == count * _DTYPES[dtype].itemsize)


def _parse_json(text: str | bytes, source: str, what: str) -> Any:
    try:
        if isinstance(text, bytes):  # json.loads would also take UTF-16 and UTF-32
            text = text.decode()
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    # Deeply nested JSON raises RecursionError; treat it as invalid.
    except (ValueError, RecursionError) as error:
        raise StateError(f"{source} has {what} that is not valid JSON: {error!s:.200}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return result


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _parse_int(literal: str) -> int:
    # int() takes quadratic time; before Python 3.10.7 it had no limit of its own.
    if len(literal) > _MAX_NUMBER_LENGTH:
        raise ValueError(f"a number has {len(literal)} characters; {_MAX_NUMBER_LENGTH} are valid")
    return int(literal)


def _parse_float(literal: str) -> float:
    if len(literal) > _MAX_NUMBER_LENGTH:
        raise ValueError(f"a number has {len(literal)} characters; {_MAX_NUMBER_LENGTH} are valid")
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is beyond float64")
    return value
