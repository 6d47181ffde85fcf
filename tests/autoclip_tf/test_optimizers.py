"""Every optimizer that Keras exports attaches, records what it really got, and trains as ever."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip.core import Quantile
from autoclip.tf import QuantileClip

EXPORTED = {
    name: value
    for name, value in vars(keras.optimizers).items()
    if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
}
# They hold other optimizers, or are nothing but their base.
SPECIAL = {"LossScaleOptimizer", "MultiOptimizer", "Optimizer"}
ORDINARY = sorted(set(EXPORTED) - SPECIAL)
# One of each way to override the base class; each optimizer takes seconds to trace. Other tests
# train with Adam and SGD.
OFTEN = {"Lion", "Muon", "Nadam"}


def train(model, fit, optimizer, epochs=2, callbacks=(), **compile_options):
    """Compile and fit; return the weights and the logs."""
    trained = model()
    trained.compile(optimizer=optimizer, loss="mse", **{"jit_compile": False, **compile_options})
    history = fit(trained, epochs=epochs, callbacks=list(callbacks))
    return trained.get_weights(), history


def recorded(optimizer):
    return np.concatenate([g.recorded for g in optimizer.clipper.export_state().groups]).tolist()


def test_there_are_optimizers_to_test():
    assert {"SGD", "Adam", "AdamW", "Nadam", "Lion"} <= set(ORDINARY)
    assert len(ORDINARY) >= 12


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name not in OFTEN)) for name in ORDINARY],
)
def test_it_trains_as_without_a_clipper_unless_something_is_clipped(model, fit, name):
    make = EXPORTED[name]
    plain = make()
    weights, _ = train(model, fit, plain)
    optimizer = make()
    assert QuantileClip.as_optimizer(optimizer, 1.0) is optimizer
    assert type(optimizer).__name__ == name and isinstance(optimizer, make)
    ours, _ = train(model, fit, optimizer)
    assert recorded(optimizer) == [8] * 4
    assert len(optimizer.variables) == len(plain.variables)
    np.testing.assert_equal(ours, weights)
    low = QuantileClip.as_optimizer(make(), 0.1)
    ours, _ = train(model, fit, low, run_eagerly=True)
    assert recorded(low) == [8] * 4
    for mine, his in zip(ours, weights):
        assert np.abs(mine - his).max() > 1e-6  # eagerly or in a graph: more than rounding


def test_compiled_by_xla_as_well(model, fit):
    weights, _ = train(model, fit, keras.optimizers.Nadam(), jit_compile=True)
    optimizer = QuantileClip.as_optimizer(keras.optimizers.Nadam(), 1.0)
    ours, _ = train(model, fit, optimizer, jit_compile=True)
    assert recorded(optimizer) == [8] * 4
    for mine, his in zip(ours, weights):  # XLA fuses, and rounds, differently
        np.testing.assert_allclose(mine, his, rtol=1e-5, atol=1e-6)


class TestHyperparameters:
    """Other work of the optimizer on clipped gradients: as in a loop by hand."""

    def compare(self, model, growing, fit, by_hand, make, callbacks=lambda: ()):
        expected = by_hand(model(), make(), Quantile(0.5)).fit(*growing, epochs=2)
        assert expected.clipped > 2
        ours = model()
        optimizer = QuantileClip.as_optimizer(make(), 0.5)
        ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        fit(ours, epochs=2)
        expected.assert_equals(ours, optimizer.clipper)
        return expected, optimizer

    def test_a_schedule(self, model, growing, fit, by_hand):
        def make():
            schedule = keras.optimizers.schedules.ExponentialDecay(1e-2, 1, 0.5)
            return keras.optimizers.SGD(schedule)

        _, optimizer = self.compare(model, growing, fit, by_hand, make)
        np.testing.assert_allclose(optimizer.learning_rate, 1e-2 * 0.5**8, rtol=1e-6)

    def test_weight_decay(self, model, growing, fit, by_hand):
        self.compare(
            model, growing, fit, by_hand, lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1)
        )

    def test_a_variable_left_out_of_weight_decay(self, model, growing, fit, by_hand):
        def make():
            optimizer = keras.optimizers.SGD(1e-2, weight_decay=0.5)
            optimizer.exclude_from_weight_decay(var_names=["bias"])
            return optimizer

        self.compare(model, growing, fit, by_hand, make)

    def test_moving_averages_of_the_weights(self, model, growing, fit, by_hand):
        def make():
            return keras.optimizers.SGD(
                1e-2, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
            )

        ours = model()
        optimizer = QuantileClip.as_optimizer(make(), 0.5)
        ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        fit(ours, epochs=2)
        expected = by_hand(model(), make(), Quantile(0.5)).fit(*growing, epochs=2)
        expected.optimizer.finalize_variable_values(expected.model.trainable_variables)
        expected.assert_equals(ours, optimizer.clipper)

    def test_swap_ema_weights(self, model, fit, growing):
        """The callback finds the averages, and evaluates with them."""

        def run(optimizer):
            return train(
                model,
                lambda trained, **options: fit(trained, validation_data=growing, **options),
                optimizer,
                callbacks=[keras.callbacks.SwapEMAWeights()],
            )

        plain = run(keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.5))
        clipped = run(
            QuantileClip.as_optimizer(
                keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.5), 1.0
            )
        )
        np.testing.assert_equal(clipped, plain)
        assert plain[1]["val_loss"][-1] != plain[1]["loss"][-1]

    @pytest.mark.parametrize(
        "callback",
        [
            lambda: keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1e9),
            lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        ],
        ids=["ReduceLROnPlateau", "LearningRateScheduler"],
    )
    def test_callbacks_that_set_the_learning_rate(self, model, fit, callback):
        plain = train(model, fit, keras.optimizers.Adam(1e-2), 4, [callback()])
        optimizer = QuantileClip.as_optimizer(keras.optimizers.Adam(1e-2), 1.0)
        ours = train(model, fit, optimizer, 4, [callback()])
        assert float(optimizer.learning_rate) < 1e-2 / 2
        assert recorded(optimizer) == [16] * 4
        np.testing.assert_equal(ours, plain)

    @pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
    def test_keras_own_clipping_acts_first(self, model, fit, windows, name):
        plain = keras.optimizers.SGD(1e-2, **{name: 1e-3})
        with pytest.warns(UserWarning, match=rf"{name}=0\.001, which acts before AutoClip") as said:
            QuantileClip.as_optimizer(plain, 1.0)
        assert said[0].filename == __file__
        with pytest.warns(UserWarning, match="acts before AutoClip") as said:
            QuantileClip().attach(keras.optimizers.SGD(**{name: 1.0}))
        assert said[0].filename == __file__
        train(model, fit, plain)
        found = np.array(windows(plain.clipper))
        assert found.shape == (4, 8)
        if name == "clipnorm":
            np.testing.assert_allclose(found, 1e-3, rtol=1e-5)
        elif name == "global_clipnorm":
            np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1e-3, rtol=1e-5)
        else:
            assert (found <= 1e-3 * np.sqrt([[32], [8], [8], [1]]) * 1.000001).all()

    def test_constraints_on_variables_hold_after_the_update(self, growing, windows):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(1, kernel_constraint="unit_norm")])
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
        model.compile(optimizer=optimizer, loss="mse")
        model.fit(*growing, verbose=0)
        np.testing.assert_allclose(np.linalg.norm(model.get_weights()[0]), 1.0, rtol=1e-5)
        assert len(windows(optimizer.clipper)[0]) == 2

    def test_a_constant_loss_scale(self, model, growing, fit, by_hand):
        """`loss_scale_factor`: the norms are those of the unscaled gradients, exactly."""
        expected = by_hand(model(), keras.optimizers.SGD(1e-2)).fit(*growing)
        ours = model()
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(1e-2, loss_scale_factor=1024.0), 0.5
        )
        ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        fit(ours)
        expected.assert_equals(ours, optimizer.clipper)


class TestWhatIsRefused:
    def test_multi_optimizer(self, model, fit, windows):
        make = getattr(keras.optimizers, "MultiOptimizer", None)
        if make is None:
            pytest.skip("this Keras has none")
        inner = [keras.optimizers.SGD(1e-2), keras.optimizers.Adam(1e-2)]

        def choose(variable):
            return inner["bias" in variable.path]

        with pytest.raises(TypeError, match="Attach a clipper to each of the optimizers in it"):
            QuantileClip.as_optimizer(make(choose))
        # And so it works.
        for each in inner:
            QuantileClip.as_optimizer(each, 0.5)
        train(model, fit, make(choose))
        assert [len(w) for each in inner for w in windows(each.clipper)] == [8] * 4

    def test_what_is_no_optimizer(self):
        for wrong in (None, keras.layers.Dense(1), keras.optimizers.Adam, 1e-3):
            with pytest.raises(TypeError, match="must be a Keras optimizer, but got") as error:
                QuantileClip.as_optimizer(wrong)
            assert "Keras 2" not in str(error.value)
        with pytest.raises(TypeError, match=r"'adam'\. Make it first: keras\.optimizers\.get"):
            QuantileClip.as_optimizer("adam")
        with pytest.raises(TypeError, match=r"For other optimizers clip in a custom loop"):
            QuantileClip.as_optimizer(tf.compat.v1.train.AdamOptimizer())

    def test_the_base_class_alone_attaches_and_fails_as_it_does(self, model, fit):
        """`Optimizer` makes no updates; Keras says so, with and without a clipper."""
        for optimizer in (
            keras.optimizers.Optimizer(1e-3),
            QuantileClip.as_optimizer(keras.optimizers.Optimizer(1e-3)),
        ):
            with pytest.raises(NotImplementedError):
                train(model, fit, optimizer, run_eagerly=True)

    def test_another_version_of_keras_without_the_seam(self, monkeypatch):
        """Said when the clipper is attached, not by training without any clipping."""

        class Later(keras.optimizers.Optimizer):
            pass

        for ancestor in Later.__mro__:
            if "_backend_update_step" in vars(ancestor):
                monkeypatch.setattr(ancestor, "_backend_update_step", lambda *arguments: None)
        optimizer = Later(1e-3)
        with pytest.raises(RuntimeError, match="does not call _all_reduce_sum_gradients"):
            QuantileClip.as_optimizer(optimizer)
        assert type(optimizer) is Later and not hasattr(optimizer, "clipper")

    @pytest.mark.nightly  # a new process imports both frameworks
    @pytest.mark.skipif(find_spec("torch") is None, reason="Keras on PyTorch needs PyTorch")
    def test_another_backend(self):
        """The message names a way to clip there, which works."""
        program = """
import keras, torch
import autoclip.torch
from autoclip.tf import QuantileClip

optimizer = keras.optimizers.SGD(1.0)
model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1, use_bias=False)])
before = type(optimizer)
for refused in (
    lambda: QuantileClip.as_optimizer(optimizer),
    lambda: QuantileClip().build(model.trainable_variables),
    lambda: QuantileClip()([(torch.ones(2, 1), model.trainable_variables[0])]),
):
    try:
        refused()
    except TypeError as error:
        print(error)
assert type(optimizer) is before

clipper = autoclip.torch.QuantileClip([v.value for v in model.trainable_variables], 0.5)
for size in (1.0, 2.0, 9.0):
    model.zero_grad()
    start = model.get_weights()[0]
    (size * model(torch.tensor([[3.0, 4.0]]))).sum().backward()
    clipper.step()
    with torch.no_grad():
        gradients = [v.value.grad for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
step = start - model.get_weights()[0]
assert abs((step**2).sum() ** 0.5 - 10.0) < 1e-4, step  # norms of 5, 10, 45
"""
        found = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "KERAS_BACKEND": "torch"},
            capture_output=True,
            text=True,
            check=True,
        )
        said = found.stdout.splitlines()
        assert len(said) == 3
        for message in said:
            assert "Keras runs on the 'torch' backend" in message
            assert 'KERAS_BACKEND to "tensorflow" before Keras is imported' in message
            assert "autoclip.torch.QuantileClip([v.value for v in model.train" in message


def test_attaching_and_training_warn_of_nothing(model, fit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = QuantileClip.as_optimizer(keras.optimizers.Adam(1e-2))
        train(model, fit, optimizer)


class Outer(keras.optimizers.Optimizer):
    """Lets another optimizer make its updates."""

    def __init__(self, inner):
        super().__init__(learning_rate=0.1)
        self.inner = inner

    def update_step(self, gradient, variable, learning_rate):
        raise AssertionError


class OuterApply(Outer):
    def apply(self, grads, trainable_variables=None):
        self.inner.apply(grads, trainable_variables)


class OuterApplyGradients(Outer):
    def apply_gradients(self, grads_and_vars):
        self.inner.apply_gradients(grads_and_vars)


@pytest.mark.parametrize("outer", [OuterApply, OuterApplyGradients])
def test_an_optimizer_around_another_one_is_noticed(outer):
    """Its updates pass the clipper by."""
    optimizer = QuantileClip.as_optimizer(outer(keras.optimizers.SGD(1.0)))
    variable = tf.Variable([1.0])
    with pytest.warns(UserWarning, match="was not clipped.*attach the clipper to the inner one"):
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])  # said once
        inner = outer(QuantileClip.as_optimizer(keras.optimizers.SGD(1.0), 0.5))
        for size in (1.0, 3.0):
            inner.apply_gradients([(tf.constant([size]), variable)])
    assert inner.inner.clipper.last.thresholds.numpy().tolist() == [2.0]


def test_accumulated_gradients_are_no_update_yet():
    optimizer = QuantileClip.as_optimizer(
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=3), 0.5
    )
    variable = tf.Variable([1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            optimizer.apply_gradients([(tf.constant([1.0]), variable)])
    assert optimizer.clipper.last.norms.numpy().tolist() == [1.0]
