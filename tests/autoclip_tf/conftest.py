"""Fixtures of the TensorFlow tests: the three ways to run a step, and a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from frameworks import WAYS
from in_tensorflow import Steps
from in_tensorflow import steps as shared_steps
from keras_training import build_optimizer, fit_in_order
from processes import ForkServer

from autoclip.core import History, Quantile, Report, Rule


@pytest.fixture(scope="session", params=WAYS["tensorflow"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def steps() -> Callable[..., Steps]:
    """Makes `Steps` without a history, whose functions are traced once for all tests."""
    return shared_steps


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


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Makes new processes that have imported TensorFlow and Keras, but not autoclip."""
    server = ForkServer(Path(__file__).with_name("devices.py"))
    yield server
    server.close()


class ByHand:
    """Training that clips with NumPy and the core, and updates with a plain Keras optimizer.

    Args:
        model: of mean squared error, as `fit` would train it.
        optimizer: without a clipper.
        rules: one for all variables, or one each.
        history_length: of all rows.
        global_clipping: one row for all variables.
        settings: the history's other settings.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        rules: Rule | Sequence[Rule] = Quantile(0.5),  # noqa: B008 (frozen)
        history_length: int = 1000,
        global_clipping: bool = False,
        **settings: Any,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._rules, self._history_length = rules, history_length
        self._settings = settings
        self._global = global_clipping
        self._history: History | None = None  # until the model has variables
        self.reports: list[Report[Any]] = []

    def gradients(self, x: Any, y: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x, training=True) - y))
        return tape.gradient(loss, self.model.trainable_variables)

    def apply(self, gradients: Sequence[Any]) -> None:
        dense = [
            None if g is None else tf.convert_to_tensor(g).numpy().astype(np.float64)
            for g in gradients
        ]
        norms = [0.0 if g is None else np.linalg.norm(g) for g in dense]
        if self._global:
            norms = [np.linalg.norm(norms)]
        if self._history is None:
            self._history = History(len(norms), self._rules, self._history_length, **self._settings)
        report = self._history.record(norms)
        self.reports.append(report)
        factors = np.broadcast_to(report.coefficients, len(dense))
        variables = self.model.trainable_variables
        clipped = [
            None if g is None else tf.cast(tf.constant(g * factor), variable.dtype)
            for g, factor, variable in zip(dense, factors, variables)
        ]
        self.optimizer.apply(clipped, variables)

    def fit(self, x: Any, y: Any, epochs: int = 1, batch_size: int = 16) -> ByHand:
        for _ in range(epochs):
            for start in range(0, len(x), batch_size):
                batch = slice(start, start + batch_size)
                self.apply(self.gradients(x[batch], y[batch]))
        return self

    @property
    def windows(self) -> list[np.ndarray]:
        assert self._history is not None
        return self._history.read(range(self._history.rows))[0]

    @property
    def clipped(self) -> int:
        """The number of gradients that were scaled down."""
        return sum(int((report.coefficients < 1).sum()) for report in self.reports)

    def assert_equals(self, model: Any, clipper: Any, rtol: float = 1e-5) -> None:
        """A trained model and its clipper came to the same weights, norms and thresholds."""
        for ours, expected in zip(windows(clipper), self.windows, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=rtol)
        last = self.reports[-1]
        np.testing.assert_allclose(clipper.last.thresholds, last.thresholds, rtol=rtol)
        np.testing.assert_allclose(clipper.last.coefficients, last.coefficients, rtol=rtol)
        for ours, expected in zip(model.get_weights(), self.model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=rtol, atol=1e-6)


def windows(clipper: Any) -> list[np.ndarray]:
    state = clipper.export_state()
    return [window for group in state.groups for window in group.windows()]


@pytest.fixture(scope="session", name="by_hand")
def by_hand_fixture() -> type[ByHand]:
    return ByHand


@pytest.fixture(scope="session", name="windows")
def windows_fixture() -> Callable[[Any], list[np.ndarray]]:
    """Of a clipper: the recorded norms of each row, oldest first."""
    return windows


@pytest.fixture(scope="session")
def growing(data: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same in the order of their sizes: from batch to batch gradients grow, and are clipped."""
    x, y = data
    order = np.argsort(np.linalg.norm(x, axis=1))
    return x[order], y[order]


@pytest.fixture
def fit(growing: tuple[np.ndarray, np.ndarray]) -> Callable[..., dict[str, list[float]]]:
    """Trains a compiled model on `growing` in batches of 16, always in the same order.

    Its optimizer is built before, if it can be, unless the first step shall: `built=False`.
    """

    def run(
        model: Any, epochs: int = 1, built: bool = True, batch_size: int = 16, **options: Any
    ) -> dict[str, list[float]]:
        if built:
            build_optimizer(model)
        return fit_in_order(model, *growing, batch_size, epochs=epochs, **options).history

    return run
