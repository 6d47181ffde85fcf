"""`optimizer_factory`: a class wherever one is asked for, and Keras optimizers that clip."""

from __future__ import annotations

import copy
import pickle

import keras
import numpy as np
import pytest
from rules import FACTORIES as TABLE

import autoclip.tf
from autoclip.tf import QuantileClip

GROUPS = [{"match": "bias", "quantile": 0.2}]
FACTORIES = {
    name: (getattr(autoclip.tf, clipper), args, settings)
    for name, (clipper, args, settings) in TABLE.items()
}
FACTORIES["groups"] = (QuantileClip, (), {"quantile": 0.5, "group_settings": GROUPS})


def factory_of(name):
    clipper, args, settings = FACTORIES[name]
    return clipper.optimizer_factory(keras.optimizers.Adam, *args, **settings)


def train(model, fit, optimizer):
    trained = model()
    trained.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    fit(trained)
    return trained


@pytest.mark.parametrize("name", FACTORIES)
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


def test_from_config_makes_one_that_clips():
    config = keras.optimizers.Adam(0.02).get_config()
    optimizer = factory_of("quantile").from_config(config)
    assert float(optimizer.learning_rate.numpy()) == pytest.approx(0.02)
    assert optimizer.clipper.defaults["quantile"] == 0.5


def test_group_settings_are_copied_and_checked():
    factory = factory_of("groups")
    expected = factory().clipper.get_config()
    assert expected["group_settings"] == GROUPS
    for each in (
        copy.copy(factory),
        copy.deepcopy(factory),
        pickle.loads(pickle.dumps(factory)),
        factory_of("groups"),
    ):
        assert each == factory and hash(each) == hash(factory)
        assert each().clipper.get_config() == expected
    assert factory != QuantileClip.optimizer_factory(keras.optimizers.Adam, quantile=0.5)
    with pytest.raises(ValueError, match='a dict with the key "match"'):
        QuantileClip.optimizer_factory(keras.optimizers.Adam, group_settings=[{"quantile": 0.5}])
