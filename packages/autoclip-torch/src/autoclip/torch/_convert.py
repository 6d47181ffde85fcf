"""The command `autoclip convert`: checkpoints of autoclip 0.2.1 as state files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from autoclip.core import Quantile, Standard, State, StateError
from autoclip.core.adapter import GroupSettings, write_file
from autoclip.torch import _legacy
from autoclip.torch._reading import legacy_histories, load_file

__all__ = ["add_arguments", "convert"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; the command `autoclip` calls this."""
    parser.description = (
        "Write the history in a checkpoint of autoclip 0.2.1 to a state file, for clipper.load."
    )
    parser.add_argument(
        "old",
        metavar="OLD",
        help="what torch.save wrote: a clipper's state_dict, or a checkpoint with one in it",
    )
    parser.add_argument("new", metavar="NEW", help="the state file to write")
    parser.add_argument("--history", metavar="PLACE", help="which one, if OLD holds several")
    parser.add_argument(
        "--group-sizes",
        type=lambda text: [int(part) for part in text.split(",")],
        metavar="N,N",
        help="how many parameters each parameter group of the optimizer has: 0.2.1 put those of "
        "all groups into one",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    found = legacy_histories(load_file(arguments.old))
    if arguments.history is not None:
        found = {place: each for place, each in found.items() if place == arguments.history}
    if not found:
        where = "" if arguments.history is None else f" at {arguments.history!r}"
        raise StateError(f"{arguments.old} holds no history of autoclip 0.2.1{where}.")
    if len(found) > 1:
        raise ValueError(
            f"{arguments.old} holds {len(found)} histories. Choose one with --history: "
            f"{', '.join(found)}."
        )
    [saved] = found.values()
    state = convert(saved, arguments.group_sizes)
    write_file(arguments.new, state.to_bytes())
    rows = sum(len(group.lengths) for group in state.groups)
    print(f"{arguments.new}: rule {state.rule}, mode {state.mode}, {rows} rows")
    return 0


def convert(saved: Mapping[str, Any], group_sizes: list[int] | None = None) -> State:
    """Make a state from what a clipper of autoclip 0.2.1 returned from `state_dict()`.

    Its settings are those of a clipper that compares each norm with the ones before it, as 0.2.1
    did: load it with `include_current=False`.

    Args:
        saved: the state_dict.
        group_sizes: how many parameters each group has; None for the groups that it has.

    Raises:
        StateError: it has another layout, or no history.
        ValueError: the sizes do not add up to its number of parameters.
    """
    groups = saved["param_groups"]
    if not saved["state"]:
        raise StateError("The clipper of autoclip 0.2.1 had recorded nothing: no history to keep.")
    sizes = [len(group["params"]) for group in groups]
    if group_sizes is not None:
        if len(groups) != 1 or sum(group_sizes) != sum(sizes):
            raise ValueError(
                f"--group-sizes divides one group, but {group_sizes} does not divide groups of "
                f"{sizes} parameters."
            )
        sizes = group_sizes
    rule = Quantile() if "quantile" in groups[0] else Standard()
    return _legacy.read(saved, "parameter", [GroupSettings(rule, include_current=False)], sizes)
