"""Errors and words that both frameworks use."""

from __future__ import annotations

from collections.abc import Sequence


class StateError(ValueError):
    """A saved state is damaged, of another kind, or does not fit the clipper that loads it.

    The message names the file (or "state_dict"), the fault and the remedy. The clipper that was
    to load the state is unchanged.
    """


class NoHistoryError(StateError):
    """A file that may be undamaged, but holds no history: it is another program's."""


def not_a_clipper_message(given: object) -> str:
    """The error for an argument that must be a clipper; users often pass the optimizer."""
    return f"clipper must be a clipper, such as optimizer.clipper, got {type(given).__name__}."


def nonfinite_message(names: Sequence[str]) -> str:
    """The error of `on_nonfinite="raise"` for the parameters called `names`."""
    return (
        f"The gradient{'s' if len(names) > 1 else ''} of {', '.join(names)} "
        f'hold{"s" if len(names) == 1 else ""} NaN or infinity, and on_nonfinite is "raise". '
        "Nothing was recorded, and nothing was scaled, in this step."
    )


def second_clipper_message(optimizer: object, clipper: object) -> str:
    """The error for an `optimizer` that has a `clipper` already."""
    return (
        f"This {type(optimizer).__name__} has a clipper already, and two would clip twice: "
        f"{clipper!r}. Detach that one first, with optimizer.clipper.detach(), or attach to a new "
        "optimizer."
    )


def attached_message(clipper: object) -> str:
    """The error for a `clipper` that is attached already."""
    return (
        f"This {type(clipper).__name__} is attached to an optimizer already. Detach it first, with "
        "clipper.detach(), or make another one and let it load the state_dict() of this one."
    )
