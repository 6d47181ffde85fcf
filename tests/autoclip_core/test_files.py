"""State files: written whole or not at all, read from regular files, errors that name the path."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autoclip.core import MAX_FILE_BYTES, History, Quantile, State, StateError

fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks, owners, pipes and signals")


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


LEFT = ".history.0123456789abcdef.tmp"
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may write to; pytest's own are for one user only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o777)
        yield path
        path.chmod(0o777)


@pytest.fixture
def ordinary_user(public: Path) -> Iterator[None]:
    """Permissions bind all users but root."""
    before = os.geteuid()
    if before == 0:
        os.chown(public, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield
    os.seteuid(before)


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
    before = os.listdir("/dev/fd")
    history.save(tmp_path / "history")
    history.load(tmp_path / "history")
    assert os.listdir("/dev/fd") == before


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
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_an_existing_files_mode_is_kept(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "history"
    filled(1.0).save(path)
    path.chmod(mode)
    filled(2.0).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert norm_in(path) == 2.0


def test_saving_again_where_chmod_and_chown_are_not_permitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on mounts without owners and permissions; no file system here is one."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    path = tmp_path / "history"
    filled(1.0).save(path)
    path.chmod(0o600)
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "chown", refuse)
    filled(2.0).save(path)
    assert norm_in(path) == 2.0
    # Not readable by more users than the old file.
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@needs_root
def test_an_existing_files_owner_and_group_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "history"
    filled(1.0).save(path)
    os.chown(path, NOBODY, NOBODY)
    filled(2.0).save(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)


@pytest.mark.usefixtures("ordinary_user")
def test_a_write_protected_file_is_not_replaced(public: Path) -> None:
    path = public / "history"
    filled(1.0).save(path)
    path.chmod(0o444)
    with pytest.raises(PermissionError) as caught:
        filled(2.0).save(path)
    assert caught.value.filename == str(path)
    assert norm_in(path) == 1.0
    assert list(public.iterdir()) == [path]


@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_without_write_permission_is_an_error_that_names_the_path(public: Path) -> None:
    path = public / "history"
    filled(1.0).save(path)
    public.chmod(0o555)
    for name in ("history", "new"):
        with pytest.raises(PermissionError) as caught:
            filled(2.0).save(public / name)
        assert caught.value.filename == str(public / name)
    assert norm_in(path) == 1.0
    assert list(public.iterdir()) == [path]
    path.chmod(0o000)
    with pytest.raises(PermissionError) as caught:
        filled().load(path)
    assert str(caught.value.filename) == str(path)


@pytest.mark.parametrize("name", ["new/", "new/.", "folder/", "/", ""])
def test_the_name_of_a_folder_is_an_error_that_names_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError) as caught:
        filled().save(name)
    assert caught.value.filename == name
    assert os.listdir() == ["folder"]


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


@pytest.mark.parametrize("target", ["folder", "pipe", "/dev/null", "/dev/full", "socket"])
def test_what_is_no_regular_file_is_not_written(target: str, tmp_path: Path) -> None:
    path = tmp_path / target
    if target == "folder":
        path.mkdir()
    elif target == "pipe":
        os.mkfifo(path)
    elif target == "socket":
        bind(path)
    elif not path.exists():
        pytest.skip(f"macOS has no {target}")
    before = path.stat()
    with pytest.raises(OSError, match="regular files only") as caught:
        filled().save(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
    assert path.stat().st_ino == before.st_ino
    assert len(list(tmp_path.iterdir())) == (0 if path.is_relative_to("/dev") else 1)


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


SAVE_ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=64k none "$1"
cd "$1"
"$2" -c '
import errno, os
import numpy as np
from autoclip.core import History, Quantile

def saved(count):
    history = History(1, Quantile(0.5), 100_000)
    history.write([0], [np.full(count, 2.0, np.float32)], [count])
    history.save("history")

saved(10)
before = open("history", "rb").read()
try:
    saved(100_000)
except OSError as error:
    assert (error.errno, error.filename) == (errno.ENOSPC, "history"), error
else:
    raise AssertionError("there was room")
assert open("history", "rb").read() == before
assert os.listdir() == ["history"]
saved(20)
'
"""


def test_a_disk_without_space_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    alone = ["unshare", "--mount", "--map-root-user"]  # what it mounts goes with it
    mount = [*alone, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the permission to mount")
    command = [*alone, "sh", "-c", SAVE_ON_A_SMALL_DISK, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_state_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "history"
    filled(1.0).save(path)

    class Broken(History):
        """A backend with a bug."""

        def export_state(self) -> State:
            state = super().export_state()
            return replace(state, groups=(replace(state.groups[0], lengths=np.array([2])),))

    broken = Broken(1, Quantile(0.5), 10)
    broken.record([2.0])
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
        # Whatever the killed process left, the next save removes.
        filled(3.0).save(path)
        assert list(tmp_path.iterdir()) == [path]


# -- interrupts --------------------------------------------------------------------------------


def opened_in(folder: Path) -> list[str]:
    """The files in a folder that this process has open."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("only /proc tells the paths of open files")
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # listdir's own
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in paths if path.startswith(f"{folder}/")]


class Interrupts:
    """Raises `error` at the n-th line of Python that runs in a call."""

    def __init__(self, error: BaseException, at: int, only: str = "") -> None:
        self.error, self.left, self.only = error, at, only

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.only not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise self.error
        return self.trace

    def call(self, function: Callable[[], None]) -> bool:
        """True if the call was interrupted; it must raise just this exception then."""
        before = sys.gettrace()
        same = None
        sys.settrace(self.trace)
        try:
            function()
        except BaseException as error:
            same = error is self.error
            error.__traceback__ = None  # its frames hold what was open
        finally:
            sys.settrace(before)
        assert same is (None if self.left > 0 else True)  # neither swallowed nor replaced
        return self.left <= 0


@pytest.mark.parametrize(
    ("error", "only"),
    [
        (KeyboardInterrupt, ""),
        (MemoryError, ""),
        # An alarm's handler raises it. The standard library ignores any OSError in places.
        (TimeoutError, "autoclip"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_one(
    error: type[BaseException], only: str, existing: bool, tmp_path: Path
) -> None:
    path, history = tmp_path / "history", filled(2.0)
    old, new = filled(1.0).state_dict()["data"], history.state_dict()["data"]
    results = set()
    for at in itertools.count(1):
        path.unlink(missing_ok=True)
        if existing:
            path.write_bytes(old)
            (tmp_path / LEFT).write_bytes(b"of a killed process")
        interrupted = Interrupts(error(), at, only).call(lambda: history.save(path))
        left = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
        left.pop(LEFT, None)
        assert left in (
            [{"history": old}, {"history": new}] if existing else [{}, {"history": new}]
        )
        assert opened_in(tmp_path) == []
        results.add(left.get("history"))
        if not interrupted:
            break
    assert at > 100  # it was interrupted at as many lines
    assert results == {old if existing else None, new}


def test_an_interrupted_read_leaves_no_file_open(tmp_path: Path) -> None:
    path, history = tmp_path / "history", filled(2.0)
    history.save(path)
    before = history.state_dict()
    for at in itertools.count(1):
        if not Interrupts(KeyboardInterrupt(), at, "files").call(lambda: history.load(path)):
            break
        assert opened_in(tmp_path) == []
        assert history.state_dict() == before
    assert at > 10


def test_an_alarm_during_a_save_is_what_is_raised(tmp_path: Path) -> None:
    """A real signal, many times, at whatever moment; its handler's error comes out as it is."""

    class Over(TimeoutError):
        pass

    def stop(*_: object) -> None:
        raise Over("the time is over")

    path = tmp_path / "history"
    history = History(1, Quantile(0.5), 200_000)
    history.write([0], [[2.0] * 200_000], [200_000])
    history.save(path)
    moments, stopped = random.Random(0), 0
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(40):
            start = time.perf_counter()
            history.save(path)
            took = time.perf_counter() - start
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, took))
                history.save(path)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Over:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert [each.name for each in tmp_path.iterdir()] == ["history"]
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert stopped > 0


@pytest.mark.parametrize("vanishes", ["really", "as the file system says"])
def test_a_temporary_file_that_is_gone_again_and_again_is_an_error(
    vanishes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems count no links, so a loop until there is one would never end."""
    path = tmp_path / "history"
    filled(1.0).save(path)
    stat_of, asked = os.stat, 0

    def gone(name: object, **options: Any) -> os.stat_result:
        nonlocal asked
        if str(name).endswith(".tmp"):
            asked += 1
            if vanishes == "really":
                os.unlink(str(name))
            else:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return stat_of(name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", gone)
    with pytest.raises(OSError, match="removes its temporary file") as caught:
        filled(2.0).save(path)
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert 1 < asked < 100
    assert norm_in(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_links_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status_of = os.fstat

    def unlinked(descriptor: int) -> Any:
        status = status_of(descriptor)
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**fields | {"st_nlink": 0})

    monkeypatch.setattr(os, "fstat", unlinked)
    filled(2.0).save(tmp_path / "history")
    assert norm_in(tmp_path / "history") == 2.0
    assert len(list(tmp_path.iterdir())) == 1


# -- what a killed process leaves --------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "history"
    for name in (LEFT, ".history.fedcba9876543210.tmp"):
        (tmp_path / name).write_bytes(b"half a state")
    filled().save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    path, left = tmp_path / "history", tmp_path / LEFT
    with left.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(left, (0, 0))  # however old
        filled().save(path)
        assert sorted(tmp_path.iterdir()) == sorted([path, left])
    filled().save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_where_there_are_no_locks_it_is_removed_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path, left = tmp_path / "history", tmp_path / LEFT
    left.write_bytes(b"half a state")
    filled(2.0).save(path)
    assert norm_in(path) == 2.0
    assert left.exists()
    past = time.time() - 3700
    os.utime(left, (past, past))
    filled(3.0).save(path)
    assert norm_in(path) == 3.0
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_not_taken_for_temporary_ones(tmp_path: Path) -> None:
    path = tmp_path / "history"
    files = {
        tmp_path / name
        for name in (
            ".history.tmp",
            ".history.0123456789abcdeX.tmp",
            ".history2.0123456789abcdef.tmp",
            "history.0123456789abcdef.tmp",
            LEFT + ".bak",
        )
    }
    for file in files:
        file.write_bytes(b"mine")
    (tmp_path / ".history.1111111111111111.tmp").mkdir()
    (tmp_path / ".history.2222222222222222.tmp").symlink_to(tmp_path / ".history.tmp")
    os.mkfifo(tmp_path / ".history.3333333333333333.tmp")
    before = set(tmp_path.iterdir())
    filled().save(path)
    assert set(tmp_path.iterdir()) == before | {path}


WRITE_OFTEN = """
import sys
from autoclip.core import History, Quantile

history = History(1, Quantile(0.5), 10)
history.record([float(sys.argv[2])])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(300):
    history.save(sys.argv[1])
"""


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "history"
    filled(1.0).save(path)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_OFTEN, str(path), norm],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for norm in ("1", "2", "3")
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    while any(child.poll() is None for child in children):
        assert norm_in(path) in (1.0, 2.0, 3.0)  # at any moment one of them, whole
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


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
    before, descriptors = history.state_dict(), os.listdir("/dev/fd")
    with pytest.raises(StateError, match=f"^{path} is not a regular file"):
        history.load(path)
    assert history.state_dict() == before
    assert os.listdir("/dev/fd") == descriptors


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
    says = f"^{path} has {MAX_FILE_BYTES + 1} bytes, but a state file has at most {MAX_FILE_BYTES}"
    with pytest.raises(StateError, match=says):
        filled().load(path)


@pytest.mark.parametrize(
    ("beginning", "says"),
    [
        (b"", "Load another copy"),
        (
            b"PK\3\4",
            "If it is a checkpoint of PyTorch or Keras, load it into your optimizer or model",
        ),
        (b"\x89HDF\r\n\x1a\n", "If it is a checkpoint of PyTorch or Keras"),
        (b"\x80\x02}", "If it is a checkpoint of PyTorch or Keras"),
    ],
)
def test_another_large_file_is_refused_before_it_is_read(
    beginning: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(MAX_FILE_BYTES)  # sparse: it takes no space
    history = filled()
    tracemalloc.start()
    with pytest.raises(
        StateError, match=f"^{path} is .*not an AutoClip state: it does not begin.*{says}"
    ):
        history.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


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
