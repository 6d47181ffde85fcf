"""Keras models whose training step is traced once."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def build_optimizer(model: Any) -> None:
    """Let a compiled model's optimizer make its variables before the first step.

    TensorFlow traces a step that makes variables twice, which takes most of a short training. Both
    ways must give the same numbers: tests of `fit` leave it to Keras, and so do all tests under the
    profiles `thorough` and `nightly`.
    """
    optimizer = model.optimizer
    every_way = settings.get_current_profile_name() in ("thorough", "nightly")
    if every_way or not model.built or optimizer is None or optimizer.built:
        return
    if model.trainable_variables:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)
