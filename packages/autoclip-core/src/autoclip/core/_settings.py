"""The settings of a clipper: their defaults, and the one place that checks them.

Both frameworks call these functions, so a wrong value is refused with the same words everywhere:
TypeError for a wrong type, ValueError for a wrong value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

__all__ = [
    "DEFAULT_DEVIATIONS",
    "DEFAULT_HISTORY_LENGTH",
    "DEFAULT_QUANTILE",
    "OnNonfinite",
    "check_deviations",
    "check_flag",
    "check_group_settings",
    "check_history_length",
    "check_known_settings",
    "check_on_nonfinite",
    "check_quantile",
]

OnNonfinite = Literal["keep", "zero", "raise"]

DEFAULT_QUANTILE = 0.9
DEFAULT_DEVIATIONS = 2.0
DEFAULT_HISTORY_LENGTH = 1000


def _check_real(name: str, value: Any, takes: str) -> float:
    # bool is a Real to Python, and True for a quantile is a slip of the hand.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} takes {takes}, but got {value!r} of type {type(value).__name__}.")
    try:
        return float(value)
    except OverflowError:  # an int or a Fraction beyond float64, so outside every range
        return math.nan


def check_quantile(value: Any) -> float:
    """Return `value` as a float if it is a quantile, a real number in [0, 1].

    Raises:
        TypeError: it is no real number (a bool or a string, say).
        ValueError: it is NaN or lies outside [0, 1].

    >>> check_quantile(1)
    1.0
    """
    takes = "a real number in [0, 1]"
    quantile = _check_real("quantile", value, takes)
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile takes {takes}, but got {value!r}.")
    return quantile


def check_deviations(value: Any) -> float:
    """Return `value` as a float if it is a number of standard deviations, finite and ≥ 0.

    Raises:
        TypeError: it is no real number.
        ValueError: it is negative, NaN or infinite.
    """
    takes = "a finite real number ≥ 0"
    deviations = _check_real("deviations", value, takes)
    if not (math.isfinite(deviations) and deviations >= 0.0):
        raise ValueError(f"deviations takes {takes}, but got {value!r}.")
    return deviations


def check_history_length(value: Any) -> int:
    """Return `value` as an int if it is a number of norms to keep, an integer ≥ 1.

    Raises:
        TypeError: it is no integer (a float is refused, even a whole one).
        ValueError: it is smaller than 1, or no int64.
    """
    takes = "an int ≥ 1 and < 2**63"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"history_length takes {takes}, but got {value!r} of type {type(value).__name__}."
        )
    if not 1 <= int(value) < 2**63:
        raise ValueError(f"history_length takes {takes}, but got {value!r}.")
    return int(value)


def check_on_nonfinite(value: Any) -> OnNonfinite:
    """Return `value` if it is one of the words "keep", "zero" and "raise".

    Raises:
        TypeError: it is no string.
        ValueError: it is another string.
    """
    words = get_args(OnNonfinite)
    takes = "one of " + ", ".join(f'"{word}"' for word in words)
    if not isinstance(value, str):
        raise TypeError(
            f"on_nonfinite takes {takes}, but got {value!r} of type {type(value).__name__}."
        )
    if value not in words:
        raise ValueError(f"on_nonfinite takes {takes}, but got {value!r}.")
    return cast(OnNonfinite, value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is a bool.

    Raises:
        TypeError: it is anything else: a number given by position would otherwise pass as a flag.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} takes True or False, but got {value!r} of type {type(value).__name__}."
        )
    return value


def check_known_settings(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse settings that do not exist: a misspelt one would otherwise be ignored in silence.

    Args:
        given: the names that were given.
        known: the names that `where` takes.
        where: who was given them, for the message.

    Raises:
        ValueError: a given name is not known.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"{where} got the unknown setting{'s' if len(unknown) > 1 else ''} "
            f"{', '.join(map(repr, unknown))}. It takes {', '.join(map(repr, known))}."
        )


def check_group_settings(
    given: Iterable[str], known: Iterable[str], global_clipping: bool, clipper: str
) -> None:
    """Refuse settings that a parameter group cannot have.

    Args:
        given: the names of the settings that the group was given.
        known: the names of those that a group of this clipper takes.
        global_clipping: whether the clipper keeps one history for all groups.
        clipper: the name of its class.

    Raises:
        ValueError: a name is not known, or there is any under `global_clipping`.
    """
    given = list(given)
    check_known_settings(given, known, f"A parameter group of {clipper}")
    if global_clipping and given:
        raise ValueError(
            "With global_clipping there is one history for all parameters, so a group cannot "
            f"have settings of its own, but got {', '.join(map(repr, given))}."
        )
