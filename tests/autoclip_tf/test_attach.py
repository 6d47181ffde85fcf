"""A clipper on an optimizer: the same object back, a good citizen of Keras, and no trace left."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import keras
import keras_training
import numpy as np
import pytest
import tensorflow as tf

from autoclip.tf import QuantileClip, StandardClip


@keras.saving.register_keras_serializable("tests")
class Momentum(keras.optimizers.Optimizer):
    """A user's own, with a variable and a hyperparameter of its own."""

    def __init__(self, learning_rate=0.01, decay=0.5, **options):
        super().__init__(learning_rate=learning_rate, **options)
        self.decay = decay

    def build(self, variables):
        super().build(variables)
        self.momenta = [self.add_variable_from_reference(v, "momentum") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        momentum = self.momenta[self._get_variable_index(variable)]
        self.assign(momentum, momentum * self.decay + gradient)
        self.assign_sub(variable, momentum * learning_rate)

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


def attached(quantile=0.5, **settings):
    return QuantileClip.as_optimizer(keras.optimizers.Adam(1e-2), quantile, **settings)


def train(model, fit, optimizer, **options):
    trained = model()
    trained.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    fit(trained, **options)
    return trained


def snapshot(optimizer):
    """An optimizer's attributes and the objects that TensorFlow tracks of it, by identity."""
    contents = {
        name: list(map(str, value)) if isinstance(value, (list, dict)) else id(value)
        for name, value in vars(optimizer).items()
    }
    return type(optimizer), contents, optimizer._trackable_children()


class TestAttaching:
    def test_the_same_object_comes_back(self):
        plain = keras.optimizers.Adam(1e-2)
        optimizer = QuantileClip.as_optimizer(plain, 0.5, 10, True, on_nonfinite="zero")
        assert optimizer is plain
        assert isinstance(optimizer, keras.optimizers.Adam)
        assert type(optimizer).__name__ == "Adam"
        assert type(optimizer).__doc__ == keras.optimizers.Adam.__doc__
        assert repr(optimizer.clipper) == (
            "QuantileClip(\n    quantile=0.5, factor=1.0, history_length=10, on_nonfinite='zero'\n"
            "    global_clipping=True\n)"
        )
        assert isinstance(StandardClip.as_optimizer(keras.optimizers.Adam()).clipper, StandardClip)

    def test_wrong_settings_of_a_group_leave_the_optimizer_alone(self):
        optimizer = keras.optimizers.Adam()
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="'momentum'"):
            QuantileClip.as_optimizer(optimizer, group_settings=[{"match": "a", "momentum": 1}])
        assert snapshot(optimizer) == before

    def test_an_optimizer_that_is_built_keeps_its_state(self, model, fit, growing, by_hand):
        expected = by_hand(model(), keras.optimizers.Adam(1e-2))
        ours = train(model, fit, optimizer := keras.optimizers.Adam(1e-2))
        theirs = train(model, fit, expected.optimizer)
        clipper = QuantileClip(0.5)
        before = [variable.numpy() for variable in optimizer.variables]
        clipper.attach(optimizer)
        assert clipper.built
        np.testing.assert_equal([variable.numpy() for variable in optimizer.variables], before)
        ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        fit(ours, epochs=2)
        expected.model = theirs
        expected.fit(*growing, epochs=2).assert_equals(ours, clipper)

    def test_a_clipper_that_is_built_needs_the_same_variables(self, model, fit, windows):
        ours, other = model(), model()
        optimizer = keras.optimizers.SGD(1e-2)
        optimizer.build(ours.trainable_variables)
        clipper = QuantileClip(0.5)
        clipper.build(other.trainable_variables)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="was built with 4 variables and now gets 4 others"):
            clipper.attach(optimizer)
        assert snapshot(optimizer) == before
        clipper.attach(unbuilt := keras.optimizers.SGD(1e-2))
        with pytest.raises(ValueError, match="was built with 4 variables"):
            unbuilt.build(ours.trainable_variables)
        # The same ones in another order are the same ones. So are fewer: rows may stay as they are.
        mine = QuantileClip(0.5)
        mine.build(ours.trainable_variables[::-1])
        mine.build(ours.trainable_variables[:2])
        mine.attach(optimizer)
        optimizer.build(ours.trainable_variables[:2])
        optimizer.build(other.trainable_variables)  # Keras does nothing then
        ours.compile(optimizer=optimizer, loss="mse")
        fit(ours)
        assert [len(window) for window in windows(mine)] == [4] * 4

    def test_a_history_of_ones_own_goes_on_in_an_optimizer(self, model, growing, by_hand, fit):
        expected = by_hand(model(), keras.optimizers.SGD(1e-2)).fit(*growing, epochs=2)
        ours = model()
        optimizer, clipper = keras.optimizers.SGD(1e-2), QuantileClip(0.5)
        hand = by_hand(ours, optimizer)
        x, y = growing
        for start in range(0, 64, 16):
            gradients = hand.gradients(x[start : start + 16], y[start : start + 16])
            optimizer.apply_gradients(clipper(zip(gradients, ours.trainable_variables)))
        clipper.attach(optimizer)
        ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        fit(ours)
        expected.assert_equals(ours, clipper)


def load_the_users_optimizer(path):
    optimizer = keras.saving.load_model(path).optimizer
    assert isinstance(optimizer, Momentum) and optimizer.decay == 0.25
    assert optimizer.clipper.defaults["quantile"] == 0.5
    assert optimizer.clipper.export_state().groups[0].recorded.tolist() == [4] * 4


class TestWhatAKerasUserExpects:
    def test_learning_rate_and_iterations(self, model, fit):
        optimizer = attached()
        assert float(optimizer.learning_rate) == np.float32(1e-2)
        optimizer.learning_rate = 0.5
        assert float(optimizer.learning_rate) == 0.5
        optimizer.learning_rate.assign(0.25)
        assert float(optimizer.learning_rate) == 0.25
        train(model, fit, optimizer)
        assert int(optimizer.iterations) == 4
        assert float(optimizer.learning_rate) == 0.25

    def test_variables_are_those_of_the_plain_optimizer(self, model, fit):
        plain, optimizer = keras.optimizers.Adam(1e-2), attached(1.0)
        for each in (plain, optimizer):
            train(model, fit, each)
        assert [(tuple(v.shape), v.dtype) for v in optimizer.variables] == [
            (tuple(v.shape), v.dtype) for v in plain.variables
        ]
        for mine, his in zip(optimizer.variables, plain.variables):
            np.testing.assert_array_equal(mine.numpy(), his.numpy())
        weights = [variable.numpy() * 2 for variable in optimizer.variables]
        optimizer.set_weights(weights)
        np.testing.assert_equal([variable.numpy() for variable in optimizer.variables], weights)

    def test_the_models_variables_are_those_of_the_plain_model(self, model, fit):
        plain, ours = (
            train(model, fit, optimizer) for optimizer in (keras.optimizers.Adam(), attached())
        )
        assert len(ours.variables) == len(plain.variables)
        assert ours.count_params() == plain.count_params()

    @pytest.mark.parametrize(
        "roundtrip",
        [
            lambda o: type(o).from_config(o.get_config()),
            lambda o: keras.optimizers.deserialize(keras.optimizers.serialize(o)),
            lambda o: keras.optimizers.get(keras.optimizers.serialize(o)),
            lambda o: keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(o)),
        ],
        ids=["from_config", "deserialize", "get", "saving"],
    )
    @pytest.mark.parametrize(
        "make",
        [
            lambda: keras.optimizers.Adam(0.125, beta_1=0.75, use_ema=True, name="mine"),
            lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.5, 10)),
            lambda: Momentum(0.125, decay=0.25),
        ],
        ids=["Adam", "SGD with a schedule", "a user's own"],
    )
    def test_config(self, make, roundtrip):
        settings = {
            "history_length": 7,
            "global_clipping": False,
            "on_nonfinite": "zero",
            "group_settings": [{"match": "kernel", "deviations": 1.0}],
        }
        optimizer = StandardClip.as_optimizer(make(), 0.5, **settings)
        other = roundtrip(optimizer)
        assert other is not optimizer and type(other) is type(optimizer)
        assert type(other.clipper) is StandardClip and other.clipper is not optimizer.clipper
        config = other.clipper.get_config()
        assert config == optimizer.clipper.get_config()
        assert {"deviations": 0.5, **settings}.items() <= config.items()
        assert other.get_config() == optimizer.get_config()
        # What stands there besides is what plain Keras writes.
        config = optimizer.get_config()
        del config["autoclip"]
        assert config == {**make().get_config(), "name": config["name"]}

    def test_a_config_for_an_optimizer_without_a_clipper(self):
        config = attached().get_config()
        with pytest.raises(
            ValueError, match=r'without a clipper, delete config\["autoclip"\] first'
        ):
            keras.optimizers.Adam.from_config(config)
        del config["autoclip"]
        assert type(keras.optimizers.Adam.from_config(config)) is keras.optimizers.Adam

    def test_config_with_loss_scaling(self):
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=8.0), 0.25
        )
        other = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert type(other) is keras.optimizers.LossScaleOptimizer and other.initial_scale == 8.0
        assert other.inner_optimizer.clipper.defaults["quantile"] == 0.25

    def test_an_optimizer_of_the_users_with_the_name_of_one_of_keras(self):
        class Adam(keras.optimizers.Adam):
            pass

        configs = [
            keras.optimizers.serialize(QuantileClip.as_optimizer(make()))
            for make in (keras.optimizers.Adam, Adam)
        ]
        theirs = keras.optimizers.deserialize(configs[0])
        assert not isinstance(theirs, Adam)
        with keras.saving.custom_object_scope({"Adam": Adam}):
            assert isinstance(keras.optimizers.deserialize(configs[1]), Adam)

    def test_a_users_optimizer_comes_back_in_a_process_that_never_attached_one(
        self, server, model, fit, tmp_path
    ):
        """As it does without a clipper: after the import of the module that registers it."""
        trained = train(model, fit, QuantileClip.as_optimizer(Momentum(decay=0.25), 0.5))
        trained.save(tmp_path / "model.keras")
        server.call(load_the_users_optimizer, path=tmp_path / "model.keras")

    @pytest.mark.filterwarnings("ignore:Skipping variable loading")
    @pytest.mark.parametrize(
        "make", [pytest.param(keras.optimizers.Adam, marks=pytest.mark.nightly), Momentum]
    )
    def test_copies_and_pickles(self, model, fit, windows, make):
        """Of a plain optimizer, they are new ones with its settings: Keras skips its variables.

        Of one with a clipper as well. The clipper's copy has a history, which the variables get
        that the copy is built with.
        """
        plain, optimizer = make(), QuantileClip.as_optimizer(make(), 0.5)
        for each in (plain, optimizer):
            train(model, fit, each)
        before = windows(optimizer.clipper)
        for copied in (copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
            for each in (plain, optimizer):
                other = copied(each)
                assert not other.built and int(other.iterations) == 0
                assert other.get_config() == each.get_config()
            assert other.clipper is not optimizer.clipper
            np.testing.assert_equal(windows(other.clipper), before)
        train(model, fit, other)
        assert [len(window) for window in windows(optimizer.clipper)] == [4] * 4
        after = windows(other.clipper)
        assert [len(window) for window in after] == [8] * 4
        np.testing.assert_equal([window[:4] for window in after], before)

    def test_copies_and_pickles_before_any_training(self):
        optimizer = attached(0.25)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert type(other) is type(optimizer)
            assert other.clipper is not optimizer.clipper
            assert other.clipper.defaults["quantile"] == 0.25

    def test_a_pickled_model_goes_on_alone(self, model, fit, windows):
        ours = train(model, fit, attached())
        other = pickle.loads(pickle.dumps(ours))
        fit(other)
        assert [len(window) for window in windows(ours.optimizer.clipper)] == [4] * 4
        assert [len(window) for window in windows(other.optimizer.clipper)] == [8] * 4


class TestUsersOptimizers:
    def test_one_of_its_own(self, model, growing, fit, by_hand):
        expected = by_hand(model(), Momentum()).fit(*growing)
        optimizer = QuantileClip.as_optimizer(Momentum(), 0.5)
        expected.assert_equals(train(model, fit, optimizer), optimizer.clipper)

    def test_a_subclass_that_overrides_apply_gradients(self, model, growing, fit, by_hand):
        """Its changes to the gradients come before the clipper."""

        class Doubled(keras.optimizers.SGD):
            def apply_gradients(self, grads_and_vars):
                return super().apply_gradients([(2.0 * g, v) for g, v in grads_and_vars])

        expected = by_hand(model(), Doubled(1e-2))
        optimizer = QuantileClip.as_optimizer(Doubled(1e-2), 0.5)
        ours = train(model, fit, optimizer)
        x, y = growing
        for start in range(0, 64, 16):
            gradients = expected.gradients(x[start : start + 16], y[start : start + 16])
            expected.apply([2.0 * gradient for gradient in gradients])
        assert expected.clipped > 0
        expected.assert_equals(ours, optimizer.clipper)

    def test_a_subclass_that_overrides_the_update_of_all_variables(self, model, growing, fit):
        """As Keras's own Nadam does; it calls super."""

        class Counting(keras.optimizers.SGD):
            updates = 0

            def _backend_update_step(self, *arguments):
                self.updates += 1
                super()._backend_update_step(*arguments)

        optimizer = QuantileClip.as_optimizer(Counting(1e-2), 0.5)
        ours = model()
        ours.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
        fit(ours)
        assert optimizer.updates == 4
        assert optimizer.clipper.export_state().groups[0].recorded.tolist() == [4] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"on_nonfinite": "raise"},
        {"group_settings": [{"match": "kernel", "on_nonfinite": "raise"}]},
    ],
    ids=["all", "a group"],
)
def test_on_a_gpu_an_error_needs_the_callback(settings, monkeypatch):
    """There, Keras compiles with XLA by default, where no step can raise."""
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * (kind == "GPU"))
    with pytest.warns(UserWarning, match="On a GPU.*Add AutoClipCallback to fit") as said:
        attached(**settings)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(on_nonfinite="zero")
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
        attached(**settings)


@pytest.mark.filterwarnings("ignore:.* was trained before the clipper was attached")
class TestAttachedAfterTraining:
    """Keras keeps the graph of a training step in the model, which an optimizer does not know."""

    @pytest.mark.parametrize(
        ("wrap", "options"),
        [
            (lambda optimizer: optimizer, {"steps_per_execution": 2}),
            (lambda optimizer: optimizer, {"jit_compile": True}),
            (keras.optimizers.LossScaleOptimizer, {"jit_compile": False}),
        ],
        ids=["graph", "xla", "loss scaling"],
    )
    def test_the_next_fit_clips(self, model, fit, windows, wrap, options):
        ours = model()
        ours.compile(optimizer=wrap(keras.optimizers.SGD(1e-2)), loss="mse", **options)
        fit(ours)
        optimizer = QuantileClip.as_optimizer(ours.optimizer, 0.5)
        fit(ours)
        assert [len(window) for window in windows(optimizer.clipper)] == [4] * 4

    def test_an_empty_history_is_said_once(self, model, fit, tmp_path):
        """As of a resumed training whose history was not loaded."""
        saved = train(model, fit, attached())
        saved.save_weights(tmp_path / "m.weights.h5")
        saved.optimizer.clipper.save(tmp_path / "history")
        plain = train(model, fit, keras.optimizers.Adam(1e-2))
        QuantileClip.as_optimizer(plain.optimizer)
        with pytest.warns(UserWarning, match="starts with an empty history") as said:
            fit(plain)
        assert [each.filename for each in said if "empty history" in str(each.message)] == [
            keras_training.__file__
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".* starts with an empty history")
            warnings.filterwarnings("ignore", ".* matched by order")  # layers have no names
            fit(plain)
            for load in (
                lambda model: model.load_weights(tmp_path / "m.weights.h5"),
                lambda model: model.optimizer.clipper.load(tmp_path / "history"),
            ):
                plain = train(model, fit, keras.optimizers.Adam(1e-2))
                QuantileClip.as_optimizer(plain.optimizer, 0.5)
                load(plain)
                fit(plain)

    def test_in_the_middle_of_fit(self, model, fit, windows):
        ours, clipper = model(), QuantileClip(0.5)
        ours.compile(optimizer=keras.optimizers.SGD(1e-2), loss="mse", jit_compile=False)
        attach = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: epoch == 1 and clipper.attach(ours.optimizer)
        )
        fit(ours, epochs=3, callbacks=[attach])
        assert [len(window) for window in windows(clipper)] == [8] * 4

    def test_a_handle_stops_it_again(self, model, fit, windows):
        ours, clipper = model(), QuantileClip(0.5)
        ours.compile(optimizer=keras.optimizers.SGD(1e-2), loss="mse", jit_compile=False)
        ours.optimizer.build(ours.trainable_variables)
        with clipper.attach(ours.optimizer):
            fit(ours)
        fit(ours)
        assert [len(window) for window in windows(clipper)] == [4] * 4

    def test_a_function_of_ones_own_says_why_there_is_nothing(self):
        variable, optimizer = tf.Variable([0.0]), keras.optimizers.SGD(1.0)
        optimizer.build([variable])
        step = tf.function(lambda: optimizer.apply_gradients([(tf.constant([1.0]), variable)]))
        step()
        QuantileClip.as_optimizer(optimizer)
        step()
        with pytest.raises(RuntimeError, match=r"traced before the clipper was attached"):
            _ = optimizer.clipper.last

    def test_every_model_of_the_optimizer_and_no_other(self, model, growing, windows):
        """Also one whose `train_step` has two optimizers, in a list."""

        class Two(keras.Model):
            def __init__(self):
                super().__init__()
                self.parts = [model(), model()]
                self.mine = [keras.optimizers.SGD(1e-2) for _ in range(2)]

            def train_step(self, data):
                for part, optimizer in zip(self.parts, self.mine):
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_mean(tf.square(part(data[0]) - data[1]))
                    variables = part.trainable_variables
                    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
                return {"loss": loss}

        two, other = Two(), model()
        two.compile(jit_compile=False)
        other.compile(optimizer="sgd", loss="mse", jit_compile=False)
        for each in (two, other):
            each.fit(*growing, verbose=0, batch_size=16)
        before = other.train_function
        clippers = [QuantileClip.as_optimizer(each, 0.5).clipper for each in two.mine]
        two.fit(*growing, verbose=0, batch_size=16)
        for clipper in clippers:
            assert [len(window) for window in windows(clipper)] == [4] * 4
        assert other.train_function is before


class TestByHandWhileAttached:
    def test_each_norm_is_recorded_once(self, windows):
        variable = tf.Variable([0.0, 0.0])
        clipper, optimizer = QuantileClip(0.5), keras.optimizers.SGD(1.0)
        handle = clipper.attach(optimizer)
        for size in (1.0, 2.0):
            pairs = [(tf.constant([3.0 * size, 4.0 * size]), variable)]
            with pytest.raises(RuntimeError, match=r"clipper\.total_norm, or detach"):
                clipper(pairs)
            optimizer.apply_gradients(pairs)
            assert float(clipper.total_norm) == 5.0 * size
        np.testing.assert_equal(windows(clipper), [[5.0, 10.0]])
        handle.remove()
        clipper(pairs)
        assert len(windows(clipper)[0]) == 3

    @pytest.mark.parametrize("settings", [{}, {"global_clipping": True}])
    def test_the_total_norm(self, settings):
        """Before clipping, of all variables, eagerly and in a graph."""
        variables = [tf.Variable([0.0]), tf.Variable([0.0, 0.0])]
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1.0), 0.0, **settings)
        with pytest.raises(RuntimeError, match="has not made a step"):
            _ = optimizer.clipper.total_norm

        def step(size):
            gradients = [tf.constant([2.0]) * size, tf.constant([3.0, 6.0]) * size]
            optimizer.apply_gradients(zip(gradients, variables))
            return optimizer.clipper.total_norm

        for run in (step, tf.function(step)):
            for size in (1.0, 5.0):
                assert float(run(tf.constant(size))) == 7.0 * size
        optimizer.clipper.reset()
        with pytest.raises(RuntimeError, match="has not made a step"):
            _ = optimizer.clipper.total_norm


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_keras_clips_first(name):
    with pytest.warns(UserWarning, match=f"has {name}=0.5, which acts before AutoClip does"):
        QuantileClip.as_optimizer(keras.optimizers.SGD(**{name: 0.5}))
    optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD())
    with pytest.warns(UserWarning, match=f"has {name}=0.5, which acts before") as said:
        setattr(optimizer, name, 0.5)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(optimizer, name, None)


class TestRemove:
    @pytest.mark.parametrize("built", [False, True])
    @pytest.mark.parametrize("make", [keras.optimizers.Adam, Momentum])
    def test_no_trace_is_left(self, model, fit, make, built):
        optimizer = make()
        if built:
            train(model, fit, optimizer)
        before, config = snapshot(optimizer), optimizer.get_config()
        clipper = QuantileClip()
        handle = clipper.attach(optimizer)
        assert snapshot(optimizer) != before
        clipper.detach()
        clipper.detach()  # a second call does nothing
        assert snapshot(optimizer) == before
        assert type(optimizer) is make
        assert not hasattr(optimizer, "clipper")
        assert optimizer.get_config() == config
        handle.remove()  # a second call does nothing

    def test_the_clipper_keeps_its_history_and_can_be_attached_again(self, model, fit, windows):
        ours = model()
        optimizer, clipper = keras.optimizers.SGD(1e-2), QuantileClip(0.5)
        handle = clipper.attach(optimizer)
        for round_, expected in enumerate((4, 4, 8)):
            if round_ == 1:
                handle.remove()
            if round_ == 2:
                clipper.attach(optimizer)
            ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
            fit(ours)
            assert [len(window) for window in windows(clipper)] == [expected] * 4

    def test_once_its_optimizer_is_gone_it_can_be_attached_again(self):
        optimizer = attached()
        clipper = optimizer.clipper
        del optimizer
        gc.collect()
        clipper.attach(other := keras.optimizers.SGD())
        assert other.clipper is clipper

    def test_a_handle_removes_only_its_own(self):
        optimizer = keras.optimizers.Adam()
        handle = QuantileClip().attach(optimizer)
        handle.remove()
        QuantileClip.as_optimizer(optimizer)
        handle.remove()
        assert isinstance(optimizer.clipper, QuantileClip)

    def test_nothing_is_kept_alive(self, model, fit):
        ours = train(model, fit, attached())
        gone = [weakref.ref(each) for each in (ours.optimizer, ours.optimizer.clipper)]
        del ours
        keras.backend.clear_session()
        gc.collect()
        assert [reference() for reference in gone] == [None, None]


def test_plain_tf_variables(windows):
    """Keras's optimizers take them too; in a loop of one's own there may be nothing else."""
    variables = [tf.Variable([1.0, 2.0], name="a"), tf.Variable(3.0, name="b")]
    optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(0.5), 0.0)
    for size in (1.0, 3.0):
        optimizer.apply_gradients(zip([tf.constant([0.0, size]), tf.constant(size)], variables))
    np.testing.assert_equal(windows(optimizer.clipper), [[1.0, 3.0]] * 2)
    np.testing.assert_allclose(variables[0], [1.0, 1.0])
    np.testing.assert_allclose(variables[1], 2.0)
