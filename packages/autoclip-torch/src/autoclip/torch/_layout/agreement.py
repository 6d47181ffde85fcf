"""The check that all processes clip alike: the same mode, settings and history, compared once.

Other settings on one process give other coefficients there, and the weights drift apart without an
error. Processes that exchange numbers anyway compare fingerprints with the first of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from autoclip.core import State

FACTS = ("mode", "settings", "history")


def fingerprints(state: State) -> list[int]:
    """A number for each of `FACTS` about a clipper with this state; equal ones, equal numbers."""
    settings = [(len(group.parameters), sorted(group.settings.items())) for group in state.groups]
    history = [
        array.tobytes()
        for group in state.groups
        for array in (group.recorded, group.lengths, group.values)
    ]
    return [
        _number([state.mode.encode()]),
        _number([repr((state.rule, settings)).encode()]),
        _number(history),
    ]


def _number(parts: Iterable[bytes]) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest()[:7], "big")


def encoded(numbers: Sequence[int]) -> list[int]:
    """Numbers for an all-reduce with MAX, after which `unequal` finds the differing ones."""
    return [sign * number for number in numbers for sign in (1, -1)]


def unequal(reduced: Sequence[int]) -> list[str]:
    """The facts that were not the same on all processes."""
    largest, smallest = reduced[::2], [-number for number in reduced[1::2]]
    found = [fact for fact, high, low in zip(FACTS, largest, smallest) if high != low]
    return found[:1] if found[:1] == ["mode"] else found  # on which the others depend


def compare(numbers: Sequence[int], group: Any, device: torch.device) -> list[str]:
    """The facts that are not the same on all processes of a group, all of which must call this."""
    agreed = torch.tensor(encoded(numbers), dtype=torch.int64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group)
    return unequal(agreed.tolist())


def disagreement_message(facts: Sequence[str], description: object) -> str:
    """The error on all processes if clippers differ in some of `FACTS`."""
    remedies: Mapping[str, str] = {
        "mode": "make the clipper with the same arguments",
        "settings": "make the clipper with the same arguments",
        "history": "load the same checkpoint",
    }
    todo = " and ".join(dict.fromkeys(remedies[fact] for fact in facts))
    return (
        f"AutoClip: the processes have clippers with a different {' and '.join(facts)}, and their "
        f"weights would drift apart. On all of them, {todo}. Nothing was recorded. This process "
        f"has {description}"
    )
