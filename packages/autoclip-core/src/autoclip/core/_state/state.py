"""The saved state of a clipper: one schema for every framework, and its checks.

`safetensors.py` knows the bytes, `matching.py` how a state is matched to the clipper that loads
it. The documentation describes the format for implementers, under "The state format".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._errors import StateError
from autoclip.core._ops import SMALLEST_NORM
from autoclip.core._rules.rule import MAX_NAME
from autoclip.core._settings.mode import Mode
from autoclip.core._settings.settings import GroupSettings
from autoclip.core._state.matching import match_states
from autoclip.core._state.safetensors import DTYPES, SealedTensors, brief_repr, check_size
from autoclip.core._version import __version__

FORMAT = "autoclip"
VERSION = 1
MAX_RECORDED = 2**62  # room to go on counting in int64
_MAX_RANK = 64
_MAX_SETTINGS = 100
_MAX_SETTING_TEXT = 1000
_MAX_SETTING_DEPTH = 4
_WORD = f"a string of at most {MAX_NAME} characters"
_METADATA_KEYS = frozenset(
    {"format", "version", "rule", "mode", "framework", "library_version", "groups", "sha256"}
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


def parameter_names(groups: Sequence[Sequence[str | None]]) -> list[str]:
    """A name for each parameter, group by group, each a different one.

    Args:
        groups: the names of each group's parameters; one that has none is named after its group and
            number. Names that occur again are numbered, `w`, `w_2`, `w_3`: layers of TensorFlow
            outside of Keras often have variables of equal names.
    """
    named = [
        f"group {i} parameter {k}" if name is None else name
        for i, names in enumerate(groups)
        for k, name in enumerate(names)
    ]
    if len(set(named)) == len(named):
        return named
    uses: Counter[str] = Counter()  # in the order of the parameters
    for first in named:
        name = first
        while name in uses:
            uses[first] += 1
            name = f"{first}_{uses[first]}"
        uses[name] = 1
    return list(uses)


@dataclass(frozen=True, eq=False)
class GroupState:
    """One parameter group: its settings, its parameters, and the histories of its rows.

    Attributes:
        settings: all settings by name, as JSON values; information for those who load the state.
        parameters: the parameters of the group, in order.
        values: float32[sum(lengths)], all windows one after the other, oldest norm first.
        lengths: int64[rows], how many norms each window holds.
        recorded: int64[rows], how many norms each row has ever recorded.

    The mode tells which rows a group has; see `Mode`.
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
        ends = np.cumsum(self.lengths).tolist()
        return [self.values[end - n : end] for n, end in zip(self.lengths.tolist(), ends)]


@dataclass(frozen=True, eq=False)
class State:
    """All that a clipper saves. Numbers that can be computed from it are not saved.

    Attributes:
        rule: the name of the rule, one for all groups; information, as the settings are.
        mode: the meaning of a row: a `"parameter"`, a `"group"`, or with `"global"` all
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

    def __post_init__(self) -> None:
        """Accept the mode by its name; `to_bytes` refuses an unknown one."""
        if self.mode in tuple(Mode):
            object.__setattr__(self, "mode", Mode(self.mode))

    @classmethod
    def of(
        cls,
        framework: str,
        mode: Mode,
        settings: Sequence[GroupSettings],
        parameters: Sequence[Sequence[ParameterInfo]],
        windows: Sequence[npt.NDArray[np.float32]] | None = None,
        recorded: npt.NDArray[np.int64] | None = None,
    ) -> State:
        """The state of a clipper, or without windows its description.

        Args:
            framework: `"numpy"`, `"torch"`, `"tensorflow"`, or another backend's name.
            mode: the meaning of a row.
            settings: of each group; at least one.
            parameters: of each group.
            windows: of each row, oldest norm first.
            recorded: int64[rows], how many norms each row has ever recorded.
        """
        infos = mode.in_state(parameters)
        by_group = mode.rows_by_group([*map(len, infos)])
        if windows is None or recorded is None:
            rows = by_group[-1].stop if by_group else 0
            windows, recorded = [np.empty(0, np.float32)] * rows, np.zeros(rows, np.int64)
        groups = tuple(
            GroupState.from_windows(
                each.settings,
                own,
                windows[rows.start : rows.stop],
                recorded[rows.start : rows.stop],
            )
            for each, own, rows in zip(settings, infos, by_group)
        )
        return cls(settings[0].rule.name, mode, framework, groups, __version__)

    # -- rows --------------------------------------------------------------------------------

    @property
    def row_names(self) -> tuple[str, ...]:
        """The name of each row; see `Mode.row_names`."""
        names = parameter_names([[each.name for each in g.parameters] for g in self.groups])
        return self.mode.row_names(names, len(self.groups))

    def by_row(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """The windows of all rows, oldest norm first, and int64[rows], how many each recorded."""
        windows = [window for group in self.groups for window in group.windows()]
        counts = [np.empty(0, np.int64), *(group.recorded for group in self.groups)]
        return windows, np.concatenate(counts)

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
        _refuse_first(_metadata_faults({**metadata, "sha256": ""}), source)
        check_size(sum(4 * g.values.size + 16 * g.lengths.size for g in self.groups), source)
        _refuse_first(self._history_faults(), source)
        tensors = {
            f"groups.{i}.{name}": (dtype, getattr(group, name))
            for i, group in enumerate(self.groups)
            for name, dtype in _TENSORS.items()
        }
        return SealedTensors.dump(metadata, tensors, source)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the state") -> State:
        """Read the bytes of `to_bytes`, trusting nothing: structure, digest, then contents.

        The rule and the settings are read as information: any rule, any settings.

        Args:
            data: the bytes.
            source: their name in an error, such as the file's name.

        Raises:
            StateError: anything at all is wrong with them.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise StateError(f"{source} must be bytes, but got {type(data).__name__}.")
        sealed = SealedTensors.parse(bytes(data), source)
        metadata = sealed.metadata
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise StateError(f'{source} is not an AutoClip state: its format is not "{FORMAT}".')
        _check_version(metadata.get("version"), source)
        sealed.check_digest()
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
        """Read a dict that `to_dict` returned.

        Raises:
            StateError: it is anything else.
        """
        found = state_dict.get("format") if isinstance(state_dict, Mapping) else None
        if not isinstance(state_dict, Mapping) or not isinstance(found, str) or found != FORMAT:
            got = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            kind = "one with the keys " if isinstance(state_dict, Mapping) else ""
            raise StateError(
                f'{source} must be a dict with the keys "format", "version" and "data", as a '
                f"clipper's state_dict() returns it, but got {kind}{brief_repr(got)}. If autoclip "
                "0.2.1 saved it, convert it first: autoclip convert OLD.pt NEW.autoclip."
            )
        _check_version(state_dict.get("version"), source)
        if "data" not in state_dict:
            raise StateError(
                f'{source} has no "data". Load the dict that a clipper\'s state_dict() returned.'
            )
        return cls.from_bytes(state_dict["data"], source)

    # -- loading -----------------------------------------------------------------------------

    def match(
        self,
        current: State,
        source: str = "the state",
        *,
        partial: bool = False,
        others: Collection[str] = (),
    ) -> State:
        """Match this saved state to the clipper that loads it.

        The histories come from this state, the settings from `current`. Names that both sides have
        decide which history is whose; equal names match in order. Only if no name is shared are
        rows matched by position. Of a window longer than the current `history_length` the newest
        values stay. A row without a partner starts empty. One warning tells of settings that
        differ, of histories that go to other names, and of rows without a partner.

        Args:
            current: the clipper as it is now; its windows are not looked at.
            source: the name of this state in messages.
            partial: rows that do not fit start empty, too, instead of an error: for checkpoints
                that hold more than the history and load without it.
            others: names of parameters of the same model that are not the clipper's. Histories of
                one of these are not matched by position: their parameters are there.

        Returns:
            `current` with this state's histories.

        Raises:
            StateError: another mode; parameters of one name with shapes that cannot be the same
                parameter's; or without shared names another number of groups or parameters.
        """
        return match_states(self, current, source, partial=partial, others=others)

    # -- checks ------------------------------------------------------------------------------

    def _history_faults(self) -> Iterator[str]:
        """Faults in the tensors of a state whose metadata is right."""
        for i, group in enumerate(self.groups):
            [rows] = map(len, self.mode.rows_by_group([len(group.parameters)]))
            for name, dtype in _TENSORS.items():
                found = getattr(group, name).dtype
                if not np.can_cast(found, DTYPES[dtype]):
                    yield f"group {i} has {name} of dtype {found}, not {DTYPES[dtype].name}"
            values = group.values
            lengths, recorded = group.lengths.astype(np.int64), group.recorded.astype(np.int64)
            if lengths.shape != (rows,) or recorded.shape != (rows,):
                yield (
                    f"group {i} has {rows} rows, but lengths of shape {lengths.shape} and recorded "
                    f"of shape {recorded.shape}"
                )
            if rows and (lengths.min() < 0 or (lengths > recorded).any()):
                yield (
                    f"in group {i} a window is longer than the number of norms that its row "
                    "recorded, or is of negative length"
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
    """Faults in the metadata; only the first one can be relied on."""
    if metadata.keys() != _METADATA_KEYS:
        yield f"its metadata has the keys {brief_repr(set(metadata))}, not {sorted(_METADATA_KEYS)}"
    for name in ("rule", "framework", "library_version"):
        value = metadata[name]
        if not isinstance(value, str) or len(value) > MAX_NAME:
            yield f"{name} is {brief_repr(value)}, not {_WORD}"
    modes = tuple(mode.value for mode in Mode)
    if metadata["mode"] not in modes:
        yield f"mode is {brief_repr(metadata['mode'])}, not one of {modes}"
    groups = metadata["groups"]
    if not isinstance(groups, list):
        yield f"groups is {brief_repr(groups)}, not a list"
    if Mode(metadata["mode"]).has_one_row and len(groups) != 1:
        yield f"global clipping has one group, but there are {len(groups)}"
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
        fault = _settings_fault(group["settings"])
        if fault:
            yield f"group {i}: {fault}"
        for k, parameter in enumerate(group["parameters"]):
            fault = _parameter_fault(parameter)
            if fault:
                yield f"parameter {k} of group {i} {fault}"


def _settings_fault(settings: Mapping[str, Any]) -> str | None:
    if len(settings) > _MAX_SETTINGS:
        return f"it has {len(settings)} settings; {_MAX_SETTINGS} are the most"
    for name, value in settings.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            return f"a setting is called {brief_repr(name)}, not {_WORD}"
        if not _is_setting(value, _MAX_SETTING_DEPTH):
            return (
                f"the setting {brief_repr(name)} is {brief_repr(value)}, not null, true, false, a "
                f"finite number, a string of at most {_MAX_SETTING_TEXT} characters, or a list or "
                f"object of at most {_MAX_SETTINGS} of these, {_MAX_SETTING_DEPTH} deep"
            )
    return None


def _is_setting(value: object, depth: int) -> bool:
    """True for JSON of a moderate size: a later release may have settings of any type."""
    if value is None or isinstance(value, int):
        return value is None or -(10**100) < value < 10**100  # as long as JSON's numbers may be
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= _MAX_SETTING_TEXT
    if not depth or not isinstance(value, (list, dict)) or len(value) > _MAX_SETTINGS:
        return False
    if isinstance(value, dict):
        if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in value):
            return False
        value = list(value.values())
    return all(_is_setting(each, depth - 1) for each in value)


def _parameter_fault(parameter: Any) -> str | None:
    if not isinstance(parameter, dict) or parameter.keys() != {"name", "shape"}:
        return f"is {brief_repr(parameter)}, not an object of name and shape"
    name, shape = parameter["name"], parameter["shape"]
    if not (name is None or isinstance(name, str)):
        return f"has the name {brief_repr(name)}, not a string or null"
    if shape is None or (
        isinstance(shape, list)
        and len(shape) <= _MAX_RANK
        and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        return None
    return (
        f"has the shape {brief_repr(shape)}, not null or at most {_MAX_RANK} sizes from 0 to "
        "2**63 - 1"
    )
