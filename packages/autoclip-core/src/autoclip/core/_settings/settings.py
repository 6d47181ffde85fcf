"""The settings of a clipper: names, defaults, checks, and overrides by parameter groups.

Both frameworks make their clippers from these classes, so that a wrong value is refused with the
same words everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Any, Literal, TypeAlias

from autoclip.core._rules.rule import Rule, structure_of
from autoclip.core._settings.fields import check_fields, check_flag, check_known_settings, setting
from autoclip.core._settings.mode import Mode

OnNonfinite: TypeAlias = Literal["keep", "zero", "raise"]
OnSpike: TypeAlias = Literal["clip", "zero", "skip"]
Record: TypeAlias = Literal["raw", "clipped"]


@dataclass(frozen=True)
class GroupSettings:
    """All settings of one parameter group, and so of its rows.

    Args:
        rule: computes the threshold from the window.
        history_length: the number of norms that a row keeps, the newest ones; an int ≥ 1.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up; None for no
            ceiling.
        warmup_steps: the number of norms that a row records before its rule counts; None for the
            rule's default.
        include_current: True if a norm is part of the window that it is compared with; None for the
            rule's default.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: the treatment of a gradient above its threshold: `"clip"` scales it down to the
            threshold, `"zero"` sets it to zero, `"skip"` (PyTorch) leaves the parameter untouched.
        on_nonfinite: the treatment of a gradient that holds a NaN or an infinity: `"keep"` leaves
            it as it is, `"zero"` sets it to zero, `"raise"` raises FloatingPointError. Its norm is
            never recorded.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a setting has a wrong value, or `record="clipped"` cannot work.
    """

    rule: Rule
    history_length: int = setting(1000, ge=1, lt=2**63)
    _: KW_ONLY
    max_norm: float | None = setting(None, gt=0)
    warmup_steps: int | None = setting(None, kind=int, ge=0, lt=2**63)
    include_current: bool | None = setting(None, kind=bool)
    record: Record = setting("raw", choices=("raw", "clipped"))
    on_spike: OnSpike = setting("clip", choices=("clip", "zero", "skip"))
    on_nonfinite: OnNonfinite = setting("keep", choices=("keep", "zero", "raise"))

    def __post_init__(self) -> None:
        """Check the settings and fill in the rule's defaults."""
        if not isinstance(self.rule, Rule):
            raise TypeError(
                f"rule must be a Rule such as Quantile(0.9), but got {self.rule!r:.200} of type "
                f"{type(self.rule).__name__}."
            )
        check_fields(self)
        for name, usual in (("warmup_steps", 0), ("include_current", True)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.rule.defaults.get(name, usual))
        if self.record == "clipped" and self.include_current:
            raise ValueError(
                'record="clipped" needs include_current=False: a norm that is compared with itself '
                "cannot be recorded as clipped before it is."
            )
        if self.record == "clipped" and self.rule.thresholds_only_fall:
            raise ValueError(
                f'record="clipped" does not work with {self.rule}: its threshold never exceeds the '
                "largest norm in the window, and no norm above the threshold would be recorded, so "
                'the threshold could only fall. Use record="raw", or a rule whose threshold can '
                "rise, such as Quantile(0.5, factor=2.0)."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name, the rule's first, as a saved state holds them."""
        return {
            **self.rule.settings,
            **{name: getattr(self, name) for name in CLIPPER_SETTINGS},
        }

    @property
    def structure(self) -> Hashable:
        """The settings that rows in one storage share."""
        return type(self.rule), structure_of(self.rule), _shared(self)

    def merged(self, overrides: Mapping[str, Any]) -> GroupSettings:
        """These settings with some replaced, by flat names.

        Raises:
            TypeError, ValueError: a setting has a wrong type or value.
        """
        if not overrides:
            return self
        both = {**self.settings, **overrides}
        rule = type(self.rule)(**{name: both.pop(name) for name in self.rule.setting_names()})
        return GroupSettings(rule, **both)


CLIPPER_SETTINGS = tuple(
    field.name for field in dataclasses.fields(GroupSettings) if field.name != "rule"
)
"""The names of the settings that a group has besides its rule's."""

_PER_ROW = ("max_norm", "warmup_steps", "on_spike", "on_nonfinite")
# The settings that rows in one storage share, in addition to those of the rule.
_shared = attrgetter(*[name for name in CLIPPER_SETTINGS if name not in _PER_ROW])


def given(arguments: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The settings among a constructor's `locals()`.

    Args:
        arguments: `locals()` in the first line of an `__init__`.
        others: names of arguments that are no settings.
    """
    return {k: v for k, v in arguments.items() if k not in ("self", "__class__", *others)}


@dataclass(frozen=True)
class ClipperSettings:
    """The settings of a clipper: its mode, and the settings of groups that override nothing.

    Attributes:
        mode: the meaning of a row.
        default: the settings of a group that names none of its own.
        owner: the name of the clipper's class, for messages.
    """

    mode: Mode
    default: GroupSettings
    owner: str

    @classmethod
    def make(
        cls,
        owner: str,
        rule: Rule | type[Rule],
        **settings: Any,
    ) -> ClipperSettings:
        """Check and collect the arguments of a clipper's constructor.

        Args:
            owner: the name of the clipper's class, for messages.
            rule: the rule, or its class; then `settings` holds the rule's settings as well.
            settings: the mode and the settings, by name.

        Raises:
            TypeError: a setting is unknown or has a wrong type, as for any Python function.
            ValueError: a setting has a wrong value, or both modes were asked for.
        """
        flags = Mode.PARAMETER.arguments  # named alike in every mode
        mode = Mode.chosen({name: check_flag(name, settings.pop(name, False)) for name in flags})
        names = rule.setting_names() if isinstance(rule, type) else ()
        unknown = [name for name in settings if name not in (*names, *CLIPPER_SETTINGS)]
        if unknown:
            known = [*names, *CLIPPER_SETTINGS, *flags]
            raise TypeError(
                f"{owner} got an unexpected keyword argument {unknown[0]!r}. It takes "
                f"{', '.join(map(repr, known))}."
            )
        if isinstance(rule, type):
            rule = rule(**{name: settings.pop(name) for name in names if name in settings})
        return cls(mode, GroupSettings(rule, **settings), owner)

    def for_group(self, overrides: Mapping[str, Any]) -> GroupSettings:
        """The settings of a group that overrides some.

        Raises:
            TypeError: a setting has a wrong type.
            ValueError: a setting is unknown or has a wrong value, or there is any under global
                clipping.
        """
        check_known_settings(overrides, self.default.settings, f"A parameter group of {self.owner}")
        self.mode.check_overrides(overrides)
        return self.default.merged(overrides)

    def taken_from(self, group: Mapping[str, Any]) -> GroupSettings:
        """The settings in a foreign group, such as an optimizer's; other keys are ignored.

        Raises:
            TypeError, ValueError: as `for_group`.
        """
        names = self.default.settings
        return self.for_group({name: group[name] for name in names if name in group})

    def describe(self, groups: Iterable[tuple[int, GroupSettings, str]] = ()) -> str:
        """A clipper's `repr`.

        Args:
            groups: of each group how many parameters it has, its settings, and a text that is to be
                said of it.
        """
        lines = [f"{self.owner}(", f"    {_as_text(self.default)}"]
        modes = [name for name, chosen in self.mode.arguments.items() if chosen]
        lines += [f"    {name}=True" for name in modes]
        for i, (count, settings, extra) in enumerate(groups):
            own = "" if settings == self.default else f", {_as_text(settings, self.default)}"
            noun = "parameter" if count == 1 else "parameters"
            lines.append(f"    group {i}: {count} {noun}{extra}{own}")
        return "\n".join([*lines, ")"])


def _as_text(settings: GroupSettings, default: GroupSettings | None = None) -> str:
    """Settings that differ from a default; without one, the rule's and the unusual ones."""
    usual = GroupSettings(settings.rule).settings if default is None else default.settings
    always = {*settings.rule.setting_names(), "history_length"} if default is None else set()
    return ", ".join(
        f"{name}={value!r}"
        for name, value in settings.settings.items()
        if name in always or value != usual[name]
    )
