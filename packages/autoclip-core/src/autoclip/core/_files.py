"""Reading and writing state files: a crash leaves the old file or the new one, never half."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Union

from autoclip.core._errors import StateError
from autoclip.core._safetensors import (
    MAX_FILE_BYTES,
    check_beginning,
    check_header,
    header_end,
)

if sys.platform != "win32":
    import fcntl

__all__ = ["MAX_FILE_BYTES", "PathLike", "read_file", "write_file"]

PathLike = Union[str, "os.PathLike[str]"]

_ABANDONED_SECONDS = 3600.0


def write_file(path: PathLike, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all.

    The bytes go to a temporary file beside the target, are synced to the disk, and take the
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
    try:
        _write(os.fspath(path), data)
    except OSError as error:
        # The user knows the name that was passed, not that of a temporary file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: str, data: bytes) -> None:
    if os.path.basename(path) in ("", os.curdir):  # realpath would take "new/" for "new"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    target = Path(os.path.realpath(path))
    try:
        old: os.stat_result | None = target.stat()
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "AutoClip writes its state to regular files only")
    effective = os.access in os.supports_effective_ids
    if old is not None and not os.access(target, os.W_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    _remove_abandoned(target)
    temporary, descriptor = _create_temporary(target, old)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if old is not None:
                _keep_access(temporary, old)
            os.fsync(file.fileno())
            if sys.platform != "win32":  # while it is locked: no other process may remove it
                os.replace(temporary, target)
        if sys.platform == "win32":  # an open file cannot be renamed there
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def _create_temporary(target: Path, old: os.stat_result | None) -> tuple[Path, int]:
    """A new locked file beside `target`, which is not readable by more users than the old one."""
    # 0o666: the user's umask decides about a new file.
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o666
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, flags, mode)
        if sys.platform != "win32":
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process may have removed the file between its creation and the lock.
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _stem(target: Path) -> str:
    # A name has at most 255 bytes, and a character up to four of them.
    return target.name[:50]


def _keep_access(temporary: Path, old: os.stat_result) -> None:
    # Mounts without owners or permissions refuse these calls, and all their files are alike.
    if sys.platform != "win32":
        with suppress(OSError):
            os.chown(temporary, old.st_uid, old.st_gid)
    with suppress(OSError):
        os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)


def _remove_abandoned(target: Path) -> None:
    """Remove what processes that were killed left of earlier attempts to write `target`."""
    pattern = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{16}}\.tmp", re.DOTALL)
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_abandoned(entry.path)


def _remove_if_abandoned(temporary: str) -> None:
    if sys.platform != "win32":
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the process that writes it is alive
        except OSError:
            pass  # this file system has no locks, or, as NFS, none for what is open for reading
        else:
            os.unlink(temporary)  # while it is locked, so that a writer that just made it notices
            return
        finally:
            os.close(descriptor)
    if time.time() - os.stat(temporary).st_mtime > _ABANDONED_SECONDS:
        os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    # Without it a crash of the machine can undo the rename. Windows cannot open a folder.
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems do not sync folders
    finally:
        os.close(descriptor)


def read_file(path: PathLike) -> bytes:
    """Read a regular file of at most `MAX_FILE_BYTES` at once.

    It is read, not mapped: a mapped file that another process cuts off meanwhile kills this one.

    Raises:
        StateError: it is a folder, a pipe or a device, too large, or begins unlike a state.
        OSError: it is not there or cannot be read.
    """
    # Opened without blocking: a pipe without a writer would hang here for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(
                f"{os.fspath(path)} is not a regular file. Load the file that save wrote."
            )
        if status.st_size > MAX_FILE_BYTES:
            raise StateError(
                f"{os.fspath(path)} has {status.st_size} bytes, but a state file has at most "
                f"{MAX_FILE_BYTES}. Load the file that save wrote."
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            # Before another program's file of gigabytes fills the memory.
            beginning = file.read(9)
            check_beginning(beginning, status.st_size, os.fspath(path))
            file.seek(0)
            check_header(file.read(header_end(beginning)), os.fspath(path))
            file.seek(0)
            return file.read(status.st_size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)
