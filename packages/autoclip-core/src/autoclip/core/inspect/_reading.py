"""Finding histories in files: our own, and through entry points those of frameworks."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from autoclip.core._errors import NoHistoryError, StateError
from autoclip.core._rules.rule import RULES
from autoclip.core._settings.settings import CLIPPER_SETTINGS, GroupSettings
from autoclip.core._state.files import CHECKPOINT_FILE, PathLike, read_file
from autoclip.core._state.safetensors import CHECKPOINTS, read_header
from autoclip.core._state.state import GroupState, State

READERS = "autoclip.readers"
"""The entry point group of functions that find histories in a framework's files.

A reader takes a path as a string and returns `dict[str, State]`: each history by its path in the
file, an empty dict if there is none. It raises `StateError` for a damaged file. Its entry point is
named after the suffix of the files that it reads, without the first dot.

The entry point `folder` is another function: it takes the path of a folder and returns the path of
the file or folder in it that is to be read, or None.
"""

# A damaged file with one of these suffixes is a damaged state, not another program's file.
_OWN_SUFFIXES = ("autoclip", "safetensors")
_PACKAGES = {
    **dict.fromkeys(("pt", "pth", "tar", "ckpt", "bin"), "autoclip-torch"),
    **dict.fromkeys(("keras", "h5", "weights.json", "index"), "autoclip-tf"),
}
_TOLD_BY_CONTENTS = tuple(f".{suffix}" for suffix in _PACKAGES.keys() - {"weights.json", "index"})
_MAX_FOLDERS = 5


def read_states(path: PathLike) -> dict[str, State]:
    """Read every history in a file or folder.

    A state file that `save` wrote is read by the core. For anything else the installed packages are
    asked: `autoclip-torch` reads PyTorch checkpoints, and folders and checkpoints of the Hugging
    Face Trainer and of Lightning; `autoclip-tf` reads `.keras` and `.h5` files and TensorFlow
    checkpoints (`.index`). Of a folder with several files, the newest one that holds a history is
    read. Nothing is unpickled.

    Args:
        path: of the file or folder.

    Returns:
        Each state by its path in the file; `""` for a state file.

    Raises:
        StateError: it is damaged, or no history is found.
        OSError: it cannot be read.
        ImportError: the package that reads it is not installed.

    >>> from autoclip.core import History, Quantile
    >>> from autoclip.core.inspect import read_states
    >>> History(rows=1, rule=Quantile(0.5)).save("run.autoclip")
    >>> read_states("run.autoclip")[""].rule
    'quantile'
    """
    return find_states(path)[1]


def find_states(path: PathLike) -> tuple[str, dict[str, State]]:
    """Read every history in a file or folder; see `read_states`.

    Returns:
        The path of the file that was read, and each state by its path in it.
    """
    name = os.fspath(path)
    if not os.path.exists(name) and os.path.isfile(f"{name}.index"):
        name = f"{name}.index"  # TensorFlow's functions return and take a checkpoint's prefix
    if os.path.isdir(name):
        return _find_in_folder(name)
    return name, _read(name)


def _find_in_folder(name: str) -> tuple[str, dict[str, State]]:
    folder = name
    for _ in range(_MAX_FOLDERS):  # a link may lead back to where it is
        chosen = _choose(folder)
        if chosen is None:
            break
        if not os.path.isdir(chosen):
            return chosen, _read(chosen)
        folder = chosen
    suffixes = _suffixes()
    missing: ImportError | None = None
    for file in _newest_first(folder):
        if _suffix(file, suffixes) is not None and not _is_foreign(file):
            try:
                return file, _read(file)
            except NoHistoryError:
                continue
            except ImportError as error:
                missing = error
    if missing is not None:
        raise missing
    raise StateError(f"{name} holds no file with a history of AutoClip.")


def _choose(folder: str) -> str | None:
    """The file or folder that is to be read, as far as a name tells."""
    own = os.path.join(folder, CHECKPOINT_FILE)
    if os.path.isfile(own):
        return own
    for reader in entry_points(group=READERS):
        if reader.name == "folder":
            chosen = _call(reader, folder)
            if chosen is not None:
                return str(chosen)
    return None


def _newest_first(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        files = [(each.stat().st_mtime_ns, each) for each in entries if each.is_file()]
    files.sort(key=lambda each: (each[0], _natural(each[1].name)), reverse=True)
    return [each.path for _, each in files]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which `step-10` comes after `step-9`."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _read(name: str) -> dict[str, State]:
    try:
        return _states_in(name)
    except OSError as error:
        error.filename = error.filename or name  # only errors of opening name the file
        raise


def _states_in(name: str) -> dict[str, State]:
    if not stat.S_ISREG(os.stat(name).st_mode):  # opening a pipe would wait for a writer
        raise StateError(f"{name} is not a regular file.")
    suffixes = _suffixes()
    kind = _suffix(name, suffixes) or _kind_by_contents(name)
    if kind in _OWN_SUFFIXES or _is_state(name):
        return {"": State.from_bytes(read_file(name), name)}
    readers = [each for each in entry_points(group=READERS) if each.name == kind]
    if not readers and kind in _PACKAGES:
        package = _PACKAGES[kind]
        raise ImportError(
            f"{name} is read by {package}, which is not installed. Install it with: pip install "
            f"{package}"
        )
    if not readers:
        known = ", ".join(f".{each}" for each in sorted(suffixes))
        raise StateError(
            f"{name} is not a state file, and neither its name nor its first bytes are those of a "
            f"checkpoint. The suffixes of files that are read: {known}."
        )
    states: dict[str, State] = {}
    for reader in readers:
        states.update(_call(reader, name))
    if not states:
        raise NoHistoryError(f"{name} holds no history of AutoClip.")
    return states


def _suffixes() -> set[str]:
    """All suffixes that are read, without their first dots."""
    named = {each.name for each in entry_points(group=READERS)} - {"folder"}
    return {*named, *_OWN_SUFFIXES, *_PACKAGES}


def _suffix(name: str, suffixes: set[str]) -> str | None:
    """The longest suffix of a file that is one of these."""
    parts = os.path.basename(name).lower().split(".")[1:]
    for i in range(len(parts)):
        if ".".join(parts[i:]) in suffixes:
            return ".".join(parts[i:])
    return None


def _is_state(name: str) -> bool:
    """True if a file begins as the ones that `save` writes, under any suffix."""
    with open(name, "rb") as file, suppress(StateError):
        read_header(file, os.fstat(file.fileno()).st_size, name)
        return True
    return False


def _kind_by_contents(name: str) -> str | None:
    """The suffix that a file of this kind usually has, from its first bytes."""
    with open(name, "rb") as file:
        first = file.read(9)
        if first[8:] == b"{":
            return "safetensors"
        if first.startswith(b"\x89HDF\r\n\x1a\n"):
            return "h5"
        if first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # a pickle
            return "pt"
        if first.startswith(b"PK\x03\x04"):
            with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                return "pt" if any(each.endswith("/data.pkl") for each in names) else "keras"
    return None


def _is_foreign(name: str) -> bool:
    """True if a file is another program's that has a checkpoint's suffix: a corpus `train.bin`."""
    if not name.lower().endswith(_TOLD_BY_CONTENTS):
        return False
    with open(name, "rb") as file:
        first = file.read(9)
    if first[8:] == b"{" or not first.strip(b"\0"):  # a state, or a checkpoint that was cut off
        return False
    return not first.startswith(CHECKPOINTS)


def _call(reader: EntryPoint, name: str) -> Any:
    try:
        return reader.load()(name)
    except (StateError, OSError):
        raise
    except Exception as error:  # a reader is someone else's code
        raise StateError(f"{name} cannot be read by {reader.value}: {error!r:.300}") from error


def settings_of(rule: str, group: GroupState) -> GroupSettings | None:
    """The settings to compute thresholds with; None if the rule or a value is not known here.

    A file of another release may lack a setting, which then has its default, or have others.
    """
    if rule not in RULES:
        return None
    saved = group.settings
    own = {name: saved[name] for name in RULES[rule].setting_names() if name in saved}
    shared = {name: saved[name] for name in CLIPPER_SETTINGS if name in saved}
    try:
        return GroupSettings(RULES[rule].from_settings(own), **shared)
    except (TypeError, ValueError):
        return None
