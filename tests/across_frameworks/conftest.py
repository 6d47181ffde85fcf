"""The same small network twice, in torch and in TensorFlow, and clippers that match."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from paths import numpy_path
from torch import nn

import autoclip.tf
import autoclip.torch

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
    """Which one saves, and which one loads."""
    saves, loads = request.param.split(" to ")
    return SIDES[saves], SIDES[loads]


@pytest.fixture(params=["numpy", "device"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Torch's two paths: as on the CPU, and as on a GPU; see the tests of autoclip.torch."""
    with nullcontext() if request.param == "numpy" else numpy_path(False):
        yield request.param
