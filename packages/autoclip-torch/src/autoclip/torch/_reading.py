"""Histories in the files that PyTorch and its trainers write, for the command `autoclip`."""

from __future__ import annotations

import _codecs
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autoclip.core import State, StateError, read_states
from autoclip.torch import _legacy

__all__ = ["legacy_histories", "load_file", "read_file", "read_folder"]

# What the Hugging Face Trainer and Accelerate call the optimizer's state in a checkpoint.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
# Where Lightning puts checkpoints, from any of its folders.
_LIGHTNING = (
    "*.ckpt",
    "checkpoints/*.ckpt",
    "version_*/checkpoints/*.ckpt",
    "*/version_*/checkpoints/*.ckpt",
)
_MAX_DEPTH = 20


def read_file(path: str) -> dict[str, State]:
    """Every history in a file that `torch.save` wrote, by its place: `"optimizer.autoclip"`.

    Raises:
        StateError: the file or a history in it is damaged, or it holds Python objects.
        OSError: it cannot be read.
    """
    loaded = load_file(path)
    states = {
        place: State.from_dict(entry, f"{path} at {place}" if place else path)
        for place, entry in mappings(loaded)
        if is_state(entry)
    }
    if not states and legacy_histories(loaded):
        raise StateError(
            f"{path} was saved by autoclip 0.2.1. Convert it first: autoclip convert {path} "
            "new.autoclip"
        )
    return states


def is_state(entry: Mapping[Any, Any]) -> bool:
    """Whether this is what a clipper's `state_dict()` returned."""
    found = entry.get("format")
    return isinstance(found, str) and found == "autoclip" and "data" in entry


def read_folder(path: str) -> dict[str, State]:
    """Every history in a folder of the Hugging Face Trainer, of Accelerate or of Lightning.

    A checkpoint's folder is read itself. Of a folder with several checkpoints, the newest one is.

    Raises:
        StateError: a history is damaged.
        OSError: a file cannot be read.
    """
    folder = Path(path)
    for name in _OPTIMIZER_FILES:
        if (folder / name).is_file():
            return read_file(str(folder / name))
    if (folder / ".metadata").is_file():
        raise StateError(
            f"{path} is a distributed checkpoint, which only torch.distributed.checkpoint reads. "
            "Load it in your program and write the history with clipper.save(path)."
        )
    steps = {
        int(match[1]): each
        for each in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", each.name)) and each.is_dir()
    }
    if steps:
        return read_states(steps[max(steps)])
    found = [each for pattern in _LIGHTNING for each in folder.glob(pattern)]
    files = [each for each in found if each.is_file()]
    return read_file(str(max(files, key=os.path.getmtime))) if files else {}


def load_file(path: str) -> Any:
    """What `torch.save` wrote, unpickling nothing but tensors and plain containers.

    Raises:
        StateError: it is damaged, not a file of torch's, or holds other Python objects.
        OSError: it cannot be read.
    """
    if torch.__version__ < "2.5":  # torch.save calls it for bytes; allowed in later versions
        torch.serialization.add_safe_globals([_codecs.encode])
    # Mapped where the format allows it, since the tensors in it are not needed.
    mmap = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{path} is damaged, or holds Python objects, which are not unpickled: they could run "
            "any code. If you trust it, load it in your program and write the history with "
            "clipper.save(path)."
        ) from error
    except Exception as error:  # torch lets all kinds through for a damaged file
        raise StateError(f"{path} is damaged or not a PyTorch checkpoint.") from error


def legacy_histories(value: Any) -> dict[str, Mapping[str, Any]]:
    """What clippers of autoclip 0.2.1 saved, by its place in a checkpoint."""
    return {
        place: entry
        for place, entry in mappings(value)
        if _legacy.is_legacy(entry)
        and isinstance(entry["param_groups"], list)
        # An optimizer's state has the same two keys.
        and all(
            isinstance(group, Mapping) and "history_length" in group and "lr" not in group
            for group in entry["param_groups"]
        )
    }


def mappings(value: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All dicts in nested dicts and lists, with the keys that lead to them."""
    if isinstance(value, Mapping):
        yield place, value
        children: Any = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return
    if depth < _MAX_DEPTH:
        for key, child in children:
            yield from mappings(child, f"{place}.{key}" if place else str(key), depth + 1)
