"""Histories in the files that Keras and TensorFlow write, for the command `autoclip`."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import tensorflow as tf

from autoclip.core import State, StateError
from autoclip.tf._keras_saving import CHECKPOINT_KEY, STATE

__all__ = ["read_checkpoint", "read_folder", "read_h5", "read_keras", "read_shards"]

# The weights in a .keras file, and in a folder that model.save(zipped=False) wrote.
_WEIGHTS = "model.weights.h5"
# The weights in a folder of keras.callbacks.BackupAndRestore.
_BACKUP = "latest.weights.h5"


def read_keras(path: str) -> dict[str, State]:
    """Every history in a `.keras` file, by the clipper's place in it: `"optimizer/clipper"`.

    Raises:
        StateError: the file or a history in it is damaged.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            weights = archive.read(_WEIGHTS)
    except (zipfile.BadZipFile, KeyError) as error:
        raise StateError(f"{path} is damaged or not a .keras file: {error}.") from error
    return _read_weights(io.BytesIO(weights), path)


def read_h5(path: str) -> dict[str, State]:
    """Every history in an `.h5` file, such as a `.weights.h5`; see `read_keras`."""
    return _read_weights(path, path)


def read_shards(path: str) -> dict[str, State]:
    """Every history in weights saved with `max_shard_size`, given their `.weights.json`.

    Raises:
        StateError: the file, a shard that it names, or a history is damaged, or a shard is missing.
        OSError: a file cannot be read.
    """
    try:
        entries = json.loads(Path(path).read_bytes())["weight_map"].values()
        names = {name for each in entries for name in ([each] if isinstance(each, str) else each)}
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("a shard is not a file of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(
            f"{path} is damaged or no index of Keras's sharded weights: {error!r:.200}."
        ) from error
    states: dict[str, State] = {}
    for name in sorted(names):
        shard = Path(path).with_name(name)
        if not shard.is_file():
            raise StateError(f"{path} names the shard {name!r:.200}, which is not beside it.")
        states.update(read_h5(str(shard)))
    return states


def read_folder(path: str) -> dict[str, State]:
    """Every history in a folder that Keras or TensorFlow writes.

    That is one of `model.save(path, zipped=False)` or of `BackupAndRestore`; of a folder of
    TensorFlow checkpoints, the newest one is read.

    Raises:
        StateError: a history is damaged.
        OSError: a file cannot be read.
    """
    for name in (_WEIGHTS, _BACKUP):
        if Path(path, name).is_file():
            return read_h5(str(Path(path, name)))
    newest = tf.train.latest_checkpoint(path)
    return {} if newest is None else read_checkpoint(f"{newest}.index")


def _read_weights(file: Any, path: str) -> dict[str, State]:
    datasets: dict[str, Any] = {}

    def visit(name: str, found: Any) -> None:
        is_bytes = isinstance(found, h5py.Dataset) and found.dtype == np.uint8
        if is_bytes and name.rpartition("/")[2] == STATE and found.size:
            datasets[name.removesuffix(f"/vars/{STATE}")] = found[()].tobytes()

    try:
        with h5py.File(file, "r") as weights:
            weights.visititems(visit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StateError(f"{path} is damaged or not an HDF5 file: {error}.") from error
    return _parsed(datasets, path)


def read_checkpoint(path: str) -> dict[str, State]:
    """Every history in a TensorFlow checkpoint, given its `.index` file.

    Raises:
        StateError: the checkpoint or a history in it is damaged.
        OSError: it cannot be read.
    """
    try:
        reader = tf.train.load_checkpoint(path.removesuffix(".index"))
        types = reader.get_variable_to_dtype_map()
        found = {
            name.removesuffix(CHECKPOINT_KEY): reader.get_tensor(name)
            for name, dtype in types.items()
            if dtype == tf.string and name.endswith(CHECKPOINT_KEY)
        }
    except (tf.errors.OpError, ValueError) as error:
        raise StateError(f"{path} is damaged or not a TensorFlow checkpoint.") from error
    return _parsed({name: data for name, data in found.items() if data}, path)


def _parsed(found: dict[str, bytes], path: str) -> dict[str, State]:
    return {
        place: State.from_bytes(data, f"{path} at {place}") for place, data in sorted(found.items())
    }
