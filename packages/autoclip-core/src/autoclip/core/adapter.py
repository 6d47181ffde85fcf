"""Building blocks for backends, in addition to `autoclip.core`.

`autoclip.torch` and `autoclip.tf` are built on these names, and a backend for another framework
can be. A clipper measures norms, records them in its rows, and multiplies the gradients by the
coefficients; its settings, rules, states and messages come from here.
"""

from autoclip.core._clipper.attachment import AttachmentHandle, BaseAttachment, constructor
from autoclip.core._clipper.clipper import BaseClipper
from autoclip.core._clipper.commit import Change, commit
from autoclip.core._clipper.factory import make_factory
from autoclip.core._clipper.groups import Group, Groups, ParamGroup
from autoclip.core._clipper.histories import Histories, Storage, rows_by_storage
from autoclip.core._clipper.logging import check_parameters
from autoclip.core._clipper.notices import EQUAL, MANY, constant_notice, idle_notice, log_and_watch
from autoclip.core._errors import (
    attached_message,
    nonfinite_message,
    not_a_clipper_message,
    second_clipper_message,
)
from autoclip.core._history import BaseTensorHistory
from autoclip.core._ops import SMALLEST_NORM, Ops, is_recorded
from autoclip.core._rules.rule import RULES, rule_instance
from autoclip.core._settings.mode import Mode
from autoclip.core._settings.settings import CLIPPER_SETTINGS, ClipperSettings, GroupSettings, given
from autoclip.core._state.files import CHECKPOINT_FILE, write_file
from autoclip.core._state.state import GroupState, ParameterInfo, State
from autoclip.core._step import numbers_of, record, thresholds_of
from autoclip.core._warnings import warn_user
from autoclip.core._window import Windows, needs_order, pack, unpack

__all__ = [
    "CHECKPOINT_FILE",
    "CLIPPER_SETTINGS",
    "EQUAL",
    "MANY",
    "RULES",
    "SMALLEST_NORM",
    "AttachmentHandle",
    "BaseAttachment",
    "BaseClipper",
    "BaseTensorHistory",
    "Change",
    "ClipperSettings",
    "Group",
    "GroupSettings",
    "GroupState",
    "Groups",
    "Histories",
    "Mode",
    "Ops",
    "ParamGroup",
    "ParameterInfo",
    "State",
    "Storage",
    "Windows",
    "attached_message",
    "check_parameters",
    "commit",
    "constant_notice",
    "constructor",
    "given",
    "idle_notice",
    "is_recorded",
    "log_and_watch",
    "make_factory",
    "needs_order",
    "nonfinite_message",
    "not_a_clipper_message",
    "numbers_of",
    "pack",
    "record",
    "rows_by_storage",
    "rule_instance",
    "second_clipper_message",
    "thresholds_of",
    "unpack",
    "warn_user",
    "write_file",
]
