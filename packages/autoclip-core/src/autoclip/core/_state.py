"""The saved state of a clipper: one schema for every framework, its checks, and how it is loaded.

The format is described for implementers in the documentation, under "The state format".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from autoclip.core._errors import StateError
from autoclip.core._ring import SMALLEST_NORM
from autoclip.core._rule import MAX_NAME
from autoclip.core._safetensors import SealedTensors, brief_repr, check_size
from autoclip.core._settings import Mode, check_saved_settings
from autoclip.core._warnings import warn_user

__all__ = ["FORMAT", "MAX_RECORDED", "VERSION", "GroupState", "ParameterInfo", "State"]

FORMAT = "autoclip"
VERSION = 1
MAX_RECORDED = 2**62  # room to go on counting in int64
_MAX_RANK = 64
_MAX_SETTINGS = 100
_MAX_SETTING_TEXT = 1000
_WORD = f"a string of at most {MAX_NAME} characters"
_METADATA_KEYS = frozenset(
    {"format", "version", "rule", "mode", "framework", "library_version", "groups"}
)
_TENSORS = {"values": "F32", "lengths": "I64", "recorded": "I64"}


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter's name and shape, which show whether a state belongs to the model.

    Attributes:
        name: the parameter's name, or None if it has none.
        shape: its shape, or None if that is not known (a state that autoclip 0.2.1 saved).
    """

    name: str | None
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        name = "an unnamed parameter" if self.name is None else brief_repr(self.name)
        shape = "unknown shape" if self.shape is None else f"shape {brief_repr(self.shape)}"
        return f"{name} of {shape}"

    def fits(self, other: ParameterInfo, same_framework: bool) -> bool:
        """Whether the two can be the same parameter.

        Within a framework shapes are equal. Across frameworks only the element counts are: a
        Linear weight and a Dense kernel are each other's transpose.
        """
        if self.shape is None or other.shape is None:
            return True
        if same_framework:
            return self.shape == other.shape
        return math.prod(self.shape) == math.prod(other.shape)


@dataclass(frozen=True, eq=False)
class GroupState:
    """One parameter group: its settings, its parameters, and the histories of its rows.

    Attributes:
        settings: all settings by name: strings, bools, ints, finite floats and None.
        parameters: the parameters of the group, in order.
        values: float32[sum(lengths)], all windows one after the other, oldest norm first.
        lengths: int64[rows], how many norms each window holds.
        recorded: int64[rows], how many norms each row has ever recorded.

    There is one row a parameter in the mode "parameter", and a single row in the other modes.
    """

    settings: Mapping[str, Any]
    parameters: tuple[ParameterInfo, ...]
    values: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    recorded: npt.NDArray[np.int64]

    @classmethod
    def from_windows(
        cls,
        settings: Mapping[str, Any],
        parameters: Sequence[ParameterInfo],
        windows: Sequence[npt.ArrayLike],
        recorded: npt.ArrayLike,
    ) -> GroupState:
        """Make a group from one window a row, oldest norm first, as `History.read` gives them."""
        arrays = [np.asarray(window, np.float32) for window in windows]
        return cls(
            settings=dict(settings),
            parameters=tuple(parameters),
            values=np.concatenate([np.empty(0, np.float32), *arrays]),
            lengths=np.array([len(array) for array in arrays], np.int64),
            recorded=np.asarray(recorded, np.int64),
        )

    def windows(self) -> list[npt.NDArray[np.float32]]:
        """One float32[length] a row, oldest norm first."""
        return np.split(self.values, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


@dataclass(frozen=True, eq=False)
class State:
    """All that a clipper saves. What can be computed from it is not saved.

    Attributes:
        rule: the name of the rule, one for all groups.
        mode: what a row stands for: a "parameter", a "group", or in the mode "global" all
            parameters; then there is one group.
        framework: "numpy", "torch" or "tensorflow".
        groups: the parameter groups, in order.
        library_version: the version of autoclip that saved it; information only.
    """

    rule: str
    mode: Mode
    framework: str
    groups: tuple[GroupState, ...]
    library_version: str = ""

    # -- bytes -------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Serialize: equal states give equal bytes.

        Raises:
            StateError: the state is not valid or too large; it could not be loaded again.
        """
        source = "the state to be saved"
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "rule": self.rule,
            "mode": self.mode,
            "framework": self.framework,
            "library_version": self.library_version,
            "groups": [
                {
                    "settings": dict(group.settings),
                    "parameters": [
                        {"name": p.name, "shape": None if p.shape is None else list(p.shape)}
                        for p in group.parameters
                    ],
                }
                for group in self.groups
            ],
        }
        _refuse_first(_metadata_faults(metadata), source)
        check_size(sum(_nbytes(group) for group in self.groups), source)
        _refuse_first(self._history_faults(), source)
        tensors = {
            f"groups.{i}.{name}": (dtype, getattr(group, name))
            for i, group in enumerate(self.groups)
            for name, dtype in _TENSORS.items()
        }
        return SealedTensors.dump(metadata, tensors, source)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the state") -> State:
        """Read what `to_bytes` wrote, trusting nothing: digest, then structure, then contents.

        A rule that is not registered in this process is accepted; see `match`.

        Args:
            data: the bytes.
            source: what to call them in an error, such as the file's name.

        Raises:
            StateError: anything at all is wrong with them.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise StateError(f"{source} takes bytes, but got {type(data).__name__}.")
        sealed = SealedTensors.parse(bytes(data), source)
        metadata = sealed.metadata
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise StateError(f'{source} is not an AutoClip state: its format is not "{FORMAT}".')
        _check_version(metadata.get("version"), source)
        _refuse_first(_metadata_faults(metadata), source)
        tensors = sealed.tensors(
            {
                f"groups.{i}.{name}": dtype
                for i in range(len(metadata["groups"]))
                for name, dtype in _TENSORS.items()
            }
        )
        state = cls(
            rule=metadata["rule"],
            mode=metadata["mode"],
            framework=metadata["framework"],
            library_version=metadata["library_version"],
            groups=tuple(
                GroupState(
                    settings=group["settings"],
                    parameters=tuple(
                        ParameterInfo(p["name"], None if p["shape"] is None else tuple(p["shape"]))
                        for p in group["parameters"]
                    ),
                    **{name: tensors[f"groups.{i}.{name}"] for name in _TENSORS},
                )
                for i, group in enumerate(metadata["groups"])
            ),
        )
        _refuse_first(state._history_faults(), source)
        return state

    # -- a framework's state_dict ------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """`{"format": "autoclip", "version": 1, "data": bytes}`, the bytes being the file's."""
        return {"format": FORMAT, "version": VERSION, "data": self.to_bytes()}

    @classmethod
    def from_dict(cls, state_dict: object, source: str = "state_dict") -> State:
        """Read what `to_dict` returned.

        Raises:
            StateError: it is anything else.
        """
        found = state_dict.get("format") if isinstance(state_dict, Mapping) else None
        if not isinstance(state_dict, Mapping) or not isinstance(found, str) or found != FORMAT:
            got = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            what = "one with the keys " if isinstance(state_dict, Mapping) else ""
            raise StateError(
                f'{source} takes a dict with the keys "format", "version" and "data", as a '
                f"clipper's state_dict() returns it, but got {what}{brief_repr(got)}."
            )
        _check_version(state_dict.get("version"), source)
        if "data" not in state_dict:
            raise StateError(
                f'{source} has no "data". Load what a clipper\'s state_dict() returned.'
            )
        return cls.from_bytes(state_dict["data"], source)

    # -- loading -----------------------------------------------------------------------------

    def match(self, current: State, source: str = "the state") -> State:
        """Match this saved state to the clipper that loads it, by position.

        The histories come from this state, the settings from `current`; where they differ, one
        warning says so. Of a window longer than the current `history_length` the newest values
        stay.

        Args:
            current: the state of the clipper as it is now.
            source: what to call this state in messages.

        Returns:
            `current` with this state's histories.

        Raises:
            StateError: another rule, mode, number of groups or parameters, a shape that cannot be
                the same parameter's, or the same names of parameters in another order.
        """
        self._check_kind(current, source)
        if len(self.groups) != len(current.groups):
            raise StateError(
                f"{source} has {len(self.groups)} parameter groups, but the clipper has "
                f"{len(current.groups)}. Groups are matched by order: make the same ones."
            )
        same_framework = self.framework == current.framework
        for i, (saved, ours) in enumerate(zip(self.groups, current.groups)):
            if len(saved.parameters) != len(ours.parameters):
                raise StateError(
                    f"{source} has {len(saved.parameters)} parameters in group {i}, but the "
                    f"clipper has {len(ours.parameters)}. Load it for the same model."
                )
            if self.mode == "parameter":
                _check_order(saved, ours, i, source)
            for k, (theirs, mine) in enumerate(zip(saved.parameters, ours.parameters)):
                if not theirs.fits(mine, same_framework):
                    what = "shapes" if same_framework else "numbers of elements"
                    raise StateError(
                        f"Parameter {k} of group {i} does not match: {source} has {theirs}, the "
                        f"clipper has {mine}; their {what} differ. Load it for the same model."
                    )
        pairs = list(zip(range(len(self.groups)), self.groups, current.groups))
        differences = _settings_that_differ(pairs)
        if differences:
            warn_user(f"{source} {differences}")
        groups = (_with_rows(ours, saved.windows(), saved.recorded) for _, saved, ours in pairs)
        return replace(current, groups=tuple(groups))

    def match_by_name(self, current: State, source: str = "the state") -> State:
        """Match this saved state to the clipper that loads it, and keep what matches.

        In the mode "parameter" rows are matched by the names of their parameters, in whatever
        groups and order, if their shapes can be the same parameter's. Names that differ only in
        what Keras adds, a layer's number or the model's name, match in order, if there are as many
        on both sides. In the other modes groups are matched by position, if their parameters have
        the same numbers of elements in any order. All other rows start empty; one warning says
        which, and which settings differ.

        Args:
            current: the state of the clipper as it is now.
            source: what to call this state in messages.

        Returns:
            `current` with this state's histories where they match.

        Raises:
            StateError: another rule or mode.
        """
        self._check_kind(current, source)
        if self.mode == "parameter":
            groups, pairs, empty, unused = self._match_parameters(current)
        else:
            groups, pairs, empty, unused = self._match_groups(current)
        faults = [_settings_that_differ(pairs)]
        if empty or unused:
            faults.append(
                f"does not match the clipper everywhere. Histories that start empty: "
                f"{_some(empty, 120)}. Saved histories that are not used: {_some(unused, 120)}."
            )
        if any(faults):
            warn_user(" ".join(f"{source} {fault}" for fault in faults if fault))
        return replace(current, groups=tuple(groups))

    def _check_kind(self, current: State, source: str) -> None:
        if self.rule != current.rule:
            raise StateError(
                f"{source} holds a clipper with the rule {brief_repr(self.rule)}, but it is loaded "
                f"into one with the rule {brief_repr(current.rule)}. Load it into a clipper with "
                "the same rule."
            )
        if self.mode != current.mode:
            raise StateError(
                f"{source} holds {_ROWS[self.mode]}, but it is loaded into a clipper with "
                f"{_ROWS[current.mode]}. Make the clipper with {_ARGUMENTS[self.mode]}."
            )

    def _match_parameters(self, current: State) -> _Matched:
        names = Counter(p.name for group in self.groups for p in group.parameters)
        renamed = self._renamed(current)
        saved: dict[str | None, _Row] = {
            parameter.name: (i, parameter, window, recorded)
            for i, group in enumerate(self.groups)
            for parameter, window, recorded in zip(
                group.parameters, group.windows(), group.recorded
            )
            if parameter.name is not None and names[parameter.name] == 1
        }
        same_framework = self.framework == current.framework
        groups: list[GroupState] = []
        pairs: dict[tuple[int, int], _Pair] = {}
        empty: list[str] = []
        for j, ours in enumerate(current.groups):
            windows: list[npt.NDArray[np.float32]] = []
            recorded: list[int] = []
            for parameter in ours.parameters:
                name = renamed.get(parameter.name, parameter.name)
                row = saved.get(name)
                if row is not None and row[1].fits(parameter, same_framework):
                    del saved[name]
                    pairs[row[0], j] = j, self.groups[row[0]], ours
                    windows.append(row[2])
                    recorded.append(int(row[3]))
                else:
                    empty.append(str(parameter))
                    windows.append(np.empty(0, np.float32))
                    recorded.append(0)
            groups.append(_with_rows(ours, windows, recorded))
        unused = [str(parameter) for _, parameter, _, _ in saved.values()]
        unused += [
            str(parameter)
            for group in self.groups
            for parameter in group.parameters
            if parameter.name is None or names[parameter.name] > 1
        ]
        return groups, list(pairs.values()), empty, unused

    def _renamed(self, current: State) -> dict[str | None, str]:
        """Saved names by the clipper's names that stand for the same variables under other paths.

        Keras numbers layers without a name through a whole process, and a Sequential model's own
        name is part of its variables' paths only until it is loaded: what one process saved as
        `sequential/dense/kernel` is `dense_7/kernel` in another.
        """
        theirs = [p.name for group in self.groups for p in group.parameters if p.name is not None]
        mine = [p.name for group in current.groups for p in group.parameters if p.name is not None]
        both = {*theirs} & {*mine}
        found, wanted = (
            _by_plain_name(name for name in names if name not in both) for names in (theirs, mine)
        )
        return {
            new: old
            for plain, names in wanted.items()
            if len(names) == len(found.get(plain, ()))
            for new, old in zip(names, found[plain])
        }

    def _match_groups(self, current: State) -> _Matched:
        groups: list[GroupState] = []
        pairs: list[_Pair] = []
        unused = [f"group {i}" for i in range(len(current.groups), len(self.groups))]
        empty: list[str] = []
        for i, ours in enumerate(current.groups):
            saved = self.groups[i] if i < len(self.groups) else None
            if saved is not None and _same_elements(saved, ours):
                pairs.append((i, saved, ours))
                groups.append(_with_rows(ours, saved.windows(), saved.recorded))
            else:
                empty.append(f"group {i}")
                unused += [] if saved is None else [f"group {i}"]
                groups.append(_with_rows(ours, [np.empty(0, np.float32)], [0]))
        return groups, pairs, empty, unused

    # -- checks ------------------------------------------------------------------------------

    def _history_faults(self) -> Iterator[str]:
        """What is wrong with the tensors of a state whose metadata is right."""
        for i, group in enumerate(self.groups):
            rows = len(group.parameters) if self.mode == "parameter" else 1
            for name, dtype in (
                ("lengths", np.int64),
                ("recorded", np.int64),
                ("values", np.float32),
            ):
                found = getattr(group, name).dtype
                if not np.can_cast(found, dtype):
                    yield f"group {i} has {name} of dtype {found}, not {np.dtype(dtype)}"
            values = group.values
            lengths, recorded = group.lengths.astype(np.int64), group.recorded.astype(np.int64)
            if lengths.shape != (rows,) or recorded.shape != (rows,):
                yield (
                    f"group {i} has {rows} rows, but lengths of shape {lengths.shape} and recorded "
                    f"of shape {recorded.shape}"
                )
            history_length = group.settings["history_length"]
            if rows and (
                lengths.min() < 0 or (lengths > np.minimum(recorded, history_length)).any()
            ):
                yield (
                    f"in group {i} a window is longer than its history_length ({history_length}) "
                    "or than what it recorded, or is of negative length"
                )
            if rows and recorded.max() > MAX_RECORDED:
                yield f"a row of group {i} recorded more than {MAX_RECORDED} norms"
            # A Python sum: lengths near 2**63 must not wrap around to the right number.
            held = sum(lengths.tolist())
            if values.shape != (held,):
                yield f"group {i} has values of shape {values.shape}, but its lengths sum to {held}"
            # Written so that NaN, which min and max return if there is one, is refused.
            if held and not (values.min() >= SMALLEST_NORM and values.max() < np.inf):
                yield f"group {i} holds a norm that is zero, negative, NaN or infinite"


# The place of one of the clipper's groups, a saved group, and the clipper's.
_Pair: TypeAlias = tuple[int, GroupState, GroupState]
# The place of a saved row's group, its parameter, window and number of recorded norms.
_Row: TypeAlias = tuple[int, ParameterInfo, npt.NDArray[np.float32], np.int64]
# The groups, the pairs that matched, the rows that start empty, and the saved ones not used.
_Matched: TypeAlias = tuple[list[GroupState], list[_Pair], list[str], list[str]]

_ROWS = {
    "parameter": "a history for each parameter",
    "group": "a history for each parameter group",
    "global": "one history for all parameters",
}
_ARGUMENTS = {
    "parameter": "neither global_clipping nor group_clipping",
    "group": "group_clipping=True",
    "global": "global_clipping=True",
}


def _nbytes(group: GroupState) -> int:
    return 4 * group.values.size + 8 * group.lengths.size + 8 * group.recorded.size


def _with_rows(
    ours: GroupState, windows: Iterable[npt.NDArray[np.float32]], recorded: npt.ArrayLike
) -> GroupState:
    keep = ours.settings["history_length"]
    newest = [window[-keep:] for window in windows]
    return GroupState.from_windows(ours.settings, ours.parameters, newest, recorded)


def _check_order(saved: GroupState, ours: GroupState, group: int, source: str) -> None:
    """Refuse parameters that are known to be the same ones in another order."""
    theirs = [p.name for p in saved.parameters]
    mine = [p.name for p in ours.parameters]
    if theirs == mine or None in theirs or set(theirs) != set(mine):
        return
    k = next(k for k, (a, b) in enumerate(zip(theirs, mine)) if a != b)
    raise StateError(
        f"{source} has the parameters of group {group} in another order: parameter {k} is "
        f"{brief_repr(theirs[k])} there and {brief_repr(mine[k])} in the clipper. Histories are "
        "matched by order: pass the parameters to the clipper in the order in which they were "
        "saved."
    )


def _same_elements(saved: GroupState, ours: GroupState) -> bool:
    def counts(group: GroupState) -> list[int] | None:
        shapes = [p.shape for p in group.parameters if p.shape is not None]
        known = len(shapes) == len(group.parameters)
        return sorted(map(math.prod, shapes)) if known else None

    theirs, mine = counts(saved), counts(ours)
    if theirs is None or mine is None:
        return len(saved.parameters) == len(ours.parameters)
    return theirs == mine


def _settings_that_differ(pairs: Sequence[_Pair]) -> str:
    """What to say of settings that differ between saved groups and the clipper's; or ""."""
    found: dict[str, list[int]] = {}
    for i, saved, ours in pairs:
        for name in {**ours.settings, **saved.settings}:
            there, here = (group.settings.get(name, _ABSENT) for group in (saved, ours))
            if there != here:
                text = f"{brief_repr(name)[1:-1]}={_shown(there)} there and {_shown(here)} here"
                found.setdefault(text, []).append(i)
    if not found:
        return ""
    differences = (
        text if len(groups) == len(pairs) else f"{text} (group {_some(map(str, groups), 30, ', ')})"
        for text, groups in found.items()
    )
    return f"was saved with other settings, and the clipper's own are used: {_some(differences)}."


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their last two components, without numbers: `dense/kernel`."""
    found: dict[str, list[str]] = {}
    for name in names:
        plain = "/".join(_NUMBER.sub("", part) for part in name.split("/")[-2:])
        found.setdefault(plain, []).append(name)
    return found


_ABSENT = object()
_NUMBER = re.compile(r"_\d+$")


def _shown(setting: object) -> str:
    return "absent" if setting is _ABSENT else brief_repr(setting)


def _some(items: Iterable[str], limit: int = 300, separator: str = "; ") -> str:
    """The first of many items, in about `limit` characters, and how many more there are."""
    items = list(items)
    text = items[0] if items else "none"
    for i, item in enumerate(items[1:], start=1):
        if len(text) + len(item) > limit:
            return f"{text}{separator}and {len(items) - i} more"
        text += separator + item
    return text


def _check_version(version: object, source: str) -> None:
    if type(version) is not int or version < 1:
        raise StateError(
            f"{source} has the version {brief_repr(version)}; a version is an int ≥ 1."
        )
    if version > VERSION:
        raise StateError(
            f"{source} has version {brief_repr(version)} of the state format, and this "
            f"autoclip-core reads up to {VERSION}. Upgrade it: pip install -U autoclip-core"
        )


def _refuse_first(faults: Iterator[str], source: str) -> None:
    for fault in faults:
        raise StateError(f"{source} is not a valid AutoClip state: {fault}.")


def _metadata_faults(metadata: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the metadata; only the first fault can be relied on."""
    if metadata.keys() != _METADATA_KEYS:
        yield f"its metadata has the keys {brief_repr(set(metadata))}, not {sorted(_METADATA_KEYS)}"
    for name in ("rule", "framework", "library_version"):
        value = metadata[name]
        if not isinstance(value, str) or len(value) > MAX_NAME:
            yield f"{name} is {brief_repr(value)}, not {_WORD}"
    if metadata["mode"] not in get_args(Mode):
        yield f"mode is {brief_repr(metadata['mode'])}, not one of {get_args(Mode)}"
    groups = metadata["groups"]
    if not isinstance(groups, list):
        yield f"groups is {brief_repr(groups)}, not a list"
    if metadata["mode"] == "global" and len(groups) != 1:
        yield f"global clipping has one group, but there are {len(groups)}"
    checked: set[tuple[Any, ...]] = set()
    for i, group in enumerate(groups):
        if (
            not isinstance(group, dict)
            or group.keys() != {"settings", "parameters"}
            or not isinstance(group["settings"], dict)
            or not isinstance(group["parameters"], list)
        ):
            yield (
                f"group {i} is {brief_repr(group)}, not an object of settings, an object, and "
                "parameters, a list"
            )
        fault = _settings_fault(metadata["rule"], group["settings"], checked)
        if fault:
            yield f"group {i}: {fault}"
        for k, parameter in enumerate(group["parameters"]):
            fault = _parameter_fault(parameter)
            if fault:
                yield f"parameter {k} of group {i} {fault}"


def _settings_fault(
    rule: str, settings: Mapping[str, Any], checked: set[tuple[Any, ...]]
) -> str | None:
    if len(settings) > _MAX_SETTINGS:
        return f"it has {len(settings)} settings; {_MAX_SETTINGS} are the most"
    for name, value in settings.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            return f"a setting is called {brief_repr(name)}, not {_WORD}"
        if not (
            value is None
            or (isinstance(value, str) and len(value) <= _MAX_SETTING_TEXT)
            or (isinstance(value, int) and -(2**63) <= value < 2**63)
            or (isinstance(value, float) and math.isfinite(value))
        ):
            return (
                f"the setting {brief_repr(name)} is {brief_repr(value)}, not null, true, false, "
                "an int64, a finite float64, or a string of at most "
                f"{_MAX_SETTING_TEXT} characters"
            )
    # With the types: to Python, True equals 1 and 1.0.
    key = tuple((name, type(value), value) for name, value in settings.items())
    if key in checked:
        return None
    try:
        check_saved_settings(rule, settings)
    except KeyError as error:
        return f"it lacks the setting {error!s:.100}"
    except (TypeError, ValueError) as error:
        return f"{str(error).rstrip('.'):.300}"
    checked.add(key)
    return None


def _parameter_fault(parameter: Any) -> str | None:
    if not isinstance(parameter, dict) or parameter.keys() != {"name", "shape"}:
        return f"is {brief_repr(parameter)}, not an object of name and shape"
    name, shape = parameter["name"], parameter["shape"]
    if not (name is None or isinstance(name, str)):
        return f"has the name {brief_repr(name)}, not a string or null"
    if shape is not None and not (
        isinstance(shape, list)
        and len(shape) <= _MAX_RANK
        and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        return (
            f"has the shape {brief_repr(shape)}, not null or at most {_MAX_RANK} sizes from 0 to "
            "2**63 - 1"
        )
    return None
