"""Settings as dataclass fields, each declared with its default and its check.

A wrong type raises TypeError and a wrong value ValueError, with the same message in every package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

__all__ = ["check_fields", "check_flag", "check_known_settings", "setting"]

_KEY = "autoclip"


@dataclasses.dataclass(frozen=True)
class _Limits:
    """The values that a setting may have."""

    kind: type
    optional: bool
    gt: float | None
    ge: float | None
    lt: float | None
    le: float | None
    choices: tuple[str, ...]

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
        low = self.ge if self.gt is None else self.gt
        high = self.le if self.lt is None else self.lt
        if self.kind is float and low is not None and high is not None:
            opening, closing = "[" if self.gt is None else "(", "]" if self.lt is None else ")"
            return f"a real number in {opening}{low:g}, {high:g}{closing}"
        limits = [
            f"{sign} {_short(limit)}"
            for sign, limit in (("≥", self.ge), (">", self.gt), ("≤", self.le), ("<", self.lt))
            if limit is not None
        ]
        noun = "an int" if self.kind is int else "a finite real number"
        return f"{noun} {' and '.join(limits)}".rstrip()

    def fits(self, value: float) -> bool:
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def check(self, name: str, value: Any) -> Any:
        """Return `value` in the setting's own type, or raise TypeError or ValueError."""
        if value is None and self.optional:
            return None
        if self.kind in (int, float):
            value = _plain_number(value)
        expected: Any = {float: Real, int: Integral}.get(self.kind, self.kind)
        # bool is an int to Python, and True for a number is almost certainly a mistake.
        is_flag = self.kind is not bool and isinstance(value, bool)
        if is_flag or not isinstance(value, expected):
            raise TypeError(
                f"{name} must be {self.takes}, but got {value!r:.200} of type "
                f"{type(value).__name__}."
            )
        if self.kind is float:
            try:
                number = float(value)
            except OverflowError:  # an int or a Fraction beyond float64, so outside every range
                number = math.nan
            fits = math.isfinite(number) and self.fits(number)
        else:
            number = self.kind(value)
            fits = value in self.choices if self.choices else self.fits(number)
        if not fits:
            raise ValueError(f"{name} must be {self.takes}, but got {value!r:.200}.")
        return number


def _short(limit: float) -> str:
    power = int(limit).bit_length() - 1
    return f"2**{power}" if power >= 32 and limit == 2**power else f"{limit:g}"


def _plain_number(value: Any) -> Any:
    # autoclip 0.2.1 took its quantile as a 0-d tensor; a 0-d NumPy array is as unambiguous.
    if (
        not isinstance(value, Real)
        and getattr(value, "shape", None) == ()
        and hasattr(value, "item")
    ):
        return value.item()
    return value


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
    limits = _Limits(of, default is None, gt, ge, lt, le, tuple(choices))
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
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, but got {value!r:.200} of type {type(value).__name__}."
        )
    return value


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
