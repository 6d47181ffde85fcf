"""Histories in the files that Keras and TensorFlow write, for the command `autoclip`."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import tensorflow as tf

from autoclip.core import State, StateError
from autoclip.tf._keras_saving import CHECKPOINT_KEY, STATE

__all__ = ["read_checkpoint", "read_h5", "read_keras"]

# The weights in a .keras file.
_WEIGHTS = "model.weights.h5"


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
