"""How a clipper's state travels: in Keras files, TensorFlow checkpoints, copies and pickles."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from autoclip.core import Rule, Saveable, State
from autoclip.core.adapter import (
    RULES,
    AttachmentHandle,
    ClipperSettings,
    GroupSettings,
    ParameterInfo,
    make_state,
    split_state,
    warn_user,
)
from autoclip.tf._groups import GroupPattern
from autoclip.tf._paths import paths_in, with_paths_of
from autoclip.tf._private import (
    KerasSaveable,
    Trackable,
    name_of,
    saved_by_keras,
    saving_for_inference,
    saving_for_orbax,
    tf_variable,
    variables_beside,
)
from autoclip.tf._step import Pipeline
from autoclip.tf._sums import StepSums

__all__ = ["CHECKPOINT_KEY", "STATE", "KerasSaving", "PendingState"]

SavedT = TypeVar("SavedT", bound="KerasSaving")

STATE = "state"
"""Under which name Keras's and TensorFlow's files hold a clipper's state."""
CHECKPOINT_KEY = f"/.ATTRIBUTES/{STATE}"
"""How its name ends in a `tf.train.Checkpoint`."""

_ASSET = "history.autoclip"


class PendingState(NamedTuple):
    """A state that was loaded before the clipper knew its variables, and waits for them."""

    state: State
    source: str
    is_partial: bool
    """Whether variables that do not fit start empty, instead of an error."""


class KerasSaving(Saveable, KerasSaveable, Trackable):
    """The part of a clipper that saves and loads, for itself and when an optimizer is saved."""

    _settings: ClipperSettings
    _patterns: list[GroupPattern]
    _pipeline: Pipeline | None
    _variables: list[tf.Variable]
    _pending: PendingState | None
    _handle: AttachmentHandle | None
    _attached_to: weakref.ref[Any] | None
    _warned: bool
    _sums: StepSums

    def _start(self, settings: ClipperSettings, overrides: list[GroupPattern]) -> None:
        """Begin without variables and without a history."""
        self._settings, self._patterns = settings, overrides
        self._pipeline = self._pending = self._handle = self._attached_to = None
        self._variables = []
        self._updates, self._unseen, self._warned, self._late = 0, False, False, False
        self._sums = StepSums()

    # -- state -------------------------------------------------------------------------------

    def _state_of(self, pipeline: Pipeline, *contents: Any) -> State:
        """The state with `contents`, windows and counts; without them the description."""
        return make_state(
            "tensorflow",
            self._settings.default.rule.name,
            self._settings.mode,
            [group.settings for group in pipeline.groups],
            [
                [
                    ParameterInfo(name_of(each), tuple(tf_variable(each).shape.as_list()))
                    for each in group.variables
                ]
                for group in pipeline.groups
            ],
            pipeline.rows_of,
            *contents,
        )

    @staticmethod
    def _write(pipeline: Pipeline, state: State) -> None:
        pipeline.rows.write(*split_state(state, pipeline.rows_of, len(pipeline.rows)))

    def export_state(self) -> State:
        if self._pipeline is not None:
            return self._state_of(self._pipeline, *self._pipeline.rows.read())
        if self._pending is not None:
            return self._pending.state
        raise ValueError(
            f"This {type(self).__name__} has no state yet: it does not know its variables. Call "
            "build(variables) first, or take a step."
        )

    def describe_state(self) -> State:
        return self.export_state() if self._pipeline is None else self._state_of(self._pipeline)

    def _adopt_state(self, state: State, source: str, is_partial: bool = False) -> None:
        if self._pipeline is None:
            # Without variables only the mode can be checked. The rest waits for them.
            state.match(replace(state, mode=self._settings.mode), source)
            self._pending, self._late = PendingState(state, source, is_partial), False
        else:
            pending = PendingState(state, source, is_partial)
            self.commit_state(self._matched(pending, self._pipeline))

    def _matched(self, pending: PendingState, pipeline: Pipeline) -> State:
        """The state of a clipper with this pipeline and the histories of a loaded one."""
        current = self._state_of(pipeline)
        saved = with_paths_of(pending.state, current)
        # A model whose layers were renamed has no path of the saved ones.
        others: set[str] = set()
        if paths_in(saved).isdisjoint(paths_in(current)):
            variables = [each for group in pipeline.groups for each in group.variables]
            others = {name_of(each) for each in variables_beside(variables)}
        return saved.match(current, pending.source, partial=pending.is_partial, others=others)

    def commit_state(self, state: State) -> None:
        assert self._pipeline is not None
        self._write(self._pipeline, state)
        self._late = False

    def _has_history(self) -> bool:
        """Whether some norm was recorded, here or in a state that waits for the variables."""
        if self._pipeline is None and self._pending is None:
            return False
        return any(group.recorded.any() for group in self.export_state().groups)

    def _bytes(self) -> bytes:
        if self._pipeline is None and self._pending is None:
            return b""
        return self.export_state().to_bytes()

    def _load_bytes(self, data: bytes, source: str, is_partial: bool) -> None:
        if data:
            self._adopt_state(State.from_bytes(data, source), source, is_partial)

    # Keras's own saving, in `model.save`, `save_weights` and the callbacks that call them.

    def _obj_type(self) -> str:
        # Keras's list of kinds is closed. Each time it makes an object of the kind and leaves out
        # what that has, too; a loss is made fast, an optimizer has variables.
        return "Loss"

    def __dir__(self) -> Iterable[str]:
        # Keras evaluates every attribute of what it saves or loads, in search of more to save.
        # The state is all there is, and properties such as `thresholds` take time.
        return () if saved_by_keras() else super().__dir__()

    def save_own_variables(self, store: Any) -> None:
        """Write the state into a Keras store; Keras calls this."""
        store[STATE] = np.frombuffer(self._bytes(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Take over the state from a Keras store; Keras calls this.

        Rows belong to variables, and are matched by their paths: layers may have been frozen or
        unfrozen since. What does not match starts empty, with a warning.

        Raises:
            StateError: the state is damaged, or of another rule or mode. Nothing has changed.
        """
        if STATE in store.keys():  # noqa: SIM118 (a store has no `in`)
            data = np.asarray(store[STATE], np.uint8).tobytes()
            self._load_bytes(data, "the Keras checkpoint", is_partial=True)
        else:
            self._warn("The Keras checkpoint")

    def save_assets(self, folder: str) -> None:
        """Write the state into a folder of Keras; Keras calls this.

        Only for Orbax, which gets nothing else of the clipper: elsewhere the state is among the
        weights.
        """
        if saving_for_orbax():
            Path(folder, _ASSET).write_bytes(self._bytes())

    def load_assets(self, folder: str | None) -> None:
        """Take over the state from a folder of Keras, if it is there; Keras calls this.

        Raises:
            StateError: as for `load_own_variables`.
        """
        if folder is not None and Path(folder, _ASSET).exists():
            data = Path(folder, _ASSET).read_bytes()
            self._load_bytes(data, "the Orbax checkpoint", is_partial=True)

    def _warn(self, source: str) -> None:
        """Warn, once, of a checkpoint without a history."""
        if not self._warned:
            self._warned = True
            warn_user(
                f"{source} holds no history of AutoClip: it was saved without. The clipper keeps "
                "the history that it has."
            )

    # tf.train.Checkpoint.

    def _warn_without_history(self, path: str) -> None:
        """Warn if the `tf.train.Checkpoint` at `path` has no clipper's state."""
        if not any(name.endswith(CHECKPOINT_KEY) for name, _ in tf.train.list_variables(path)):
            self._warn(f"The tf.train.Checkpoint {path}")

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        # A checkpoint has the state, as one string. A SavedModel has the variables themselves: the
        # graphs in it, such as a signature that trains, read and write them.
        children: dict[str, Any] = super()._trackable_children(save_type, **options)
        if save_type == "savedmodel":
            children |= {f"variable_{i}": each for i, each in enumerate(self._variables)}
        return children

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        if saving_for_inference():
            return {STATE: tf.constant(b"")}
        if not tf.executing_eagerly():
            raise RuntimeError(
                "A checkpoint with a clipper is written outside of any tf.function. Inside, it "
                "would hold the history of the moment when the function was traced."
            )
        return {STATE: tf.constant(self._bytes())}

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        if not saving_for_inference():
            data = restored_tensors[STATE].numpy()
            self._load_bytes(data, "the tf.train.Checkpoint", is_partial=False)

    # -- configurations, copies and pickles --------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The settings, from which `from_config` makes such a clipper without a history."""
        default = self._settings.default
        config = dict(default.settings)
        rule = {name: config.pop(name) for name in default.rule.setting_names()}
        groups = [
            {"match": each.match, **_differences(each.settings, default)} for each in self._patterns
        ]
        return {
            **self._rule_config(rule),
            **config,
            **self._settings.mode.arguments,
            "group_settings": groups or None,
        }

    def _rule_config(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"rule": {"name": self._settings.default.rule.name, **settings}}

    @classmethod
    def from_config(cls: type[SavedT], config: Mapping[str, Any]) -> SavedT:
        """Make a clipper from what `get_config` returned.

        Raises:
            ValueError: the rule is not registered in this process, or a setting is wrong.
        """
        config = dict(config)
        if "rule" in config:
            config["rule"] = _rule_from_config(config["rule"])
        return cls(**config)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to no variables as yet. It has the history that its variables will get.
        return _copied, (type(self), self._settings, self._patterns, self._bytes())


def _copied(
    cls: type[SavedT], settings: ClipperSettings, overrides: list[GroupPattern], data: bytes
) -> SavedT:
    clipper = cls.__new__(cls)
    clipper._start(settings, overrides)
    clipper._load_bytes(data, "the copied clipper", is_partial=True)
    return clipper


def _differences(settings: GroupSettings, default: GroupSettings) -> dict[str, Any]:
    usual = default.settings
    return {name: value for name, value in settings.settings.items() if value != usual[name]}


def _rule_from_config(config: Mapping[str, Any]) -> Rule:
    """The rule that `get_config` wrote down.

    Raises:
        ValueError: no rule of this name is registered, or a setting is wrong.
    """
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in RULES:
        raise ValueError(
            f"The configuration has the rule {name!r:.200}, which is not registered here. Import "
            "the module that defines it, with @register_rule above its class, before loading."
        )
    return RULES[name].from_settings(settings)
