"""Checkpoints that autoclip 0.2.1 saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autoclip.core import GroupState, ParameterInfo, Quantile, Standard, State, StateError
from autoclip.core.adapter import GroupSettings, Mode, is_recorded

__all__ = ["convert", "is_clipper", "is_legacy", "is_legacy_pair", "read", "with_tensors"]

# The one setting of each rule of 0.2.1, beside history_length.
_SETTINGS = {"quantile": "quantile", "standard": "deviations"}


def is_legacy(state_dict: object) -> bool:
    """Whether this is what a clipper of autoclip 0.2.1 returned from `state_dict()`."""
    return isinstance(state_dict, Mapping) and set(state_dict) == {"state", "param_groups"}


def is_legacy_pair(state_dict: object) -> bool:
    """Whether this is what the optimizer wrapper of autoclip 0.2.1 saved."""
    return isinstance(state_dict, Mapping) and set(state_dict) == {"optimizer", "clipper"}


def is_clipper(entry: Mapping[Any, Any]) -> bool:
    """Tell a clipper's entry in a checkpoint from an optimizer's, which has the same keys."""
    groups = entry.get("param_groups")
    return (
        is_legacy(entry)
        and isinstance(groups, list)
        and len(groups) > 0
        and all(
            isinstance(group, Mapping) and "history_length" in group and "lr" not in group
            for group in groups
        )
    )


def with_tensors(saved: Mapping[Any, Any], made: Callable[[Any], Any]) -> dict[str, Any]:
    """Copy an entry of a checkpoint, with tensors for the objects that stand for them.

    Args:
        saved: an entry for which `is_clipper` is true.
        made: a function that returns the tensor for such an object, and any other value as it is.

    Raises:
        StateError: it has another layout than 0.2.1 wrote, or `made` raises.
    """
    with _explaining():
        groups = saved["param_groups"]
        _check_distinct(map(id, groups), "a parameter group")
        state = {
            key: {"history": made(entry["history"])} if isinstance(entry, Mapping) else made(entry)
            for key, entry in saved["state"].items()
        }
        # A quantile could be a tensor.
        by_group = [{key: made(value) for key, value in group.items()} for group in groups]
    return {"state": state, "param_groups": by_group}


def convert(saved: Mapping[str, Any], group_sizes: Sequence[int] | None = None) -> State:
    """Make a state from what a clipper of 0.2.1 returned from `state_dict()`.

    Its settings are those of a clipper that compares each norm with the ones before it, as 0.2.1
    did: load it with `include_current=False`.

    Args:
        saved: the state_dict, with tensors.
        group_sizes: how many parameters each group has; None for the groups that it has.

    Raises:
        StateError: it has another layout, or no history.
        ValueError: the sizes do not add up to its number of parameters.
    """
    with _explaining():
        groups = saved["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        rule = Quantile() if "quantile" in groups[0] else Standard()
        if not saved["state"]:
            raise StateError("The clipper of autoclip 0.2.1 had recorded nothing.")
    if group_sizes is not None:
        if len(groups) != 1 or sum(group_sizes) != sum(sizes):
            raise ValueError(
                f"--group-sizes divides one group, but {group_sizes} does not divide groups of "
                f"{sizes} parameters."
            )
        sizes = list(group_sizes)
    return read(saved, Mode.PARAMETER, [GroupSettings(rule, include_current=False)], sizes)


def read(
    state_dict: Mapping[str, Any],
    mode: Mode,
    present: Sequence[GroupSettings],
    sizes: Sequence[int],
) -> State:
    """Make a state from a state_dict of autoclip 0.2.1.

    It knows no names and no shapes. It recorded every norm, also zeros and NaN, which are never
    recorded any more: they are dropped. Settings that it did not have are those of the clipper
    that loads it. A clipper that had not made a step does not say whether it was global; it is then
    taken to be as `mode`. Its `as_optimizer` put the parameters of all the optimizer's groups into
    one group of the clipper: such a group is divided into groups of `sizes` parameters.

    Args:
        state_dict: as 0.2.1 returned it.
        mode: of the clipper that loads it.
        present: the settings of its groups.
        sizes: how many parameters each of its groups has.

    Raises:
        StateError: it has another layout than 0.2.1 wrote, or another rule's settings.
    """
    with _explaining():
        state, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        # Settings come first: of another rule they are the clearest sign of a wrong clipper.
        given = [_settings(group, present[0].rule.name) for group in groups]
        if state:
            mode = Mode.GLOBAL if "global_history" in state else Mode.PARAMETER
        _check_distinct(map(id, groups), "a parameter group")
        _check_distinct((each for group in groups for each in group["params"]), "a parameter")
        identifiers = [list(group["params"]) for group in groups]
        if len(groups) == 1 and len(identifiers[0]) == sum(sizes):
            everything = iter(identifiers[0])
            identifiers = [list(islice(everything, size)) for size in sizes]
            given *= len(sizes)
        # If there are more groups than the clipper has, matching says so.
        bases = [*present, *[present[-1]] * (len(given) - len(present))]
        settings = [base.merged(own) for base, own in zip(bases, given)]
        unknown, empty = ParameterInfo(None, None), np.empty(0, np.float32)
        clean = _Cleaning()
        if mode == "global":
            window = clean(state["global_history"]) if state else empty
            found = [_group(settings[0], [unknown] * sum(map(len, identifiers)), [window])]
        else:
            windows = [
                [clean(state[i]["history"]) if i in state else empty for i in ids]
                for ids in identifiers
            ]
            found = [
                _group(setting, [unknown] * len(own), own if mode == "parameter" else [empty])
                for setting, own in zip(settings, windows)
            ]
    return State(present[0].rule.name, mode, "torch", tuple(found), "0.2.1")


def _settings(group: Mapping[str, Any], rule: str) -> dict[str, Any]:
    name = _SETTINGS.get(rule)
    if name is None or name not in group:
        raise StateError(
            "state_dict was saved by another clipper of autoclip 0.2.1: its groups have no "
            f"{name or rule!r}. Load it into a clipper of the same class."
        )
    # A quantile could be a tensor then.
    return {name: float(group[name]), "history_length": group["history_length"]}


class _Cleaning:
    """Takes histories out of tensors. Together they take no more memory than the tensors do."""

    def __init__(self) -> None:
        self._taken: Counter[int] = Counter()  # bytes, of each storage

    def __call__(self, history: object) -> npt.NDArray[np.float32]:
        if not isinstance(history, torch.Tensor):
            raise StateError(
                f"A history of autoclip 0.2.1 is a tensor, but got {type(history).__name__}."
            )
        storage = history.untyped_storage()
        self._taken[storage.data_ptr()] += history.numel() * history.element_size()
        if self._taken[storage.data_ptr()] > storage.nbytes():
            raise StateError(
                "The histories of autoclip 0.2.1 have more numbers than are stored: a tensor is "
                "expanded, or is there several times."
            )
        norms = history.detach().to("cpu", torch.float32).reshape(-1).numpy()
        kept: npt.NDArray[np.float32] = norms[is_recorded(norms)]
        return kept


def _check_distinct(things: Iterable[Any], name: str) -> None:
    seen: set[Any] = set()
    for each in things:
        if each in seen:
            raise StateError(f"The state_dict of autoclip 0.2.1 lists {name} twice.")
        seen.add(each)


@contextmanager
def _explaining() -> Iterator[None]:
    """Turn all that another layout raises into an error that says what the layout is."""
    try:
        yield
    except (StateError, OSError):
        raise
    except Exception as error:
        raise StateError(
            f"state_dict looks like one of autoclip 0.2.1, but cannot be read: {error!r:.300}. It "
            'takes {"state": {id: {"history": tensor}}, "param_groups": [...]}.'
        ) from error


def _group(
    settings: GroupSettings,
    parameters: list[ParameterInfo],
    windows: list[npt.NDArray[np.float32]],
) -> GroupState:
    kept = [window[-settings.history_length :] for window in windows]
    recorded = [len(window) for window in kept]
    return GroupState.from_windows(settings.settings, parameters, kept, recorded)
