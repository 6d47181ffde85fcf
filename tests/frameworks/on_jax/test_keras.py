"""Keras on its JAX backend, with the lines of docs/backends.md, against a loop in NumPy."""

from __future__ import annotations

import os
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np

from autoclip.core import History, Quantile

DOCS = Path(__file__).parents[3] / "docs"
EXAMPLE = runpy.run_path(str(DOCS / "examples" / "optax_transformation.py"))
GENERATOR = np.random.default_rng(0)
X = (GENERATOR.normal(size=(64, 3)) * np.logspace(-1, 1, 64)[:, None]).astype(np.float32)
Y = X.sum(axis=1, keepdims=True)
RATE = 1e-3


def make_model() -> Any:
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(1, kernel_initializer="zeros", name="out")(inputs)
    page = (DOCS / "backends.md").read_text(encoding="utf-8")
    [block] = [each for each in page.split("```")[1::2] if "class JaxModel(keras.Model)" in each]
    names = {**EXAMPLE, "jax": jax, "keras": keras, "inputs": inputs, "outputs": outputs}
    exec(textwrap.dedent(block.partition("\n")[2]), names)
    model = names["model"]
    model.compile(keras.optimizers.SGD(RATE), "mse")
    return model


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_the_jax_backend_of_keras(tmp_path: Path) -> None:
    model = make_model()
    history = History(rows=2, rule=Quantile(0.9))
    kernel, bias, clipped = np.zeros((3, 1)), np.zeros(1), 0
    for _ in range(2):
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        for x, y in zip(np.split(X, 8), np.split(Y, 8)):
            errors = 2 * (x @ kernel + bias - y) / len(x)
            gradients = [x.T @ errors, errors.sum(axis=0)]
            report = history.record([np.linalg.norm(each) for each in gradients])
            clipped += (report.coefficients < 1).sum()
            kernel = kernel - RATE * report.coefficients[0] * gradients[0]
            bias = bias - RATE * report.coefficients[1] * gradients[1]
        for found, expected in zip(model.trainable_variables, (kernel, bias)):
            np.testing.assert_allclose(found, expected, rtol=1e-4)
        model.save_weights(tmp_path / "model.weights.h5")
        model = make_model()  # a resumed run
        model.load_weights(tmp_path / "model.weights.h5")
    assert clipped > 5
