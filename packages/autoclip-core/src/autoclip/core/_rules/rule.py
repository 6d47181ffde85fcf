"""Rules: a few settings and one function from a window of norms to a threshold.

A rule is written once and runs in NumPy, PyTorch and TensorFlow. All other modules use rules only
through the class `Rule`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

from autoclip.core._settings.fields import check_fields, check_known_settings

MAX_NAME = 100
"""The most characters of a rule's or a setting's name in a saved state."""


class Rule(ABC):
    """A threshold as a function of a window of norms: a frozen dataclass of settings.

    Subclass it, give its settings with `setting`, write `threshold`, and decorate the class with
    `register_rule` if its states are to be loaded from files.

    Attributes:
        name: the rule's name in a saved state.
        defaults: the defaults of a clipper's settings, such as `include_current`, under this rule.
            Without an entry, `include_current` is True and `warmup_steps` is 0.

    >>> from dataclasses import dataclass
    >>> from typing import ClassVar
    >>> from autoclip.core import History, Rule, register_rule, setting
    >>> @register_rule
    ... @dataclass(frozen=True)
    ... class Mad(Rule):
    ...     '''Median plus some median absolute deviations.'''
    ...
    ...     deviations: float = setting(3.0, ge=0)
    ...     name: ClassVar[str] = "example_mad"
    ...
    ...     @staticmethod
    ...     def threshold(window, deviations):
    ...         median = window.quantile(0.5)
    ...         return median + deviations * window.quantile(0.5, abs(window.norms - median))
    >>> history = History(rows=1, rule=Mad(1.0))
    >>> for norm in (1.0, 2.0, 9.0):
    ...     report = history.record([norm])
    >>> report.thresholds
    array([3.])
    """

    name: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        """Check the settings."""
        check_fields(self)

    @staticmethod
    @abstractmethod
    def threshold(window: Any, *args: Any, **settings: Any) -> Any:
        """The thresholds of many rows.

        Args:
            window: a `Window`.
            args: none; a rule names its settings as parameters.
            settings: the rule's own, by name. A float is [rows, 1], or [1, 1] if all rows have the
                same; anything else is the plain value, which all these rows share.

        Returns:
            [rows, 1].
        """

    @staticmethod
    def clip_to(window: Any, norm: Any, threshold: Any, *args: Any, **settings: Any) -> Any:
        """The norms that gradients above their threshold are scaled down to.

        Args:
            window: the same as for `threshold`.
            norm: [rows, 1], the gradients' norms.
            threshold: [rows, 1], as `threshold` returned it.
            args: none; a rule names its settings as parameters.
            settings: as `threshold` gets them.

        Returns:
            [rows, 1]; the threshold itself, unless a rule overrides this.
        """
        return threshold

    @property
    def thresholds_only_fall(self) -> bool:
        """True if no threshold can exceed the largest norm in its window.

        If the clipped norms were recorded under such a rule, thresholds could fall but never rise
        again. `record="clipped"` is refused then.
        """
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """The rule's settings by name, as a saved state holds them."""
        return {name: getattr(self, name) for name in self.setting_names()}

    @classmethod
    @cache
    def setting_names(cls) -> tuple[str, ...]:
        """The names of the rule's settings."""
        if not dataclasses.is_dataclass(cls):
            raise TypeError(
                f"{cls.__name__} is not a dataclass. Decorate the rule with "
                "@dataclass(frozen=True); its fields are its settings."
            )
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_settings(cls: type[RuleT], settings: Mapping[str, Any]) -> RuleT:
        """Make the rule from its settings by name.

        Raises:
            TypeError, ValueError: a setting is unknown, missing, or has a wrong value.
        """
        check_known_settings(settings, cls.setting_names(), f"the {cls.name} rule")
        return cls(**settings)


RuleT = TypeVar("RuleT", bound=Rule)


def structure_of(rule: Rule) -> tuple[Any, ...]:
    """The settings that rows which are recorded together must share: all but floats."""
    return tuple(
        (name, None if isinstance(value, float) else (type(value).__name__, value))
        for name, value in rule.settings.items()
    )


RULES: dict[str, type[Rule]] = {}
"""Every registered rule by the name that a saved state calls it."""


def register_rule(rule: type[RuleT]) -> type[RuleT]:
    """Class decorator: make a rule known by its name, for configurations and saved states.

    Registering a class of the same module and name again, as a notebook cell that runs twice does,
    replaces it.

    Raises:
        TypeError: it is not a frozen dataclass derived from `Rule` with a `name`.
        ValueError: another rule has the name, or a setting is called like one of the clippers', or
            a name is too long for a saved state.
    """
    from autoclip.core._settings.settings import (
        CLIPPER_SETTINGS,  # it knows rules, rules need not know it
    )

    parameters = getattr(rule, "__dataclass_params__", None)
    if not (isinstance(rule, type) and issubclass(rule, Rule)) or not getattr(
        parameters, "frozen", False
    ):
        raise TypeError(
            f"rule must be a subclass of Rule that is a frozen dataclass, but got {rule!r}. "
            "Put @register_rule above @dataclass(frozen=True)."
        )
    if not isinstance(getattr(rule, "name", None), str) or not rule.name:
        raise TypeError(f'{rule.__name__} has no name. Write: name: ClassVar[str] = "..."')
    taken = sorted({*CLIPPER_SETTINGS, "match", "params", "param_names"} & {*rule.setting_names()})
    if taken:
        raise ValueError(
            f"{rule.__name__} has the setting {taken[0]!r}, which is one of every clipper. Call it "
            "something else."
        )
    for name in (rule.name, *rule.setting_names()):
        if len(name) > MAX_NAME:
            raise ValueError(
                f"{rule.__name__} uses the name {name[:20]}... of {len(name)} characters, but a "
                f"saved state takes {MAX_NAME}. Choose a shorter one."
            )
    known = RULES.get(rule.name, rule)
    if (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ValueError(
            f"A rule named {rule.name!r} is registered already: {known.__module__}."
            f"{known.__qualname__}. Choose another name."
        )
    RULES[rule.name] = rule
    return rule


def rule_instance(rule: Rule) -> Rule:
    """`rule`, unless it is a class.

    Raises:
        TypeError: it is a class. `ClipperSettings.make` refuses other objects.
    """
    if isinstance(rule, type):
        raise TypeError(
            f"rule must be a rule such as Quantile(0.9), but got the class {rule.__name__}. "
            f"Make an instance: {rule.__name__}()."
        )
    return rule
