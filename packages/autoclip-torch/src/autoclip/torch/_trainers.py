"""What the trainers' callbacks share: the clipper that an optimizer gets from their settings."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from autoclip.torch._clipper import Clipper
from autoclip.torch._clippers import QuantileClip, StandardClip

__all__ = ["ClipperChoice", "ClipperClass"]

ClipperClass = type[QuantileClip] | type[StandardClip]


class ClipperChoice:
    """A class of clippers and its settings, to be attached to optimizers that a trainer makes.

    Args:
        clipper_class: None stands for `QuantileClip`.
        settings: of `clipper_class.as_optimizer`.

    Raises:
        TypeError, ValueError: a setting is unknown or wrong.
    """

    def __init__(self, clipper_class: ClipperClass | None, settings: dict[str, Any]) -> None:
        self._class: ClipperClass = clipper_class or QuantileClip
        self._settings = settings
        self._is_default = clipper_class is None and not settings
        self._made: list[Clipper] = []
        # A wrong setting is to be found here, not after the model has been loaded and moved.
        self._class([torch.zeros(1, requires_grad=True)], **settings)

    def attach(self, optimizer: Optimizer) -> Clipper:
        """The optimizer's clipper, which is attached now if the optimizer has none.

        Raises:
            TypeError: it is no torch optimizer.
            RuntimeError: it has a clipper already, and this choice asks for another one.
        """
        present = getattr(optimizer, "clipper", None)
        if present is not None and (
            self._is_default or any(present is clipper for clipper in self._made)
        ):
            return present  # type: ignore[no-any-return]
        clipper: Clipper = self._class.as_optimizer(optimizer, **self._settings).clipper
        self._made.append(clipper)
        return clipper
