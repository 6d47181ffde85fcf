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

from autoclip.core import _installation

_installation.refuse_legacy_installation()

from autoclip.core._clipper.logging import log_values  # noqa: E402
from autoclip.core._clipper.max_norm import MaxNorm  # noqa: E402
from autoclip.core._errors import StateError  # noqa: E402
from autoclip.core._numpy.history import History  # noqa: E402
from autoclip.core._ops import SMALLEST_NORM  # noqa: E402
from autoclip.core._rules.quantile import Quantile  # noqa: E402
from autoclip.core._rules.rule import Rule, register_rule  # noqa: E402
from autoclip.core._rules.standard import Standard  # noqa: E402
from autoclip.core._settings.fields import setting  # noqa: E402
from autoclip.core._settings.settings import OnNonfinite, OnSpike, Record  # noqa: E402
from autoclip.core._state.safetensors import MAX_FILE_BYTES  # noqa: E402
from autoclip.core._state.saving import Saveable  # noqa: E402
from autoclip.core._state.state import GroupState, ParameterInfo, State  # noqa: E402
from autoclip.core._step import Report  # noqa: E402
from autoclip.core._version import __version__  # noqa: E402
from autoclip.core._window import Window  # noqa: E402

# Accelerations, which the rules know nothing of.
from autoclip.core._numpy import quantile_trackers as _quantile  # noqa: E402, F401  isort: skip
from autoclip.core._numpy import standard_trackers as _standard  # noqa: E402, F401  isort: skip

__all__ = [
    "MAX_FILE_BYTES",
    "SMALLEST_NORM",
    "GroupState",
    "History",
    "MaxNorm",
    "OnNonfinite",
    "OnSpike",
    "ParameterInfo",
    "Quantile",
    "Record",
    "Report",
    "Rule",
    "Saveable",
    "Standard",
    "State",
    "StateError",
    "Window",
    "__version__",
    "log_values",
    "register_rule",
    "setting",
]
