"""Checkpoints that autoclip 0.2.1 saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autoclip.core import (
    SMALLEST_NORM,
    GroupState,
    ParameterInfo,
    Rule,
    State,
    StateError,
    check_history_length,
)

__all__ = ["is_legacy", "is_legacy_pair", "read"]


def is_legacy(state_dict: object) -> bool:
    """Whether this is what a clipper of autoclip 0.2.1 returned from `state_dict()`."""
    return isinstance(state_dict, Mapping) and set(state_dict) == {"state", "param_groups"}


def is_legacy_pair(state_dict: object) -> bool:
    """Whether this is what the optimizer wrapper of autoclip 0.2.1 saved."""
    return isinstance(state_dict, Mapping) and set(state_dict) == {"optimizer", "clipper"}


def read(
    state_dict: Mapping[str, Any],
    rule_class: type[Rule],
    global_clipping: bool,
    sizes: Sequence[int],
) -> State:
    """Make a state from a state_dict of autoclip 0.2.1.

    It knows no names and no shapes. It recorded every norm, the zeros and NaN included, that
    nothing records any more: they are dropped. A clipper that had not made a step does not say
    whether it was global; it is then taken to be what `global_clipping` says. Its `as_optimizer`
    put the parameters of all the optimizer's groups into one group of the clipper: such a group is
    divided into groups of `sizes` parameters.

    Raises:
        StateError: it has another layout than 0.2.1 wrote, or another rule's settings.
    """
    try:
        state, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        settings = [_settings(group, rule_class) for group in groups]
        if state:
            global_clipping = "global_history" in state
        identifiers = [list(group["params"]) for group in groups]
        if len(groups) == 1 and len(identifiers[0]) == sum(sizes):
            everything = iter(identifiers[0])
            identifiers = [list(islice(everything, size)) for size in sizes]
            settings *= len(sizes)
        unknown = ParameterInfo(None, None)
        if global_clipping:
            window = _clean(state.get("global_history", []))
            parameters = [unknown] * sum(map(len, identifiers))
            found = [_group(settings[0], parameters, [window])]
        else:
            found = [
                _group(
                    setting,
                    [unknown] * len(ids),
                    [_clean(state[i]["history"]) if i in state else _clean([]) for i in ids],
                )
                for setting, ids in zip(settings, identifiers)
            ]
    except StateError:
        raise
    except Exception as error:
        raise StateError(
            f"state_dict looks like one of autoclip 0.2.1, but cannot be read: {error!r}. It takes "
            '{"state": {id: {"history": tensor}}, "param_groups": [...]}.'
        ) from error
    return State(rule_class.name, global_clipping, "torch", tuple(found), "0.2.1")


def _settings(group: Mapping[str, Any], rule_class: type[Rule]) -> dict[str, Any]:
    for name in rule_class.setting_names():
        if name not in group:
            raise StateError(
                f"state_dict was saved by another clipper of autoclip 0.2.1: its groups have no "
                f"{name!r}. Load it into a clipper of the same class."
            )
    # A quantile could be a tensor then.
    rule = rule_class.from_settings({k: float(group[k]) for k in rule_class.setting_names()})
    return {**rule.settings, "history_length": check_history_length(group["history_length"])}


def _clean(history: Any) -> npt.NDArray[np.float32]:
    norms = torch.as_tensor(history, dtype=torch.float32).detach().cpu().reshape(-1).numpy()
    return norms[(norms >= SMALLEST_NORM) & (norms < np.inf)]


def _group(
    settings: dict[str, Any],
    parameters: list[ParameterInfo],
    windows: list[npt.NDArray[np.float32]],
) -> GroupState:
    windows = [window[-settings["history_length"] :] for window in windows]
    return GroupState.from_windows(settings, parameters, windows, [len(w) for w in windows])
