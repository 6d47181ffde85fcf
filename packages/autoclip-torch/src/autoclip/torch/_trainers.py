"""What the trainers' callbacks share: the clipper that an optimizer gets from their settings."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from autoclip.core import Rule
from autoclip.torch._clipper import Clipper
from autoclip.torch._named import QuantileClip, StandardClip

__all__ = ["ClipperClass", "ClipperMaker"]

ClipperClass = type[QuantileClip] | type[StandardClip]


class ClipperMaker:
    """Makes clippers with given settings for the optimizers that a trainer makes.

    Args:
        clipper_class: None stands for `QuantileClip`.
        rule: a rule for a plain `Clipper`; not together with `clipper_class`.
        settings: of `as_optimizer`.

    Raises:
        TypeError, ValueError: a setting is unknown or wrong, or there is a class and a rule.
    """

    def __init__(
        self, clipper_class: ClipperClass | None, rule: Rule | None, settings: dict[str, Any]
    ) -> None:
        if clipper_class is not None and rule is not None:
            raise TypeError(
                "AutoClipCallback takes a clipper class with its settings, or rule=..., but got "
                "both."
            )
        self._class: type[Clipper] = clipper_class or QuantileClip if rule is None else Clipper
        self._settings = settings if rule is None else {"rule": rule, **settings}
        self._is_default = clipper_class is None and not self._settings
        self._made: list[Clipper] = []
        # A wrong setting is to be found here, not after the model has been loaded and moved.
        self._class([torch.zeros(1, requires_grad=True)], **self._settings)

    def attach(self, optimizer: Optimizer) -> Clipper:
        """The optimizer's clipper, which is attached now if the optimizer has none.

        Raises:
            TypeError: it is not a torch optimizer.
            RuntimeError: it has a clipper already, and settings were given for another one.
        """
        present = getattr(optimizer, "clipper", None)
        if present is not None and (
            self._is_default or any(present is clipper for clipper in self._made)
        ):
            return present  # type: ignore[no-any-return]
        clipper: Clipper = self._class.as_optimizer(optimizer, **self._settings).clipper  # type: ignore[attr-defined]
        self._made.append(clipper)
        return clipper
