"""A clipper's parameters in an optimizer's groups: where they are, and where they have moved."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain, count
from operator import lt
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip.core.adapter import warn_user
from autoclip.torch._parameters import shape_of, without_wrappers

Positions = list[list[tuple[int, int]]]
"""For each group of a clipper, the index of each parameter's group in the optimizer, and in that
group."""

NEW_CLIPPER = (
    "To continue with empty histories, call optimizer.clipper.detach() and attach a new clipper."
)
"""The end of the errors of groups that cannot be followed."""


class Followed:
    """The positions of a clipper's parameters in an optimizer's groups.

    Args:
        optimizer: the optimizer.
        param_groups: its groups.
        positions: of the clipper's parameters.

    Attributes:
        param_groups: the optimizer's groups as they were when somebody looked last.
        counts: the number of parameters of each of them.
        identities: the `id` of each parameter in them, group after group.
        shapes: the shape of each, None if it is not known.
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
        parameters = [group["params"] for group in param_groups]
        self.counts = [*map(len, parameters)]
        # Neither the parameters, whose memory is to be freed when others replace them, nor weak
        # references, which torch.utils.swap_tensors refuses.
        self.identities = [*map(id, chain.from_iterable(parameters))]
        self.shapes = [*map(shape_of, chain.from_iterable(parameters))]
        self._group_identities = [*map(id, param_groups)]
        self.is_one_to_one = positions == self.all_positions()

    @classmethod
    def found(cls, optimizer: Optimizer, by_group: Iterable[Iterable[Tensor]]) -> Followed:
        """Find a clipper's parameters among an optimizer's.

        Raises:
            ValueError: its parameters are not these.
        """
        positions = _by_id(optimizer.param_groups)
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

    def located(self) -> Followed:
        """The same parameters where they are now.

        If all of them are still in the optimizer, each is where its object is. Otherwise they have
        been exchanged, as FSDP and `load_state_dict(assign=True)` do, and the positions stay.

        Raises:
            RuntimeError: parameters have vanished.

        Warns:
            UserWarning: some have moved while others have vanished.
        """
        groups = self.param_groups
        now = Followed(self.optimizer, groups, self.positions)
        # A new object may have the id of one that is gone: single ones are not looked for, and all
        # of them must have their shapes.
        shapes = dict(zip(now.identities, now.shapes))
        if all(
            key in shapes and shape in (None, shapes[key])
            for key, shape in zip(self.identities, self.shapes)
        ):
            now_at = _by_id(groups)
            moved = dict(zip(_pairs(self.counts), map(now_at.__getitem__, self.identities)))
            positions = [[moved[old] for old in each] for each in self.positions]
            return Followed(self.optimizer, groups, positions)
        if len(now.counts) < len(self.counts) or any(map(lt, now.counts, self.counts)):
            raise RuntimeError(
                f"The optimizer's groups had {self.counts} parameters and have {now.counts} now. "
                f"AutoClip cannot tell whose histories are gone. {NEW_CLIPPER}"
            )
        self._warn_of_shift(now)
        return now

    def _warn_of_shift(self, now: Followed) -> None:
        """Warn if some objects are still there, at the positions of others.

        One that was removed before one was added at the end shifts all between them. A new object
        with the id of an old one is told from it by its shape, unless all shapes are equal.
        """
        former = dict(zip(zip(self.identities, self.shapes), _pairs(self.counts)))
        shapes = dict(zip(_pairs(self.counts), self.shapes))
        for key, (k, m) in zip(zip(now.identities, now.shapes), _pairs(now.counts)):
            if key in former and shapes.get((k, m), key[1]) != key[1]:
                i, j = former[key]
                warn_user(
                    f"Parameter {j} of the optimizer's group {i} is parameter {m} of group {k} "
                    "now, and other parameters have vanished: AutoClip cannot tell whose histories "
                    "are gone, and leaves each at its position. To begin with empty ones, call "
                    "optimizer.clipper.reset()."
                )
                return

    def sources(self, now: Followed) -> list[int]:
        """The former index of each group of the optimizer; of a new one, the next number.

        Groups whose dicts are all still there, or that are all known, as after joining two, may
        have moved; otherwise they are where they were.
        """
        former = {key: i for i, key in enumerate(self._group_identities)}
        present = {*now._group_identities}
        if not (former.keys() <= present or present <= former.keys()):
            return [*range(len(now.counts))]
        new = count(len(former))
        return [former[key] if key in former else next(new) for key in now._group_identities]

    def all_positions(self) -> Positions:
        """The positions of all parameters in the optimizer, by its groups."""
        return [[(i, j) for j in range(size)] for i, size in enumerate(self.counts)]

    def grown(self) -> Positions:
        """The clipper's positions, and those of parameters that were added to the optimizer.

        One joins the group of the clipper that has others of its group in the optimizer, or a new
        group.
        """
        positions = [[*each] for each in self.positions]
        known = {*chain.from_iterable(positions)}
        owners = {i: own for own in positions for i, _ in own}
        for i, j in _pairs(self.counts):
            if (i, j) not in known:
                if i not in owners:
                    owners[i] = []
                    positions.append(owners[i])
                owners[i].append((i, j))
        return positions

    def name_of(self, i: int, j: int) -> str | None:
        """The name of a parameter in the optimizer's groups, or None."""
        names = self.param_groups[i].get("param_names", ())
        return without_wrappers(names[j]) if j < len(names) else None


def _pairs(counts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The positions in groups of these sizes."""
    return ((i, j) for i, size in enumerate(counts) for j in range(size))


def _by_id(param_groups: Iterable[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """The positions of an optimizer's parameters by their `id`."""
    return {
        id(parameter): (i, j)
        for i, group in enumerate(param_groups)
        for j, parameter in enumerate(group["params"])
    }
