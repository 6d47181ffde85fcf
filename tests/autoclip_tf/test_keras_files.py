"""Keras's own files: whatever saves the optimizer saves the history, and training goes on."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import signal
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings
from keras.src.saving import saving_lib
from keras_training import build_optimizer, fit_in_order
from processes import execute

from autoclip.core.inspect import read_states
from autoclip.tf import QuantileClip, StandardClip, StateError


def adam(**settings):
    return QuantileClip.as_optimizer(keras.optimizers.Adam(0.01), 0.5, 10, **settings)


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)


@keras.saving.register_keras_serializable("tests")
class Halved(keras.optimizers.SGD):
    """An optimizer of a user's own, registered as Keras asks for."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate / 2)


RUNS = {
    "adam": (adam, {}),
    "adam, compiled by XLA": (adam, {"jit_compile": True}),
    "standard, global": (
        lambda: StandardClip.as_optimizer(
            keras.optimizers.SGD(0.001, momentum=0.9),
            0.5,
            10,
            global_clipping=True,
            warmup_steps=2,
        ),
        {},
    ),
    "groups": (
        lambda: QuantileClip.as_optimizer(
            keras.optimizers.AdamW(0.01, weight_decay=0.1),
            0.9,
            group_settings=[{"match": "bias", "quantile": 0.2, "history_length": 3}],
        ),
        {},
    ),
    "nadam, standard": (
        lambda: StandardClip.as_optimizer(keras.optimizers.Nadam(0.01), 1.0, 10, warmup_steps=2),
        {},
    ),
    "accumulation": (
        lambda: QuantileClip.as_optimizer(
            keras.optimizers.Adam(0.01, gradient_accumulation_steps=3), 0.5, 10
        ),
        {},
    ),
    "averages and a schedule": (
        lambda: QuantileClip.as_optimizer(
            keras.optimizers.Lion(
                keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.5), use_ema=True
            ),
            0.5,
            10,
        ),
        {},
    ),
    "an optimizer of one's own": (
        lambda: QuantileClip.as_optimizer(Halved(0.01, momentum=0.5), 0.5, 10),
        {},
    ),
    "mixed_float16": (lambda: QuantileClip.as_optimizer(scaled(keras.optimizers.Adam()), 0.5), {}),
}
SELDOM = [
    "adam, compiled by XLA",
    "nadam, standard",
    "averages and a schedule",
    "an optimizer of one's own",
]
if settings.get_current_profile_name() == "deterministic":  # nightly all
    RUNS = {name: run for name, run in RUNS.items() if name not in SELDOM}


@functools.cache
def make_data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 4)) * np.exp(generator.normal(size=(64, 1)))
    return x.astype(np.float32), x.sum(axis=1, keepdims=True).astype(np.float32)


def make_model(optimizer, dtype="float32", **options):
    # Functional: the variables of a Sequential that was loaded have other paths.
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="relu", name="hidden", dtype=dtype)(inputs)
    outputs = keras.layers.Dense(1, name="out", dtype=dtype)(hidden)
    model = keras.Model(inputs, keras.layers.Activation("linear", dtype="float32")(outputs))
    model.compile(optimizer=optimizer, loss="mean_squared_error", **options)
    return model


def fit(model, epochs=1, **options):
    build_optimizer(model)
    fit_in_order(model, *make_data(), 8, epochs=epochs, **options)
    return model


def clipper_of(model):
    return getattr(model.optimizer, "inner_optimizer", model.optimizer).clipper


def everything(model):
    """All that training depends on, and what the last step did."""
    clipper = clipper_of(model)
    arrays = {f"weight {i}": array for i, array in enumerate(model.get_weights())}
    arrays |= {f"optimizer {i}": v.numpy() for i, v in enumerate(model.optimizer.variables)}
    arrays["state"] = np.frombuffer(clipper.state_dict()["data"], np.uint8)
    arrays["thresholds"] = clipper.last.thresholds.numpy()
    arrays["norms"] = clipper.last.norms.numpy()
    return arrays


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def optimizer_state(model):
    return [variable.numpy() for variable in model.optimizer.variables]


def assert_optimizer_state(model, expected):
    for ours, theirs in zip(optimizer_state(model), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def go_on(folder, names, options):
    tf.config.optimizer.set_experimental_options(options)  # graphs that differ round differently
    for name in names:
        model = keras.models.load_model(f"{folder}/{name} 1.keras")
        np.savez(f"{folder}/{name}.npz", **everything(fit(model, initial_epoch=1, epochs=2)))


class TestFreshProcess:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return tmp_path_factory.mktemp("runs")

    @pytest.fixture(scope="class")
    @classmethod
    def without_stop(cls, folder):
        """Two epochs each, in one call of `fit`; the model of the first one is saved."""
        results = {}
        for name, (optimizer, options) in RUNS.items():
            dtype = "mixed_float16" if "float16" in name else "float32"
            checkpoint = keras.callbacks.ModelCheckpoint(f"{folder}/{name} {{epoch}}.keras")
            model = make_model(optimizer(), dtype, **options)
            results[name] = everything(fit(model, epochs=2, callbacks=[checkpoint]))
        return results

    @pytest.fixture(scope="class")
    @classmethod
    def restarted(cls, server, folder, without_stop):
        """The second epoch in a process that has seen nothing but the file."""
        options = tf.config.optimizer.get_experimental_options()
        server.call(go_on, folder=folder, names=list(RUNS), options=options)
        return {name: dict(np.load(f"{folder}/{name}.npz")) for name in RUNS}

    @pytest.mark.parametrize("name", RUNS)
    def test_fit_goes_on_as_if_it_had_never_stopped(self, without_stop, restarted, name):
        assert len(restarted[name]["state"]) > 0
        assert_same(restarted[name], without_stop[name])

    def test_without_importing_autoclip(self, server, folder, without_stop):
        """Keras names what it does not know; the model alone can be loaded."""
        path = f"{folder}/adam 2.keras"
        code = f"""
import sys, keras, numpy
model = keras.models.load_model({path!r}, compile=False)
print(model.predict(numpy.ones((1, 4)), verbose=0).item())
assert not [name for name in sys.modules if name.startswith('autoclip')]
keras.models.load_model({path!r})
"""
        (outcome,) = server.run(execute, {"code": code})
        expected = keras.models.load_model(path).predict(np.ones((1, 4)), verbose=0).item()
        assert str(expected) in outcome.output.splitlines()
        error = outcome.error.splitlines()[-1]
        assert error.startswith("ValueError: Argument(s) not recognized: {'autoclip': ")
        assert repr(QuantileClip.__module__) in error and "'QuantileClip'" in error


class TestPlain:
    """Between an optimizer with a clipper and the same one without."""

    @pytest.fixture
    def plain(self):
        return fit(make_model(keras.optimizers.Adam(0.01)))

    @pytest.fixture
    def clipped(self):
        return fit(make_model(adam()))

    def test_a_clipper_for_a_loaded_plain_model(self, plain, tmp_path):
        plain.save(f"{tmp_path}/plain.keras")
        model = keras.models.load_model(f"{tmp_path}/plain.keras")
        QuantileClip.as_optimizer(model.optimizer, quantile=1.0)
        assert_optimizer_state(model, optimizer_state(plain))
        fit(plain)
        fit(model)  # quantile 1 never clips
        assert_optimizer_state(model, optimizer_state(plain))
        assert model.optimizer.clipper.export_state().groups[0].recorded.tolist() == [8] * 4

    @pytest.mark.parametrize(
        "file", ["plain.weights.h5", pytest.param("plain.keras", marks=pytest.mark.nightly)]
    )
    def test_a_plain_checkpoint_into_a_clipped_model(self, plain, tmp_path, file):
        if file.endswith(".keras"):
            plain.save(f"{tmp_path}/{file}")
        else:
            plain.save_weights(f"{tmp_path}/{file}")
        model = make_model(QuantileClip.as_optimizer(keras.optimizers.Adam(0.01), quantile=1.0))
        model.optimizer.build(model.trainable_variables)
        with pytest.warns(UserWarning, match="holds no history of AutoClip"):
            model.load_weights(f"{tmp_path}/{file}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.load_weights(f"{tmp_path}/{file}")  # it is said once
        assert_optimizer_state(model, optimizer_state(plain))
        assert model.optimizer.clipper.export_state().groups[0].recorded.tolist() == [0] * 4
        fit(plain)
        fit(model)
        assert_optimizer_state(model, optimizer_state(plain))

    def test_a_plain_checkpoint_clears_no_history(self, plain, clipped, tmp_path):
        plain.save_weights(f"{tmp_path}/plain.weights.h5")
        state = clipped.optimizer.clipper.state_dict()
        with pytest.warns(UserWarning, match="keeps the history that it has"):
            clipped.load_weights(f"{tmp_path}/plain.weights.h5")
        assert clipped.optimizer.clipper.state_dict() == state

    @pytest.mark.parametrize(
        "file", [pytest.param("clipped.weights.h5", marks=pytest.mark.nightly), "clipped.keras"]
    )
    def test_a_clipped_checkpoint_into_a_plain_model(self, clipped, tmp_path, file):
        if file.endswith(".keras"):
            clipped.save(f"{tmp_path}/{file}")
        else:
            clipped.save_weights(f"{tmp_path}/{file}")
        model = make_model(keras.optimizers.Adam(0.01))
        model.optimizer.build(model.trainable_variables)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.load_weights(f"{tmp_path}/{file}")
        assert type(model.optimizer) is keras.optimizers.Adam
        assert_optimizer_state(model, optimizer_state(clipped))
        fit(model)

    def test_a_clipped_file_goes_on_without_its_clipper(self, clipped, tmp_path):
        clipped.save(f"{tmp_path}/clipped.keras")
        model = keras.models.load_model(f"{tmp_path}/clipped.keras")
        config = model.optimizer.get_config()
        del config["autoclip"]
        plain = keras.models.load_model(f"{tmp_path}/clipped.keras", compile=False)
        plain.compile(keras.optimizers.Adam.from_config(config), loss="mean_squared_error")
        plain.optimizer.build(plain.trainable_variables)
        plain.load_weights(f"{tmp_path}/clipped.keras")
        assert_optimizer_state(plain, optimizer_state(clipped))
        assert not hasattr(plain.optimizer, "clipper")


class TestOtherSettings:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return fit(make_model(adam()), epochs=2)

    @pytest.fixture
    def windows(self, model):
        return clipper_of(model).export_state().groups[0].windows()

    @pytest.fixture
    def file(self, model, tmp_path):
        model.save_weights(f"{tmp_path}/model.weights.h5")
        return f"{tmp_path}/model.weights.h5"

    def built(self, optimizer):
        model = make_model(optimizer)
        model.optimizer.build(model.trainable_variables)
        return model

    def test_a_shorter_history_keeps_the_newest(self, file, windows):
        model = self.built(QuantileClip.as_optimizer(keras.optimizers.Adam(), 0.2, 4))
        with pytest.warns(UserWarning, match="history_length=10 there and 4 here") as found:
            model.load_weights(file)
        assert "quantile=0.5 there and 0.2 here" in str(found[0].message)
        group = clipper_of(model).export_state().groups[0]
        for ours, theirs in zip(group.windows(), windows, strict=True):
            np.testing.assert_array_equal(ours, theirs[-4:])
        assert group.recorded.tolist() == [16] * 4
        defaults = clipper_of(model).defaults
        assert (defaults["quantile"], defaults["history_length"]) == (0.2, 4)

    def test_a_longer_history_keeps_all(self, file, windows):
        model = self.built(QuantileClip.as_optimizer(keras.optimizers.Adam(), 0.5, 100))
        with pytest.warns(UserWarning, match="history_length=10 there and 100 here"):
            model.load_weights(file)
        group = clipper_of(model).export_state().groups[0]
        for ours, theirs in zip(group.windows(), windows, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        fit(model)
        assert clipper_of(model).export_state().groups[0].lengths.tolist() == [18] * 4

    def test_another_mode_is_an_error(self, file):
        optimizer = keras.optimizers.Adam(0.01)
        model = self.built(QuantileClip.as_optimizer(optimizer, global_clipping=True))
        fit(model)
        state = clipper_of(model).state_dict()
        # Keras makes a ValueError of its own of every error, with the text of the first one.
        with pytest.raises(ValueError, match=r"(?s)the Keras checkpoint .*neither global"):
            model.load_weights(file)
        assert clipper_of(model).state_dict() == state

    def test_another_rule_goes_on_with_the_history(self, file, windows):
        model = self.built(StandardClip.as_optimizer(keras.optimizers.Adam(0.01)))
        with pytest.warns(UserWarning, match="rule='quantile' there and 'standard' here"):
            model.load_weights(file)
        for ours, theirs in zip(clipper_of(model).export_state().groups[0].windows(), windows):
            np.testing.assert_array_equal(ours, theirs)

    def test_in_other_groups_variables_keep_their_histories(self, file, windows):
        model = self.built(
            QuantileClip.as_optimizer(
                keras.optimizers.Adam(0.01), 0.5, 10, group_settings=[{"match": "bias"}]
            )
        )
        model.load_weights(file)
        groups = clipper_of(model).export_state().groups
        found = [window for group in groups for window in group.windows()]
        for ours, theirs in zip(found, [*windows[1::2], *windows[::2]], strict=True):
            np.testing.assert_array_equal(ours, theirs)


class TestLoadedBeforeItIsBuilt:
    def test_the_history_waits_for_the_optimizers_variables(self, tmp_path):
        first = fit(make_model(adam()))
        clipper_of(first).save(tmp_path / "history")
        model = make_model(adam())
        clipper_of(model).load(tmp_path / "history")
        fit(model)
        assert clipper_of(model).export_state().groups[0].recorded.tolist() == [16] * 4

    def test_one_that_does_not_fit_can_be_replaced(self, tmp_path):
        clipper = QuantileClip()
        clipper.build([tf.Variable([0.0])])
        clipper.save(tmp_path / "another model's")
        clipper_of(fit(make_model(adam()))).save(tmp_path / "the model's")
        model = make_model(adam())
        clipper_of(model).load(tmp_path / "another model's")
        with pytest.raises(StateError, match="another model's has 1 parameters in group 0"):
            model.optimizer.build(model.trainable_variables)
        assert not model.optimizer.built  # or Keras would go on without a clipper's variables
        clipper_of(model).load(tmp_path / "the model's")
        fit(model)
        assert clipper_of(model).export_state().groups[0].recorded.tolist() == [16] * 4


class TestCallbacks:
    def test_model_checkpoint_of_weights_alone(self, tmp_path):
        checkpoint = keras.callbacks.ModelCheckpoint(
            f"{tmp_path}/{{epoch}}.weights.h5", save_weights_only=True
        )
        without_stop = fit(make_model(adam()), epochs=2, callbacks=[checkpoint])
        model = make_model(adam())
        model.optimizer.build(model.trainable_variables)
        model.load_weights(f"{tmp_path}/1.weights.h5")
        fit(model, initial_epoch=1, epochs=2)
        assert_same(everything(model), everything(without_stop))

    def test_backup_and_restore_after_the_process_was_killed(self, server, tmp_path):
        (killed,) = server.run(train_and_die, {"folder": tmp_path})
        assert killed.status == -signal.SIGKILL
        assert not (tmp_path / "result.npz").exists()
        server.call(train_to_the_end, folder=tmp_path)
        result = dict(np.load(tmp_path / "result.npz"))
        assert result.pop("steps") == 2 * 8  # epochs 2 and 3: it was not begun anew
        assert_same(result, everything(fit(make_model(adam()), epochs=3)))


class DieAt(keras.callbacks.Callback):
    """Kills the process, as the kernel does when memory runs out, after a number of steps."""

    def __init__(self, step=None):
        super().__init__()
        self.step = step
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder):
    backup = keras.callbacks.BackupAndRestore(f"{folder}/backup")
    fit(make_model(adam()), epochs=3, callbacks=[backup, DieAt(step=8 + 5)])


def train_to_the_end(folder):
    counter = DieAt()
    backup = keras.callbacks.BackupAndRestore(f"{folder}/backup")
    model = fit(make_model(adam()), epochs=3, callbacks=[backup, counter])
    np.savez(f"{folder}/result.npz", steps=counter.steps, **everything(model))


class TestCopies:
    @pytest.mark.parametrize(
        "copied",
        [
            # By pickle's protocol, too.
            pytest.param(copy.deepcopy, marks=pytest.mark.nightly),
            lambda model: pickle.loads(pickle.dumps(model)),
        ],
        ids=["deepcopy", "pickle"],
    )
    def test_a_copied_model_has_a_history_of_its_own(self, copied):
        model = fit(make_model(adam()))
        other = copied(model)
        assert clipper_of(other) is not clipper_of(model)
        assert_optimizer_state(other, optimizer_state(model))
        assert clipper_of(other).state_dict() == clipper_of(model).state_dict()
        before = everything(model)
        fit(other)
        assert_same(everything(model), before)
        fit(model)
        assert_same(everything(other), everything(model))

    def test_a_cloned_model_compiled_from_the_config_starts_fresh(self):
        model = fit(make_model(RUNS["groups"][0]()))
        clone = keras.models.clone_model(model)
        clone.compile_from_config(model.get_compile_config())
        assert isinstance(clone.optimizer, keras.optimizers.AdamW)
        assert clipper_of(clone) is not clipper_of(model)
        assert clipper_of(clone).get_config() == clipper_of(model).get_config()
        state = clipper_of(model).state_dict()
        fit(clone)
        assert clipper_of(model).state_dict() == state
        recorded = [group.recorded.tolist() for group in clipper_of(clone).export_state().groups]
        assert recorded == [[8, 8], [8, 8]]

    @pytest.mark.skipif(
        not hasattr(keras.optimizers, "MultiOptimizer"), reason="newer than this Keras"
    )
    @pytest.mark.parametrize(
        "come_back", ["file", pytest.param("deepcopy", marks=pytest.mark.nightly), "config"]
    )
    def test_every_optimizer_in_a_multi_optimizer(self, come_back, tmp_path):
        choose = keras.optimizers.OptimizerMap(adam(), {"out.*": adam(global_clipping=True)})
        model = fit(make_model(keras.optimizers.MultiOptimizer(choose)))
        if come_back == "file":
            model.save(tmp_path / "model.keras")
            other = keras.saving.load_model(tmp_path / "model.keras")
        elif come_back == "deepcopy":
            other = copy.deepcopy(model)
        else:
            config = model.optimizer.get_config()
            other = make_model(keras.optimizers.MultiOptimizer.from_config(config))
        fit(other)
        steps = 8 if come_back == "config" else 16
        recorded = [
            each.clipper.export_state().groups[0].recorded.tolist()
            for each in other.optimizer.optimizers
        ]
        assert sorted(recorded) == [[steps], [steps, steps]]


class TestInference:
    """A model exported for inference needs no history, and is not disturbed by one."""

    @pytest.mark.parametrize("how", ["export", "tf.saved_model.save"])
    def test_saved_models(self, how, tmp_path):
        model = fit(make_model(adam()))
        state = clipper_of(model).state_dict()
        if how == "export":
            model.export(tmp_path, verbose=False)
        else:
            tf.saved_model.save(model, str(tmp_path))
        assert clipper_of(model).state_dict() == state
        serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
        x = make_data()[0]
        np.testing.assert_array_equal(
            next(iter(serve(tf.constant(x)).values())), model.predict(x, batch_size=64, verbose=0)
        )
        fit(model)
        assert clipper_of(model).state_dict() != state

    @pytest.mark.parametrize(
        ("make", "direct", "jit_compile"),
        [
            pytest.param(lambda: QuantileClip(0.5, 5), False, False, marks=pytest.mark.nightly),
            (lambda: QuantileClip(0.5, 5), True, True),
            (lambda: QuantileClip(0.5, 5, True, on_nonfinite="zero"), False, True),
            (lambda: StandardClip(1.0, warmup_steps=2, max_norm=9.0), False, False),
            (lambda: QuantileClip(group_settings=[{"match": "bias"}]), True, False),
        ],
        ids=["quantile", "by hand, XLA", "global, XLA", "standard", "groups, by hand"],
    )
    def test_a_module_that_trains(self, make, direct, jit_compile, tmp_path):
        """A loaded module continues as the saved one: the histories are in it."""

        class Trained(tf.Module):
            def __init__(self):
                super().__init__()
                self.weight = tf.Variable(tf.zeros(4), name="weight")
                self.bias = tf.Variable(0.0, name="bias")
                self.optimizer, self.clipper = keras.optimizers.SGD(0.1, momentum=0.5), make()
                self.optimizer.build([self.weight, self.bias])
                if direct:
                    self.clipper.build([self.weight, self.bias])
                else:
                    self.clipper.attach(self.optimizer)

            @tf.function(input_signature=[tf.TensorSpec([])], jit_compile=jit_compile)
            def train(self, size):
                pairs = [(tf.fill([4], size), self.weight), (size, self.bias)]
                self.optimizer.apply_gradients(self.clipper(pairs) if direct else pairs)
                return tf.concat([self.weight, self.bias[None]], axis=0)

        module = Trained()
        for size in (1.0, 5.0, 2.0):
            module.train(tf.constant(size))
        tf.saved_model.save(module, str(tmp_path))
        loaded = tf.saved_model.load(str(tmp_path))
        for size in (7.0, 1.0, 11.0):
            expected = module.train(tf.constant(size)).numpy()
            np.testing.assert_array_equal(loaded.train(tf.constant(size)), expected)

    def test_a_module_with_a_clipper(self, tmp_path):
        module = tf.Module()
        module.weight = tf.Variable([1.0, 2.0])
        module.clipper = QuantileClip(0.5)
        module.clipper([(tf.constant([3.0, 4.0]), module.weight)])
        module.double = tf.function(lambda: 2.0 * module.weight, input_signature=[])
        tf.saved_model.save(module, str(tmp_path))
        loaded = tf.saved_model.load(str(tmp_path))
        np.testing.assert_array_equal(loaded.double(), [2.0, 4.0])


def test_the_legacy_format_is_loaded_as_without_a_clipper(tmp_path):
    """Keras saves the optimizer's own variables there, nothing else of it, and loads none."""
    model = make_model(adam())
    model.compile(model.optimizer, loss=keras.losses.MeanSquaredError())  # "mse" cannot be loaded
    fit(model).save(f"{tmp_path}/model.h5")
    loaded = keras.models.load_model(f"{tmp_path}/model.h5")
    assert loaded.evaluate(*make_data(), verbose=0) == model.evaluate(*make_data(), verbose=0)
    assert clipper_of(loaded).get_config() == clipper_of(model).get_config()
    assert not clipper_of(loaded).built
    loaded.compile(adam(), loss="mean_squared_error")
    fit(loaded)


class TestFrozenLayers:
    """If Keras loads, or warns and trains, the clipper keeps the matching rows and trains too."""

    @pytest.mark.filterwarnings("ignore:Skipping variable loading")
    @pytest.mark.parametrize(
        "come_back",
        [
            lambda model, path: model.save(path) or keras.saving.load_model(path),
            lambda model, path: copy.deepcopy(model),
        ],
        ids=["file", "deepcopy"],
    )
    def test_frozen_before_saving(self, come_back, tmp_path):
        model = fit(make_model(adam()))
        kept = clipper_of(model).export_state().groups[0].windows()[2:]
        model.get_layer("hidden").trainable = False
        with pytest.warns(UserWarning, match=r"not used: 'hidden/kernel' of shape \(4, 8\); "):
            other = come_back(model, str(tmp_path / "model.keras"))
        found = clipper_of(other).export_state().groups[0].windows()
        np.testing.assert_equal(found, kept)
        fit(other)
        assert clipper_of(other).export_state().groups[0].recorded.tolist() == [16, 16]

    @pytest.mark.filterwarnings("ignore:Skipping variable loading")
    @pytest.mark.parametrize("group_clipping", [False, True])
    def test_a_whole_group_frozen_before_saving(self, group_clipping, tmp_path):
        groups = [{"match": "hidden", "quantile": 0.3}, {"match": "kernel", "quantile": 0.7}]
        model = make_model(adam(group_settings=groups, group_clipping=group_clipping))
        *_, kept, last = fit(model).optimizer.clipper.export_state().groups
        model.get_layer("hidden").trainable = False
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match="not used: "):
            other = keras.saving.load_model(tmp_path / "model.keras")
        found = clipper_of(other).export_state().groups
        np.testing.assert_equal([g.windows() for g in found], [g.windows() for g in (kept, last)])
        assert [group["quantile"] for group in fit(other).optimizer.clipper.param_groups] == [
            0.7,
            0.5,
        ]

    @pytest.mark.filterwarnings("ignore:Skipping variable loading")
    def test_frozen_before_saving_in_global_mode(self, tmp_path):
        model = fit(make_model(QuantileClip.as_optimizer(keras.optimizers.Adam(), 0.5, 10, True)))
        model.get_layer("hidden").trainable = False
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match="start empty: all parameters"):
            other = keras.saving.load_model(tmp_path / "model.keras")
        fit(other)
        assert clipper_of(other).export_state().groups[0].recorded.tolist() == [8]

    @pytest.mark.filterwarnings("ignore:Skipping variable loading")
    @pytest.mark.parametrize(
        ("built", "frozen"),
        [
            (False, "hidden"),
            (True, "out"),
            pytest.param(False, "out", marks=pytest.mark.nightly),
            pytest.param(True, "hidden", marks=pytest.mark.nightly),
        ],
    )
    def test_weights_between_stages(self, frozen, built, tmp_path):
        file = tmp_path / "stage.weights.h5"
        model = fit(make_model(adam()))
        model.save_weights(file)
        stage = make_model(adam())
        stage.get_layer(frozen).trainable = False
        stage.compile(adam(), loss="mse")
        if built:
            stage.optimizer.build(stage.trainable_variables)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            stage.load_weights(file)
            fit(stage)
        assert sum(f"not used: '{frozen}/kernel'" in str(each.message) for each in said) == 1
        assert clipper_of(stage).export_state().groups[0].recorded.tolist() == [16, 16]


def by_file(model, make, folder):
    model.save_weights(f"{folder}/model.weights.h5")
    other = make()
    other.load_weights(f"{folder}/model.weights.h5")
    return other


def by_checkpoint(model, make, folder):
    path = tf.train.Checkpoint(model=model).write(f"{folder}/checkpoint")
    other = make()
    tf.train.Checkpoint(model=other).read(path)
    return other


def by_clipper(model, make, folder):
    clipper_of(model).save(f"{folder}/history")
    other = make()
    clipper_of(other).load(f"{folder}/history")
    return other


def carried(often):
    """Every way to carry a history to another model; on each commit one, which differs by test."""
    ways = (by_file, by_checkpoint, by_clipper)
    marks = pytest.mark.nightly
    return pytest.mark.parametrize(
        "carry", [way if way is often else pytest.param(way, marks=marks) for way in ways]
    )


class Twice(keras.layers.Layer):
    """Two layers of one name: Keras gives their variables one path."""

    def build(self, shape):
        self.both = [keras.layers.Dense(4, name="proj") for _ in range(2)]
        for layer in self.both:
            layer.build(shape)

    def call(self, x):
        return self.both[0](x) - 0.1 * self.both[1](x)


class TestNames:
    """A history goes to the variable of its name; to another one only if no name is shared."""

    def make(self, *names, frozen=(), optimizer=None, twice=False):
        """Layers with variables of equal shapes, one after the other, built and trained."""
        inputs = outputs = keras.Input((4,))
        for name in names:
            layer = Twice(name=name) if twice else keras.layers.Dense(4, name=name)
            layer.trainable = name not in frozen
            outputs = layer(outputs)
        model = keras.Model(inputs, outputs)
        model.compile(optimizer or adam(), loss="mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    def fit(self, model):
        x = make_data()[0]
        model.fit(x, x, batch_size=8, verbose=0)
        return model

    def load(self, model, make, folder, carry=by_file):
        """The model that loads, and what AutoClip warns of."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other = carry(model, make, folder)
        return other, [str(each.message) for each in said if "istor" in str(each.message)]

    def windows(self, model):
        """Each variable's history by its path and number."""
        found = {}
        for group in clipper_of(model).export_state().groups:
            for info, window in zip(group.parameters, group.windows(), strict=True):
                i = sum(name == info.name for name, _ in found)
                found[info.name, i] = window.tolist()
        return found

    @pytest.mark.filterwarnings("ignore:A total of")
    def test_another_layer_of_the_same_model_starts_empty(self, tmp_path):
        names = ("block_0", "block_1")
        model = self.fit(self.make(*names, frozen=["block_1"]))
        other, said = self.load(model, lambda: self.make(*names, frozen=["block_0"]), tmp_path)
        assert self.windows(other) == {("block_1/kernel", 0): [], ("block_1/bias", 0): []}
        [message] = said
        assert "start empty: 'block_1/kernel'" in message
        assert "not used: 'block_0/kernel'" in message

    @pytest.mark.filterwarnings("ignore:A total of")
    def test_shared_names_decide(self, tmp_path):
        model = self.fit(self.make("a", "block_1"))
        other, said = self.load(model, lambda: self.make("block_1", "block_2"), tmp_path)
        ours, theirs = self.windows(other), self.windows(model)
        assert {name for name, _ in theirs if theirs[name, 0]} == {name for name, _ in theirs}
        for part in ("kernel", "bias"):
            assert ours[f"block_1/{part}", 0] == theirs[f"block_1/{part}", 0]
            assert ours[f"block_2/{part}", 0] == []
        [message] = said
        assert "start empty: 'block_2/kernel'" in message and "not used: 'a/kernel'" in message

    @carried(by_checkpoint)
    def test_without_a_shared_name_by_order_and_the_pairs_are_said(self, carry, tmp_path):
        """Layers without names: Keras numbers them through the whole process."""
        model = self.fit(self.make(None, None))
        other, said = self.load(model, lambda: self.make(None, None), tmp_path, carry)
        ours, theirs = self.windows(other), self.windows(model)
        assert ours.keys().isdisjoint(theirs)
        assert list(ours.values()) == list(theirs.values()) and all(theirs.values())
        [message] = said
        assert "matched by order" in message
        for (new, _), (old, _) in zip(list(ours)[:2], theirs):
            assert f"'{old}' → '{new}'" in message

    @carried(by_clipper)
    def test_equal_names_match_in_order(self, carry, tmp_path):
        def make():
            return self.make("two", twice=True)

        model = self.fit(make())
        other, said = self.load(model, make, tmp_path, carry)
        assert {number for _, number in self.windows(model)} == {0, 1}
        assert self.windows(other) == self.windows(model) and not said
        assert all(self.windows(other).values())

    def by_group(self, model):
        """The positions of each group's variables in the model, and the group's settings."""
        order = [id(variable) for variable in model.trainable_variables]
        return [
            (
                [order.index(id(variable)) for variable in group["params"]],
                [group["match"], group["quantile"], group["max_norm"]],
            )
            for group in clipper_of(model).param_groups
        ]

    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("nested", ("dense", "dense")),
            ("sequential", ("a", "b")),
            pytest.param("nested", ("a", "b"), marks=pytest.mark.nightly),
            pytest.param("sequential", ("dense", "dense"), marks=pytest.mark.nightly),
        ],
    )
    def test_a_path_that_a_model_of_its_own_begins(self, kind, names, tmp_path):
        """`block/dense/kernel` is `dense/kernel` once the model is loaded, and again after that."""
        inputs = outputs = keras.Input((4,))
        for i, name in enumerate(names):
            parts = [keras.layers.Dense(4, name=name)]
            outputs = keras.Sequential(parts, name=f"block_{i}")(outputs)
        model = keras.Model(inputs, keras.layers.Dense(4, name="out")(outputs))
        if kind == "sequential":
            layers = [keras.layers.Dense(4, name=f"{i}{name}") for i, name in enumerate(names)]
            model = keras.Sequential([inputs, *layers], name="mine")
        model.compile(adam(), loss="mse", jit_compile=False)
        theirs = self.windows(self.fit(model))
        for come_back in (
            lambda: (
                model.save(tmp_path / "m.keras") or keras.saving.load_model(tmp_path / "m.keras")
            ),
            lambda: copy.deepcopy(model),
        ):
            other, said = self.load(model, lambda: None, tmp_path, lambda *_: come_back())  # noqa: B023
            assert list(self.windows(other).values()) == list(theirs.values())
            assert self.windows(other).keys() != theirs.keys() and not said
        other.save_weights(tmp_path / "m.weights.h5")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.load_weights(tmp_path / "m.weights.h5")
        assert self.windows(model) == theirs

    def test_a_pattern_of_such_a_path_selects_the_same_variables(self, tmp_path):
        """Though two layers then have one path, and each time that a model is saved and loaded."""
        inputs = outputs = keras.Input((4,))
        for name in ("encoder", "decoder"):
            parts = [keras.layers.Dense(4, name="dense"), keras.layers.Dense(4, name=name[0])]
            outputs = keras.Sequential(parts, name=name)(outputs)
        model = keras.Model(inputs, keras.layers.Dense(4, name="out")(outputs))
        groups = [
            {"match": "^decoder/dense", "quantile": 0.3},
            {"match": "^encoder/.*kernel|^out", "max_norm": 0.5},
        ]
        model.compile(adam(group_settings=groups), loss="mse", jit_compile=False)
        expected, theirs = self.by_group(self.fit(model)), self.windows(model)
        for _ in range(2):
            model.save(tmp_path / "m.keras")
            model = keras.saving.load_model(tmp_path / "m.keras")
            assert self.by_group(model) == expected
            assert list(self.windows(model).values()) == list(theirs.values())
        assert [variables for variables, _ in expected] == [[4, 5], [0, 2, 8, 9], [1, 3, 6, 7]]

    @pytest.mark.filterwarnings("ignore:A total of", "ignore:Skipping variable loading")
    @carried(by_file)
    def test_the_number_of_a_model_made_again_does_not_matter(self, carry, tmp_path):
        """`sequential/b/kernel` is `sequential_1/b/kernel` then; frozen layers keep theirs."""

        def make(frozen):
            layers = [keras.layers.Dense(4, name=name) for name in "abc"]
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.1), *layers])
            model.get_layer(frozen).trainable = False
            model.compile(adam(), loss="mse", jit_compile=False)
            model.optimizer.build(model.trainable_variables)
            return model

        def by_layer(model):
            windows = self.windows(model).items()
            return {path.split("/", 1)[1]: window for (path, _), window in windows}

        theirs = by_layer(model := self.fit(make("a")))
        other, _ = self.load(model, lambda: make("b"), tmp_path, carry)
        assert self.windows(other).keys().isdisjoint(self.windows(model))
        ours = by_layer(other)
        assert ours["c/kernel"] == theirs["c/kernel"] != []
        assert ours["c/bias"] == theirs["c/bias"] != []
        assert ours["a/kernel"] == ours["a/bias"] == []


@pytest.mark.filterwarnings("ignore:A total of", "ignore:Skipping variable loading")
@pytest.mark.parametrize(
    "kind", [pytest.param(QuantileClip, marks=pytest.mark.nightly), StandardClip]
)
def test_skip_mismatch_is_decided_when_loading(kind, tmp_path):
    """Another last layer, and perhaps another rule: the first fit does not raise."""
    file = tmp_path / "first.weights.h5"
    fit(make_model(QuantileClip.as_optimizer(keras.optimizers.Adam()))).save_weights(file)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="out")(hidden))
    model.compile(kind.as_optimizer(keras.optimizers.Adam()), loss="mse")
    model.load_weights(file, skip_mismatch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which histories start empty is said once tracing knows
        fit(model)
    recorded = clipper_of(model).export_state().groups[0].recorded.tolist()
    assert recorded == [16, 16, 8, 8]


class CallsItsClipper(keras.Model):
    def __init__(self):
        super().__init__(name="model")
        self.dense = keras.layers.Dense(1, name="out")
        self.clipper = QuantileClip(0.5)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        variables = self.trainable_variables
        pairs = zip(tape.gradient(loss, variables), variables)
        self.optimizer.apply_gradients(self.clipper(pairs))
        return {"loss": loss}


class CallsOneOfItsClippers(CallsItsClipper):
    def __init__(self):
        super().__init__()
        self.clippers = [self.clipper]  # Keras 3.8 does not look into a list in a dict
        del self.clipper

    def __getattr__(self, name):
        return self.clippers[0] if name == "clipper" else super().__getattribute__(name)


def save_weights(model, path):
    model.save_weights(path / "model.weights.h5")
    return lambda other: other.load_weights(path / "model.weights.h5")


def save_model(model, path):
    model.save(path / "model.keras")
    return lambda other: other.load_weights(path / "model.keras")


def save_checkpoint(model, path):
    saved = tf.train.Checkpoint(model).save(path / "checkpoint")
    return lambda other: tf.train.Checkpoint(other).restore(saved).assert_consumed()


@pytest.mark.parametrize(
    ("make", "save"),
    [
        (CallsItsClipper, save_weights),
        pytest.param(CallsItsClipper, save_model, marks=pytest.mark.nightly),
        (CallsItsClipper, save_checkpoint),
        # tf.train.Checkpoint does not look into lists.
        pytest.param(CallsOneOfItsClippers, save_weights, marks=pytest.mark.nightly),
        (CallsOneOfItsClippers, save_model),
    ],
)
def test_a_model_that_calls_a_clipper_itself(tmp_path, make, save):
    model, other = make(), make()
    for each in (model, other):
        each.compile("sgd", loss="mse")
    load = save(fit(model), tmp_path)
    fit(other)
    fit(other)
    load(other)
    assert other.clipper.state_dict() == model.clipper.state_dict()
    for each in (model, other):
        fit(each)
    assert other.clipper.state_dict() == model.clipper.state_dict()


def recorded(model):
    return [
        window.tolist()
        for group in model.clipper.export_state().groups
        for window in group.windows()
    ]


def test_a_loaded_model_has_the_history_of_its_clipper(tmp_path):
    @keras.saving.register_keras_serializable("test")
    class Model(CallsItsClipper):
        def get_config(self):
            return {}

    model = Model()
    model.compile("sgd", loss="mse")
    fit(model).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded)
    fit(model)
    assert recorded(loaded) == recorded(model)


def test_a_history_is_saved_once_if_model_and_optimizer_have_the_clipper(tmp_path):
    model, other = make_model(adam()), make_model(adam())
    for each in (model, other):
        each.clipper = clipper_of(each)
    fit(model).save_weights(tmp_path / "model.weights.h5")
    fit(other).load_weights(tmp_path / "model.weights.h5")
    assert clipper_of(other).state_dict() == clipper_of(model).state_dict()
    assert len(read_states(tmp_path / "model.weights.h5")) == 1


@pytest.mark.skipif(
    not hasattr(saving_lib, "_save_assets_to_dict"), reason="this Keras saves no files with Orbax"
)
def test_what_keras_gives_to_orbax(tmp_path):
    """The values of the variables that it knows, and files: `OrbaxCheckpoint`, `load_model`."""
    model, other = fit(make_model(adam())), make_model(adam())
    files = saving_lib._save_assets_to_dict(model)
    saving_lib._load_assets_from_dict(other, files)
    other.optimizer.build(other.trainable_variables)
    assert clipper_of(other).state_dict() == clipper_of(model).state_dict()
    # Elsewhere the state is among the weights, and no file repeats it.
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert not [name for name in archive.namelist() if "autoclip" in name]
    saving_lib._load_assets_from_dict(make_model(keras.optimizers.Adam()), files)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_a_model_in_float8(tmp_path):
    """Its scales are overwritten with their gradients; they have no history."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(16, name="dense")])
    model.quantize("float8")
    model.compile(adam(), loss="mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    model.fit(x, x, verbose=0)
    assert len(model.trainable_variables) > 2
    assert clipper_of(model).export_state().groups[0].recorded.tolist() == [1, 1]
    model.save(tmp_path / "model.keras")
    if keras.__version__.startswith("3.8."):
        return  # it cannot load a model in float8, with or without a clipper
    other = keras.saving.load_model(tmp_path / "model.keras")
    other.fit(x, x, verbose=0)
    assert clipper_of(other).export_state().groups[0].recorded.tolist() == [2, 2]


def test_keras_evaluates_no_property_of_a_clipper(tmp_path, monkeypatch):
    """It looks at every attribute of what it saves and loads, and some of ours read the device."""
    asked = []

    def noted(name):
        found = getattr(QuantileClip, name)
        return property(lambda clipper: asked.append(name) or found.__get__(clipper))

    model = fit(make_model(adam()))
    model.clipper = model.optimizer.clipper
    for name in ("thresholds", "last", "param_groups", "total_norm"):
        assert name in dir(model.optimizer.clipper)
        monkeypatch.setattr(QuantileClip, name, noted(name))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    copied = copy.deepcopy(model)
    assert asked == []
    for other in (loaded, copied):
        assert clipper_of(other).state_dict() == clipper_of(model).state_dict()
