"""The files that `torch.save` writes: their contents, and the tensors that are asked for."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from autoclip.core import StateError
from autoclip.torch._files.pickle import Unmade, read_pickle

# A file is a zip archive or, up to PyTorch 1.5, several pickles of which the first is a number.
_ARCHIVE = b"PK\x03\x04"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@contextmanager
def open_checkpoint(path: str) -> Iterator[CheckpointFile]:
    """Open a file that `torch.save` wrote.

    Raises:
        StateError: the file is damaged, not one of PyTorch's, or claims more than it holds.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        yield CheckpointFile(path, file)


def _open_at_once(path: str, flags: int) -> int:
    # Blocking, a pipe without a writer would hang.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class CheckpointFile:
    """The contents of a file that `torch.save` wrote; see `open_checkpoint`.

    Attributes:
        contents: dicts, lists, tuples, text, numbers, None, and `Unmade` for everything else.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._read_storage: Callable[[str], bytes]
        self._storages: dict[str, torch.Tensor] = {}
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{path} is not a regular file.")
        self._size = status.st_size
        try:
            self.contents = self._read()
        except StateError:
            raise
        except Exception as error:  # damage raises all kinds
            raise StateError(f"{path} is damaged or not a PyTorch checkpoint.") from error

    def tensor(self, value: Any) -> Any:
        """Read the tensor that an `Unmade` stands for; tensors of one storage share its memory.

        Any other value is returned as it is.

        Raises:
            StateError: it is something else, or extends beyond the numbers that are stored.
        """
        if not isinstance(value, Unmade):
            return value
        try:
            if value.function != "torch._utils._rebuild_tensor_v2":
                raise ValueError(f"{value.function} makes no tensor")
            storage, offset, shape, stride, *_ = value.arguments
            _, kind, key, *_ = storage.arguments
            if key not in self._storages:
                data = bytearray(self._read_storage(key))  # PyTorch warns of read-only memory
                self._storages[key] = torch.frombuffer(data, dtype=_DTYPES[kind.function])
            return self._storages[key].as_strided(shape, stride, offset)
        except StateError:
            raise
        except Exception as error:
            raise StateError("A tensor in the checkpoint is damaged.") from error

    def _read(self) -> Any:
        beginning = self._file.read(len(_ARCHIVE))
        self._file.seek(0)
        if beginning == _ARCHIVE:
            return self._read_archive(zipfile.ZipFile(self._file))
        return self._read_pickles()

    def _read_archive(self, archive: zipfile.ZipFile) -> Any:
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")

        def read(name: str) -> bytes:
            entry = archive.getinfo(root + name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > self._size:
                raise StateError(
                    f"{self._path} has a compressed entry {name!r} of {entry.file_size} bytes, "
                    "which torch.save does not write. Pack the archive again, uncompressed."
                )
            return archive.read(entry)

        self._read_storage = lambda key: read(f"data/{key}")
        return read_pickle(io.BytesIO(read("data.pkl")))

    def _read_pickles(self) -> Any:
        file = _Bounded(self._file, self._size)
        storages: list[Unmade] = []
        if read_pickle(file) != _MAGIC_NUMBER:
            raise ValueError("a pickle of something else")
        _protocol, _sizes, contents, keys = (read_pickle(file, storages) for _ in range(4))
        arguments = [storage.arguments for storage in storages]
        dtypes = {key: _DTYPES[kind.function] for _, kind, key, *_ in arguments}
        spans = {}
        for key in keys:  # the storages follow, each after its number of elements
            size = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
            begin = self._file.tell()
            if begin + size > self._size:
                raise ValueError(f"the storage {key} ends behind the file")
            spans[key] = (begin, size)
            self._file.seek(begin + size)

        def read(key: str) -> bytes:
            begin, size = spans[key]
            self._file.seek(begin)
            return self._file.read(size)

        self._read_storage = read
        return contents


class _Bounded:
    """A file that is asked for no more than it holds: Python allocates memory before it reads."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self._size = size
        self.readline = file.readline

    def read(self, count: int, /) -> bytes:
        if count > 1000:
            count = min(count, self._size - self._file.tell())
        data: bytes = self._file.read(count)
        return data
