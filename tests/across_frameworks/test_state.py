"""A history that one framework saved goes on in the other.

The same small network twice, in torch and in TensorFlow, and clippers that match.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from torch import nn

import autoclip.tf
import autoclip.torch
from autoclip.core import History, Quantile, State, StateError

LENGTH = 6
RULES = {
    "quantile": ("QuantileClip", {"quantile": 0.4}),
    "standard": ("StandardClip", {"deviations": 0.5, "warmup_steps": 2}),
}
# Of the biases; the rest has the clipper's own, and is the last group.
OVERRIDES = {"quantile": {"quantile": 0.9}, "standard": {"deviations": 0.1, "history_length": 3}}


class TorchSide:
    """A torch network and its clipper, fed with the norms of the gradients that it shall have."""

    framework = "torch"
    # Where the clipper is attached: the optimizer's step, which calls it.
    update: Any = None

    def __init__(self, rule: str, grouping: str, sizes: tuple[int, int, int] = (3, 5, 2)) -> None:
        first, middle, last = sizes
        self.network = nn.ModuleDict(
            {"hidden": nn.Linear(first, middle), "out": nn.Linear(middle, last)}
        )
        named = list(self.network.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        name, settings = RULES[rule]
        self.cls = getattr(autoclip.torch, name)
        settings = {**settings, "history_length": LENGTH}
        if grouping == "groups":
            biases = [(n, p) for n, p in named if "bias" in n]
            rest = [(n, p) for n, p in named if "bias" not in n]
            groups = [{"params": biases, **OVERRIDES[rule]}, {"params": rest}]
            self.clipper = self.cls(groups, **settings)
        else:
            self.clipper = self.cls(named, global_clipping=grouping == "global", **settings)

    def step(self, norms: Any) -> np.ndarray:
        for parameter, norm in zip(self.parameters, norms):
            parameter.grad = torch.full_like(parameter, norm / np.sqrt(parameter.numel()))
        (self.update or self.clipper.step)()
        return self.clipper.last.thresholds.numpy()


class TensorFlowSide:
    """The same in TensorFlow."""

    framework = "tensorflow"
    update: Any = None

    def __init__(self, rule: str, grouping: str, sizes: tuple[int, int, int] = (3, 5, 2)) -> None:
        first, middle, last = sizes
        inputs = keras.Input((first,))
        hidden = keras.layers.Dense(middle, name="hidden")(inputs)
        self.network = keras.Model(inputs, keras.layers.Dense(last, name="out")(hidden))
        self.variables = self.network.trainable_variables
        name, settings = RULES[rule]
        self.cls = getattr(autoclip.tf, name)
        self.clipper = self.cls(
            **settings,
            history_length=LENGTH,
            global_clipping=grouping == "global",
            group_settings=[{"match": "bias", **OVERRIDES[rule]}] if grouping == "groups" else None,
        )
        self.clipper.build(self.variables)

    def step(self, norms: Any) -> np.ndarray:
        gradients = [
            tf.fill(v.shape, np.float32(norm / np.sqrt(np.prod(v.shape))))
            for v, norm in zip(self.variables, norms)
        ]
        (self.update or self.clipper)(zip(gradients, self.variables))
        return self.clipper.last.thresholds.numpy()


SIDES = {"torch": TorchSide, "tensorflow": TensorFlowSide}


@pytest.fixture(scope="session")
def sides() -> dict[str, type[Any]]:
    return SIDES


@pytest.fixture(params=["parameter-wise", "global", "groups"])
def grouping(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["torch to tensorflow", "tensorflow to torch"])
def direction(request: pytest.FixtureRequest) -> tuple[type[Any], type[Any]]:
    """The framework that saves, and the one that loads."""
    saves, loads = request.param.split(" to ")
    return SIDES[saves], SIDES[loads]


def stream(seed, steps):
    """Norms for the four parameters, now and then none."""
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(size=(steps, 4)))
    norms[generator.random(norms.shape) < 0.1] = 0.0
    return norms


def by_file(saves, loads, folder):
    saves.save(folder / "history.safetensors")
    loads.load(folder / "history.safetensors")


def by_dict(saves, loads, folder):
    loads.load_state_dict(saves.state_dict())


@pytest.mark.parametrize(
    ("path", "steps", "hand_over"),
    [
        pytest.param(
            path,
            steps,
            hand_over,
            marks=[pytest.mark.nightly] * (path == "device" and steps < 15),
            id=f"{path}-{name}",
        )
        for path in ("numpy", "device")
        for steps, hand_over, name in (
            (0, by_file, "nothing"),
            (4, by_dict, "a part of a window"),
            (15, by_file, "more than a window"),
        )
    ],
    indirect=["path"],
)
def test_both_go_on_alike(direction, rule, grouping, steps, hand_over, path, tmp_path):
    first, second = (side(rule, grouping) for side in direction)
    for norms in stream(1, steps):
        first.step(norms)
    for norms in stream(2, 3):  # what the other one has is replaced
        second.step(norms)
    hand_over(first.clipper, second.clipper, tmp_path)
    for norms in stream(3, 5):
        ours, theirs = second.step(norms), first.step(norms)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert np.isfinite(ours).all()


def test_there_and_back_again(direction, rule, grouping, tmp_path):
    """Nothing is lost: what comes back is what was sent, byte for byte."""
    first, second = (side(rule, grouping) for side in direction)
    for norms in stream(1, 10):
        first.step(norms)
    before = first.clipper.state_dict()
    by_file(first.clipper, second.clipper, tmp_path)
    sent, kept = (State.from_dict(side.clipper.state_dict()) for side in (first, second))
    assert (sent.framework, kept.framework) == (first.framework, second.framework)
    for ours, theirs in zip(kept.groups, sent.groups, strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)
        np.testing.assert_array_equal(ours.lengths, theirs.lengths)
        np.testing.assert_array_equal(ours.recorded, theirs.recorded)
        assert ours.settings == theirs.settings
    for norms in stream(2, 3):
        first.step(norms)
    by_file(second.clipper, first.clipper, tmp_path)
    assert first.clipper.state_dict() == before


def test_through_the_optimizers(sides):
    """Out of torch's `optimizer.state_dict()` into the clipper of a compiled Keras model."""
    saves, loads = sides["torch"]("quantile", "global"), sides["tensorflow"]("quantile", "global")
    optimizer = torch.optim.SGD(saves.network.parameters(), 0.1)
    saves.clipper = autoclip.torch.QuantileClip.as_optimizer(
        optimizer, 0.4, 6, global_clipping=True
    ).clipper
    saves.update = optimizer.step
    for norms in stream(1, 8):
        saves.step(norms)
    model = loads.network
    model.compile(
        autoclip.tf.QuantileClip.as_optimizer(
            keras.optimizers.SGD(0.1), 0.4, 6, global_clipping=True
        ),
        loss="mse",
    )
    loads.clipper, loads.update = model.optimizer.clipper, model.optimizer.apply_gradients
    loads.clipper.load_state_dict(optimizer.state_dict()["autoclip"])
    assert not loads.clipper.built  # the history waits for the variables
    model.optimizer.build(loads.variables)
    for norms in stream(2, 8):
        np.testing.assert_allclose(loads.step(norms), saves.step(norms), rtol=1e-6)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_the_history_of_the_core(sides, framework, tmp_path):
    history = History(4, Quantile(0.4), history_length=6)
    for norms in stream(1, 9):
        history.record(norms)
    side = sides[framework]("quantile", "parameter-wise")
    by_file(history, side.clipper, tmp_path)
    for norms in stream(2, 9):
        np.testing.assert_allclose(side.step(norms), history.record(norms).thresholds, rtol=1e-6)
    by_dict(side.clipper, history, tmp_path)
    for norms in stream(3, 9):
        np.testing.assert_allclose(history.record(norms).thresholds, side.step(norms), rtol=1e-6)


NAMES = {
    "torch": ["hidden.weight", "hidden.bias", "out.weight", "out.bias"],
    "tensorflow": ["hidden/kernel", "hidden/bias", "out/kernel", "out/bias"],
}


@pytest.mark.parametrize("hand_over", [by_file, by_dict])
def test_another_model_is_refused(direction, rule, grouping, hand_over, tmp_path):
    """Parameter 0, a weight of 3 by 7 where 3 by 5 is expected; with groups it is a bias."""
    saves, loads = direction
    first, second = saves(rule, grouping, sizes=(3, 7, 2)), loads(rule, grouping)
    for norms in stream(1, 8):
        first.step(norms)
        second.step(norms)
    before = second.clipper.state_dict()
    with pytest.raises(StateError) as error:
        hand_over(first.clipper, second.clipper, tmp_path)
    source = str(tmp_path / "history.safetensors") if hand_over is by_file else "state_dict"
    position = 1 if grouping == "groups" else 0
    theirs, ours = NAMES[first.framework][position], NAMES[second.framework][position]
    if position:
        shapes = "(7,)", "(5,)"
    else:
        shapes = ("(7, 3)", "(3, 5)") if first.framework == "torch" else ("(3, 7)", "(5, 3)")
    assert str(error.value) == (
        f"Parameter 0 of group 0 does not match: {source} has '{theirs}' of shape {shapes[0]}, the "
        f"clipper has '{ours}' of shape {shapes[1]}; their numbers of elements differ. Load it for "
        "the same model."
    )
    assert second.clipper.state_dict() == before


def test_another_mode_or_grouping_is_refused(direction):
    saves, loads = direction
    for one, other, words in [
        (("quantile", "global"), ("quantile", "groups"), "global_clipping=True"),
        (("standard", "groups"), ("standard", "parameter-wise"), "2 parameter groups"),
    ]:
        first, second = saves(*one), loads(*other)
        second.step([1.0, 2.0, 3.0, 4.0])
        before = second.clipper.state_dict()
        with pytest.raises(StateError, match=words):
            by_dict(first.clipper, second.clipper, None)
        assert second.clipper.state_dict() == before


def test_a_shorter_history_and_other_settings(direction):
    saves, loads = direction
    first = saves("quantile", "parameter-wise")
    for norms in stream(1, 12) + 0.1:
        first.step(norms)
    second = loads("quantile", "parameter-wise")
    arguments = [second.network.named_parameters()] if second.framework == "torch" else []
    second.clipper = second.cls(*arguments, quantile=0.8, history_length=2)
    if second.framework == "tensorflow":
        second.clipper.build(second.variables)
    words = "quantile=0.4 there and 0.8 here.* history_length=6 there and 2 here"
    with pytest.warns(UserWarning, match=words) as found:
        by_dict(first.clipper, second.clipper, None)
    assert len(found) == 1
    kept, sent = (State.from_dict(side.clipper.state_dict()).groups[0] for side in (second, first))
    for ours, theirs in zip(kept.windows(), sent.windows(), strict=True):
        np.testing.assert_array_equal(ours, theirs[-2:])
    assert kept.recorded.tolist() == sent.recorded.tolist() == [12] * 4
