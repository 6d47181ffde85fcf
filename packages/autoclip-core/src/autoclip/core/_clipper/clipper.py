"""The base of every framework's clipper: settings, groups, histories and saved state."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

from autoclip.core._clipper.attachment import AttachmentHandle, BaseAttachment
from autoclip.core._clipper.groups import Groups, ParamGroup
from autoclip.core._clipper.histories import Histories
from autoclip.core._rules.rule import Rule
from autoclip.core._settings.settings import ClipperSettings
from autoclip.core._state.saving import Saveable
from autoclip.core._state.state import State
from autoclip.core._step import Report

ArrayT = TypeVar("ArrayT")
GroupsT = TypeVar("GroupsT", bound=Groups[Any])


class BaseClipper(Saveable, Generic[GroupsT, ArrayT]):
    """The part of a clipper that is the same in every framework.

    A framework adds how gradients are measured and scaled, and how an optimizer calls the clipper.
    """

    _groups: GroupsT
    _histories: Histories[Any]
    _attachment: BaseAttachment | None

    # -- settings ----------------------------------------------------------------------------

    @property
    def _settings(self) -> ClipperSettings:
        return self._groups.settings

    @property
    def rule(self) -> Rule:
        """The rule of a group that names no settings of its own."""
        return self._settings.default.rule

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a group that names none of its own, by name."""
        return self._settings.default.settings

    @property
    def global_clipping(self) -> bool:
        """True if one history stands for all parameters together."""
        return self._groups.mode.arguments["global_clipping"]

    @property
    def group_clipping(self) -> bool:
        """True if one history stands for each parameter group."""
        return self._groups.mode.arguments["group_clipping"]

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The parameter groups: `"params"`, `"param_names"` if they have names, and settings.

        Writing a setting, `clipper.param_groups[0]["quantile"] = 0.5`, changes it from the next
        step on, also in compiled and captured steps; a wrong value raises and changes nothing.
        Under global clipping all groups share their settings.
        """
        return self._groups.views(self._histories)

    # -- after a step ------------------------------------------------------------------------

    @property
    @abstractmethod
    def last(self) -> Report[ArrayT]:
        """The last step, row by row: norms, thresholds, coefficients, and names."""

    @property
    @abstractmethod
    def total_norm(self) -> ArrayT:
        """The L2 norm of all gradients together before clipping, at the last step."""

    @property
    @abstractmethod
    def thresholds(self) -> ArrayT:
        """[rows]: the thresholds of the windows as they are now, in the order of `last`."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all norms, as if no step had been made."""

    # -- optimizers --------------------------------------------------------------------------

    @abstractmethod
    def attach(self, optimizer: Any) -> AttachmentHandle:
        """Let `optimizer` call this clipper at each of its steps, and carry its state."""

    @property
    def _is_attached(self) -> bool:
        return self._attachment is not None and self._attachment.optimizer is not None

    def detach(self) -> None:
        """Detach the clipper from its optimizer, as the handle that `attach` returned does.

        The optimizer is as it was before, and the clipper keeps its history. An interrupted call
        can be repeated. Does nothing if the clipper is not attached.

        Raises:
            RuntimeError: PyTorch: parameters have vanished from the optimizer, so the clipper has
                none to keep. It is detached all the same.
        """
        if self._attachment is not None:
            self._attachment.end()

    # -- state -------------------------------------------------------------------------------

    def export_state(self) -> State:
        """See `Saveable.export_state`."""
        self._arrange()
        return self._groups.state(*self._histories.read())

    def describe_state(self) -> State:
        """See `Saveable.describe_state`."""
        return self._groups.state()

    def commit_state(self, state: State) -> None:
        """See `Saveable.commit_state`."""
        self._arrange()
        self._histories.write(*state.by_row())

    def _arrange(self) -> None:
        """Bring the rows of the histories up to date with the groups."""

    def __repr__(self) -> str:
        return self._groups.describe()
