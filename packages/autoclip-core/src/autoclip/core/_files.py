"""Reading and writing state files: a crash leaves the old file or the new one, never half."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Union

from autoclip.core._errors import StateError

__all__ = ["MAX_FILE_BYTES", "PathLike", "read_file", "write_file"]

PathLike = Union[str, "os.PathLike[str]"]

MAX_FILE_BYTES = 2**31
"""The largest state file that is read, 2 GiB: 500 rows of a million norms each."""


def write_file(path: PathLike, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all.

    The bytes go to a temporary file beside the target, are synced to the disk, and take the
    target's place by a rename. Symbolic links are followed, and an existing file's permissions
    are kept.

    Raises:
        OSError: it cannot be written; a file that was there is as it was.
    """
    target = Path(os.path.realpath(path))
    try:
        try:
            mode: int | None = target.stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "AutoClip writes its state to regular files only")
        # A name has at most 255 bytes, and a character up to four of them.
        temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}.tmp")
        # Created with 0o666, so that the user's umask decides about a new file.
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        # The user knows the name that was passed, not that of a temporary file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    _sync_folder(target.parent)


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
        StateError: it is a folder, a pipe or a device, or it is too large.
        OSError: it is not there or cannot be read.
    """
    # Opened without blocking: a pipe without a writer would hang here for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{os.fspath(path)} is not a regular file; a state is read from one.")
        if status.st_size > MAX_FILE_BYTES:
            raise StateError(
                f"{os.fspath(path)} has {status.st_size} bytes; a state file has at most "
                f"{MAX_FILE_BYTES}."
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)
