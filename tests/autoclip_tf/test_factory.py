"""`optimizer_factory`: a class wherever one is asked for, and Keras optimizers that clip."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import keras
import numpy as np
import pytest

from autoclip.core import Standard
from autoclip.tf import Clipper, QuantileClip, StandardClip

GROUPS = [{"match": "bias", "quantile": 0.2}]
FACTORIES = {
    "quantile": (QuantileClip, (), {"quantile": 0.5, "group_settings": GROUPS}),
    "positional": (QuantileClip, (0.5, 16, True), {}),
    "standard": (StandardClip, (), {"deviations": 0.5, "warmup_steps": 2}),
    "rule": (Clipper, (Standard(0.5),), {"global_clipping": True, "warmup_steps": 2}),
}
EACH = pytest.mark.parametrize("name", FACTORIES)


def factory_of(name, kind=keras.optimizers.Adam):
    clipper, args, settings = FACTORIES[name]
    return clipper.optimizer_factory(kind, *args, **settings)


def train(model, fit, optimizer):
    trained = model()
    trained.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    fit(trained)
    return trained


@EACH
def test_it_makes_what_as_optimizer_makes(model, fit, name):
    clipper, args, settings = FACTORIES[name]
    made = factory_of(name)(learning_rate=0.01)
    attached = clipper.as_optimizer(keras.optimizers.Adam(0.01), *args, **settings)
    assert type(made) is type(attached)
    trained, other = train(model, fit, made), train(model, fit, attached)
    for one, two in zip(trained.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(one, two)
    states = made.clipper.export_state(), attached.clipper.export_state()
    for one, two in zip(*(state.groups for state in states), strict=True):
        assert one.settings == two.settings
        assert [w.tolist() for w in one.windows()] == [w.tolist() for w in two.windows()]


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.AdamW])
def test_it_passes_for_the_optimizers_class(kind):
    factory = QuantileClip.optimizer_factory(kind)
    assert inspect.isclass(factory) and issubclass(factory, kind)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(factory, name) == getattr(kind, name)
    assert inspect.signature(factory) == inspect.signature(kind)
    assert isinstance(factory(), factory)
    assert not isinstance(keras.optimizers.Lion(), factory)


def test_from_config_makes_one_that_clips():
    config = keras.optimizers.Adam(0.02).get_config()
    optimizer = factory_of("quantile").from_config(config)
    assert float(optimizer.learning_rate.numpy()) == pytest.approx(0.02)
    assert optimizer.clipper.defaults["quantile"] == 0.5


@EACH
def test_copies_and_pickles_are_equal_and_clip(name):
    factory = factory_of(name)
    for each in (
        copy.copy(factory),
        copy.deepcopy(factory),
        pickle.loads(pickle.dumps(factory)),
        factory_of(name),
    ):
        assert each == factory and hash(each) == hash(factory)
        assert each().clipper.defaults == factory().clipper.defaults
    assert factory != QuantileClip.optimizer_factory(keras.optimizers.Adam, quantile=0.1)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"quantile": 2.0}, ValueError),
        ({"percentile": 10}, TypeError),
        ({"group_settings": [{"quantile": 0.5}]}, (TypeError, ValueError, KeyError)),
    ],
)
def test_settings_are_checked_when_it_is_made(settings, error):
    with pytest.raises(error):
        QuantileClip.optimizer_factory(keras.optimizers.Adam, **settings)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (keras.optimizers.Adam(), r"there is as_optimizer"),
        (functools.partial(keras.optimizers.Adam, 0.1), r"partial\(QuantileClip"),
        ("adam", "must be a subclass of keras's Optimizer, got 'adam'"),
        (factory_of("standard"), "have a clipper already"),
    ],
)
def test_only_classes_of_optimizers(given, match):
    with pytest.raises(TypeError, match=match):
        QuantileClip.optimizer_factory(given)


def test_on_a_clipper_it_raises():
    with pytest.raises(TypeError, match=r"QuantileClip\.optimizer_factory .* on the class"):
        QuantileClip().optimizer_factory(keras.optimizers.Adam)
