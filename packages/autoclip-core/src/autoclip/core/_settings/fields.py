"""Settings as dataclass fields, each declared with its default and its check.

A wrong type raises TypeError and a wrong value ValueError, with the same message in every package.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

_KEY = "autoclip"


_COMPARE = {"≥": operator.ge, ">": operator.gt, "≤": operator.le, "<": operator.lt}
_NUMBERS: dict[type, type] = {float: Real, int: Integral}


@dataclasses.dataclass(frozen=True)
class _Limits:
    """The values that a setting may have: of a type, within bounds, or one of some words."""

    kind: type
    optional: bool = False
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] = ()

    @property
    def takes(self) -> str:
        """The values that a setting may have, in words."""
        if self.choices:
            text = "one of " + ", ".join(f'"{word}"' for word in self.choices)
        elif self.kind is bool:
            text = "True or False"
        else:
            text = self._number()
        return f"{text} or None" if self.optional else text

    def _number(self) -> str:
        if self.kind is float and len(self.bounds) == 2:
            low, high = self.bounds.values()
            opening = "[" if "≥" in self.bounds else "("
            closing = "]" if "≤" in self.bounds else ")"
            return f"a real number in {opening}{low:g}, {high:g}{closing}"
        noun = "an int" if self.kind is int else "a finite real number"
        limits = " and ".join(f"{sign} {_short(limit)}" for sign, limit in self.bounds.items())
        return f"{noun} {limits}".rstrip()

    def check(self, name: str, value: Any) -> Any:
        """Return `value` in the setting's own type, or raise TypeError or ValueError."""
        if value is None and self.optional:
            return None
        if self.kind in _NUMBERS:
            value = _plain_number(value)
        number: Any = value if type(value) is self.kind else self._converted(name, value)
        fits = all(_COMPARE[sign](number, limit) for sign, limit in self.bounds.items())
        if self.kind is float:
            fits = fits and math.isfinite(number)
        if not fits or (self.choices and number not in self.choices):
            raise ValueError(f"{name} must be {self.takes}, but got {value!r:.200}.")
        return number

    def _converted(self, name: str, value: Any) -> Any:
        # bool is an int to Python, and True for a number is almost certainly a mistake.
        if isinstance(value, bool) or not isinstance(value, _NUMBERS.get(self.kind, self.kind)):
            raise TypeError(
                f"{name} must be {self.takes}, but got {value!r:.200} of type "
                f"{type(value).__name__}."
            )
        try:
            return self.kind(value)
        except OverflowError:  # an int or a Fraction beyond float64, so outside every range
            return math.inf


def _short(limit: float) -> str:
    power = int(limit).bit_length() - 1
    return f"2**{power}" if power >= 32 and limit == 2**power else f"{limit:g}"


def _plain_number(value: Any) -> Any:
    # autoclip 0.2.1 took its quantile as a 0-d tensor; a 0-d NumPy array is as unambiguous.
    is_array = getattr(value, "shape", None) == () and not isinstance(value, Real)
    return value.item() if is_array and hasattr(value, "item") else value


def setting(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Iterable[str] = (),
    kind: type | None = None,
) -> Any:
    """A field of a rule: its default and its limits.

    Args:
        default: the value where none is given. Its type is the setting's: a float takes real
            numbers, an int integers, a bool flags, a str one of `choices`. None makes the setting
            optional.
        gt: a number must be greater than this. Numbers are always finite.
        ge: a number must be at least this.
        lt: a number must be less than this.
        le: a number must be at most this.
        choices: the words that a str setting takes.
        kind: the type where `default` is None; float if it is not given.

    Returns:
        A dataclass field.

    >>> from dataclasses import dataclass
    >>> from autoclip.core import Rule, setting
    >>> @dataclass(frozen=True)
    ... class Median(Rule):
    ...     factor: float = setting(2.0, gt=0)
    ...
    ...     @staticmethod
    ...     def threshold(window, factor):
    ...         return factor * window.quantile(0.5)
    >>> Median(factor=-1)
    Traceback (most recent call last):
    ...
    ValueError: factor must be a finite real number > 0, but got -1.
    """
    of = kind or (float if default is None else type(default))
    given = {"≥": ge, ">": gt, "≤": le, "<": lt}
    bounds = {sign: limit for sign, limit in given.items() if limit is not None}
    limits = _Limits(of, default is None, bounds, tuple(choices))
    return dataclasses.field(default=default, metadata={_KEY: limits})


def check_fields(instance: Any) -> None:
    """Check the fields of a frozen dataclass that `setting` made, and store them in their types.

    Raises:
        TypeError, ValueError: a field has a wrong type or value.
    """
    for field in dataclasses.fields(instance):
        limits = field.metadata.get(_KEY)
        if limits is not None:
            value = limits.check(field.name, getattr(instance, field.name))
            object.__setattr__(instance, field.name, value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is a bool.

    Raises:
        TypeError: it is anything else; a number given by position would otherwise pass as a flag.
    """
    flag: bool = _Limits(bool).check(name, value)
    return flag


def check_known_settings(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse unknown settings; a misspelled one would otherwise be ignored.

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
            f"{', '.join(map(repr, unknown)):.200}. It takes {', '.join(map(repr, known))}."
        )
