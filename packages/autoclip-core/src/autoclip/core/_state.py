"""The saved state of a clipper: one schema for every framework, validated, as canonical bytes.

The format is described for implementers in the documentation, under "The state format".
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from autoclip.core._errors import StateError
from autoclip.core._rules import RULES
from autoclip.core._settings import check_history_length, check_known_settings
from autoclip.core._windows import SMALLEST_NORM

__all__ = ["FORMAT", "MAX_HEADER_BYTES", "VERSION", "GroupState", "ParameterInfo", "State"]

FORMAT = "autoclip"
VERSION = 1
MAX_HEADER_BYTES = 4 * 2**20
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_MAX_RECORDED = 2**62  # room to go on counting in int64
_METADATA_KEYS = frozenset(
    {"format", "version", "rule", "global_clipping", "framework", "library_version", "groups"}
)


@dataclass(frozen=True)
class ParameterInfo:
    """What a state knows of a parameter: enough to refuse a wrong model with a useful message.

    Attributes:
        name: the parameter's name, or None if the clipper was not told one.
        shape: its shape, or None if that is not known (a state that autoclip 0.2.1 saved).
    """

    name: str | None
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        name = "an unnamed parameter" if self.name is None else repr(self.name)
        return f"{name} of {'unknown shape' if self.shape is None else f'shape {self.shape}'}"

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
        settings: the rule's settings and `history_length`, by name.
        parameters: the parameters of the group, in order.
        values: float32[sum(lengths)], all windows one after the other, oldest norm first.
        lengths: int64[rows], how many norms each window holds.
        recorded: int64[rows], how many norms each row has ever recorded.

    There is one row a parameter, or a single row under global clipping.
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
    """All that a clipper saves. What can be derived from it is not saved.

    Attributes:
        rule: the name of the rule, one for all groups.
        global_clipping: whether one row stands for all parameters; then there is one group.
        framework: "numpy", "torch" or "tensorflow".
        groups: the parameter groups, in order.
        library_version: the version of autoclip that saved it; information only.
    """

    rule: str
    global_clipping: bool
    framework: str
    groups: tuple[GroupState, ...]
    library_version: str = ""

    # -- bytes -------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Serialize: equal states give equal bytes.

        Raises:
            StateError: the state is not valid; it could not be loaded again.
        """
        self._check("the state to be saved")
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "rule": self.rule,
            "global_clipping": self.global_clipping,
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
        fault = _metadata_fault(metadata)
        if fault:
            raise StateError(f"the state to be saved is not a valid AutoClip state: {fault}.")
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
        tensors: dict[str, npt.NDArray[Any]] = {_DIGEST: np.zeros(_DIGEST_BYTES, np.uint8)}
        for i, group in enumerate(self.groups):
            # safetensors 0.8.0 writes the buffer as it lies, whatever strides or byte order say.
            tensors[f"groups.{i}.values"] = np.ascontiguousarray(group.values, "<f4")
            tensors[f"groups.{i}.lengths"] = np.ascontiguousarray(group.lengths, "<i8")
            tensors[f"groups.{i}.recorded"] = np.ascontiguousarray(group.recorded, "<i8")
        # One metadata key only: several come out in random order.
        data = safetensors.numpy.save(tensors, metadata={FORMAT: text})
        if _header_size(data) > MAX_HEADER_BYTES:
            raise StateError(
                f"the state to be saved has a header of {_header_size(data)} bytes; "
                f"{MAX_HEADER_BYTES} are the most. Shorten the parameters' names."
            )
        body = data[:-_DIGEST_BYTES]
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the state") -> State:
        """Read what `to_bytes` wrote, trusting nothing: digest, then structure, then contents.

        Args:
            data: the bytes.
            source: what to call them in an error, such as the file's name.

        Raises:
            StateError: anything at all is wrong with them.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise StateError(f"{source} takes bytes, but got {type(data).__name__}.")
        data = bytes(data)
        if len(data) < 8 + _DIGEST_BYTES:
            raise StateError(
                f"{source} is no AutoClip state: it has only {len(data)} bytes. "
                "It may be empty or cut off."
            )
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            raise StateError(
                f"{source} is damaged, cut off, or no AutoClip state: its last {_DIGEST_BYTES} "
                "bytes are not the SHA-256 digest of what stands before them. "
                "Load another copy or an earlier checkpoint."
            )
        header = _read_header(data, source)
        metadata = _read_metadata(header, source)
        groups = metadata["groups"]
        _check_layout(header, len(groups), source)
        try:
            tensors = safetensors.numpy.load(data)
        except Exception as error:  # its parser has its own exception class, and more
            raise StateError(f"{source} is no valid safetensors file: {error}") from error
        state = cls(
            rule=metadata["rule"],
            global_clipping=metadata["global_clipping"],
            framework=metadata["framework"],
            library_version=metadata["library_version"],
            groups=tuple(
                GroupState(
                    settings=group["settings"],
                    parameters=tuple(
                        ParameterInfo(p["name"], None if p["shape"] is None else tuple(p["shape"]))
                        for p in group["parameters"]
                    ),
                    values=tensors[f"groups.{i}.values"],
                    lengths=tensors[f"groups.{i}.lengths"],
                    recorded=tensors[f"groups.{i}.recorded"],
                )
                for i, group in enumerate(groups)
            ),
        )
        state._check(source)
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
        # As text: of an array "equal" is another array.
        if not isinstance(state_dict, Mapping) or str(state_dict.get("format")) != FORMAT:
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else state_dict
            raise StateError(
                f'{source} takes a dict with the keys "format", "version" and "data", as a '
                f"clipper's state_dict() returns it, but got {got!r:.200}."
            )
        _check_version(state_dict.get("version"), source)
        if "data" not in state_dict:
            raise StateError(f'{source} has no "data": it was saved by something else.')
        return cls.from_bytes(state_dict["data"], source)

    # -- loading -----------------------------------------------------------------------------

    def fit_to(self, current: State, source: str = "the state", stacklevel: int = 2) -> State:
        """Match this saved state to the clipper that loads it.

        Groups and parameters are matched by order. The histories come from this state, the
        settings from `current`; where they differ, one warning says so. Of a window longer than
        the current `history_length` the newest values stay.

        Args:
            current: the state of the clipper as it is now.
            source: what to call this state in messages.
            stacklevel: how many calls up the warning points, as in `warnings.warn`.

        Returns:
            `current` with this state's histories.

        Raises:
            StateError: another rule, mode, number of groups or parameters, or a shape that
                cannot be the same parameter's.
        """
        if self.rule != current.rule:
            raise StateError(
                f"{source} holds a clipper with the {self.rule} rule, but it is loaded into one "
                f"with the {current.rule} rule. Load it into a clipper of the same class."
            )
        if self.global_clipping != current.global_clipping:
            raise StateError(
                f"{source} was saved with global_clipping={self.global_clipping}, but it is "
                f"loaded into a clipper with global_clipping={current.global_clipping}. A history "
                "of one mode says nothing about the other: make the clipper with the same mode."
            )
        if len(self.groups) != len(current.groups):
            raise StateError(
                f"{source} has {len(self.groups)} parameter groups, but the clipper has "
                f"{len(current.groups)}. Groups are matched by order: make the same ones."
            )
        same_framework = self.framework == current.framework
        groups, differences = [], []
        for i, (saved, ours) in enumerate(zip(self.groups, current.groups)):
            if len(saved.parameters) != len(ours.parameters):
                raise StateError(
                    f"{source} has {len(saved.parameters)} parameters in group {i}, but the "
                    f"clipper has {len(ours.parameters)}. Load it for the same model."
                )
            for k, (theirs, mine) in enumerate(zip(saved.parameters, ours.parameters)):
                if not theirs.fits(mine, same_framework):
                    what = "shapes" if same_framework else "numbers of elements"
                    raise StateError(
                        f"Parameter {k} of group {i} does not match: {source} has {theirs}, the "
                        f"clipper has {mine}; their {what} differ. Load it for the same model."
                    )
            differences += [
                f"{name}={saved.settings[name]!r} there and {value!r} here (group {i})"
                for name, value in ours.settings.items()
                if saved.settings.get(name, value) != value
            ]
            groups.append(_with_histories(ours, saved))
        if differences:
            warnings.warn(
                f"{source} was saved with other settings, and the clipper's own stay in force: "
                + "; ".join(differences)
                + ".",
                stacklevel=stacklevel,
            )
        return replace(current, groups=tuple(groups))

    # -- checks ------------------------------------------------------------------------------

    def _check(self, source: str) -> None:
        def refuse(fault: str) -> NoReturn:
            raise StateError(f"{source} is not a valid AutoClip state: {fault}.")

        if self.rule not in RULES:
            refuse(
                f"it has the rule {self.rule!r}, and this version of autoclip-core knows "
                f"{', '.join(map(repr, sorted(RULES)))}"
            )
        rule = RULES[self.rule]
        if self.global_clipping and len(self.groups) != 1:
            refuse(f"global clipping has one group, but there are {len(self.groups)}")
        for i, group in enumerate(self.groups):
            try:
                names = (*rule.setting_names(), "history_length")
                check_known_settings(group.settings, names, f"group {i}")
                history_length = check_history_length(group.settings["history_length"])
                rule.from_settings({name: group.settings[name] for name in rule.setting_names()})
            except KeyError as error:
                refuse(f"group {i} lacks the setting {error}")
            except (TypeError, ValueError) as error:
                refuse(f"group {i}: {error}")
            rows = 1 if self.global_clipping else len(group.parameters)
            values, lengths, recorded = group.values, group.lengths, group.recorded
            if lengths.shape != (rows,) or recorded.shape != (rows,):
                refuse(
                    f"group {i} has {rows} rows, but lengths of shape {lengths.shape} and "
                    f"recorded of shape {recorded.shape}"
                )
            if (lengths < 0).any() or (lengths > np.minimum(recorded, history_length)).any():
                refuse(
                    f"in group {i} a window is longer than its history_length "
                    f"({history_length}) or than what it recorded, or is of negative length"
                )
            if (recorded > _MAX_RECORDED).any():
                refuse(f"a row of group {i} recorded more than {_MAX_RECORDED} norms")
            # A Python sum: lengths near 2**63 must not wrap around to the right number.
            if values.shape != (sum(lengths.tolist()),):
                refuse(f"group {i} has values of shape {values.shape} for {lengths.tolist()!r:.80}")
            if not ((values >= SMALLEST_NORM) & (values < np.inf)).all():
                refuse(f"group {i} holds a norm that is zero, negative, NaN or infinite")


def _with_histories(ours: GroupState, saved: GroupState) -> GroupState:
    keep = ours.settings["history_length"]
    return GroupState.from_windows(
        ours.settings,
        ours.parameters,
        [window[-keep:] for window in saved.windows()],
        saved.recorded,
    )


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constants(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _parse_json(text: str | bytes, source: str, what: str) -> Any:
    # RecursionError: "[[[[…" nested deeply enough exhausts Python's stack, not ours to die of.
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{source} has {what} that is no valid JSON: {error}") from error


def _read_header(data: bytes, source: str) -> dict[str, Any]:
    size = _header_size(data)
    if size > MAX_HEADER_BYTES or 8 + size > len(data) - _DIGEST_BYTES:
        raise StateError(
            f"{source} announces a header of {size} bytes; at most {MAX_HEADER_BYTES} are read, "
            f"and the file has {len(data)}."
        )
    header = _parse_json(data[8 : 8 + size], source, "a header")
    if not isinstance(header, dict):
        raise StateError(f"{source} has a header that is no JSON object.")
    return header


def _read_metadata(header: dict[str, Any], source: str) -> dict[str, Any]:
    entries = header.pop("__metadata__", None)
    if (
        not isinstance(entries, dict)
        or set(entries) != {FORMAT}
        or not isinstance(entries[FORMAT], str)
    ):
        raise StateError(
            f'{source} is no AutoClip state: its only metadata key must be "{FORMAT}".'
        )
    metadata = _parse_json(entries[FORMAT], source, "metadata")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise StateError(f'{source} is no AutoClip state: its format is not "{FORMAT}".')
    _check_version(metadata.get("version"), source)
    fault = _metadata_fault(metadata)
    if fault:
        raise StateError(f"{source} is not a valid AutoClip state: {fault}.")
    return metadata


def _check_version(version: object, source: str) -> None:
    if type(version) is not int or version < 1:
        raise StateError(f"{source} has the version {version!r}; a version is an int ≥ 1.")
    if version > VERSION:
        raise StateError(
            f"{source} has version {version} of the state format, and this autoclip-core reads "
            f"up to {VERSION}. Upgrade it: pip install -U autoclip-core"
        )


def _metadata_fault(metadata: dict[str, Any]) -> str | None:
    """What is wrong with the types and names in the metadata, if anything."""
    if set(metadata) != _METADATA_KEYS:
        return f"its metadata has the keys {sorted(metadata)}, not {sorted(_METADATA_KEYS)}"
    for name in ("rule", "framework", "library_version"):
        if not isinstance(metadata[name], str):
            return f"{name} is {metadata[name]!r}, not a string"
    if not isinstance(metadata["global_clipping"], bool):
        return f"global_clipping is {metadata['global_clipping']!r}, not true or false"
    if not isinstance(metadata["groups"], list):
        return "groups is not a list"
    for i, group in enumerate(metadata["groups"]):
        if not isinstance(group, dict) or set(group) != {"settings", "parameters"}:
            return f"group {i} does not consist of settings and parameters"
        if not isinstance(group["settings"], dict) or not isinstance(group["parameters"], list):
            return f"group {i} has settings that are no object, or parameters that are no list"
        for parameter in group["parameters"]:
            if not isinstance(parameter, dict) or set(parameter) != {"name", "shape"}:
                return f"a parameter of group {i} does not consist of name and shape"
            name, shape = parameter["name"], parameter["shape"]
            if not (name is None or isinstance(name, str)):
                return f"a parameter of group {i} has the name {name!r}, not a string or null"
            if shape is not None and not (
                isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
            ):
                return f"a parameter of group {i} has the shape {shape!r}, not sizes or null"
    return None


def _check_layout(header: dict[str, Any], groups: int, source: str) -> None:
    """Exact tensor names, dtypes and ranks, before any other parser sees the file."""
    dtypes = {_DIGEST: "U8"}
    for i in range(groups):
        dtypes |= {
            f"groups.{i}.values": "F32",
            f"groups.{i}.lengths": "I64",
            f"groups.{i}.recorded": "I64",
        }
    if set(header) != set(dtypes):
        strange = sorted(set(header) ^ set(dtypes))
        raise StateError(f"{source} has missing or unknown tensors: {', '.join(strange)}.")
    end = 0
    for name, entry in header.items():
        if (
            not isinstance(entry, dict)
            or set(entry) != {"dtype", "shape", "data_offsets"}
            or entry["dtype"] != dtypes[name]
            or not isinstance(entry["shape"], list)
            or len(entry["shape"]) != 1
            or not isinstance(entry["data_offsets"], list)
            or [type(n) for n in (*entry["shape"], *entry["data_offsets"])] != [int] * 3
        ):
            raise StateError(f"{source} has a tensor {name!r} that is not {dtypes[name]}[n].")
        end = max(end, entry["data_offsets"][1])
    if header[_DIGEST]["shape"] != [_DIGEST_BYTES] or header[_DIGEST]["data_offsets"][1] != end:
        raise StateError(f"{source} does not end with its digest of {_DIGEST_BYTES} bytes.")
