"""AutoClip's framework-free core: histories of gradient norms, rules and the state format.

Gradients → norms → rows of the history → thresholds → coefficients. The adapters
`autoclip.torch` and `autoclip.tf` add the first step and the last; everything that both need is
decided here. It is usable on its own, with NumPy:

>>> from autoclip.core import History, Quantile
>>> history = History(rows=1, rule=Quantile(0.9), history_length=1000)
>>> report = history.record([3.0])
>>> report.coefficients
array([1.])
"""

from autoclip.core._installation import refuse_legacy_installation

refuse_legacy_installation()

from autoclip.core._errors import (  # noqa: E402
    StateError,
    nonfinite_message,
    second_clipper_message,
)
from autoclip.core._files import MAX_FILE_BYTES  # noqa: E402
from autoclip.core._history import History, Report  # noqa: E402
from autoclip.core._logging import log_values  # noqa: E402
from autoclip.core._quantile import Quantile  # noqa: E402
from autoclip.core._rules import RULES, Rule, Tracker, register_rule  # noqa: E402
from autoclip.core._saving import Saveable  # noqa: E402
from autoclip.core._settings import (  # noqa: E402
    DEFAULT_DEVIATIONS,
    DEFAULT_HISTORY_LENGTH,
    DEFAULT_QUANTILE,
    OnNonfinite,
    check_flag,
    check_group_settings,
    check_history_length,
    check_known_settings,
    check_on_nonfinite,
)
from autoclip.core._standard import Standard  # noqa: E402
from autoclip.core._state import GroupState, ParameterInfo, State  # noqa: E402
from autoclip.core._version import __version__  # noqa: E402
from autoclip.core._windows import SMALLEST_NORM, Windows  # noqa: E402

__all__ = [
    "DEFAULT_DEVIATIONS",
    "DEFAULT_HISTORY_LENGTH",
    "DEFAULT_QUANTILE",
    "MAX_FILE_BYTES",
    "RULES",
    "SMALLEST_NORM",
    "GroupState",
    "History",
    "OnNonfinite",
    "ParameterInfo",
    "Quantile",
    "Report",
    "Rule",
    "Saveable",
    "Standard",
    "State",
    "StateError",
    "Tracker",
    "Windows",
    "__version__",
    "check_flag",
    "check_group_settings",
    "check_history_length",
    "check_known_settings",
    "check_on_nonfinite",
    "log_values",
    "nonfinite_message",
    "register_rule",
    "second_clipper_message",
]
