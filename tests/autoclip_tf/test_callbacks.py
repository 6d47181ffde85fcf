"""Logged values, and the messages of the callback that XLA cannot give."""

from __future__ import annotations

import csv
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip.tf import QuantileClip
from autoclip.tf.callbacks import AutoClipCallback
from autoclip.tf.logging import log_values

NAMES = ["autoclip/clipped", "autoclip/clipped_norm", "autoclip/total_norm"]


def compiled(model, optimizer=None, quantile=0.5, settings=None, **options):
    trained = model()
    optimizer = QuantileClip.as_optimizer(
        optimizer or keras.optimizers.SGD(1e-2), quantile, **(settings or {})
    )
    trained.compile(optimizer=optimizer, loss="mse", **{"jit_compile": False, **options})
    return trained


class Recorder(keras.callbacks.Callback):
    """Notes what `clipper.last` says after each batch, by itself, and the logs of each batch."""

    def __init__(self):
        super().__init__()
        self.values, self.logs = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.values.append([])

    def on_train_batch_end(self, batch, logs=None):
        last = self.model.optimizer.clipper.last
        norms, thresholds, coefficients = (
            each.numpy().astype(np.float64)
            for each in (last.norms, last.thresholds, last.coefficients)
        )
        values = {
            "autoclip/total_norm": np.linalg.norm(norms),
            "autoclip/clipped_norm": np.linalg.norm(norms * coefficients),
            "autoclip/clipped": (coefficients < 1).mean(),
        }
        if len(norms) == 1:
            values["autoclip/threshold"] = thresholds[0]
        for row, name in enumerate(last.names):
            if name != "all parameters":
                values[f"autoclip/norm/{name}"] = norms[row]
                values[f"autoclip/threshold/{name}"] = thresholds[row]
        self.values[-1].append(values)
        self.logs.append(dict(logs))


class TestCallback:
    @pytest.mark.parametrize("global_clipping", [False, True], ids=["parameter-wise", "global"])
    def test_the_values_are_means_over_each_epoch(self, model, fit, global_clipping):
        trained = compiled(model, settings={"global_clipping": global_clipping})
        recorder = Recorder()
        history = fit(trained, epochs=3, callbacks=[AutoClipCallback(), recorder])
        names = [*NAMES, "autoclip/threshold"] if global_clipping else NAMES
        assert sorted(history) == sorted([*names, "loss"])
        for epoch, batches in enumerate(recorder.values):
            assert len(batches) == 4
            for name in names:
                found = history[name][epoch]
                assert type(found) is float
                assert found == pytest.approx(np.mean([each[name] for each in batches]), rel=1e-6)
        assert max(history["autoclip/clipped"]) > 0
        assert all("autoclip/clipped" not in logs for logs in recorder.logs)

    @pytest.mark.parametrize(("update_freq", "every"), [("batch", 1), (3, 3)])
    def test_values_of_batches(self, model, fit, update_freq, every):
        recorder = Recorder()
        callback = AutoClipCallback(prefix="g/", update_freq=update_freq)
        history = fit(compiled(model), epochs=2, callbacks=[callback, recorder])
        assert sorted(history) == [*(f"g/{name}" for name in NAMES), "loss"]
        values = [each for epoch in recorder.values for each in epoch]
        for batch, logs in enumerate(recorder.logs, start=1):
            found = {name: logs[name] for name in logs if name != "loss"}
            means = {
                f"g/{name}": pytest.approx(
                    np.mean([each[name] for each in values[max(0, batch - every) : batch]]),
                    rel=1e-6,
                )
                for name in NAMES
            }
            assert found == (means if batch % every == 0 else {})

    def test_values_of_variables(self, model, fit):
        trained = compiled(model)
        recorder = Recorder()
        callback = AutoClipCallback(update_freq="batch", log_parameters=r"kernel$")
        history = fit(trained, epochs=2, callbacks=[callback, recorder])
        paths = [variable.path for variable in trained.trainable_variables if variable.ndim == 2]
        own = [f"autoclip/{what}/{path}" for what in ("norm", "threshold") for path in paths]
        assert len(paths) == 2
        assert sorted(history) == sorted([*NAMES, *own, "loss"])
        for name in own:
            for epoch, batches in enumerate(recorder.values):
                mean = np.mean([each[name] for each in batches])
                assert history[name][epoch] == pytest.approx(mean, rel=1e-6)
            last = recorder.values[-1][-1][name]
            assert recorder.logs[-1][name] == pytest.approx(last, rel=1e-6)

    def test_batches_that_are_not_finite_do_not_count(self, model, fit, data):
        x, y = (each.copy() for each in data)
        y[20] = np.inf  # in the second batch of four
        recorder = Recorder()
        trained = compiled(model, settings={"warmup_steps": 3, "global_clipping": True})
        history = trained.fit(
            x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[AutoClipCallback(), recorder]
        ).history
        [batches] = recorder.values
        norms = [each["autoclip/total_norm"] for each in batches]
        assert np.isfinite(history["autoclip/total_norm"][0])
        finite = [norm for norm in norms if np.isfinite(norm)]
        assert history["autoclip/total_norm"] == [pytest.approx(np.mean(finite))]
        # During warm-up there is no threshold.
        thresholds = [each["autoclip/threshold"] for each in batches]
        assert history["autoclip/threshold"] == [thresholds[-1]]
        assert thresholds[:2] == [np.inf, np.inf]

    def test_wrong_arguments(self):
        for wrong in (True, None, 1.5):
            with pytest.raises(TypeError, match="update_freq must be"):
                AutoClipCallback(update_freq=wrong)
        for wrong in ("step", 0, -1):
            with pytest.raises(ValueError, match="update_freq must be"):
                AutoClipCallback(update_freq=wrong)
        with pytest.raises(ValueError, match="is not a regular expression"):
            AutoClipCallback(log_parameters="*")

    def test_tensorboard(self, model, fit, tmp_path):
        pytest.importorskip("tensorboard", reason="TensorBoard is not part of this environment")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray

        recorder = Recorder()
        board = keras.callbacks.TensorBoard(tmp_path, update_freq="batch")
        callback = AutoClipCallback(update_freq="batch")
        history = fit(compiled(model), epochs=2, callbacks=[callback, board, recorder])
        events = EventAccumulator(str(tmp_path / "train"))
        events.Reload()

        def series(tag):
            return [float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]

        values = [each for epoch in recorder.values for each in epoch]
        for name in NAMES:
            assert series(f"batch_{name}") == pytest.approx([each[name] for each in values])
            assert series(f"epoch_{name}") == pytest.approx(history[name])

    def test_callbacks_after_it_log_them_too(self, model, fit, growing, tmp_path):
        log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
        trained = compiled(model)
        callbacks = [AutoClipCallback(), log]
        history = fit(trained, epochs=2, callbacks=callbacks, validation_data=growing)
        rows = list(csv.DictReader((tmp_path / "log.csv").open()))
        assert sorted(rows[0]) == [*NAMES, "epoch", "loss", "val_loss"]
        for name in NAMES:
            assert [float(row[name]) for row in rows] == pytest.approx(history[name])

    def test_a_callback_can_monitor_them(self, model, fit):
        stop = keras.callbacks.EarlyStopping(
            "autoclip/total_norm", mode="max", patience=0, min_delta=1e9
        )
        history = fit(compiled(model), epochs=9, callbacks=[AutoClipCallback(), stop])
        assert len(history["loss"]) == 2

    def test_under_loss_scaling(self, model, fit):
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-2))
        callback = AutoClipCallback()
        history = fit(compiled(model, optimizer), callbacks=[callback])
        assert callback.clipper is optimizer.inner_optimizer.clipper
        assert sorted(history) == [*NAMES, "loss"]

    @pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}])
    def test_accumulated_gradients_count_once(self, model, fit, windows, options):
        """Also across epochs, and in an epoch that begins in the middle of an update."""
        optimizer = keras.optimizers.SGD(1e-2, gradient_accumulation_steps=3)
        trained = compiled(model, optimizer, settings={"global_clipping": True}, **options)
        seen = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
        )
        callback = AutoClipCallback(update_freq="batch")
        history = fit(trained, epochs=3, callbacks=[callback, note])
        [norms] = windows(trained.optimizer.clipper)
        assert len(norms) == 4  # after batches 3, 6, 9 and 12 of 4 in each epoch
        means = [norms[0], norms[1], norms[2:].mean()]
        assert history["autoclip/total_norm"] == pytest.approx(means, rel=1e-6)
        found = [each.get("autoclip/total_norm") for each in seen]
        assert [i for i, value in enumerate(found, start=1) if value is not None] == [3, 6, 9, 12]
        assert found[2::3] == pytest.approx(norms.tolist(), rel=1e-6)

    def test_steps_that_a_loss_scaler_skips_do_not_count(self, model, data, windows):
        x, y = (each.copy() for each in data)
        y[[20, 60]] = np.inf  # in the second batch of four, and in the last
        inner = keras.optimizers.SGD(1e-2)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        trained = compiled(model, optimizer, settings={"global_clipping": True})
        callbacks = [AutoClipCallback()]
        options = {"batch_size": 16, "shuffle": False, "verbose": 0, "callbacks": callbacks}
        history = trained.fit(x, y, epochs=2, **options).history
        [norms] = windows(inner.clipper)
        assert len(norms) == 4
        means = [norms[:2].mean(), norms[2:].mean()]
        assert history["autoclip/total_norm"] == pytest.approx(means, rel=1e-6)

    @pytest.mark.parametrize("options", [{"steps_per_execution": 3}, {"jit_compile": True}])
    def test_every_update_counts(self, model, fit, windows, options):
        trained = compiled(model, settings={"global_clipping": True}, **options)
        history = fit(trained, epochs=2, callbacks=[AutoClipCallback()])
        [norms] = windows(trained.optimizer.clipper)
        means = norms.reshape(2, 4).mean(axis=1)
        assert history["autoclip/total_norm"] == pytest.approx(means, rel=1e-6)
        assert len(history["autoclip/threshold"]) == 2

    def test_several_callbacks_of_one_clipper(self, model, fit):
        callbacks = [AutoClipCallback(), AutoClipCallback(prefix="again/", update_freq="batch")]
        history = fit(compiled(model), epochs=2, callbacks=callbacks)
        for name in NAMES:
            assert history[name] == pytest.approx(history[f"again/{name}"])

    def test_a_large_norm_of_the_past_takes_no_digits(self, model, fit, data):
        """Sums are not differences of ever larger sums."""
        x, y = data
        trained = compiled(model, keras.optimizers.SGD(0.0), quantile=1.0)
        callback = AutoClipCallback()
        expected = fit(trained, callbacks=[callback])["autoclip/total_norm"]
        trained.fit(x, y * 1e30, verbose=0, callbacks=[callback])
        assert fit(trained, callbacks=[callback])["autoclip/total_norm"] == pytest.approx(expected)

    def test_a_step_that_was_traced_before_is_traced_again(self, model, fit, windows):
        trained = compiled(model, settings={"global_clipping": True})
        fit(trained)
        callback = AutoClipCallback()
        history = fit(trained, callbacks=[callback])
        [norms] = windows(trained.optimizer.clipper)
        assert history["autoclip/total_norm"] == pytest.approx([norms[4:].mean()], rel=1e-6)
        function = trained.train_function
        fit(trained, callbacks=[callback])
        assert trained.train_function is function

    def test_no_operation_of_the_sums_returns_an_infinity(self, model, fit):
        """Also where there is no threshold, as in the first epoch."""
        tf.debugging.enable_check_numerics()
        try:
            settings = {"global_clipping": True, "warmup_steps": 5}
            history = fit(
                compiled(model, settings=settings), epochs=2, callbacks=[AutoClipCallback()]
            )
        finally:
            tf.debugging.disable_check_numerics()
        assert [np.isfinite(each) for each in history["autoclip/threshold"]] == [False, True]

    def test_sums_are_not_part_of_any_state(self, model, fit, tmp_path):
        keras.utils.clear_session()  # states hold names: dense_9 is shorter than dense_10
        ours = compiled(model)
        keras.utils.clear_session()
        theirs = compiled(model)
        fit(ours, epochs=2, callbacks=[AutoClipCallback()])
        fit(theirs, epochs=2)
        np.testing.assert_equal(ours.get_weights(), theirs.get_weights())
        assert len(ours.optimizer.variables) == len(theirs.optimizer.variables)
        sizes = [len(each.optimizer.clipper.state_dict()["data"]) for each in (ours, theirs)]
        assert sizes[0] == sizes[1]
        ours.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert fit(loaded, callbacks=[AutoClipCallback()]) == fit(
            ours, callbacks=[AutoClipCallback()]
        )

    @pytest.mark.parametrize(
        "make",
        [
            keras.optimizers.SGD,
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        ],
    )
    def test_an_optimizer_without_a_clipper_is_an_error_at_the_start(self, model, fit, make):
        trained = model()
        trained.compile(optimizer=make(), loss="mse", jit_compile=False)
        with pytest.raises(ValueError, match="the model's optimizer has none"):
            fit(trained, callbacks=[AutoClipCallback()])
        assert int(trained.optimizer.iterations) == 0

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_a_clipper_that_is_detached_during_the_training(self, model, fit):
        """Its epochs have no values, and another training has its own clipper."""
        trained, callback = compiled(model), AutoClipCallback()
        clipper = trained.optimizer.clipper
        toggle = {1: clipper.detach, 2: lambda: clipper.attach(trained.optimizer)}
        at = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, _: toggle.get(epoch, int)()
        )
        found = fit(trained, epochs=3, callbacks=[callback, at])["autoclip/total_norm"]
        assert np.isfinite(found).tolist() == [True, False, True]
        trained.compile(QuantileClip.as_optimizer(keras.optimizers.SGD()), loss="mse")
        assert np.isfinite(fit(trained, callbacks=[callback])["autoclip/total_norm"]).all()
        assert callback.clipper is trained.optimizer.clipper is not clipper

    def test_it_evaluates_and_predicts(self, model, growing):
        trained = compiled(model)
        loss = trained.evaluate(*growing, verbose=0, callbacks=[AutoClipCallback()])
        assert np.isfinite(loss)
        trained.predict(growing[0], verbose=0, callbacks=[AutoClipCallback()])


class TestWarnings:
    """Faults outside of AutoClip that an epoch shows, once each."""

    def test_updates_that_pass_by_the_clipper(self, growing):
        class Own(keras.Model):
            """Its training step is a `tf.function` of its own, which Keras cannot trace again."""

            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1)

            @tf.function
            def update(self, x, y):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(self.dense(x) - y))
                variables = self.trainable_variables
                self.optimizer.apply(tape.gradient(loss, variables), variables)
                return loss

            def train_step(self, data):
                return {"loss": self.update(*data)}

        trained = Own()
        trained.dense.build((None, 4))
        trained.compile(keras.optimizers.SGD(1e-3), jit_compile=False)
        options = {"batch_size": 16, "verbose": 0}
        trained.fit(*growing, **options)
        QuantileClip.as_optimizer(trained.optimizer)
        trained.optimizer.clipper.build(trained.trainable_variables)
        callback = AutoClipCallback()
        with pytest.warns(UserWarning, match="4 updates passed by the clipper in this epoch"):
            trained.fit(*growing, **options, callbacks=[callback])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained.fit(*growing, **options, callbacks=[callback])

    @pytest.mark.parametrize("is_late", [False, True])
    def test_in_a_custom_loop_the_callback_comes_before_the_trace(self, is_late):
        weight = tf.Variable([1.0])
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(0.0))
        step = tf.function(lambda: optimizer.apply([2.0 * weight], [weight]))
        callback = AutoClipCallback(clipper=optimizer.clipper)  # it needs no model
        if is_late:
            step()
        callback.on_train_begin()
        callback.on_epoch_begin(0)
        step()
        logs = {}
        if is_late:
            with pytest.warns(UserWarning, match="1 updates of this epoch are missing in the log"):
                callback.on_epoch_end(0, logs)
        else:
            callback.on_epoch_end(0, logs)
        expected = np.nan if is_late else 2.0
        assert logs["autoclip/total_norm"] == pytest.approx(expected, nan_ok=True)

    def test_norms_that_something_else_has_clipped(self, model, growing):
        x, y = growing
        with pytest.warns(UserWarning, match="global_clipnorm=0.001, which acts before"):
            trained = compiled(model, keras.optimizers.SGD(1e-4, global_clipnorm=1e-3))
        options = {"batch_size": 2, "verbose": 0, "callbacks": [AutoClipCallback()]}
        with pytest.warns(UserWarning, match="does not vary: those of all 32 updates") as caught:
            trained.fit(x, y, epochs=3, **options)
        assert sum("does not vary" in str(each.message) for each in caught) == 1

    def test_updates_that_record_nothing(self, model, growing):
        x, y = growing
        trained = compiled(model)
        options = {"batch_size": 2, "verbose": 0, "callbacks": [AutoClipCallback()]}
        with pytest.warns(UserWarning, match="32 updates in a row recorded no norm") as caught:
            history = trained.fit(x, y * np.nan, epochs=2, **options).history
        assert sum("recorded no norm" in str(each.message) for each in caught) == 1
        assert np.isnan(history["autoclip/total_norm"]).all()

    def test_nothing_is_wrong(self, model, growing):
        options = {"batch_size": 2, "verbose": 0, "callbacks": [AutoClipCallback()]}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            compiled(model).fit(*growing, epochs=2, **options)


class TestFaults:
    """`on_nonfinite="raise"`."""

    @pytest.fixture
    def broken(self, growing):
        """The third of four batches has a target that is not finite."""
        x, y = (each.copy() for each in growing)
        y[40] = np.nan
        return x, y

    def test_xla_sets_the_gradient_to_zero_and_the_callback_raises(self, model, broken, windows):
        trained = compiled(model, settings={"on_nonfinite": "raise"}, jit_compile=True)
        weights = []

        class Weights(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                weights.append(trained.get_weights())

        callbacks = [Weights(), AutoClipCallback()]
        names = ", ".join(variable.path for variable in trained.trainable_variables)
        with pytest.raises(FloatingPointError, match=f"The gradients of {names} hold NaN") as error:
            trained.fit(*broken, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
        assert "XLA cannot stop a step: the gradient was set to zero" in str(error.value)
        assert len(weights) == 3
        np.testing.assert_equal(weights[2], weights[1])
        clipper = trained.optimizer.clipper
        assert [len(window) for window in windows(clipper)] == [2] * 4
        clipper.check()  # said once
        # And it goes on.
        x, y = broken
        trained.fit(x[:32], y[:32], batch_size=16, verbose=0, callbacks=[AutoClipCallback()])
        assert [len(window) for window in windows(clipper)] == [4] * 4

    @pytest.mark.parametrize("steps", [1, 2])
    def test_without_the_callback_the_clipper_remembers(self, model, broken, steps):
        trained = compiled(
            model,
            settings={"on_nonfinite": "raise"},
            jit_compile=True,
            steps_per_execution=steps,
        )
        trained.fit(*broken, batch_size=16, shuffle=False, verbose=0)
        assert np.isfinite(trained.get_weights()[0]).all()
        with pytest.raises(FloatingPointError, match="The gradients of"):
            trained.optimizer.clipper.check()

    @pytest.mark.parametrize(
        ("options", "error"),
        [({"run_eagerly": True}, FloatingPointError), ({}, tf.errors.InvalidArgumentError)],
        ids=["eager", "graph"],
    )
    def test_elsewhere_the_step_itself_raises(self, model, broken, options, error):
        trained = compiled(model, settings={"on_nonfinite": "raise"}, **options)
        with pytest.raises(error, match="The gradients of"):
            trained.fit(*broken, batch_size=16, verbose=0, callbacks=[AutoClipCallback()])


class TestLogValues:
    def test_before_any_step(self):
        assert log_values(QuantileClip()) == {}

    def test_by_hand(self):
        variables = [tf.Variable(0.0, name=name) for name in "abc"]
        clipper = QuantileClip(0.5)
        for norms in ([1.0, 10.0, 100.0], [3.0, 10.0, np.nan]):
            clipper(zip(map(tf.constant, norms), variables))
        assert log_values(clipper) == {
            "autoclip/total_norm": pytest.approx(np.nan, nan_ok=True),
            "autoclip/clipped_norm": pytest.approx(np.nan, nan_ok=True),
            "autoclip/clipped": 0.5,  # of the rows that recorded
        }
        clipper(zip(map(tf.constant, [0.0, 0.0, 0.0]), variables))
        assert log_values(clipper) == {"autoclip/total_norm": 0.0, "autoclip/clipped_norm": 0.0}


class TestSeveralClippers:
    def make(self, model):
        first, second = (QuantileClip.as_optimizer(keras.optimizers.SGD(1e-3)) for _ in range(2))
        trained = model()
        last = trained.layers[-1].name
        trained.compile(
            keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(first, {f".*{last}.*": second})
            ),
            loss="mse",
        )
        return trained, first.clipper, second.clipper

    @pytest.mark.skipif(
        not hasattr(keras.optimizers, "MultiOptimizer"), reason="newer than this Keras"
    )
    def test_one_callback_each(self, model, fit):
        trained, first, second = self.make(model)
        with pytest.raises(ValueError, match="has 2 clippers"):
            fit(trained, callbacks=[AutoClipCallback()])
        callbacks = [AutoClipCallback(first, "first/"), AutoClipCallback(second, "second/")]
        history = fit(trained, callbacks=callbacks)
        names = [f"{which}/{name}" for which in ("first", "second") for name in NAMES]
        assert sorted(history) == sorted(["loss", *names])

    def test_a_model_with_optimizers_of_its_own_gives_their_clippers(self, model, growing):
        class Two(keras.Model):
            def __init__(self):
                super().__init__()
                self.parts = [model(), model()]
                self.mine = [
                    QuantileClip.as_optimizer(keras.optimizers.SGD(1e-3)) for _ in range(2)
                ]

            def train_step(self, data):
                for part, optimizer in zip(self.parts, self.mine):
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_mean(tf.square(part(data[0]) - data[1]))
                    variables = part.trainable_variables
                    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
                return {"loss": loss}

        two = Two()
        two.compile(jit_compile=False)
        options = {"batch_size": 16, "verbose": 0}
        with pytest.raises(ValueError, match=r"AutoClipCallback\(clipper="):
            two.fit(*growing, **options, callbacks=[AutoClipCallback()])
        callbacks = [AutoClipCallback(each.clipper, f"{i}/") for i, each in enumerate(two.mine)]
        history = two.fit(*growing, **options, callbacks=callbacks).history
        assert sorted(history) == sorted(
            ["loss", *(f"{i}/{name}" for i in range(2) for name in NAMES)]
        )
        assert np.isfinite(list(history.values())).all()

    def test_something_else(self):
        with pytest.raises(
            TypeError, match=r"clipper must be a clipper, such as optimizer\.clipper"
        ):
            AutoClipCallback(keras.optimizers.SGD())
