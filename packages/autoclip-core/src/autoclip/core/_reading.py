"""Finding histories in files: our own, and through entry points those of frameworks."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from autoclip.core._errors import StateError
from autoclip.core._files import PathLike, read_file
from autoclip.core._safetensors import check_beginning
from autoclip.core._state import State

__all__ = ["CHECKPOINT_FILE", "READERS", "read_states"]

READERS = "autoclip.readers"
"""The entry point group of functions that find histories in a framework's files.

A reader takes a path as a string and returns `dict[str, State]`: each history by its place in the
file, an empty dict if there is none. It raises `StateError` for a damaged file. Its entry point is
named after the suffix of the files that it reads, without the dot, or `folder`.
"""

CHECKPOINT_FILE = "autoclip.safetensors"
"""The state file that a trainer's callback writes into a checkpoint's folder."""

# A damaged file with one of these suffixes is a damaged state, not another program's file.
_OWN_SUFFIXES = ("autoclip", "safetensors")


def read_states(path: PathLike) -> dict[str, State]:
    """Read every history in a file or folder.

    A state file that `save` wrote is read by the core. For anything else the installed packages are
    asked: `autoclip-torch` reads PyTorch checkpoints, and folders and checkpoints of the Hugging
    Face Trainer and of Lightning; `autoclip-tf` reads `.keras` and `.h5` files and TensorFlow
    checkpoints (`.index`). Nothing is unpickled but what `torch.load(weights_only=True)` accepts.

    Args:
        path: of the file or folder.

    Returns:
        Each state by its place in the file; `""` for a state file.

    Raises:
        StateError: it is damaged, or no history is found.
        OSError: it cannot be read.

    >>> from autoclip.core import History, Quantile, read_states
    >>> History(rows=1, rule=Quantile(0.5)).save("run.autoclip")
    >>> read_states("run.autoclip")[""].rule
    'quantile'
    """
    name = os.fspath(path)
    kind = Path(name).suffix.lower().removeprefix(".")
    if os.path.isdir(name):
        own = os.path.join(name, CHECKPOINT_FILE)
        if os.path.isfile(own):
            return {"": State.from_bytes(read_file(own), own)}
        kind = "folder"
    elif kind in _OWN_SUFFIXES or _begins_like_a_state(name):
        return {"": State.from_bytes(read_file(name), name)}
    readers = entry_points(group=READERS)
    states: dict[str, State] = {}
    of_this_kind = [each for each in readers if each.name == kind]
    for reader in of_this_kind:
        states.update(_read(reader, name))
    if not of_this_kind and kind != "folder":
        others = {each.value: each for each in readers if each.name != "folder"}.values()
        for reader in others:
            with suppress(StateError):  # to most readers this is not one of their files
                states.update(_read(reader, name))
            if states:
                break
    if not states:
        raise StateError(
            f"{name} holds no history of AutoClip."
            if of_this_kind
            else f"{name} is not a state file, and no installed package finds a history in it: "
            "autoclip-torch reads files of PyTorch, autoclip-tf those of Keras and TensorFlow."
        )
    return states


def _begins_like_a_state(name: str) -> bool:
    if not os.path.isfile(name):
        return True  # let reading it say what is wrong; to open a pipe would wait for a writer
    with open(name, "rb") as file:
        beginning = file.read(9)
    try:
        check_beginning(beginning, os.path.getsize(name), name)
    except StateError:
        return False
    return True


def _read(reader: EntryPoint, name: str) -> dict[str, State]:
    try:
        found: dict[str, State] = reader.load()(name)
    except (StateError, OSError):
        raise
    except Exception as error:  # a reader is someone else's code
        raise StateError(f"{name} cannot be read by {reader.value}: {error!r:.300}") from error
    return found
