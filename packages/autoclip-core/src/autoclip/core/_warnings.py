"""Warnings that point at the user's own line, however many frames frameworks put in between."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# Hooks, steps and savers of these call us; how many frames that makes depends on their versions.
_FRAMEWORKS = frozenset(
    {
        "accelerate",
        "autoclip",
        "contextlib",
        "deepspeed",
        "keras",
        "lightning",
        "pytorch_lightning",
        "tensorflow",
        "tf_keras",
        "torch",
        "transformers",
    }
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and point at the innermost line outside of AutoClip and the frameworks it hooks into.

    Args:
        message: the text.
        category: the class of the warning.
    """
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None and _package(frame) in _FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
