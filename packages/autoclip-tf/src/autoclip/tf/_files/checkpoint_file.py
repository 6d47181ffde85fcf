"""The strings in a `tf.train.Checkpoint`'s files.

TensorFlow's own reader crashes the process on a string that claims more memory than there is. This
one takes no more than the files hold. An index is a sorted table of LevelDB's format, uncompressed;
its values are the protocol buffers in `tensorflow/core/protobuf/tensor_bundle.proto`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import tensor_bundle_pb2

_MAGIC_NUMBER = bytes.fromhex("57fb808b247547db")
_FOOTER_BYTES = 48
_MAX_KEY_BYTES = 2**16


def read_strings(path: str, ending: str) -> Iterator[tuple[str, bytes]]:
    """Read all scalar strings whose names end with `ending`, given the path of the index.

    Yields:
        The name without the ending, and the string.

    Raises:
        ValueError: a file is damaged, claims more than it holds, or is not a regular file.
        OSError: a file cannot be read.
    """
    table = _table(Path(path).read_bytes())
    key, value = next(table, (b"?", b""))
    if key:
        raise ValueError("the index has no header")
    header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
    left: int | None = None
    for key, value in table:
        name = key.decode()
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
        if entry.dtype != types_pb2.DT_STRING or not name.endswith(ending):
            continue
        if entry.shape.dim or entry.slices:
            raise ValueError(f"{name!r:.200} is not a scalar")
        shard = f"{path.removesuffix('.index')}.data-{entry.shard_id:05}-of-{header.num_shards:05}"
        if not stat.S_ISREG(os.stat(shard).st_mode):
            raise ValueError(f"{shard} is not a regular file")
        size = os.path.getsize(shard)
        # Together they are no larger than a file, even if they overlap.
        left = (size if left is None else left) - entry.size
        if min(left, entry.offset, size - entry.offset - entry.size) < 0:
            raise ValueError(f"{name!r:.200} claims more than {shard} holds")
        with open(shard, "rb") as file:
            file.seek(entry.offset)
            stored = file.read(entry.size)
        length, begin = _varint(stored, 0)
        begin += 4  # a checksum of the length
        if begin + length != len(stored):
            raise ValueError(f"{name!r:.200} has another length than it claims")
        yield name.removesuffix(ending), stored[begin:]


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All keys and values of a table, in order."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or not footer.endswith(_MAGIC_NUMBER):
        raise ValueError("the index does not end as one")
    _, offset = _handle(footer, 0)  # of the filters
    index, _ = _handle(footer, offset)
    end = 0
    for _, value in _block(data, *index):
        (begin, size), _ = _handle(value, 0)
        if begin < end:
            raise ValueError("blocks of the index overlap")
        end = begin + size
        yield from _block(data, begin, size)


def _block(data: bytes, begin: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    if begin + size >= len(data) or data[begin + size] != 0:
        raise ValueError("a block of the index ends behind it, or is compressed")
    block = data[begin : begin + size]
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")  # offsets of whole keys follow
    offset, key = 0, b""
    while offset < end:
        shared, offset = _varint(block, offset)
        added, offset = _varint(block, offset)
        length, offset = _varint(block, offset)
        key = key[:shared] + block[offset : offset + added]
        offset += added
        if len(key) != shared + added or len(key) > _MAX_KEY_BYTES or offset + length > end:
            raise ValueError("an entry of the index ends behind it")
        yield key, block[offset : offset + length]
        offset += length


def _handle(data: bytes, offset: int) -> tuple[tuple[int, int], int]:
    begin, offset = _varint(data, offset)
    size, offset = _varint(data, offset)
    return (begin, size), offset


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """An integer of at most 64 bits, and the offset after it."""
    value = 0
    for i in range(10):
        byte = data[offset + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, offset + i + 1
    raise ValueError("an integer of the index is too long")
