"""Checks a factory's settings and optimizer class when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from autoclip.core.adapter import make_factory

__all__ = ["optimizer_factory"]

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def optimizer_factory(
    clipper_class: Any,
    optimizer_class: type[OptimizerT],
    args: tuple[Any, ...],
    settings: Mapping[str, Any],
) -> type[OptimizerT]:
    """A factory; see `Clipper.optimizer_factory`."""
    factory = make_factory(clipper_class, optimizer_class, Optimizer, args, settings)
    clipper_class([torch.zeros((), requires_grad=True)], *args, **settings)  # checks the settings
    return factory
