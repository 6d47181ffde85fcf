"""What the TensorFlow tests share: the three ways to run a step, and a small model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

MODES = ("eager", "graph", "xla")


class Steps:
    """A clipper that is called eagerly, in a tf.function, or in one compiled by XLA.

    Args:
        clipper: not built yet.
        shapes: of the variables.
        mode: one of MODES.
        dtype: of the variables.
    """

    def __init__(
        self,
        clipper: Any,
        shapes: Sequence[tuple[int, ...]],
        mode: str,
        dtype: Any = tf.float32,
    ) -> None:
        self.clipper = clipper
        self.variables = [
            tf.Variable(tf.zeros(shape, dtype), name=f"variable_{i}")
            for i, shape in enumerate(shapes)
        ]
        clipper.build(self.variables)
        self._empty = clipper.state_dict()

        def step(gradients: Sequence[Any]) -> list[Any]:
            return [gradient for gradient, _ in clipper(zip(gradients, self.variables))]

        self._step = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")

    def reset(self) -> None:
        self.clipper.load_state_dict(self._empty)

    def __call__(self, *gradients: Any) -> list[Any]:
        given = [
            None
            if gradient is None
            else gradient
            if isinstance(gradient, tf.IndexedSlices)
            else tf.constant(gradient, variable.dtype)
            for gradient, variable in zip(gradients, self.variables, strict=True)
        ]
        return self._step(given)

    def windows(self) -> list[list[float]]:
        state = self.clipper._export_state()
        return [window.tolist() for group in state.groups for window in group.windows()]


@pytest.fixture(scope="session", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def steps() -> type[Steps]:
    return Steps


def make_model(**options: Any) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(1),
        ],
        **options,
    )


@pytest.fixture
def model() -> Callable[..., Any]:
    """Makes equal models of four variables."""
    return make_model


@pytest.fixture(scope="session")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Of 64 samples, whose sizes differ so much that gradients do."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 4)) * np.exp(generator.normal(size=(64, 1)))
    return x.astype(np.float32), x.sum(axis=1, keepdims=True).astype(np.float32)
