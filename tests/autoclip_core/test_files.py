"""State files: written whole or not at all, read from regular files, errors that name the path."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoclip.core import MAX_FILE_BYTES, History, Quantile, State, StateError


def filled(norm: float = 1.0) -> History:
    history = History(1, Quantile(0.5), 10)
    history.record([norm])
    return history


def norm_in(path: Path | str) -> float:
    """The only norm in a state file."""
    history = History(1, Quantile(0.5), 10)
    history.load(path)
    return float(history.thresholds[0])


def bind(path: Path) -> None:
    """Leave a socket at `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


# -- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_holds_the_bytes_of_the_state_dict(
    kind: Callable[[Path], str], tmp_path: Path
) -> None:
    path = tmp_path / "history.safetensors"
    history = filled()
    history.save(kind(path))
    assert path.read_bytes() == history.state_dict()["data"]
    loaded = History(1, Quantile(0.5), 10)
    loaded.load(kind(path))
    assert loaded.state_dict() == history.state_dict()
    assert list(tmp_path.iterdir()) == [path]


def test_saving_and_loading_leave_no_file_open(tmp_path: Path) -> None:
    history = filled()
    before = os.listdir("/proc/self/fd")
    history.save(tmp_path / "history")
    history.load(tmp_path / "history")
    assert os.listdir("/proc/self/fd") == before


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled(2.0).save("history")
    assert norm_in("history") == 2.0


@pytest.mark.parametrize("name", ["é" * 127, "語" * 85, "x" * 255, "🙂" * 63, "a\nb", " "])
def test_a_name_as_long_as_the_file_system_allows(name: str, tmp_path: Path) -> None:
    filled(2.0).save(tmp_path / name)
    filled(3.0).save(tmp_path / name)
    assert norm_in(tmp_path / name) == 3.0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("umask")
def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    filled().save(tmp_path / "history")
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o640


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o400])
def test_an_existing_files_mode_is_kept(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "history"
    filled(1.0).save(path)
    path.chmod(mode)
    filled(2.0).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert norm_in(path) == 2.0


def test_links_are_followed_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    target, link, chain = folder / "history", tmp_path / "latest", tmp_path / "chain"
    link.symlink_to(Path("runs", "history"))
    chain.symlink_to(link)
    filled(1.0).save(chain)  # the target is not there yet
    assert norm_in(target) == 1.0
    filled(2.0).save(link)
    assert link.is_symlink() and chain.is_symlink() and not target.is_symlink()
    assert norm_in(target) == norm_in(link) == norm_in(chain) == 2.0
    assert list(folder.iterdir()) == [target]


def test_another_name_of_the_same_file_keeps_the_old_contents(tmp_path: Path) -> None:
    """A snapshot made by a hard link stays what it was: the file is replaced, not written into."""
    path, snapshot = tmp_path / "history", tmp_path / "snapshot"
    filled(1.0).save(path)
    snapshot.hardlink_to(path)
    filled(2.0).save(path)
    assert norm_in(snapshot) == 1.0


def test_a_missing_folder_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "history"
    with pytest.raises(FileNotFoundError) as caught:
        filled().save(path)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    path = tmp_path / "link" / "history"
    with pytest.raises(NotADirectoryError) as caught:
        filled().save(path)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("target", ["folder", "pipe", "/dev/null", "/dev/full", "socket", "/"])
def test_what_is_no_regular_file_is_not_written(target: str, tmp_path: Path) -> None:
    path = tmp_path / target
    if target == "folder":
        path.mkdir()
    elif target == "pipe":
        os.mkfifo(path)
    elif target == "socket":
        bind(path)
    before = path.stat()
    with pytest.raises(OSError, match="regular files only") as caught:
        filled().save(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
    assert path.stat().st_ino == before.st_ino
    assert len(list(tmp_path.iterdir())) == (
        0 if path.is_relative_to("/dev") or target == "/" else 1
    )


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(existing: bool, tmp_path: Path) -> None:
    """The disk is a limit on the size of files, in a process that can keep it."""
    path = tmp_path / "history"
    if existing:
        filled(1.0).save(path)
    code = """
import resource, signal, sys
from autoclip.core import History, Quantile

history = History(1, Quantile(0.5), 100_000)
history.write([0], [[2.0] * 100_000], [100_000])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    history.save(sys.argv[1])
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{errno.EFBIG} {path}"
    if existing:
        assert norm_in(path) == 1.0
    assert list(tmp_path.iterdir()) == ([path] if existing else [])


def test_a_state_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "history"
    filled(1.0).save(path)
    broken = filled(2.0)
    broken._windows.recorded[0] = 0
    with pytest.raises(StateError, match="the state to be saved"):
        broken.save(path)
    assert norm_in(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]


WRITE_FOR_EVER = """
import itertools, sys
import numpy as np
from autoclip.core import History, Quantile

histories = [History(1, Quantile(0.5), 500_000) for _ in range(2)]
for norm, history in enumerate(histories, start=1):
    history.write([0], [np.full(500_000, norm, np.float32)], [500_000])
for history in itertools.cycle(histories):
    history.save(sys.argv[1])
    print("saved", flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_a_complete_state(tmp_path: Path) -> None:
    path = tmp_path / "history"
    moments = random.Random(0)
    for _ in range(10):
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        (window,) = State.from_bytes(path.read_bytes()).groups[0].windows()
        assert len(window) == 500_000
        assert set(window.tolist()) in ({1.0}, {2.0})  # one or the other, never some of each


# -- reading -----------------------------------------------------------------------------------


def test_a_missing_file_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "history"
    with pytest.raises(FileNotFoundError) as caught:
        filled().load(path)
    assert str(caught.value.filename) == str(path)


@pytest.mark.parametrize("target", ["folder", "pipe", "/dev/zero", "/dev/null"])
def test_what_is_no_regular_file_is_refused_without_waiting(target: str, tmp_path: Path) -> None:
    path = tmp_path / target
    if target == "folder":
        path.mkdir()
    elif target == "pipe":
        os.mkfifo(path)
    history = filled(4.0)
    before, descriptors = history.state_dict(), os.listdir("/proc/self/fd")
    with pytest.raises(StateError, match=f"^{path} is not a regular file"):
        history.load(path)
    assert history.state_dict() == before
    assert os.listdir("/proc/self/fd") == descriptors


def test_an_unreadable_file_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    bind(tmp_path / "socket")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "socket", tmp_path / "loop", tmp_path / "socket" / "below"):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            filled().load(path)
        assert str(caught.value.filename) == str(path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "history"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: it takes no space
    says = f"^{path} has 2147483649 bytes; a state file has at most 2147483648"
    with pytest.raises(StateError, match=says):
        filled().load(path)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """As much as the file has, not as much as a file may have."""
    filled().save(tmp_path / "history")
    history = filled()
    tracemalloc.start()
    history.load(tmp_path / "history")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04", bytes(range(256)) * 2])
def test_another_file_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    history = filled(4.0)
    before = history.state_dict()
    with pytest.raises(StateError, match=f"^{path} is "):
        history.load(str(path))
    assert history.state_dict() == before
