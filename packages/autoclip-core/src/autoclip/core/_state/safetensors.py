"""A state as bytes: a safetensors file whose one metadata key is JSON that carries a digest.

The safetensors library reads and writes the file. This module adds limits that hold before memory
is taken, strict JSON, and the digest. It knows the container, `state.py` the contents.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from autoclip.core._errors import NoHistoryError, StateError

MAX_FILE_BYTES = 2**33
"""The largest state that is written or read, 8 GiB: two million rows of a thousand norms each."""

CHECKPOINTS = (b"PK\x03\x04", b"\x80", b"\x89HDF")
"""The first bytes of checkpoints of PyTorch and Keras: zip archives, pickles, HDF5 files."""

MAX_HEADER_BYTES = 100_000_000
"""The largest header, a limit of the safetensors library: 700,000 names of 100 characters."""

_KEY = "autoclip"
_DIGEST = "sha256"
_NO_DIGEST = "0" * 64
# JSON of shorter lists and objects takes up to 53 times its size in memory once it is parsed.
_BYTES_PER_CONTAINER = 8
_MAX_NUMBER_LENGTH = 100
_STRING_OR_CONTAINER = re.compile(rb'"[^"]*"|[\[{]')
DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4")}

_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 4
_repr.maxlong = _repr.maxstring = _repr.maxother = 60


def brief_repr(value: object) -> str:
    """`repr(value)`, shortened to at most 120 characters: values from a file may be huge."""
    text = _repr.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass(frozen=True)
class SealedTensors:
    """The contents of a file that the safetensors library accepts, with metadata that is JSON.

    Attributes:
        source: the file's name for errors.
        metadata: the metadata, parsed; any JSON value.
        text: the metadata as it stands in the file.
        entries: each tensor's `"dtype"`, `"shape"` and `"data"`, by name.
    """

    source: str
    metadata: Any
    text: str
    entries: dict[str, dict[str, Any]]

    @staticmethod
    def dump(
        metadata: Mapping[str, Any],
        tensors: Mapping[str, tuple[str, npt.NDArray[Any]]],
        source: str,
    ) -> bytes:
        """Serialize metadata and one-dimensional tensors: equal ones give equal bytes.

        Args:
            metadata: a JSON object; the digest is added to it.
            tensors: a dtype, "F32" or "I64", and an array [n] that can be cast to it, by name.
            source: the state's name for errors.

        Raises:
            StateError: the file would be larger than `parse` allows.
        """
        arrays = {
            name: np.ascontiguousarray(array, DTYPES[dtype])
            for name, (dtype, array) in tensors.items()
        }
        text = json.dumps(
            {**metadata, _DIGEST: _NO_DIGEST},
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
        digest = _digest(text, {name: array.data for name, array in arrays.items()})
        # The last one: `version` alone follows it in the order of the keys.
        before, _, after = text.rpartition(_NO_DIGEST)
        try:
            data = safetensors.numpy.save(arrays, {_KEY: f"{before}{digest}{after}"})
        except safetensors.SafetensorError as error:
            raise _too_large_a_header(source) from error
        if _header_length(data) > MAX_HEADER_BYTES:  # older releases write larger ones
            raise _too_large_a_header(source)
        check_size(len(data), source)
        return data

    @classmethod
    def parse(cls, data: bytes, source: str) -> SealedTensors:
        """Read the container, without interpreting its contents.

        Time and memory are proportional to the size of `data`, not to the sizes that it claims.

        Raises:
            StateError: it is no such file.
        """
        check_size(len(data), source)
        header = read_header(io.BytesIO(data), len(data), source)
        # The library reads metadata from files only, not from bytes.
        metadata = _parse_json(header, source, "header").get("__metadata__")
        try:
            entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise StateError(
                f"{source} is damaged or cut off: it is not a valid safetensors file "
                f"({brief_repr(str(error))}). Load another copy or an earlier checkpoint."
            ) from error
        if not isinstance(metadata, dict) or metadata.keys() != {_KEY}:
            raise StateError(
                f'{source} holds no AutoClip history: its only metadata key must be "{_KEY}".'
            )
        text = metadata[_KEY]
        parsed = _parse_json(text.encode(), source, "metadata")
        return cls(source, parsed, text, dict(entries))

    def check_digest(self) -> None:
        """Refuse contents that are not those that were written.

        Raises:
            StateError: they are not.
        """
        digest = self.metadata.get(_DIGEST)
        if not isinstance(digest, str) or len(digest) != len(_NO_DIGEST):
            raise StateError(
                f"{self.source} is not a valid AutoClip state: {_DIGEST} is {brief_repr(digest)}, "
                f"not a string of {len(_NO_DIGEST)} hexadecimal digits."
            )
        blank = self.text.replace(digest, _NO_DIGEST)
        if _digest(blank, {name: entry["data"] for name, entry in self.entries.items()}) != digest:
            raise StateError(
                f"{self.source} is damaged: its contents do not have the SHA-256 digest that it "
                "names. Load another copy or an earlier checkpoint."
            )

    def tensors(self, dtypes: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
        """The tensors as arrays.

        Args:
            dtypes: the dtype of each tensor that there must be, "F32" or "I64", by name.

        Returns:
            float32[n] and int64[n] arrays by name.

        Raises:
            StateError: there are not exactly these tensors, of one dimension.
        """
        if self.entries.keys() != dtypes.keys():
            missing = brief_repr(sorted(dtypes.keys() - self.entries.keys()))
            unknown = brief_repr(sorted(self.entries.keys() - dtypes.keys()))
            raise StateError(
                f"{self.source} is not a valid AutoClip state: for its groups it lacks the tensors "
                f"{missing} and has the unknown tensors {unknown}."
            )
        arrays = {}
        for name, dtype in dtypes.items():
            entry = self.entries[name]
            if entry["dtype"] != dtype or len(entry["shape"]) != 1:
                raise StateError(
                    f"{self.source} is not a valid AutoClip state: its tensor {name!r} is "
                    f"{entry['dtype']}{brief_repr(entry['shape'])}, not {dtype}[n]."
                )
            array = np.frombuffer(entry["data"], DTYPES[dtype])
            arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
        return arrays


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


def read_header(file: BinaryIO, size: int, source: str) -> bytes:
    """Read a file's header, without its size, and refuse another program's file.

    Args:
        file: the file, at its beginning.
        size: the number of all bytes.
        source: the file's name for errors.

    Raises:
        StateError: it cannot be a state, as far as its size and its header show that.
    """
    if size < 10:
        raise StateError(
            f"{source} is not an AutoClip state: it has only {size} bytes. "
            "It may be empty or cut off."
        )
    beginning, first = file.read(8), file.read(1)
    length, available = _header_length(beginning), min(size - 8, MAX_HEADER_BYTES)
    if first != b"{" or length > available:
        raise StateError(
            f"{source} is damaged, cut off, or not an AutoClip state: it does not begin with a "
            f"safetensors header of at most {available} bytes. "
            + (
                "If it is a checkpoint of PyTorch or Keras, load it into your optimizer or model. "
                "Convert one of autoclip 0.2.1 first: autoclip convert OLD NEW."
                if beginning.startswith(CHECKPOINTS)
                else "Load another copy or an earlier checkpoint."
            )
        )
    header = first + file.read(length - 1)
    if f'"{_KEY}"'.encode() not in header:
        raise NoHistoryError(
            f"{source} holds no AutoClip history: it is a safetensors file of something else. "
            "Load the file that save wrote."
        )
    return header


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _too_large_a_header(source: str) -> StateError:
    return StateError(
        f"{source} needs a header of more than {MAX_HEADER_BYTES} bytes, the limit of safetensors "
        "files. Shorten the parameters' names."
    )


def _digest(text: str, tensors: Mapping[str, Any]) -> str:
    """The SHA-256 digest of metadata without its digest, and of the tensors by name."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def _parse_json(data: bytes, source: str, part: str) -> Any:
    most = len(data) // _BYTES_PER_CONTAINER + 64
    # Brackets in names do not count, but to leave them out takes longer than to parse the text.
    if data.count(b"[") + data.count(b"{") > most and _containers(data) > most:
        raise StateError(
            f"{source} is damaged: its {part} has too many lists and objects for {len(data)} bytes."
        )
    try:
        return json.loads(
            data.decode(),  # json.loads would also take UTF-16 and UTF-32
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=partial(_number, int),
            parse_float=partial(_number, float),
        )
    # Deeply nested JSON raises RecursionError; treat it as invalid.
    except (ValueError, RecursionError) as error:
        raise StateError(
            f"{source} is damaged: its {part} is not valid JSON: {error!s:.200}"
        ) from error


def _containers(data: bytes) -> int:
    """The number of lists and objects in JSON."""
    # Without its escapes: for those, a regular expression would keep a stack.
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    return sum(data[each.start()] != ord('"') for each in _STRING_OR_CONTAINER.finditer(data))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return result


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _number(kind: type[int] | type[float], literal: str) -> float:
    # int() takes quadratic time; before Python 3.10.7 it had no limit of its own.
    if len(literal) > _MAX_NUMBER_LENGTH:
        raise ValueError(f"a number has {len(literal)} characters; {_MAX_NUMBER_LENGTH} are valid")
    value = kind(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is beyond float64")
    return value
