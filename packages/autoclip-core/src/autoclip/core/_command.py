"""The command `autoclip`: show, plot and check histories of gradient norms in files.

It uses argparse rather than click or typer so that autoclip-core depends on NumPy alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import NoReturn

from autoclip.core._diagnostics import CANDIDATES, summarize
from autoclip.core._errors import StateError
from autoclip.core._reading import read_states
from autoclip.core._state import State
from autoclip.core._version import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = "autoclip.commands"
"""The entry point group of further commands.

An entry point is named after its command. It is a function that takes the command's
`argparse.ArgumentParser`, adds arguments to it, and sets `run=`, a function of the parsed arguments
that returns the exit code. It raises `StateError` for a file that is wrong.
"""

_KINDS = ("overview", "norms", "distribution", "clipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `autoclip`.

    Args:
        arguments: None for those of the process.

    Returns:
        The exit code: 0 for success, 1 for a file that is damaged or holds no history, 2 if the
        command could not run: a file that is not there, a missing package, wrong arguments.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        chosen = _parser(given).parse_args(given)
        code: int = chosen.run(chosen)
        sys.stdout.flush()
    except StateError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough. Python must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(what, 2)
    except (ImportError, KeyError, ValueError) as error:
        return _fail(str(error.args[0] if error.args else error), 2)
    return code


def _fail(message: str, code: int) -> int:
    print(f"autoclip: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, as every other error of the command.
        self.exit(2, f"{self.prog}: {message}. See: {self.prog} -h\n")


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="autoclip",
        description="Look at histories of gradient norms.",
        epilog="FILE is a state file that `clipper.save` wrote, or any checkpoint with a history "
        "that an installed package reads: a PyTorch checkpoint, a folder of the Hugging Face "
        "Trainer or of Lightning (autoclip-torch), a .keras or .h5 file (autoclip-tf).",
    )
    parser.add_argument("--version", action="version", version=f"autoclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = _add(commands, "show", "print settings, rows, thresholds and shares clipped", _show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument("--all", action="store_true", help="print all rows, not only 30")

    plot = _add(commands, "plot", "draw a picture (needs autoclip-core[plot])", _plot)
    plot.add_argument("-o", "--output", required=True, help="the picture: .png, .pdf or .svg")
    plot.add_argument("--kind", choices=_KINDS, default="overview", help="default: %(default)s")
    plot.add_argument("--row", help="the parameter; default: the one that is clipped hardest")
    plot.add_argument(
        "--quantiles",
        type=_quantiles,
        default=CANDIDATES,
        metavar="Q,Q",
        help="the quantiles to mark; default: " + ",".join(f"{q:g}" for q in CANDIDATES),
    )

    check = _add(commands, "check", "check that files hold an undamaged history", _check)
    check.add_argument("--json", action="store_true", help="print JSON")

    for extra in sorted(entry_points(group=COMMANDS), key=lambda each: each.name):
        package = extra.dist.name if extra.dist is not None else extra.value
        added = commands.add_parser(extra.name, help=f"of {package}: see autoclip {extra.name} -h")
        if given and given[0] == extra.name:  # to load it may import a framework
            extra.load()(added)
    return parser


def _add(commands: object, name: str, text: str, run: object) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(  # type: ignore[attr-defined]
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    many = "+" if name == "check" else None
    parser.add_argument("file", nargs=many, metavar="FILE", help="a file or folder with a history")
    if name != "check":
        parser.add_argument(
            "--history", metavar="PLACE", help="which one, if the file holds several"
        )
    parser.set_defaults(run=run)
    return parser


def _quantiles(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0.0 <= value <= 1.0 for value in values):
        raise argparse.ArgumentTypeError("quantiles lie between 0 and 1")
    return values


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Keep frameworks, which write to the file descriptor while they load, from being heard."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read(name: str) -> dict[str, State]:
    with _no_stderr():
        return read_states(name)


def _chosen_states(arguments: argparse.Namespace) -> dict[str, State]:
    states = _read(arguments.file)
    if arguments.history is None:
        return states
    if arguments.history not in states:
        raise StateError(
            f"{arguments.file} has no history at {arguments.history!r}. It has "
            f"{', '.join(map(repr, states))}."
        )
    return {arguments.history: states[arguments.history]}


def _show(arguments: argparse.Namespace) -> int:
    states = _chosen_states(arguments)
    summaries = {place: summarize(state) for place, state in states.items()}
    if arguments.json:
        print(json.dumps({place: each.to_dict() for place, each in summaries.items()}, indent=2))
        return 0
    for i, (place, summary) in enumerate(summaries.items()):
        print("\n" * (i > 0) + arguments.file + (f" at {place}" if place else ""))
        print(summary.describe(max_rows=None if arguments.all else 30))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from autoclip.core import plot

    states = _chosen_states(arguments)
    if len(states) > 1:
        raise ValueError(
            f"{arguments.file} holds {len(states)} histories. Choose one with --history: "
            f"{', '.join(states)}."
        )
    plot.use_files_only()
    [state] = states.values()
    if arguments.kind == "clipped":
        figure = plot.clipped(state)
    elif arguments.kind == "norms":
        figure = plot.norms(state, arguments.row)
    else:
        draw = plot.overview if arguments.kind == "overview" else plot.distribution
        figure = draw(state, arguments.row, quantiles=arguments.quantiles)
    figure.savefig(arguments.output, dpi=150)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    results = {name: _checked(name) for name in arguments.file}
    if arguments.json:
        print(json.dumps(results, indent=2))
    for name, result in results.items():
        if not result["ok"]:
            _fail(str(result["error"]), 1)
        elif not arguments.json:
            print(f"{name}: ok, {result['rows']} rows")
    return 0 if all(result["ok"] for result in results.values()) else 1


def _checked(name: str) -> dict[str, object]:
    try:
        states = _read(name)
    except (StateError, OSError) as error:
        return {"ok": False, "error": " ".join(str(error).split())}
    rows = sum(len(group.lengths) for each in states.values() for group in each.groups)
    return {"ok": True, "histories": len(states), "rows": rows}
