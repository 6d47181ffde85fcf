"""KerasHub, KerasTuner, Keras RS and the scikit-learn wrappers."""

from __future__ import annotations

import pickle
from typing import Any

import keras
import keras_hub
import keras_rs
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf
from recipes import run_recipe
from scikeras.wrappers import KerasClassifier
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score

from autoclip.tf import QuantileClip
from autoclip.tf.callbacks import AutoClipCallback

GENERATOR = np.random.default_rng(0)
X = (GENERATOR.normal(size=(32, 4)) * np.logspace(-1, 1, 32)[:, None]).astype(np.float32)
Y = GENERATOR.integers(0, 3, 32)


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)


def make_model() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def windows(optimizer: Any) -> list[list[float]]:
    groups = optimizer.clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


class Watch:
    """Compares each update of an SGD optimizer, eagerly, with NumPy."""

    def __init__(self, optimizer: Any, quantile: float) -> None:
        self.optimizer, self.quantile = optimizer, quantile
        self.norms: list[list[float]] = []
        self.clipped = 0
        self._apply = optimizer.apply
        optimizer.apply = self.apply

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        variables = list(trainable_variables)
        dense = [np.asarray(tf.convert_to_tensor(each), np.float64) for each in grads]
        before = [np.asarray(v.value, np.float64) for v in variables]
        result = self._apply(grads, trainable_variables)
        self.norms.append([float(np.sqrt((gradient**2).sum())) for gradient in dense])
        last = self.optimizer.clipper.last
        np.testing.assert_allclose(last.norms, self.norms[-1], rtol=1e-5)
        for row, (gradient, variable) in enumerate(zip(dense, variables)):
            window = [norms[row] for norms in self.norms if norms[row]]
            if not self.norms[-1][row]:
                continue
            threshold = np.quantile(window, self.quantile)
            np.testing.assert_allclose(float(last.thresholds[row]), threshold, rtol=1e-5)
            coefficient = min(1.0, threshold / self.norms[-1][row])
            self.clipped += coefficient < 1
            rate = float(self.optimizer.learning_rate.numpy())
            expected = before[row] - rate * coefficient * gradient
            np.testing.assert_allclose(np.asarray(variable.value), expected, rtol=1e-4, atol=1e-6)
        return result

    def check(self, steps: int) -> None:
        assert len(self.norms) == steps
        assert self.clipped > 0
        for row, window in enumerate(windows(self.optimizer)):
            expected = [norms[row] for norms in self.norms if norms[row]]
            np.testing.assert_allclose(window, expected, rtol=1e-5)


def sgd(quantile: float = 0.5) -> Any:
    return QuantileClip.as_optimizer(keras.optimizers.SGD(0.01), quantile=quantile)


# -- KerasHub ----------------------------------------------------------------------------------


def backbone() -> Any:
    keras.utils.set_random_seed(0)
    return keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=6,
        dropout=0.0,
    )


def tokens() -> Any:
    words = GENERATOR.integers(0, 20, (16, 7))
    inputs = {"token_ids": words[:, :-1], "padding_mask": np.ones((16, 6), bool)}
    return tf.data.Dataset.from_tensor_slices((inputs, words[:, 1:])).batch(4)


@pytest.mark.filterwarnings("ignore:.*compile", "ignore:Skipping variable loading")
def test_keras_hub_recipe_resumes_bit_for_bit() -> None:
    data = tokens()
    names = run_recipe("keras-hub", backbone=backbone(), preprocessor=None, data=data)
    whole, other = names["task"], names["resumed"]
    assert {len(window) for window in windows(whole.optimizer)} == {8}
    assert other is not whole and other.optimizer is not whole.optimizer
    assert windows(other.optimizer) == windows(whole.optimizer)
    for task in (whole, other):
        task.fit(data, epochs=2, verbose=0)
    for one, two in zip(other.get_weights(), whole.get_weights()):
        np.testing.assert_array_equal(one, two)
    assert windows(other.optimizer) == windows(whole.optimizer)


def test_keras_hub_as_numpy_clips_and_logs() -> None:
    task = keras_hub.models.GPT2CausalLM(backbone(), preprocessor=None)
    optimizer = sgd()
    task.compile(optimizer=optimizer, run_eagerly=True)
    watch = Watch(optimizer, 0.5)
    history = task.fit(tokens(), epochs=2, verbose=0, callbacks=[AutoClipCallback()]).history
    watch.check(8)
    assert "autoclip/total_norm" in history


# -- KerasTuner --------------------------------------------------------------------------------


def test_keras_tuner_recipe() -> None:
    names = run_recipe("keras-tuner", make_model=make_model, x=X, y=Y)
    tuner, best = names["tuner"], names["best"]
    chosen = tuner.get_best_hyperparameters()[0].get("quantile")
    assert best.optimizer.clipper.defaults["quantile"] == chosen
    (length,) = {len(window) for window in windows(best.optimizer)}
    assert length in (1, 2)  # one batch an epoch, and two epochs
    best.fit(X, Y, batch_size=16, verbose=0)
    assert {len(window) for window in windows(best.optimizer)} == {length + 2}


def test_keras_tuner_as_numpy_clips_and_logs() -> None:
    watches: list[Watch] = []

    def build(hp: Any) -> Any:
        model, optimizer = make_model(), sgd(hp.Choice("quantile", [0.3, 0.5]))
        watches.append(Watch(optimizer, hp.get("quantile")))
        model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)
        return model

    tuner = keras_tuner.GridSearch(build, objective="loss", directory="tuning")
    tuner.search(X, Y, epochs=2, batch_size=8, verbose=0, callbacks=[AutoClipCallback()])
    trained = [watch for watch in watches if watch.norms]
    assert {watch.quantile for watch in trained} == {0.3, 0.5}
    for watch in trained:
        watch.check(8)
    trials = tuner.oracle.trials.values()
    assert all(trial.metrics.exists("autoclip/total_norm") for trial in trials)


# -- scikit-learn ------------------------------------------------------------------------------


def test_sklearn_recipe() -> None:
    names = run_recipe("keras-sklearn", make_model=make_model, x=X, y=Y)
    classifier = names["classifier"]
    optimizer = classifier.model_.optimizer
    assert optimizer.clipper.defaults["quantile"] == 0.5
    assert {len(window) for window in windows(optimizer)} == {2}
    fresh = clone(classifier).fit(X, Y)
    assert fresh.model_.optimizer.clipper is not optimizer.clipper
    assert np.isfinite(cross_val_score(classifier, X, Y, cv=2)).all()
    grid = {"model_kwargs": [{"quantile": 0.1}, {"quantile": 0.9}]}
    best = GridSearchCV(classifier, grid, cv=2).fit(X, Y)
    quantile = best.best_estimator_.model_.optimizer.clipper.defaults["quantile"]
    assert {"quantile": quantile} == best.best_params_["model_kwargs"]


@pytest.mark.parametrize("wrapper", ["keras", "scikeras"])
def test_sklearn_wrappers_as_numpy_clip_and_log(wrapper: str) -> None:
    watches: list[Watch] = []
    fit = {"epochs": 2, "batch_size": 8, "verbose": 0, "shuffle": False}
    if wrapper == "keras":

        def build(X: Any, y: Any) -> Any:
            model, optimizer = make_model(), sgd()
            watches.append(Watch(optimizer, 0.5))
            model.compile(optimizer, "categorical_crossentropy", run_eagerly=True)
            return model

        options = {**fit, "callbacks": [AutoClipCallback()]}
        classifier = keras.wrappers.SKLearnClassifier(build, fit_kwargs=options)
    else:

        def build_and_compile(compile_kwargs: Any) -> Any:
            model, optimizer = make_model(), compile_kwargs["optimizer"]
            watches.append(Watch(optimizer, 0.5))
            model.compile(optimizer, compile_kwargs["loss"], run_eagerly=True)
            return model

        classifier = KerasClassifier(
            build_and_compile,
            optimizer=QuantileClip.optimizer_factory(keras.optimizers.SGD, quantile=0.5),
            loss="sparse_categorical_crossentropy",
            callbacks=[AutoClipCallback()],
            **fit,
        )
    classifier.fit(X, Y)
    (watch,) = watches
    watch.check(8)
    history = classifier.history_
    logged = history if wrapper == "scikeras" else history.history
    assert len(logged["autoclip/total_norm"]) == 2


def test_a_pickled_model_goes_on() -> None:
    model = make_model()
    model.compile(optimizer=sgd(), loss="sparse_categorical_crossentropy")
    model.fit(X, Y, verbose=0)
    other = pickle.loads(pickle.dumps(model))
    assert windows(other.optimizer) == windows(model.optimizer)


def test_scikeras_takes_a_factory() -> None:
    def build() -> Any:
        return make_model()

    factory = QuantileClip.optimizer_factory(keras.optimizers.Adam, quantile=0.5)
    classifier = KerasClassifier(
        build,
        optimizer=factory,
        optimizer__learning_rate=0.02,
        loss="sparse_categorical_crossentropy",
        epochs=2,
        verbose=0,
    )
    classifier.fit(X, Y)
    optimizer = classifier.model_.optimizer
    assert float(optimizer.learning_rate.numpy()) == pytest.approx(0.02)
    assert {len(window) for window in windows(optimizer)} == {2}
    again = clone(classifier).fit(X, Y)
    assert again.model_.optimizer.clipper.defaults["quantile"] == 0.5


# -- Keras RS ----------------------------------------------------------------------------------


IDS = GENERATOR.integers(0, 10, (32, 3))
TARGETS = GENERATOR.normal(size=(32, 1)) * np.logspace(-1, 1, 32)[:, None]


def embedding_model(layer: str, run_eagerly: bool) -> Any:
    keras.utils.set_random_seed(0)
    if layer == "embed_reduce":
        embed: Any = keras_rs.layers.EmbedReduce(10, 4, combiner="sum")
    else:
        table = keras_rs.layers.TableConfig("table", 10, 4, optimizer="sgd", combiner="sum")
        feature = keras_rs.layers.FeatureConfig("ids", table, (8, 3), (8, 4))
        embed = keras_rs.layers.DistributedEmbedding(feature)
    model = keras.Sequential([embed, keras.layers.Dense(1)])
    model.compile(optimizer=sgd(), loss="mse", run_eagerly=run_eagerly)
    model.build((8, 3))
    return model


@pytest.mark.parametrize("layer", ["embed_reduce", "distributed"])
def test_keras_rs_embeddings_as_numpy_clips_and_logs(layer: str) -> None:
    model = embedding_model(layer, run_eagerly=True)
    watch = Watch(model.optimizer, 0.5)
    options = {"batch_size": 8, "epochs": 3, "verbose": 0, "shuffle": False}
    history = model.fit(IDS, TARGETS, callbacks=[AutoClipCallback()], **options).history
    watch.check(12)
    assert len(history["autoclip/total_norm"]) == 3


@pytest.mark.parametrize("layer", ["embed_reduce", "distributed"])
def test_keras_rs_resumes_bit_for_bit(layer: str) -> None:
    model = embedding_model(layer, run_eagerly=False)
    options = {"batch_size": 8, "epochs": 2, "verbose": 0, "shuffle": False}
    model.fit(IDS, TARGETS, **options)
    model.save("model.keras")
    other = keras.models.load_model("model.keras")
    assert windows(other.optimizer) == windows(model.optimizer)
    for each in (model, other):
        each.fit(IDS, TARGETS, **options)
    for one, two in zip(other.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(one, two)
    assert windows(other.optimizer) == windows(model.optimizer)
