"""MultiWorkerMirroredStrategy over two processes: the same as one device with the global batch.

Training is by hand, in a graph: Keras's own `fit` fails under this strategy with any optimizer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip.tf import QuantileClip, StandardClip

CLIPPERS = {
    "parameter-wise": lambda optimizer: QuantileClip.as_optimizer(optimizer, 0.5, 10),
    "global": lambda optimizer: StandardClip.as_optimizer(
        optimizer, 0.5, 10, global_clipping=True, include_current=True, warmup_steps=0
    ),
}
WORKERS, BATCH = 2, 8


def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 4)) * np.exp(generator.normal(size=(64, 1)))
    return x.astype(np.float32), x.sum(axis=1, keepdims=True).astype(np.float32)


def rank():
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def make_model(attach):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="out")(hidden))
    model.compile(attach(keras.optimizers.SGD(0.002, momentum=0.5)), loss="mean_squared_error")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, strategy=None, first=0, last=16):
    """Some steps, with this worker's part of each batch, or with all of it."""
    variables = model.trainable_variables
    optimizer = model.optimizer

    def replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x, training=True) - y)) / BATCH
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    @tf.function
    def step(x, y):
        replica(x, y) if strategy is None else strategy.run(replica, args=(x, y))

    for i in range(first, last):
        parts = [np.split(each, 64 // BATCH)[i % (64 // BATCH)] for each in data()]
        if strategy is not None:
            parts = [np.split(each, WORKERS)[rank()] for each in parts]
        step(*map(tf.constant, parts))
    return model


def save(model, folder, name):
    """A worker's results, for the test to compare."""
    np.savez(folder / f"{name}.npz", *model.get_weights())
    model.optimizer.clipper.save(folder / f"{name}.autoclip")


def work(folder):
    folder = Path(folder)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    for kind, attach in CLIPPERS.items():
        with strategy.scope():
            model = make_model(attach)
        train(model, strategy, 0, 8)
        model.save(folder / f"{kind} {rank()}.keras")
        save(train(model, strategy, 8, 16), folder, f"{kind} {rank()}")
    with strategy.scope():
        loaded = keras.saving.load_model(folder / f"{kind} 0.keras")  # the first worker's, in both
    save(train(loaded, strategy, 8, 16), folder, f"loaded {rank()}")
    refuse(strategy)


def refuse(strategy):
    """One worker's gradient is not finite: both raise, before any update."""
    with strategy.scope():
        weight = tf.Variable([1.0], name="weight")
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1.0), on_nonfinite="raise")
        optimizer.build([weight])

    @tf.function
    def step(slope):
        # TensorFlow asks for the device of a gradient, which one from outside does not have.
        strategy.run(lambda slope: optimizer.apply([1.0 * slope], [weight]), args=(slope,))

    with pytest.raises(tf.errors.InvalidArgumentError, match="The gradient of weight holds NaN"):
        step(tf.constant([np.nan if rank() else 1.0]))
    assert weight.numpy().tolist() == [1.0]


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    outcomes = server.run(work, {"folder": folder}, WORKERS, workers=True)
    assert [outcome.status for outcome in outcomes] == [0] * WORKERS, "\n".join(map(str, outcomes))
    return folder


def weights(folder, name):
    return list(np.load(folder / f"{name}.npz").values())


@pytest.mark.parametrize("kind", CLIPPERS)
def test_equal_to_one_device_with_the_global_batch(folder, kind):
    model = train(make_model(CLIPPERS[kind]))
    worker = make_model(CLIPPERS[kind]).optimizer.clipper
    worker.load(folder / f"{kind} 0.autoclip")
    ours, theirs = (each.export_state().groups[0] for each in (worker, model.optimizer.clipper))
    assert ours.recorded.tolist() == theirs.recorded.tolist() == [16] * len(ours.recorded)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5)
    for mine, expected in zip(weights(folder, f"{kind} 0"), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*CLIPPERS, "loaded"])
def test_both_workers_are_alike_bit_for_bit(folder, kind):
    first, second = ((folder / f"{kind} {i}.autoclip").read_bytes() for i in range(WORKERS))
    assert first == second
    np.testing.assert_equal(weights(folder, f"{kind} 0"), weights(folder, f"{kind} 1"))


def test_a_loaded_run_goes_on_as_if_it_had_never_stopped(folder):
    *_, kind = CLIPPERS
    expected = (folder / f"{kind} 0.autoclip").read_bytes()
    assert (folder / "loaded 0.autoclip").read_bytes() == expected
    np.testing.assert_equal(weights(folder, "loaded 0"), weights(folder, f"{kind} 0"))
