"""The clippers that the trainers' callbacks make from their settings."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoclip.core import Rule
from autoclip.torch._attachment import check_optimizer
from autoclip.torch._clipper import Clipper, QuantileClip
from autoclip.torch._parameters import clipped_inside, names_in
from autoclip.torch._trainers.engine import EngineClipper


class Clippers:
    """Clippers that live as long as their optimizers or engines.

    A callback may be used for several models in turn, and a clipper holds its parameters. Copies
    of a callback, also in other processes, have no clippers.

    Args:
        clippers: the first ones.
    """

    def __init__(self, clippers: Iterable[Clipper | EngineClipper] = ()) -> None:
        self._references = [weakref.ref(clipper) for clipper in clippers]

    def __iter__(self) -> Iterator[Clipper | EngineClipper]:
        return (each for reference in self._references if (each := reference()) is not None)

    def __reduce__(self) -> tuple[type[Clippers], tuple[()]]:
        return Clippers, ()


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
        self, clipper_class: type[Clipper] | None, rule: Rule | None, settings: dict[str, Any]
    ) -> None:
        if clipper_class is not None and rule is not None:
            raise TypeError(
                "AutoClipCallback needs a clipper class with its settings, or rule=..., not both."
            )
        self._class: type[Clipper] = clipper_class or QuantileClip if rule is None else Clipper
        self._settings = settings if rule is None else {"rule": rule, **settings}
        self._is_default = clipper_class is None and not self._settings
        self._made = Clippers()
        # A wrong setting is to be found here, not after the model has been loaded and moved.
        made = self._class([torch.zeros(1, device="cpu", requires_grad=True)], **self._settings)
        # An engine takes the rule itself, so the class's settings without those of the rule.
        self._rule = made._settings.default.rule

    def attach(
        self, optimizers: Sequence[Optimizer], model: Any, unwrapped: nn.Module | None
    ) -> list[Clipper | EngineClipper]:
        """The clippers of a trainer's optimizers, or of the engine around its model.

        An optimizer without a clipper gets one now. Without settings, and if any optimizer came
        with a clipper, the user has chosen those that are clipped, and none is added.

        Args:
            optimizers: all that the trainer has.
            model: its model, which may be a DeepSpeed engine or an FSDP1 module.
            unwrapped: gives the parameters their names; None for none.

        Raises:
            TypeError: an optimizer is not torch's.
            ValueError: an engine clips, and the settings ask for something else than global
                clipping.
            RuntimeError: an optimizer or engine has a clipper already, and settings were given for
                another one; or see `autoclip.torch.deepspeed.attach`.

        If it raises, no optimizer has got a clipper.
        """
        if is_deepspeed(model):
            from autoclip.torch import deepspeed

            return [self._attached(model, deepspeed.attach, model, **self._engine_settings)]
        if self._is_default and any(self._is_foreign(each) for each in optimizers):
            optimizers = [each for each in optimizers if self._present(each) is not None]
        if is_fsdp1(model):
            from autoclip.torch import fsdp

            return [
                self._attached(each, fsdp.attach, model, each, **self._engine_settings)
                for each in optimizers
            ]
        for optimizer in optimizers:
            if self._present(optimizer) is None:
                check_optimizer(optimizer, "as_optimizer")
        clippers = [self._attached(each, self._as_optimizer, each) for each in optimizers]
        if unwrapped is not None:
            name_parameters(clippers, unwrapped)
        return clippers

    def _as_optimizer(self, optimizer: Any) -> Any:
        return self._class.as_optimizer(optimizer, **self._settings).clipper

    def _attached(self, owner: Any, attach: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """The clipper that an optimizer or engine has and keeps, or else a new one."""
        clipper = self._present(owner)
        if clipper is None:
            clipper = attach(*args, **settings)
            self._made = Clippers((*self._made, clipper))
        return clipper

    def _present(self, owner: Any) -> Any:
        """The clipper that an optimizer or engine has and keeps; None if it is to get one."""
        present = clipper_of(owner)
        return present if self._is_default or not self._is_foreign(owner) else None

    def _is_foreign(self, owner: Any) -> bool:
        """True if it came with a clipper."""
        present = clipper_of(owner)
        return present is not None and all(present is not clipper for clipper in self._made)

    @property
    def _engine_settings(self) -> dict[str, Any]:
        own = {k: v for k, v in self._settings.items() if k not in self._rule.setting_names()}
        return {"global_clipping": False, **own, "rule": self._rule}


def clipper_of(owner: Any) -> Any:
    """The clipper of an engine or optimizer, or of an optimizer inside that one; None for none."""
    # Not getattr: an engine passes on the attributes of its module.
    present = vars(owner).get("clipper")
    if present is None and isinstance(owner, Optimizer):
        found = clipped_inside(owner)
        present = None if found is None else vars(found[1])["clipper"]
    return present


def name_parameters(clippers: Iterable[Clipper | EngineClipper], model: nn.Module) -> None:
    """Give the model's names to parameters that the clippers got without one."""
    names = names_in(model)
    for clipper in clippers:
        if isinstance(clipper, Clipper):
            clipper._groups.name_parameters(names)


def is_fsdp1(model: Any) -> bool:
    """True if it is wrapped in FSDP1; does not import FSDP1."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(model, module.FullyShardedDataParallel)


def is_deepspeed(model: Any) -> bool:
    """True if it is a DeepSpeed engine; does not import DeepSpeed."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)
