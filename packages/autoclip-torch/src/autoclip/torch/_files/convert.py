"""The command `autoclip convert`: checkpoints of autoclip 0.2.1 as state files."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress

from autoclip.core import StateError
from autoclip.core.adapter import write_file
from autoclip.torch._files import legacy
from autoclip.torch._files.checkpoint_file import open_checkpoint
from autoclip.torch._files.reading import legacy_clippers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; the command `autoclip` calls this."""
    parser.add_argument(
        "old",
        metavar="OLD",
        help="a file of torch.save: a clipper's state_dict, or a checkpoint with one in it",
    )
    parser.add_argument("new", metavar="NEW", help="the state file to write, for clipper.load")
    parser.add_argument("--history", metavar="PATH", help="its path in OLD, if that holds several")
    parser.add_argument(
        "--group-sizes",
        type=_sizes,
        metavar="N,N",
        help="how many parameters each parameter group of the optimizer has: 0.2.1 put those of "
        "all groups into one",
    )
    parser.set_defaults(run=_run)


def _sizes(text: str) -> list[int]:
    with suppress(ValueError):
        sizes = [int(part) for part in text.split(",")]
        if min(sizes) >= 0:
            return sizes
    raise argparse.ArgumentTypeError(f"must be ints ≥ 0, as in 10,4, got {text!r}")


def _run(arguments: argparse.Namespace) -> int:
    with open_checkpoint(arguments.old) as file:
        found = legacy_clippers(file)
        if arguments.history is not None:
            found = {path: each for path, each in found.items() if path == arguments.history}
        if not found:
            where = "" if arguments.history is None else f" at {arguments.history!r}"
            raise StateError(f"{arguments.old} holds no history of autoclip 0.2.1{where}.")
        if len(found) > 1:
            raise ValueError(
                f"{arguments.old} holds {len(found)} histories. Choose one with --history: "
                f"{', '.join(found)}."
            )
        [saved] = found.values()
        try:
            state = legacy.convert(saved, file.tensor, arguments.group_sizes)
        except StateError as error:
            raise StateError(f"{arguments.old}: {error}") from error
    if os.path.exists(arguments.new) and os.path.samefile(arguments.old, arguments.new):
        raise ValueError(f"{arguments.new} is OLD itself, which may hold more. Name another file.")
    write_file(arguments.new, state.to_bytes())
    rows = sum(len(group.lengths) for group in state.groups)
    print(f"{arguments.new}: rule {state.rule}, mode {state.mode}, {rows} row{'s' * (rows != 1)}")
    return 0
