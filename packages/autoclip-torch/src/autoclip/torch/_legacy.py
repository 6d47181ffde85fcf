"""Checkpoints that autoclip 0.2.1 saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autoclip.core import GroupState, ParameterInfo, State, StateError
from autoclip.core.adapter import GroupSettings, Mode, is_recorded

__all__ = ["is_legacy", "is_legacy_pair", "read"]

# The one setting of each rule of 0.2.1, beside history_length.
_SETTINGS = {"quantile": "quantile", "standard": "deviations"}


def is_legacy(state_dict: object) -> bool:
    """Whether this is what a clipper of autoclip 0.2.1 returned from `state_dict()`."""
    return isinstance(state_dict, Mapping) and set(state_dict) == {"state", "param_groups"}


def is_legacy_pair(state_dict: object) -> bool:
    """Whether this is what the optimizer wrapper of autoclip 0.2.1 saved."""
    return isinstance(state_dict, Mapping) and set(state_dict) == {"optimizer", "clipper"}


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
    try:
        state, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        # Settings come first: of another rule they are the clearest sign of a wrong clipper.
        given = [_settings(group, present[0].rule.name) for group in groups]
        if state:
            mode = "global" if "global_history" in state else "parameter"
        identifiers = [list(group["params"]) for group in groups]
        if len(groups) == 1 and len(identifiers[0]) == sum(sizes):
            everything = iter(identifiers[0])
            identifiers = [list(islice(everything, size)) for size in sizes]
            given *= len(sizes)
        # If there are more groups than the clipper has, matching says so.
        bases = [*present, *[present[-1]] * (len(given) - len(present))]
        settings = [base.merged(own) for base, own in zip(bases, given)]
        unknown = ParameterInfo(None, None)
        if mode == "global":
            window = _clean(state.get("global_history", []))
            found = [_group(settings[0], [unknown] * sum(map(len, identifiers)), [window])]
        else:
            windows = [
                [_clean(state[i]["history"]) if i in state else _clean([]) for i in ids]
                for ids in identifiers
            ]
            found = [
                _group(setting, [unknown] * len(own), own if mode == "parameter" else [_clean([])])
                for setting, own in zip(settings, windows)
            ]
    except StateError:
        raise
    except Exception as error:
        raise StateError(
            f"state_dict looks like one of autoclip 0.2.1, but cannot be read: {error!r:.300}. It "
            'takes {"state": {id: {"history": tensor}}, "param_groups": [...]}.'
        ) from error
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


def _clean(history: Any) -> npt.NDArray[np.float32]:
    norms = torch.as_tensor(history, dtype=torch.float32, device="cpu").detach().reshape(-1).numpy()
    kept: npt.NDArray[np.float32] = norms[is_recorded(norms)]
    return kept


def _group(
    settings: GroupSettings,
    parameters: list[ParameterInfo],
    windows: list[npt.NDArray[np.float32]],
) -> GroupState:
    kept = [window[-settings.history_length :] for window in windows]
    recorded = [len(window) for window in kept]
    return GroupState.from_windows(settings.settings, parameters, kept, recorded)
