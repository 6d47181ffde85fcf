"""What a rule is: a small object that turns a window of norms into a threshold.

A new rule is one file like `_quantile.py`: a frozen dataclass of its settings, decorated with
`register_rule`, and a `Tracker` that computes its thresholds. Gradients, hooks, state and files
know rules only through these two classes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from autoclip.core._settings import check_known_settings
from autoclip.core._windows import Windows

__all__ = ["RULES", "Rows", "Rule", "Tracker", "register_rule"]

Rows: TypeAlias = slice | npt.NDArray[np.int64]
"""Which rows: an index array without duplicates, or `slice(None)` for all of them."""


class Tracker(ABC):
    """The thresholds of many rows under one kind of rule, kept up to date as norms arrive.

    Whatever a tracker remembers can be derived from the windows: it is never saved.

    Attributes:
        thresholds: float64[rows]; infinite for a row that has recorded nothing.
    """

    def __init__(self, rules: Sequence[Any], windows: Windows) -> None:
        self.rules = rules
        self.windows = windows
        self.thresholds = np.full(len(rules), np.inf)

    @abstractmethod
    def update(
        self, rows: Rows, entered: npt.NDArray[np.float32], left: npt.NDArray[np.float32]
    ) -> None:
        """Bring `thresholds[rows]` up to date after one norm was recorded in each of `rows`.

        Args:
            rows: the rows that recorded. Their windows hold the new norm already.
            entered: float32[n], the norms that came.
            left: float32[n], the norms that fell out of the windows, NaN where none did.
        """

    @abstractmethod
    def rebuild(self, rows: npt.NDArray[np.int64]) -> None:
        """Derive everything about `rows`, none of them empty, from their windows."""


class Rule(ABC):
    """How one row's threshold follows from its window; a frozen dataclass of settings.

    Attributes:
        name: the rule's name in a saved state.
    """

    name: ClassVar[str]

    @property
    def settings(self) -> dict[str, float]:
        """The rule's settings by name, as a saved state holds them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The names of the rule's settings."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_settings(cls: type[RuleT], settings: Mapping[str, Any]) -> RuleT:
        """Make the rule from its settings by name.

        Raises:
            TypeError, ValueError: a setting is unknown, missing, or has a wrong value.
        """
        check_known_settings(settings, cls.setting_names(), f"the {cls.name} rule")
        return cls(**settings)

    @classmethod
    @abstractmethod
    def track(cls: type[RuleT], rules: Sequence[RuleT], windows: Windows) -> Tracker:
        """Make the tracker for `rules`, one of them a row of `windows`, all rows empty."""


RuleT = TypeVar("RuleT", bound=Rule)

RULES: dict[str, type[Rule]] = {}
"""Every registered rule by the name that a saved state calls it."""


def register_rule(rule: type[RuleT]) -> type[RuleT]:
    """Class decorator: let states of this rule be saved and loaded.

    Raises:
        ValueError: another rule has the name.
    """
    if RULES.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"A rule named {rule.name!r} is registered already: {RULES[rule.name]}.")
    return rule
