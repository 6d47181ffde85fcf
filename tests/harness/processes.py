"""Runs functions of test files in new processes, forked from one that has imported a framework.

A fork takes milliseconds, where a new interpreter takes seconds to import the framework again. Each
process is as new as if it had just done so, and may hang or die without harm to other tests.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib.util
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

HARNESS = Path(__file__).parent
WHY_NO_FORK = {
    "win32": "Windows has no os.fork",
    "darwin": "macOS's frameworks crash in a forked process",
}
SECONDS = 240  # below pytest's limit; generous, for a busy machine


@dataclass(frozen=True)
class Outcome:
    """The outcome of one process.

    Attributes:
        status: 0 if the function returned, 1 if it raised, -n if signal n killed the process.
        output: what it wrote to standard output and standard error.
        error: the traceback of what it raised, or where it was when its time was over.
    """

    status: int
    output: str
    error: str

    def __str__(self) -> str:
        return f"ended with status {self.status}\n{self.error}\n{self.output[-4000:]}"


class ForkServer:
    """The process that others are forked from.

    Args:
        preload: a Python file that it imports, with a context manager
            `process(rank, count, folder, **options)`, which each forked process runs its function
            in. `folder` is one that the processes of one run share.
        python: the interpreter, and its options.
    """

    def __init__(self, preload: Path, python: tuple[str | Path, ...] = (sys.executable,)) -> None:
        if sys.platform in WHY_NO_FORK:
            import pytest  # the forked processes need none of it

            pytest.skip(WHY_NO_FORK[sys.platform])
        self._process = subprocess.Popen(
            [*python, __file__, str(preload)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        function: Callable[..., object],
        arguments: dict[str, Any],
        count: int = 1,
        **options: Any,
    ) -> list[Outcome]:
        """Run a function in new processes at once.

        Args:
            function: of a module's top level, imported in the processes from its file.
            arguments: of JSON's types, or paths, which become strings.
            count: of processes.
            options: for the context manager.

        Returns:
            The outcomes in the order of the ranks.
        """
        assert isinstance(function, FunctionType)
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "path": function.__code__.co_filename,
                "name": function.__name__,
                "arguments": arguments,
                "count": count,
                "options": options,
                "folder": folder,
            }
            self._process.stdin.write(json.dumps(request, default=str) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the server of processes has died"
            return [Outcome(*outcome) for outcome in json.loads(answer)]

    def call(self, function: Callable[..., object], **arguments: Any) -> str:
        """Run a function, which must not raise, in one new process.

        Returns:
            What it printed.
        """
        (outcome,) = self.run(function, arguments)
        assert outcome.status == 0, str(outcome)
        return outcome.output

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def execute(code: str, site_packages: str | None = None) -> None:
    """For `ForkServer.run`: run a program in a process that has imported nothing more.

    Args:
        code: of the program.
        site_packages: of another environment, in the place of the server's own.
    """
    if site_packages is not None:
        sys.path[:] = [path for path in sys.path if not path.endswith("site-packages")]
        site.addsitedir(site_packages)
    exec(code, {"__name__": "__main__"})


# -- in the server -------------------------------------------------------------------------------


@functools.cache
def code_of(path: str) -> CodeType:
    return compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)


def module_at(path: str) -> ModuleType:
    sys.path.insert(0, str(Path(path).parent))  # for what the file imports from beside it
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(code_of(path), module.__dict__)
    return module


def fork(rank: int, request: dict[str, Any], preloaded: ModuleType) -> int:
    """Start one process; it ends without the exit handlers of the server."""
    process = os.fork()
    if process:
        return process
    status = 1
    folder = Path(request["folder"])
    try:
        tempfile.tempdir = str(folder)  # which is removed, whatever the process leaves behind
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(folder / f"{rank}.output", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with open(folder / f"{rank}.error", "w") as error:
            # A process that hangs says where, a little before it is killed.
            faulthandler.dump_traceback_later(SECONDS - 5, file=error)
            try:
                warnings.filterwarnings("error", module="autoclip")
                with preloaded.process(rank, request["count"], folder, **request["options"]):
                    getattr(module_at(request["path"]), request["name"])(**request["arguments"])
                status = 0
            except BaseException:
                traceback.print_exc(file=error)
            faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def serve(request: dict[str, Any], preloaded: ModuleType) -> list[tuple[int, str, str]]:
    """Run a function in as many processes as a request asks for.

    Returns:
        What makes an `Outcome` of each.
    """
    code_of(request["path"])  # compiled once here, not in each process
    running = {fork(rank, request, preloaded): rank for rank in range(request["count"])}
    end = time.monotonic() + SECONDS
    statuses: dict[int, int] = {}
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            rank = running.pop(process)
            statuses[rank] = os.waitstatus_to_exitcode(status)
            if status:
                end = min(end, time.monotonic() + 15)  # the others can only wait for it now
        elif time.monotonic() > end:
            for process in running:
                os.kill(process, signal.SIGKILL)
            end = float("inf")
        else:
            time.sleep(0.005)

    def written(rank: int, kind: str) -> str:
        path = Path(request["folder"]) / f"{rank}.{kind}"
        return path.read_text(errors="replace") if path.exists() else ""

    return [
        (statuses[rank], written(rank, "output"), written(rank, "error"))
        for rank in range(request["count"])
    ]


if __name__ == "__main__":
    # Answers go to standard output; whatever else is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preloaded = module_at(sys.argv[1])
    # The frameworks' objects: each process would look through them, and so copy their memory.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), preloaded)), file=answers, flush=True)
    os._exit(0)  # to unload the frameworks takes seconds
