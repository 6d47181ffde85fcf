"""Checkpoints that autoclip 0.2.1 saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autoclip.core import ParameterInfo, Quantile, Standard, State, StateError
from autoclip.core.adapter import GroupSettings, Mode, is_recorded
from autoclip.torch._files.pickle import is_quick_to_hash

# The setting of each rule of 0.2.1, in addition to history_length.
_SETTINGS = {"quantile": "quantile", "standard": "deviations"}


def is_clipper(entry: Mapping[Any, Any]) -> bool:
    """Tell a clipper's entry in a checkpoint from an optimizer's, which has the same keys."""
    groups = entry.get("param_groups")
    return (
        set(entry) == {"state", "param_groups"}
        and isinstance(groups, list)
        and len(groups) > 0
        and all(isinstance(group, Mapping) and "history_length" in group for group in groups)
        # A group that was added later could have keys of the optimizer's.
        and any("lr" not in group for group in groups)
    )


def convert(
    saved: Mapping[Any, Any],
    tensor: Callable[[Any], Any],
    group_sizes: Sequence[int] | None = None,
) -> State:
    """Make a state from the `state_dict()` of a clipper of autoclip 0.2.1.

    It has no names and no shapes. 0.2.1 recorded every norm, also zeros and NaN, which are dropped.
    The settings are those of a clipper that compares each norm with the ones before it, as 0.2.1
    did: load the state with `include_current=False`. 0.2.1's `as_optimizer` put the parameters of
    all groups of an optimizer into one group, which `group_sizes` divides again.

    Args:
        saved: an entry of a checkpoint for which `is_clipper` is true.
        tensor: a function that returns the tensor for an object that stands for one in the entry,
            and any other value as it is.
        group_sizes: the number of parameters of each group; None for the groups that it has.

    Raises:
        StateError: it has another layout, or no history, or `tensor` raises.
        ValueError: the sizes do not add up to its number of parameters.
    """
    with _explaining():
        state, groups = dict(saved["state"]), list(saved["param_groups"])
        rule = Quantile() if "quantile" in groups[0] else Standard()
        if not state:
            raise StateError("The clipper of autoclip 0.2.1 had recorded nothing.")
        _check_distinct(map(id, groups), "a parameter group")
        _check_distinct((each for group in groups for each in group["params"]), "a parameter")
        name, own = _SETTINGS[rule.name], GroupSettings(rule, include_current=False)
        settings = [
            # A quantile could be a tensor then.
            own.merged(
                {name: float(tensor(group[name])), "history_length": group["history_length"]}
            )
            for group in groups
        ]
        identifiers = [list(group["params"]) for group in groups]
    if group_sizes is not None:
        sizes = [*map(len, identifiers)]
        if len(groups) != 1 or sum(group_sizes) != sum(sizes):
            raise ValueError(
                f"--group-sizes divides one group, but {group_sizes} does not divide groups of "
                f"{sizes} parameters."
            )
        everything = iter(identifiers[0])
        identifiers = [list(islice(everything, size)) for size in group_sizes]
        settings *= len(identifiers)
    mode = Mode.GLOBAL if "global_history" in state else Mode.PARAMETER
    with _explaining():
        histories = [
            tensor(state[each]["history"]) if each in state else torch.zeros(0)
            for ids in identifiers
            for each in ids
        ]
        if mode.has_one_row:
            histories = [tensor(state["global_history"])]
        _check_size(histories)
        lengths = [each.history_length for each in mode.by_row(settings, [*map(len, identifiers)])]
        windows = [_recorded(each)[-length:] for each, length in zip(histories, lengths)]
        recorded = np.array([len(window) for window in windows], np.int64)
        infos = [[ParameterInfo(None, None)] * len(ids) for ids in identifiers]
        made = State.of("torch", mode, settings, infos, windows, recorded)
        return replace(made, library_version="0.2.1")


def _check_size(histories: Sequence[object]) -> None:
    """Refuse histories that together take more memory than what is stored."""
    claimed, stored = 0, {}
    for history in histories:
        if not isinstance(history, torch.Tensor):
            raise StateError(
                f"A history of autoclip 0.2.1 is a tensor, but got {type(history).__name__}."
            )
        claimed += history.nbytes
        stored[history.untyped_storage().data_ptr()] = history.untyped_storage().nbytes()
    if claimed > sum(stored.values()):
        raise StateError(
            "The histories of autoclip 0.2.1 have more numbers than are stored: a tensor is "
            "expanded, or is there several times."
        )


def _recorded(history: torch.Tensor) -> npt.NDArray[np.float32]:
    norms = history.detach().to("cpu", torch.float32).reshape(-1).numpy()
    kept: npt.NDArray[np.float32] = norms[is_recorded(norms)]
    return kept


def _check_distinct(things: Iterable[Any], name: str) -> None:
    seen: set[Any] = set()
    for each in things:
        if not is_quick_to_hash(each):
            raise ValueError(f"{name} is a {type(each).__name__}")
        if each in seen:
            raise StateError(f"The state_dict of autoclip 0.2.1 lists {name} twice.")
        seen.add(each)


@contextmanager
def _explaining() -> Iterator[None]:
    """Turn the errors of another layout into one that names the right layout."""
    try:
        yield
    except (StateError, OSError):
        raise
    except Exception as error:
        raise StateError(
            f"This looks like a state_dict of autoclip 0.2.1, but cannot be read: {error!r:.300}. "
            'It must be {"state": {id: {"history": tensor}}, "param_groups": [...]}.'
        ) from error
