"""Saving and loading histories: the same four methods everywhere."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from autoclip.core._state.files import PathLike, read_file, write_file
from autoclip.core._state.state import State


class Saveable(ABC):
    """`state_dict`, `load_state_dict`, `save` and `load` on top of a `State`.

    A subclass, such as another framework's clipper, implements `export_state` and `commit_state`,
    and `describe_state` if windows are expensive to read. Loading reads and checks the state first,
    so if it raises, nothing has changed.
    """

    @abstractmethod
    def export_state(self) -> State:
        """Return the current state."""

    def describe_state(self) -> State:
        """Return the current state, whose windows may be empty: loading does not look at them.

        The mode, the groups with their settings and parameters, and the framework are those of
        `export_state`, which this calls unless a subclass knows a cheaper way.
        """
        return self.export_state()

    @abstractmethod
    def commit_state(self, state: State) -> None:
        """Replace the histories by those of a state that fits. It must not fail.

        Args:
            state: one that was matched to `describe_state()`: it has the same mode, groups,
                settings and parameters.
        """

    def _adopt_state(self, state: State, source: str) -> None:
        """Check that a saved state fits, then commit it."""
        self.commit_state(state.match(self.describe_state(), source))

    def _check_state_dict(self, state_dict: Mapping[str, Any], source: str) -> State:
        """The state in a `state_dict`, for `commit_state`; `source` is its name in messages.

        Raises:
            StateError: it is damaged or does not fit.
        """
        return State.from_dict(state_dict).match(self.describe_state(), source)

    @property
    def has_history(self) -> bool:
        """True if some row has recorded a norm."""
        return any(group.recorded.any() for group in self.export_state().groups)

    def state_dict(self) -> dict[str, Any]:
        """The state as `{"format": "autoclip", "version": 1, "data": bytes}`.

        The bytes are those that `save` writes, in every framework.
        """
        return self.export_state().to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the histories of a state that `state_dict` returned, in any framework.

        The settings stay as they are; one warning says where the saved ones differ.

        Args:
            state_dict: as `state_dict()` returned it.

        Raises:
            StateError: it is damaged or does not fit. Nothing has changed.
        """
        self._adopt_state(State.from_dict(state_dict), "state_dict")

    def save(self, path: PathLike) -> None:
        """Write the state to a file that every framework's clipper loads.

        Raises:
            OSError: the file cannot be written; one that was there is as it was.
        """
        write_file(path, self.export_state().to_bytes())

    def load(self, path: PathLike) -> None:
        """Load the histories of a file that `save` wrote, in any framework.

        The settings stay as they are; one warning says where the saved ones differ.

        Raises:
            StateError: the file is damaged or does not fit. Nothing has changed.
            OSError: it cannot be read.
        """
        name = os.fspath(path)
        self._adopt_state(State.from_bytes(read_file(path), source=name), name)
