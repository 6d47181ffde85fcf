"""Keras models whose training step is traced once, and batches that are prepared once."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from hypothesis import settings


def every_way() -> bool:
    """True under the profiles that leave everything to Keras, as users do."""
    return settings.get_current_profile_name() in ("thorough", "nightly")


def build_optimizer(model: Any) -> None:
    """Let a compiled model's optimizer make its variables before the first step.

    TensorFlow traces a step that makes variables twice, which takes most of a short training. Both
    ways must give the same numbers: tests of `fit` leave it to Keras, and so do all tests under the
    profiles `thorough` and `nightly`.
    """
    optimizer = model.optimizer
    if every_way() or not model.built or optimizer is None or optimizer.built:
        return
    if model.trainable_variables:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)


_BATCHES: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray, Any]] = {}


def fit_in_order(model: Any, x: np.ndarray, y: np.ndarray, batch_size: int, **options: Any) -> Any:
    """Call `model.fit` on arrays without shuffling.

    Keras makes a new pipeline of batches of the arrays in each call, which takes a seventh of a
    short training. All calls share one, except under the profiles `thorough` and `nightly`.
    """
    options = {"shuffle": False, "verbose": 0, **options}
    if every_way():
        return model.fit(x, y, batch_size=batch_size, **options)
    key = id(x), id(y), batch_size
    if key not in _BATCHES:  # which keeps the arrays, and so their ids
        _BATCHES[key] = x, y, tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)
    return model.fit(_BATCHES[key][2], **options)
