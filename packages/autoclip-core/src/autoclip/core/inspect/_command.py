"""The command `autoclip`: show, plot and check histories of gradient norms in files.

It uses argparse rather than click or typer, which would be a dependency of autoclip-core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from typing import Any, NoReturn

from autoclip.core._errors import StateError
from autoclip.core._state.state import State
from autoclip.core._version import __version__
from autoclip.core.inspect._reading import find_states
from autoclip.core.inspect._summary import CANDIDATES, summarize
from autoclip.core.inspect._text import printable

COMMANDS = "autoclip.commands"
"""The entry point group of further commands.

An entry point is named after its command. It is a function that takes the command's
`argparse.ArgumentParser`, adds arguments to it, and sets `run=`, a function of the parsed arguments
that returns the exit code. It raises `StateError` for a file that is wrong.
"""

# Commands of the other packages: who has them, and their purpose, which loading them would tell
# only after a framework is imported.
_ELSEWHERE = {
    "convert": (
        "autoclip-torch",
        "write the history in an autoclip 0.2.1 checkpoint to a file",
    )
}
# The functions of `plot`, and the arguments that they take from the command.
_KINDS = {
    "overview": ("row", "quantiles"),
    "norms": ("row",),
    "distribution": ("row", "quantiles"),
    "clipped": (),
}

# A shell's status for a program that a signal ended: 128 and the signal's number.
_INTERRUPTED = 128 + 2
_CLOSED_PIPE = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `autoclip`.

    Args:
        arguments: None for those of the process.

    Returns:
        The exit code: 0 for success, 1 for a file that is damaged or holds no history, 2 if the
        command could not run: a file that is not there, a missing package, wrong arguments. As
        shells report it, 130 after Ctrl-C and 141 after the reader of a pipe has closed it.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _escaping(sys.stdout), _escaping(sys.stderr):
            return _run(given)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return _CLOSED_PIPE
    finally:
        _discard_unwritten()


def _discard_unwritten() -> None:
    """Discard output that cannot be written: a closed pipe, a full disk.

    Python would try to write it again at exit, report the failure, and exit with 120.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, AttributeError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(given: Sequence[str]) -> int:
    try:
        chosen = _parser(given).parse_args(given)
        code: int = chosen.run(chosen)
        if sys.stdout is not None:  # as it is if the process was started with it closed
            sys.stdout.flush()
    except StateError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(_message(error), 2)
    except MemoryError:
        return _fail("There is not enough memory.", 2)
    except (ImportError, KeyError, ValueError) as error:
        return _fail(str(error.args[0] if error.args else error), 2)
    return code


@contextmanager
def _escaping(stream: Any) -> Iterator[None]:
    """Print characters that the terminal's encoding does not have as escape sequences."""
    old = getattr(stream, "errors", None)
    if old is None or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):  # it flushes
            stream.reconfigure(errors=old)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str, code: int) -> int:
    print(f"autoclip: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, as every other error of the command.
        line = printable(f"{self.prog}: {message}. See: {self.prog} -h")
        self.exit(2, f"{line}\n")


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="autoclip",
        description="Look at histories of gradient norms.",
        epilog="FILE is a state file that `clipper.save` wrote, or any checkpoint with a history "
        "that an installed package reads: a PyTorch checkpoint, a folder of the Hugging Face "
        "Trainer or of Lightning (autoclip-torch), a .keras or .h5 file (autoclip-tf). Of a folder "
        "with several, the newest is read.",
    )
    parser.add_argument("--version", action="version", version=f"autoclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = _add(commands, "show", "print settings, rows, thresholds and shares clipped", _show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument("--all", action="store_true", help="print all rows, not only 30")

    plot = _add(commands, "plot", "draw a plot (needs autoclip-core[plot])", _plot)
    plot.add_argument("-o", "--output", required=True, help="the plot: .png, .pdf or .svg")
    plot.add_argument("--kind", choices=_KINDS, default="overview", help="default: %(default)s")
    plot.add_argument(
        "--row",
        help="the parameter: its name, a part that no other name has, or its number; default: the "
        "one that is clipped hardest",
    )
    plot.add_argument(
        "--quantiles",
        type=_quantiles,
        default=CANDIDATES,
        metavar="Q,Q",
        help="the quantiles to mark; default: " + ",".join(f"{q:g}" for q in CANDIDATES),
    )

    check = _add(commands, "check", "check that files hold an undamaged history", _check)
    check.add_argument("--json", action="store_true", help="print JSON")

    extras = {each.name: each for each in entry_points(group=COMMANDS)}
    for name in sorted({*extras, *_ELSEWHERE} - {"show", "plot", "check"}):
        package, purpose = _ELSEWHERE.get(name, ("", ""))
        if name in extras:
            found = extras[name]
            package = found.dist.name if found.dist is not None else found.value
            purpose = purpose or f"of {package}: see autoclip {name} -h"
        else:
            purpose += f" (needs {package})"
        added = commands.add_parser(name, help=purpose, description=_sentence(purpose))
        if given and given[0] == name:
            if name in extras:
                extras[name].load()(added)  # this may import a framework
            else:
                added.add_argument("arguments", nargs=argparse.REMAINDER)
                added.set_defaults(run=_missing(name, package))
    return parser


def _missing(name: str, package: str) -> Any:
    def run(arguments: argparse.Namespace) -> int:
        raise ImportError(f"{name} comes with {package}. Install it with: pip install {package}")

    return run


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add(commands: Any, name: str, text: str, run: object) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=_sentence(text)
    )
    many = "+" if name == "check" else None
    parser.add_argument("file", nargs=many, metavar="FILE", help="a file or folder with a history")
    if name != "check":
        parser.add_argument(
            "--history", metavar="PATH", help="its path in the file, if that holds several"
        )
    parser.set_defaults(run=run)
    return parser


def _quantiles(text: str) -> tuple[float, ...]:
    with suppress(ValueError):
        values = tuple(float(part) for part in text.split(","))
        if all(0.0 <= value <= 1.0 for value in values):
            return values
    raise argparse.ArgumentTypeError(f"must be numbers from 0 to 1, as in 0.5,0.9, got {text!r}")


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Silence frameworks, which write to the file descriptor while they load."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read(name: str) -> tuple[str, dict[str, State]]:
    with _no_stderr():
        return find_states(name)


def _chosen_states(arguments: argparse.Namespace) -> tuple[str, dict[str, State]]:
    file, states = _read(arguments.file)
    if arguments.history is None:
        return file, states
    if arguments.history not in states:
        raise StateError(
            f"{file} has no history at {arguments.history!r}. It has "
            f"{', '.join(map(repr, states))}."
        )
    return file, {arguments.history: states[arguments.history]}


def _show(arguments: argparse.Namespace) -> int:
    file, states = _chosen_states(arguments)
    summaries = {path: summarize(state) for path, state in states.items()}
    if arguments.json:
        found = {path: {"file": file, **each.to_dict()} for path, each in summaries.items()}
        print(json.dumps(found, indent=2))
        return 0
    width = shutil.get_terminal_size().columns
    for i, (path, summary) in enumerate(summaries.items()):
        print("\n" * (i > 0) + printable(file + (f" at {path}" if path else "")))
        print(summary.describe(None if arguments.all else 30, width))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from autoclip.core.inspect import plot

    file, states = _chosen_states(arguments)
    if len(states) > 1:
        raise ValueError(
            f"{file} holds {len(states)} histories. Choose one with --history: {', '.join(states)}."
        )
    plot.use_files_only()
    [state] = states.values()
    with warnings.catch_warnings():
        # Of characters that matplotlib's font does not have.
        warnings.simplefilter("ignore", UserWarning)
        options = {name: getattr(arguments, name) for name in _KINDS[arguments.kind]}
        figure = getattr(plot, arguments.kind)(state, **options)
        figure.savefig(arguments.output, dpi=150)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    results, codes = {}, [0]
    for name in dict.fromkeys(arguments.file):
        results[name], code = _checked(name)
        codes.append(code)
    if arguments.json:
        print(json.dumps(results, indent=2))
    for name, result in results.items():
        if not result["ok"]:
            _fail(str(result["error"]), 1)
        elif not arguments.json:
            rows = result["rows"]
            print(printable(f"{name}: ok, {rows} row{'s' * (rows != 1)}"))
    return max(codes)


def _checked(name: str) -> tuple[dict[str, object], int]:
    """The result for a file, and the exit code that it calls for."""
    try:
        _, states = _read(name)
    except StateError as error:
        return {"ok": False, "error": str(error)}, 1
    except (OSError, ImportError) as error:
        return {"ok": False, "error": _message(error)}, 2
    rows = sum(len(group.lengths) for each in states.values() for group in each.groups)
    return {"ok": True, "histories": len(states), "rows": rows}, 0
