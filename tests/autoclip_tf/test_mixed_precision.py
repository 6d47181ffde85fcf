"""Loss scaling: the unscaled gradient is clipped and recorded, and an overflow never is."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_training import build_optimizer

from autoclip.core import Quantile
from autoclip.tf import QuantileClip
from autoclip.tf.logging import log_values

FITS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}
ENDLESS = 2.0**120
"""A scale under which every gradient overflows, for more halvings than there are steps."""


@pytest.fixture(params=FITS)
def how(request):
    return FITS[request.param]


def scaled(clipped, rate=1e-2, **settings):
    """A LossScaleOptimizer, and the optimizer in it."""
    options = {name: settings.pop(name) for name in ("initial_scale",) if name in settings}
    inner = keras.optimizers.SGD(rate)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, dynamic_growth_steps=3, **options)
    if clipped:
        assert QuantileClip.as_optimizer(optimizer, **settings) is optimizer
    return optimizer, inner


def half_model(dtype="mixed_float16"):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(8, activation="relu", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )


def test_the_inner_optimizer_is_attached_and_the_outer_one_returned():
    optimizer, inner = scaled(True)
    assert type(optimizer) is keras.optimizers.LossScaleOptimizer
    assert isinstance(inner.clipper, QuantileClip)
    assert optimizer.clipper is inner.clipper
    with pytest.raises(RuntimeError, match="has a clipper already"):
        QuantileClip.as_optimizer(optimizer)
    optimizer, inner = scaled(False)
    QuantileClip().attach(optimizer).remove()
    assert not hasattr(inner, "clipper") and not hasattr(optimizer, "clipper")


@pytest.mark.parametrize("saved", [True, False])
def test_loss_scaling_on_one_side_of_a_checkpoint(model, fit, tmp_path, saved):
    """Keras keeps the state of an inner optimizer elsewhere: it is not loaded, and that is said."""

    def made(is_scaled):
        ours, plain = model(), keras.optimizers.SGD(1e-2)
        optimizer = keras.optimizers.LossScaleOptimizer(plain) if is_scaled else plain
        ours.compile(optimizer=QuantileClip.as_optimizer(optimizer), loss="mse")
        return ours

    first, second = made(saved), made(not saved)
    fit(first)
    first.save_weights(f"{tmp_path}/m.weights.h5")
    second.optimizer.build(second.trainable_variables)
    with pytest.warns(UserWarning, match="with a LossScaleOptimizer, as mixed_float16 adds it"):
        second.load_weights(f"{tmp_path}/m.weights.h5")
    state = second.optimizer.clipper.export_state()
    assert not any(group.recorded.any() for group in state.groups)


def test_in_float32_powers_of_two_change_nothing(model, growing, fit, by_hand, how):
    """Whatever the scale does meanwhile: it doubles every three steps."""
    expected = by_hand(model(), keras.optimizers.SGD(1e-2), Quantile(0.5)).fit(*growing, epochs=2)
    assert expected.clipped > 2
    ours = model()
    optimizer, inner = scaled(True, quantile=0.5)
    ours.compile(optimizer=optimizer, loss="mse", **how)
    fit(ours, epochs=2)
    assert float(optimizer.dynamic_scale) == 2.0**17
    expected.assert_equals(ours, inner.clipper)


def test_keras_wraps_the_optimizer_of_a_mixed_float16_model(growing, by_hand):
    small = [each / 10 for each in growing]  # the scale that Keras begins with overflows nothing
    keras.config.set_dtype_policy("mixed_float16")
    try:
        ours = half_model()
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
        ours.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(ours.optimizer, keras.optimizers.LossScaleOptimizer)
    assert ours.optimizer.inner_optimizer is optimizer
    assert ours.optimizer.clipper is optimizer.clipper
    ours.fit(*small, 16, shuffle=False, verbose=0)

    expected = by_hand(half_model(), keras.optimizers.SGD(1e-2), Quantile(0.5))
    scale = 2.0**15
    for start in range(0, 64, 16):
        x, y = (each[start : start + 16] for each in small)
        with tf.GradientTape() as tape:
            output = tf.cast(expected.model(x, training=True), tf.float32)
            loss = scale * tf.reduce_mean(tf.square(output - y))
        gradients = tape.gradient(loss, expected.model.trainable_variables)
        expected.apply([gradient / scale for gradient in gradients])
    assert expected.clipped > 2
    expected.assert_equals(ours, optimizer.clipper)
    # Without any scaling, and in float32 throughout: the same but for float16's rounding.
    single = by_hand(half_model("float32"), keras.optimizers.SGD(1e-2), Quantile(0.5)).fit(*small)
    np.testing.assert_allclose(expected.windows, single.windows, rtol=5e-3)


@pytest.mark.parametrize(
    ("how", "on_nonfinite"),
    [
        # Under XLA, which compiles the same graph, the one that it treats in another way.
        pytest.param(
            how, choice, marks=[pytest.mark.nightly] * (how == "xla" and choice != "raise")
        )
        for how in FITS
        for choice in ("keep", "zero", "raise")
    ],
    indirect=["how"],
)
def test_overflows_leave_no_trace_whatever_on_nonfinite_says(fit, how, windows, on_nonfinite):
    """The scaler must see the overflow: it skips the step and halves the scale, as ever."""
    ours = half_model()
    optimizer, inner = scaled(True, quantile=1.0, on_nonfinite=on_nonfinite, initial_scale=ENDLESS)
    weights = ours.get_weights()
    ours.compile(optimizer=optimizer, loss="mse", auto_scale_loss=False, **how)
    fit(ours)
    assert float(optimizer.dynamic_scale) == ENDLESS / 2**4
    assert int(inner.iterations) == 0
    np.testing.assert_equal(ours.get_weights(), weights)
    assert [len(window) for window in windows(inner.clipper)] == [0] * 4
    assert log_values(inner.clipper) == {}
    inner.clipper.check()


def test_a_storm_of_overflows_and_then_training(growing, how):
    """The same weights, scales and iterations as without a clipper, step by step."""
    x, y = growing
    results = []
    for clipped in (False, True):
        ours = half_model()
        optimizer, inner = (
            scaled(True, quantile=1.0, initial_scale=2.0**24)
            if clipped
            else scaled(False, initial_scale=2.0**24)
        )
        ours.compile(optimizer=optimizer, loss="mse", auto_scale_loss=False, **how)
        build_optimizer(ours)
        steps = []
        for _ in range(20):
            ours.train_on_batch(x[:16], y[:16])
            steps.append((float(optimizer.dynamic_scale), int(inner.iterations)))
            if clipped:
                recorded = inner.clipper.export_state().groups[0].recorded
                assert recorded.tolist() == [steps[-1][1]] * 4
        results.append((steps, ours.get_weights()))
    assert 0 < results[0][0][-1][1] < 20  # some overflowed, some did not
    assert results[1][0] == results[0][0]
    for mine, his in zip(results[1][1], results[0][1]):
        if how.get("jit_compile"):  # XLA fuses, and rounds, differently
            np.testing.assert_allclose(mine, his, rtol=1e-3, atol=1e-5)
        else:
            np.testing.assert_array_equal(mine, his)


def test_accumulation_within_loss_scaling(model, growing, fit, by_hand):
    expected = by_hand(model(), keras.optimizers.SGD(1e-2), Quantile(0.5)).fit(*growing)
    ours = model()
    inner = keras.optimizers.SGD(1e-2, gradient_accumulation_steps=2)
    optimizer = QuantileClip.as_optimizer(keras.optimizers.LossScaleOptimizer(inner), 0.5)
    ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    fit(ours, batch_size=8)
    expected.assert_equals(ours, inner.clipper)


def test_a_loop_of_ones_own(model, growing, by_hand):
    expected = by_hand(model(), keras.optimizers.SGD(1e-2), Quantile(0.5)).fit(*growing)
    ours = model()
    optimizer, inner = scaled(True, quantile=0.5)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(ours(x, training=True) - y))
            loss = optimizer.scale_loss(loss)
        variables = ours.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    for start in range(0, 64, 16):
        step(*(tf.constant(each[start : start + 16]) for each in growing))
    expected.assert_equals(ours, inner.clipper)
