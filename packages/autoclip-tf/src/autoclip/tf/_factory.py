"""Checks a factory's settings and optimizer class when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import keras

from autoclip.core.adapter import make_factory

__all__ = ["optimizer_factory"]

OptimizerT = TypeVar("OptimizerT")


def optimizer_factory(
    clipper_class: Any,
    optimizer_class: type[OptimizerT],
    args: tuple[Any, ...],
    settings: Mapping[str, Any],
) -> type[OptimizerT]:
    """A factory; see `Clipper.optimizer_factory`."""
    factory = make_factory(
        clipper_class, optimizer_class, keras.optimizers.Optimizer, args, settings
    )
    clipper_class(*args, **settings)  # checks the settings; it knows no variables
    return factory
