"""TensorFlow Probability: a loop inside a graph, against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from recipes import run_recipe

from autoclip.tf import QuantileClip

SCALES = np.exp(np.random.default_rng(0).normal(size=40)).astype(np.float32)
START = np.arange(1.0, 4.0, dtype=np.float32)


def problem() -> dict[str, Any]:
    """A sum of squares times a number that differs from step to step, and its variable."""
    weight, count = tf.Variable(START, name="weight"), tf.Variable(0)

    def loss() -> Any:
        scale = tf.gather(SCALES, count.assign_add(1) - 1)
        return scale * tf.reduce_sum(tf.square(weight))

    return {"loss": loss, "variables": [weight], "count": count}


def expected(steps: int) -> tuple[Any, list[float]]:
    """The weight after some steps, and the norm of each."""
    weight, norms = START.astype(np.float64), []
    for scale in SCALES[:steps]:
        gradient = 2.0 * scale * weight
        norms.append(float(np.linalg.norm(gradient)))
        weight = weight - 0.01 * gradient * min(1.0, np.quantile(norms, 0.5) / norms[-1])
    return weight, norms


def test_recipe() -> None:
    given = problem()
    names = run_recipe("tfp", **given)
    weight, norms = expected(20)
    np.testing.assert_allclose(names["total_norms"], norms, rtol=1e-4)
    np.testing.assert_allclose(given["variables"][0], weight, rtol=1e-4)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_second_call_and_a_resumed_one_go_on(tmp_path: Path, jit_compile: bool) -> None:
    def run(optimizer: Any, weight: Any, loss: Any) -> None:
        tfp.math.minimize(
            loss, 20, optimizer, trainable_variables=[weight], jit_compile=jit_compile
        )

    given = problem()
    for part in range(2):
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(0.01), quantile=0.5)
        [weight] = given["variables"]
        if part:
            tf.train.Checkpoint(optimizer=optimizer).read(str(tmp_path / "first"))
        run(optimizer, weight, given["loss"])
        tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "first"))
    values, norms = expected(40)
    [group] = optimizer.clipper.export_state().groups
    np.testing.assert_allclose(group.windows()[0], norms, rtol=1e-4)
    np.testing.assert_allclose(weight, values, rtol=1e-4)
