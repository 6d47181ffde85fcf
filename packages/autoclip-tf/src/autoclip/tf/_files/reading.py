"""Histories in the files that Keras and TensorFlow write, for the command `autoclip`.

A file is asked for no more than it holds: its histories together are no larger than the file, and
nothing is read from any other file.
"""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from autoclip.core import State, StateError
from autoclip.core.inspect import printable
from autoclip.tf._files.checkpoint_file import read_strings
from autoclip.tf._saving import CHECKPOINT_KEY, CHILD, STATE

_WEIGHTS = "model.weights.h5"  # in a .keras file
_MAX_INDEX_BYTES = 2**24


def read_keras(path: str) -> dict[str, State]:
    """Read every history in a `.keras` file, by its path in it: `"optimizer/autoclip"`.

    Raises:
        StateError: the file or a history in it is damaged, or claims more than the file holds.
        OSError: it cannot be read.
    """
    size = os.path.getsize(path)
    with _damage_as_error(path, "not a .keras file"), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(_WEIGHTS)
        if entry.file_size > size:
            raise StateError(
                f"{path} has an entry {_WEIGHTS!r} of {entry.file_size} bytes, but the file "
                f"has {size}: it is compressed, as Keras does not write it. Unpack "
                f"{_WEIGHTS} and read that."
            )
        weights = archive.read(entry)
    return _read_weights(io.BytesIO(weights), path, size)


def read_h5(path: str) -> dict[str, State]:
    """Read every history in an `.h5` file, such as a `.weights.h5`; see `read_keras`."""
    return _read_weights(path, path, os.path.getsize(path))


def read_shards(path: str) -> dict[str, State]:
    """Read every history in weights saved with `max_shard_size`, given their `.weights.json`.

    Raises:
        StateError: the file, a shard that it names, or a history is damaged, or a shard is missing.
        OSError: a file cannot be read.
    """
    if os.path.getsize(path) > _MAX_INDEX_BYTES:
        raise StateError(f"{path} is larger than an index of Keras's sharded weights.")
    with _damage_as_error(path, "no index of Keras's sharded weights"):
        entries = json.loads(Path(path).read_bytes())["weight_map"].values()
        names = {name for each in entries for name in ([each] if isinstance(each, str) else each)}
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("a shard is not a file of the same folder")
    states: dict[str, State] = {}
    for name in sorted(names):
        shard = Path(path).with_name(name)
        if not shard.is_file():
            raise StateError(f"{path} names the shard {name!r:.200}, which is not in its folder.")
        states.update(read_h5(str(shard)))
    return states


def read_checkpoint(path: str) -> dict[str, State]:
    """Read every history in a TensorFlow checkpoint, given its `.index` file.

    Raises:
        StateError: the checkpoint or a history in it is damaged.
        OSError: it cannot be read.
    """
    states = {}
    with _damage_as_error(path, "not a TensorFlow checkpoint"):
        for name, data in read_strings(path, CHECKPOINT_KEY):
            where = printable(name.removesuffix(f"/{CHILD}"))
            if data:  # empty, if a clipper had taken no step
                states[where] = State.from_bytes(data, f"{path} at {where}")
    return states


@contextmanager
def _damage_as_error(path: str, kind: str) -> Iterator[None]:
    """Raise StateError for all that damage raises in the block: errors of any kind.

    Args:
        path: of the file.
        kind: the end of the message, such as "not a .keras file".
    """
    try:
        yield
    except StateError:
        raise
    except Exception as error:
        # A damaged file claims offsets that cannot be sought; HDF5's own errors have no number.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise StateError(f"{path} is damaged or {kind}: {error!s:.300}.") from error


def _read_weights(file: Any, path: str, size: int) -> dict[str, State]:
    """Read the histories in an HDF5 file of `size` bytes."""
    states: dict[str, State] = {}
    left = size

    def visit(name: str, found: Any) -> None:  # each object once, and no link to another file
        nonlocal left
        if name.rpartition("/")[2] != STATE or not isinstance(found, h5py.Dataset):
            return
        if found.dtype != np.uint8:
            return
        where = printable(name.removesuffix(f"/vars/{STATE}"))
        if not _is_plain(found):
            raise StateError(
                f"{path} has at {where} a dataset that is compressed, in chunks, virtual or in "
                "another file, as Keras does not write it. Load it in your program and write the "
                "history with clipper.save(path)."
            )
        left -= found.nbytes
        if left < 0:
            raise StateError(
                f"{path} claims histories that are larger than the file. It is damaged or forged."
            )
        if found.size:
            states[where] = State.from_bytes(found[()].tobytes(), f"{path} at {where}")

    with _damage_as_error(path, "not an HDF5 file"), h5py.File(file, "r") as weights:
        weights.visititems(visit)
    return dict(sorted(states.items()))


def _is_plain(dataset: Any) -> bool:
    """True if the numbers are in the file one after the other, uncompressed."""
    properties = dataset.id.get_create_plist()
    layouts = (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT)
    return properties.get_layout() in layouts and not properties.get_external_count()
