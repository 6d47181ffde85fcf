"""The three modes of a clipper: which rows there are, their names, and how parameters share them.

All that depends on the mode is answered here; nothing else compares modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import accumulate
from typing import TypeVar

ALL_PARAMETERS = ("all parameters",)
"""The names of the rows under global clipping."""

T = TypeVar("T")


class Mode(str, Enum):
    """The meaning of a row of the history: a parameter, a parameter group, or all parameters.

    A member equals its name in a saved state: `Mode.GLOBAL == "global"`. Rows are numbered group by
    group, and within a group parameter by parameter.
    """

    PARAMETER = "parameter"
    GROUP = "group"
    GLOBAL = "global"

    __str__ = str.__str__

    @classmethod
    def chosen(cls, arguments: Mapping[str, bool]) -> Mode:
        """The mode that a clipper's arguments ask for: `{"global_clipping": True}`.

        Raises:
            ValueError: more than one is True.
        """
        asked = [mode for mode in cls if arguments.get(f"{mode}_clipping")]
        if len(asked) > 1:
            each = " and ".join(f"{mode}_clipping keeps {mode.description}" for mode in asked)
            raise ValueError(f"{each}. Choose one of the two.")
        return asked[0] if asked else cls.PARAMETER

    @property
    def arguments(self) -> dict[str, bool]:
        """The mode as a clipper's arguments; parameter-wise clipping has none."""
        return {f"{mode}_clipping": self is mode for mode in Mode if mode is not Mode.PARAMETER}

    @property
    def request(self) -> str:
        """The arguments that ask for this mode, in words."""
        chosen = [f"{name}=True" for name, value in self.arguments.items() if value]
        return chosen[0] if chosen else "neither global_clipping nor group_clipping"

    @property
    def description(self) -> str:
        """The rows of this mode, in words."""
        return {
            Mode.PARAMETER: "a history for each parameter",
            Mode.GROUP: "a history for each parameter group",
            Mode.GLOBAL: "one history for all parameters",
        }[self]

    # -- rows --------------------------------------------------------------------------------

    @property
    def joins(self) -> bool:
        """True if a row's norm is that of several gradients together."""
        return self is not Mode.PARAMETER

    @property
    def has_one_row(self) -> bool:
        """True if there is one row, however many groups and parameters there are."""
        return self is Mode.GLOBAL

    def rows_of(self, size: int) -> int:
        """The number of rows that a group of `size` parameters has of its own."""
        return {Mode.PARAMETER: size, Mode.GROUP: 1, Mode.GLOBAL: 0}[self]

    def rows_by_group(self, sizes: Sequence[int]) -> list[range]:
        """The rows of each group.

        Args:
            sizes: the number of parameters of each group.
        """
        if self is Mode.GLOBAL:
            return [range(1) for _ in sizes]
        counts = [*map(self.rows_of, sizes)]
        return [range(stop - count, stop) for count, stop in zip(counts, accumulate(counts))]

    def row_of_parameters(self, sizes: Sequence[int]) -> list[int]:
        """The row of each parameter, group by group."""
        if self is Mode.PARAMETER:
            return list(range(sum(sizes)))
        return [
            rows[0] for rows, size in zip(self.rows_by_group(sizes), sizes) for _ in range(size)
        ]

    def by_row(self, by_group: Sequence[T], sizes: Sequence[int]) -> list[T]:
        """A value of each row, from one of each group; under global clipping the first one."""
        if self is Mode.GLOBAL:
            return list(by_group[:1])
        pairs = zip(by_group, self.rows_by_group(sizes))
        return [value for value, rows in pairs for _ in rows]

    def row_names(self, parameters: Iterable[str], groups: int) -> tuple[str, ...]:
        """The names of the rows in reports.

        Args:
            parameters: the names of all parameters, group by group.
            groups: the number of groups.
        """
        if self is Mode.PARAMETER:
            return tuple(parameters)
        if self is Mode.GROUP:
            return tuple(f"group {i}" for i in range(groups))
        return ALL_PARAMETERS

    # -- groups ------------------------------------------------------------------------------

    def in_state(self, groups: Sequence[Sequence[T]]) -> list[list[T]]:
        """The parameters of the groups of a saved state; one group under global clipping."""
        if self is Mode.GLOBAL:
            return [[each for group in groups for each in group]]
        return [list(group) for group in groups]

    def check_overrides(self, names: Iterable[str]) -> None:
        """Refuse settings of a group's own where there are no rows for them.

        Raises:
            ValueError: there are some, and all groups share one history.
        """
        names = list(names)
        if names and self is Mode.GLOBAL:
            raise ValueError(
                "With global_clipping there is one history for all parameters, so a group cannot "
                f"have settings of its own, but got {', '.join(map(repr, names))}."
            )
