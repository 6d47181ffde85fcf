"""Reading and writing state files: a crash leaves the old file or the new one, never half."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Union

from autoclip.core._errors import StateError
from autoclip.core._state.safetensors import MAX_FILE_BYTES, read_header

if sys.platform != "win32":
    import fcntl

PathLike = Union[str, "os.PathLike[str]"]

CHECKPOINT_FILE = "autoclip.safetensors"
"""The state file that a trainer's callback writes into a checkpoint's folder."""

_ABANDONED_SECONDS = 3600.0
_ATTEMPTS = 10


class _Removed(Exception):
    """Another process has removed the temporary file."""


@contextmanager
def _errors_ignored() -> Iterator[None]:
    """A block whose failing system calls do not matter.

    Exceptions that a signal handler raises do: TimeoutError is an OSError, without an `errno`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise


def write_file(path: PathLike, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all.

    The bytes go to a temporary file next to the target, are synced to the disk, and take the
    target's place by a rename. So the folder must be writable, and:

    * Symbolic links are followed and kept. Other hard links keep the old contents.
    * An existing file's permissions are kept, and its owner and group as far as the process may
      set them; access control lists and extended attributes are not. A new file follows the umask.
    * A file that the user may not write raises PermissionError, as `open` would.
    * Of two processes that write at once, one wins as a whole.
    * A process that is killed leaves its temporary file, `.NAME.<16 hex digits>.tmp`. The next save
      to the same path removes it, where the file system has no locks once it is an hour old.

    Raises:
        OSError: it cannot be written; a file that was there is as it was.
    """
    name = os.fspath(path)
    target = os.path.realpath(name)
    folder, base = os.path.split(target)
    prefix = f".{base[:50]}."  # a name has at most 255 bytes, and a character up to four of them
    temporary = ""
    try:
        old = _status(name, target)
        _remove_abandoned(folder, prefix)
        for _ in range(_ATTEMPTS):
            # Named before it is made: from then on any exception removes it.
            temporary = os.path.join(folder, f"{prefix}{secrets.token_hex(8)}.tmp")
            if _write(temporary, target, old, data):
                _sync_folder(folder)
                return
        raise OSError(errno.EBUSY, "another process removes its temporary file")
    except OSError as error:
        # The user knows the name that was passed, not that of a temporary file.
        if error.errno is not None and error.filename in (None, target, temporary):
            error.filename = str(path)
            del error.filename2
        raise


def _status(name: str, target: str) -> os.stat_result | None:
    """The status of the file that is to be replaced; None if there is none.

    Raises:
        OSError: it must not be replaced.
    """
    if os.path.basename(name) in ("", os.curdir):  # realpath would take "new/" for "new"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "AutoClip writes its state to regular files only")
    effective = os.access in os.supports_effective_ids
    if not os.access(target, os.W_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return old


def _write(temporary: str, target: str, old: os.stat_result | None, data: bytes) -> bool:
    """Write to a temporary file and rename it; False if another process has removed it."""
    # 0o666: the user's umask decides about a new file. Nobody gains access.
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o666
    try:
        # From the system call to the file object no line of Python runs that could be interrupted.
        with open(temporary, "xb", opener=partial(os.open, mode=mode)) as file:
            if sys.platform != "win32":
                with _errors_ignored():  # some file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if not _exists(temporary):  # removed between its creation and the lock
                raise _Removed
            file.write(data)
            file.flush()
            if old is not None:
                _keep_access(temporary, old)
            os.fsync(file.fileno())
            if sys.platform != "win32":  # while it is locked: no other process may remove it
                os.replace(temporary, target)
        if sys.platform == "win32":  # an open file cannot be renamed there
            os.replace(temporary, target)
    except BaseException as error:
        with _errors_ignored():
            os.unlink(temporary)
        if isinstance(error, _Removed):
            return False
        raise
    return True


def _exists(path: str) -> bool:
    # A function of its own: Python 3.11 does not clean up after an interrupt at a `try` inside.
    # os.path.exists takes a TimeoutError of a signal handler for a missing file.
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _keep_access(temporary: str, old: os.stat_result) -> None:
    # Mounts without owners or permissions refuse these calls, and all their files are alike.
    if sys.platform != "win32":
        with _errors_ignored():
            os.chown(temporary, old.st_uid, old.st_gid)
    with _errors_ignored():
        os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)


def _remove_abandoned(folder: str, prefix: str) -> None:
    """Remove temporary files that killed processes left of earlier attempts to write a file."""
    pattern = re.compile(rf"{re.escape(prefix)}[0-9a-f]{{16}}\.tmp")
    with _errors_ignored(), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with _errors_ignored():
                    _remove_if_abandoned(entry.path)


def _remove_if_abandoned(temporary: str) -> None:
    if sys.platform != "win32":
        opener = partial(_open_at_once, more=os.O_NOFOLLOW)
        with open(temporary, "rb", opener=opener) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # The process that writes it is alive; or this file system has no locks, or, as
                # NFS, none for files open for reading.
                if isinstance(error, BlockingIOError) or error.errno is None:
                    raise
            else:
                os.unlink(temporary)  # while it is locked, so that its writer may notice
                return
    if time.time() - os.stat(temporary).st_mtime > _ABANDONED_SECONDS:
        os.unlink(temporary)


def _sync_folder(folder: str) -> None:
    # Without it a crash of the machine can undo the rename. Windows cannot open a folder.
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = None
    with _errors_ignored():  # some network file systems do not sync folders
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _open_at_once(path: str, flags: int, more: int = 0) -> int:
    # Blocking, a pipe without a writer would hang.
    return os.open(path, flags | more | getattr(os, "O_NONBLOCK", 0))


def read_file(path: PathLike) -> bytes:
    """Read a regular file of at most `MAX_FILE_BYTES` at once.

    It is read, not mapped: a mapped file that another process cuts off meanwhile kills this one.

    Raises:
        StateError: it is a folder, a pipe or a device, too large, or begins unlike a state.
        OSError: it is not there or cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _not_regular(name)
            if status.st_size > MAX_FILE_BYTES:
                raise StateError(
                    f"{name} has {status.st_size} bytes, but a state file has at most "
                    f"{MAX_FILE_BYTES}. Load the file that save wrote."
                )
            # Before another program's file of gigabytes fills the memory.
            read_header(file, status.st_size, name)
            file.seek(0)
            return file.read(status.st_size)
    except IsADirectoryError as error:
        raise _not_regular(name) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = name
        raise


def _not_regular(name: str) -> StateError:
    return StateError(f"{name} is not a regular file. Load the file that save wrote.")
