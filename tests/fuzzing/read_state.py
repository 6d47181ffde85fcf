"""Coverage-guided fuzzing of the state reader, with atheris (CPython 3.11 on Linux has wheels).

    hatch run fuzz:read-state FOLDER

FOLDER keeps the inputs that reached new code, for the next run; it starts with the golden files. An
input is a file whose digest is put right here, or after the byte 0xff the metadata of a file whose
tensors are right. It must be refused with a short StateError, or be a state that is saved and read
again.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["autoclip", "json"]):
    from autoclip.core import State, StateError

GOLDEN = Path(__file__).parents[1] / "autoclip_core" / "golden"


NO_DIGEST = b"0" * 64


def with_metadata(text: str) -> bytes:
    """A file that has this metadata, and three empty rows in two groups."""
    header: dict[str, object] = {"__metadata__": {"autoclip": text}}
    end = 0
    for name, dtype, size in (
        ("groups.0.lengths", "I64", 16),
        ("groups.0.recorded", "I64", 16),
        ("groups.1.lengths", "I64", 8),
        ("groups.1.recorded", "I64", 8),
        ("groups.0.values", "F32", 0),
        ("groups.1.values", "F32", 0),
    ):
        count = size // {"I64": 8, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(end)


def sealed(data: bytes) -> bytes:
    """The file with the right digest in place of the last 64 zeros of its header."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        digest = hashlib.sha256(header.pop("__metadata__")["autoclip"].encode())
        for name in sorted(header):
            begin, end = header[name]["data_offsets"]
            digest.update(data[start + begin : start + end])
    except Exception:  # whatever is wrong with it
        return data
    before, zeros, after = data[:start].rpartition(NO_DIGEST)
    return before + (digest.hexdigest().encode() if zeros else b"") + after + data[start:]


def unsealed(data: bytes) -> bytes:
    """The file with zeros in place of its digest."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    digest = json.loads(header["__metadata__"]["autoclip"])["sha256"]
    return data.replace(digest.encode(), NO_DIGEST)


def check(data: bytes) -> None:
    if data[:1] == b"\xff":
        data = with_metadata(data[1:].decode("utf-8", "surrogateescape"))
    data = sealed(data)
    try:
        state = State.from_bytes(data, source="the file")
    except StateError as error:
        message = str(error)
    else:
        message = ""
        saved = state.to_bytes()
        assert State.from_bytes(saved).to_bytes() == saved
    assert len(message) <= 500 and message.isprintable(), message


def main() -> None:
    atheris.Setup(sys.argv, check)
    folder = next((Path(each) for each in sys.argv[1:] if not each.startswith("-")), None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in GOLDEN.glob("*.safetensors"):
            data = unsealed(path.read_bytes())
            (folder / path.stem).write_bytes(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            text = header["__metadata__"]["autoclip"]
            (folder / f"{path.stem}.metadata").write_bytes(b"\xff" + text.encode())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
