"""Histories in the files that PyTorch and its trainers write, for the command `autoclip`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from autoclip.core import State, StateError
from autoclip.core.inspect import printable
from autoclip.torch._files import legacy
from autoclip.torch._files.checkpoint_file import CheckpointFile, open_checkpoint
from autoclip.torch._files.pickle import Unmade, as_bytes

# The names of the optimizer's state in checkpoints of the Hugging Face Trainer and Accelerate.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
# Where Lightning puts checkpoints, from any of its folders.
_LIGHTNING = (
    "checkpoints/*.ckpt",
    "version_*/checkpoints/*.ckpt",
    "*/version_*/checkpoints/*.ckpt",
)
# Of a path, as it is shown.
_MAX_KEYS = 20
_MAX_KEY = 100


def read_file(path: str) -> dict[str, State]:
    """Read every history in a file that `torch.save` wrote, by its path there.

    Such a path is `"optimizer.autoclip"`: keys of nested dicts.

    Raises:
        StateError: the file or a history in it is damaged, or clippers of autoclip 0.2.1 saved it.
        OSError: it cannot be read.
    """
    with open_checkpoint(path) as file:
        states: dict[str, State] = {}
        parsed: dict[int, State] = {}  # many paths may have the same bytes
        for where, entry in _state_dicts(file):
            key = id(entry["data"])
            if key not in parsed:
                source = f"{path} at {where}" if where else path
                parsed[key] = State.from_dict({**entry, "data": as_bytes(entry["data"])}, source)
            states[where] = parsed[key]
        if not states and legacy_clippers(file):
            raise StateError(
                f"{path} was saved by autoclip 0.2.1. Convert it first: autoclip convert {path} "
                "new.autoclip"
            )
    return states


def state_dicts(path: str) -> dict[str, dict[str, Any]]:
    """Read every clipper's `state_dict()` in a file that `torch.save` wrote, by its path in it.

    Raises:
        StateError: the file is damaged.
        OSError: it cannot be read.
    """
    with open_checkpoint(path) as file:
        return {
            where: {**entry, "data": as_bytes(entry["data"])} for where, entry in _state_dicts(file)
        }


def find_file(path: str) -> str | None:
    """Find the newest checkpoint in a folder of the Hugging Face Trainer, Accelerate or Lightning.

    Returns:
        The path of the file, or of the folder of the checkpoint; None if there is none.

    Raises:
        StateError: it is a distributed checkpoint.
    """
    folder = Path(path)
    for name in _OPTIMIZER_FILES:
        if (folder / name).is_file():
            return str(folder / name)
    if (folder / ".metadata").exists():
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
        return str(steps[max(steps)])
    found = [each for pattern in _LIGHTNING for each in folder.glob(pattern) if each.is_file()]
    return str(max(found, key=os.path.getmtime)) if found else None


def legacy_clippers(file: CheckpointFile) -> dict[str, Mapping[Any, Any]]:
    """Find all that clippers of autoclip 0.2.1 saved, by its path in the checkpoint."""
    return dict(_find(file.contents, legacy.is_clipper))


def _state_dicts(file: CheckpointFile) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    return _find(file.contents, lambda entry: entry.get("format") == "autoclip" and "data" in entry)


def _find(
    contents: Any, test: Callable[[Mapping[Any, Any]], bool]
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Find dicts in nested dicts and lists, each once, with the keys that lead to them."""
    seen: set[int] = set()
    path: list[tuple[Any, Iterator[tuple[Any, Any]]]] = [("", iter([("", contents)]))]
    while path:
        for key, child in path[-1][1]:
            if isinstance(child, Unmade):
                child = child.items
            if not child or not isinstance(child, (dict, list, tuple)) or id(child) in seen:
                continue
            seen.add(id(child))
            if isinstance(child, dict):
                path.append((key, iter(child.items())))
                if test(child):
                    yield ".".join(_word(each) for each, _ in path[2:][-_MAX_KEYS:]), child
            else:
                path.append((key, iter(enumerate(child))))
            break
        else:
            path.pop()


def _word(key: Any) -> str:
    return printable(str(key)[:_MAX_KEY]) if isinstance(key, (str, int)) else type(key).__name__
