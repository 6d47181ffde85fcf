"""Parameters in an optimizer's groups, which a clipper knows by their position there."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import lt
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Followed", "Positions"]

Positions = list[list[tuple[int, int]]]
"""For each group of a clipper, the index of each parameter's group in the optimizer, and in that
group."""


class Followed:
    """The positions of a clipper's parameters in an optimizer's groups.

    Args:
        optimizer: the optimizer.
        param_groups: its groups.
        positions: of the clipper's parameters.

    Attributes:
        param_groups: the optimizer's groups as they were when somebody looked last.
        counts: the number of parameters of each of them.
        is_one_to_one: True if the clipper has the same groups with the same parameters.
    """

    def __init__(
        self,
        optimizer: weakref.ref[Optimizer],
        param_groups: list[dict[str, Any]],
        positions: Positions,
    ) -> None:
        # Weakly: a cycle would keep a dropped optimizer's state in memory until a collection.
        self.optimizer = optimizer
        self.param_groups = param_groups
        self.positions = positions
        self.counts = [len(group["params"]) for group in param_groups]
        self.is_one_to_one = len(positions) == len(self.counts) and all(
            each == list(zip(repeat(i), range(count)))
            for i, (each, count) in enumerate(zip(positions, self.counts))
        )

    @classmethod
    def found(cls, optimizer: Optimizer, by_group: Iterable[Iterable[Tensor]]) -> Followed:
        """Find a clipper's parameters among an optimizer's.

        Raises:
            ValueError: its parameters are not these.
        """
        positions = {
            id(parameter): (i, j)
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        }
        wanted = [[id(parameter) for parameter in parameters] for parameters in by_group]
        known = {*chain.from_iterable(wanted)}
        missing, extra = len(known - positions.keys()), len(positions.keys() - known)
        if missing or extra:
            raise ValueError(
                "A clipper attaches to an optimizer over the same parameters, but "
                f"{missing} of the clipper's are not the optimizer's, and {extra} of the "
                "optimizer's are not the clipper's. Make the clipper from the same ones, or use "
                "as_optimizer."
            )
        found = [[positions[each] for each in group] for group in wanted]
        return cls(weakref.ref(optimizer), optimizer.param_groups, found)

    def new_parameters(self) -> Iterator[tuple[int, range]]:
        """The groups of the optimizer that have grown since, and the new indices in each.

        Raises:
            RuntimeError: parameters have vanished.
        """
        counts = [len(group["params"]) for group in self.param_groups]
        known = [*self.counts, *repeat(0, len(counts) - len(self.counts))]
        if len(counts) < len(known) or any(map(lt, counts, known)):
            raise RuntimeError(
                f"The optimizer's groups had {self.counts} parameters and have {counts} now. "
                "AutoClip knows parameters by their position, and cannot tell which are gone. "
                "Make a new clipper for the new parameters."
            )
        pairs = zip(known, counts)
        return ((i, range(a, b)) for i, (a, b) in enumerate(pairs) if b > a)

    def owners(self) -> dict[int, int]:
        """The group of the clipper that has the parameters of each group of the optimizer."""
        if self.is_one_to_one:  # also of groups that are empty
            return {i: i for i in range(len(self.counts))}
        return {i: k for k, positions in enumerate(self.positions) for i, _ in positions}
