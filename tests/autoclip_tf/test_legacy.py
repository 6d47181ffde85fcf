"""Keras 2 (tf-keras): `gradient_transformers=[clipper]`, as in autoclip 0.2.1's README."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from autoclip.core import History, Quantile
from autoclip.tf import QuantileClip

tf_keras = pytest.importorskip("tf_keras")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tf_keras")


def readme_model():
    tf_keras.utils.set_random_seed(0)
    return tf_keras.models.Sequential(
        [
            tf_keras.layers.Dense(50),
            tf_keras.layers.ReLU(),
            tf_keras.layers.Dense(50),
            tf_keras.layers.ReLU(),
            tf_keras.layers.Dense(1),
        ]
    )


def with_transformer(name, clippers, **options):
    """A legacy optimizer with clippers."""
    legacy = getattr(tf_keras.optimizers.legacy, name)
    return legacy(**options, gradient_transformers=clippers)


def with_override(name, clippers, **options):
    """One of the newer optimizers with a clipper, as in docs/tensorflow.md."""
    [clipper] = clippers

    class Clipped(getattr(tf_keras.optimizers, name)):
        def apply_gradients(self, grads_and_vars, **kwargs):
            return super().apply_gradients(clipper(grads_and_vars), **kwargs)

    return Clipped(**options)


def train(clippers, growing, epochs=2, make=with_transformer, **options):
    model = readme_model()
    model.compile(
        optimizer=make("Adam", clippers, learning_rate=1e-3),
        loss="mean_absolute_error",
        metrics=["accuracy"],
        **options,
    )
    history = model.fit(*growing, 16, epochs=epochs, shuffle=False, verbose=0).history
    return model, history


def test_the_readme_of_0_2_1_as_it_stands(growing, windows):
    clipper = QuantileClip(quantile=0.9, history_length=1000)
    _, history = train([clipper], growing, epochs=5)
    assert history["loss"][-1] < history["loss"][0]
    assert len(history["accuracy"]) == 5
    (group,) = clipper.param_groups
    assert len(group["params"]) == 6
    assert [len(window) for window in windows(clipper)][::2] == [20] * 3  # kernels


@pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("global_clipping", [False, True], ids=["parameter-wise", "global"])
@pytest.mark.parametrize("make", [with_transformer, with_override])
def test_it_clips_as_a_loop_by_hand(growing, windows, run_eagerly, global_clipping, make):
    clipper = QuantileClip(0.5, global_clipping=global_clipping)
    model, _ = train([clipper], growing, run_eagerly=run_eagerly, make=make)
    expected = readme_model()
    expected.build((None, 4))
    optimizer = make("Adam", [lambda pairs: pairs], learning_rate=1e-3)
    history, clipped = None, 0
    for start in [*range(0, 64, 16)] * 2:
        x, y = (each[start : start + 16] for each in growing)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.abs(expected(x, training=True) - y))
        gradients = tape.gradient(loss, expected.trainable_variables)
        norms = [np.linalg.norm(np.asarray(g, np.float64)) for g in gradients]
        norms = [np.linalg.norm(norms)] if global_clipping else norms
        history = history or History(len(norms), Quantile(0.5))
        report = history.record(norms)
        clipped += int((report.coefficients < 1).sum())
        factors = np.broadcast_to(report.coefficients, len(gradients))
        gradients = [gradient * np.float32(f) for gradient, f in zip(gradients, factors)]
        optimizer.apply_gradients(zip(gradients, expected.trainable_variables))
    assert clipped > 2
    np.testing.assert_allclose(clipper.last.thresholds, report.thresholds, rtol=1e-5)
    for mine, his in zip(windows(clipper), history.read(range(history.rows))[0], strict=True):
        np.testing.assert_allclose(mine, his, rtol=1e-5)
    for mine, his in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(mine, his, rtol=1e-5, atol=1e-6)


def test_at_quantile_one_nothing_changes(growing):
    plain, _ = train([], growing)
    clipped, _ = train([QuantileClip(1.0)], growing)
    np.testing.assert_equal(clipped.get_weights(), plain.get_weights())


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize(
    "name", ["model.keras", pytest.param("model.h5", marks=pytest.mark.nightly), "saved_model"]
)
def test_a_reload_drops_the_clipper_in_silence(growing, windows, tmp_path, recwarn, name):
    """Keras 2 saves no transformers, and says nothing. The history travels by `save`, `load`."""
    clipper = QuantileClip(0.5)
    model, _ = train([clipper], growing)
    model.save(tmp_path / name)
    clipper.save(tmp_path / "clipper.safetensors")
    recwarn.clear()
    loaded = tf_keras.models.load_model(tmp_path / name)
    loaded.fit(*growing, 16, verbose=0)
    assert [warning for warning in recwarn if "transformers" in str(warning.message)] == []
    if name != "saved_model":
        assert type(loaded.optimizer) is tf_keras.optimizers.legacy.Adam
    assert getattr(loaded.optimizer, "gradient_transformers", []) in ([], None)
    assert len(windows(clipper)[0]) == 8
    # What helps: a new optimizer, and the clipper's own file.
    again = QuantileClip(0.5)
    again.load(tmp_path / "clipper.safetensors")
    loaded.compile(
        optimizer=tf_keras.optimizers.legacy.Adam(gradient_transformers=[again]), loss="mae"
    )
    loaded.fit(*growing, 16, verbose=0)
    assert len(windows(again)[0]) == 12


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: tf_keras.optimizers.Adam(),
        lambda: tf_keras.optimizers.legacy.Adam(),
        lambda: tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.Adam()),
        lambda: with_override("Adam", [QuantileClip()]),
    ],
    ids=["new", "legacy", "loss scaling", "a subclass"],
)
def test_as_optimizer_says_what_to_do_instead(optimizer):
    made = optimizer()
    before = type(made)
    with pytest.raises(TypeError, match="Optimizers of Keras 2 are not those of Keras 3") as error:
        QuantileClip.as_optimizer(made)
    assert "gradient_transformers=[clipper]" in str(error.value)
    assert "optimizer.apply_gradients(clipper(zip(gradients, variables)))" in str(error.value)
    assert type(made) is before


def test_a_loop_of_ones_own_with_an_optimizer_of_keras_2(growing, windows):
    """The remedy that the error above recommends for optimizers without transformers."""
    model = readme_model()
    optimizer, clipper = tf_keras.optimizers.Adam(1e-3), QuantileClip(0.5)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(clipper(zip(gradients, model.trainable_variables)))

    model.build((None, 4))
    optimizer.build(model.trainable_variables)
    for start in range(0, 64, 16):
        step(*(tf.constant(each[start : start + 16]) for each in growing))
    assert [len(window) for window in windows(clipper)] == [4] * 6
    assert (clipper.last.coefficients.numpy() < 1).any()


@pytest.mark.parametrize("scale", [8.0, 2.0**40])
@pytest.mark.parametrize("make", [with_transformer, with_override])
def test_mixed_precision_of_keras_2(growing, windows, scale, make):
    """The gradients that transformers get are unscaled, and overflows never come to them."""
    policy = tf_keras.mixed_precision.Policy("mixed_float16")
    model = tf_keras.Sequential([tf_keras.layers.Dense(1, dtype=policy)])
    clipper = QuantileClip(0.5)
    inner = make("SGD", [clipper], learning_rate=1e-2)
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=scale)
    model.compile(optimizer=optimizer, loss="mse")
    model.build((None, 4))
    x, y = (each[:16] for each in growing)
    true = np.linalg.norm(2 * x.T @ (x @ model.get_weights()[0] - y) / 16)
    model.train_on_batch(x, y)
    if scale == 8.0:
        np.testing.assert_allclose(windows(clipper)[0], [true], rtol=5e-3)
    else:
        assert float(optimizer.loss_scale) == scale / 2
        assert [len(window) for window in windows(clipper)] == [0, 0]
