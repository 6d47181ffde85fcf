"""A clipper's state in the files of Keras and in TensorFlow's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from autoclip.core import State
from autoclip.core.adapter import warn_user
from autoclip.tf._files.paths import paths_in, with_model_of, with_paths_of
from autoclip.tf._groups import Groups
from autoclip.tf._private import (
    Saved,
    Trackable,
    name_of,
    other_weights,
    saving_for_inference,
    saving_for_orbax,
)

if TYPE_CHECKING:
    from autoclip.tf._clipper import Clipper

STATE = "state"
"""The name of the state in Keras's and TensorFlow's files."""
CHECKPOINT_KEY = f"/.ATTRIBUTES/{STATE}"
"""The end of its name in a `tf.train.Checkpoint`."""
CHILD = "history"
"""The name of a clipper's `SavedState` there."""

_ASSET = "history.autoclip"


class PendingState(NamedTuple):
    """A loaded state that waits for the clipper's variables.

    Attributes:
        state: as it was loaded.
        source: its name in messages.
        is_partial: True if variables that do not fit start empty, instead of an error.
    """

    state: State
    source: str
    is_partial: bool

    def matched(self, groups: Groups) -> State:
        """The state of a clipper with these groups, and with the loaded histories.

        Raises:
            StateError: it does not fit.
        """
        current = groups.state()
        saved = with_paths_of(self.state, current)
        # A model whose layers were renamed has no path of the saved ones.
        others: set[str] = set()
        if paths_in(saved).isdisjoint(paths_in(current)):
            others = {name_of(each) for each in other_weights(groups.parameters())}
            saved = with_model_of(saved, current, others)
        return saved.match(current, self.source, partial=self.is_partial, others=others)


class SavedState(Saved):
    """The part of a clipper that Keras and TensorFlow save and load: its state, as one string.

    Keras finds it in all clippers, and these in all objects that it saves or loads.

    Args:
        clipper: its clipper.

    Attributes:
        variables: the variables of the clipper, for a SavedModel.
    """

    def __init__(self, clipper: Clipper) -> None:
        self._clipper = clipper
        self._warned = False
        self.variables: list[tf.Variable] = []

    def __repr__(self) -> str:
        return f"<the state of a {type(self._clipper).__name__}>"

    def to_bytes(self) -> bytes:
        """The state of the clipper; empty if it has none yet."""
        return self._clipper.export_state().to_bytes() if self._clipper._has_state else b""

    def load_bytes(self, data: bytes, source: str, is_partial: bool = True) -> None:
        """Load a state that `to_bytes` wrote; see `PendingState`."""
        if data:
            state = State.from_bytes(data, source)
            self._clipper._adopt_state(state, source, is_partial)

    # -- Keras: `model.save`, `save_weights`, and the callbacks that call them -----------------

    def save_own_variables(self, store: Any) -> None:
        """Write the state into a Keras store; Keras calls this."""
        store[STATE] = np.frombuffer(self.to_bytes(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Load the state from a Keras store; Keras calls this.

        Rows belong to variables, and are matched by their paths: layers may have been frozen or
        unfrozen since. A row without a match starts empty, with a warning.

        Raises:
            StateError: the state is damaged, or of another mode. Nothing has changed.
        """
        if STATE in store.keys():  # noqa: SIM118 (a store has no `in`)
            data = np.asarray(store[STATE], np.uint8).tobytes()
            self.load_bytes(data, "the Keras checkpoint")
        else:
            self._warn(
                "The Keras checkpoint",
                "or with a LossScaleOptimizer, as mixed_float16 adds it, on one side only; to "
                "change that, use clipper.save(path) and clipper.load(path)",
            )

    def save_assets(self, folder: str) -> None:
        """Write the state into a folder of Keras; Keras calls this.

        Only for Orbax, which gets no other state of the clipper: elsewhere it is among the weights.
        """
        if saving_for_orbax():
            Path(folder, _ASSET).write_bytes(self.to_bytes())

    def load_assets(self, folder: str | None) -> None:
        """Load the state from a folder of Keras, if it is there; Keras calls this.

        Raises:
            StateError: as for `load_own_variables`.
        """
        if folder is not None and Path(folder, _ASSET).exists():
            self.load_bytes(Path(folder, _ASSET).read_bytes(), "the Orbax checkpoint")

    def _warn(self, source: str, reason: str = "") -> None:
        """Warn, once, of a checkpoint without a history for this clipper."""
        if not self._warned:
            self._warned = True
            warn_user(
                f"{source} holds no history of AutoClip for this optimizer: it was saved without"
                + (f", {reason}" if reason else "")
                + ". The clipper keeps the history that it has."
            )

    # -- TensorFlow: `tf.train.Checkpoint`, SavedModels -----------------------------------------

    def look_into(self, path: str) -> None:
        """Warn if the `tf.train.Checkpoint` at `path` has no clipper's state."""
        if not any(name.endswith(CHECKPOINT_KEY) for name, _ in tf.train.list_variables(path)):
            self._warn(f"The tf.train.Checkpoint {path}")

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        # A checkpoint has the state, as one string. A SavedModel has the variables themselves: the
        # graphs in it, such as a signature that trains, read and write them.
        children: dict[str, Any] = super()._trackable_children(save_type, **options)
        if save_type == "savedmodel":
            children |= {f"variable_{i}": each for i, each in enumerate(self.variables)}
        return children

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        if saving_for_inference():
            return {STATE: tf.constant(b"")}
        if not tf.executing_eagerly():
            raise RuntimeError(
                "A checkpoint with a clipper is written outside of any tf.function. Inside, it "
                "would hold the history of the moment when the function was traced."
            )
        return {STATE: tf.constant(self.to_bytes())}

    def _copy_trackable_to_cpu(self, object_map: Any) -> None:
        # An asynchronous checkpoint, whose thread writes the copy while the training goes on.
        # TensorFlow calls this once eagerly and once in a function, which it runs at each save.
        copied = object_map.setdefault(self, _CopiedState())
        tf.py_function(lambda: copied.__dict__.update(data=self.to_bytes()), [], [])

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        if not saving_for_inference():
            data = restored_tensors[STATE].numpy()
            self.load_bytes(data, "the tf.train.Checkpoint", is_partial=False)


class _CopiedState(Trackable):
    """A clipper's state as it was when an asynchronous checkpoint began."""

    data = b""

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {STATE: tf.constant(self.data)}
