"""`optimizer_factory`: a class wherever one is asked for, and optimizers that clip."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules import FACTORIES as TABLE
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import autoclip.torch
from autoclip.core import Quantile
from autoclip.torch import Clipper, QuantileClip

FACTORIES: dict[str, Any] = {
    name: getattr(autoclip.torch, clipper).optimizer_factory(SGD, *args, **settings)
    for name, (clipper, args, settings) in TABLE.items()
}


class Doubling(QuantileClip.optimizer_factory(SGD, quantile=0.5)):  # type: ignore[misc]
    """A subclass of a factory: its own instances, which clip."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data *= 2


def train(optimizer: Optimizer, model: nn.Module, sizes: list[float]) -> Tensor:
    for size in sizes:
        optimizer.zero_grad()
        model(torch.full((2, 3), size)).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("name", FACTORIES)
@given(sizes=st.lists(st.floats(0.01, 2), min_size=1, max_size=6))
def test_it_makes_what_as_optimizer_makes(name: str, sizes: list[float]) -> None:
    one, other = model(), model()
    made = FACTORIES[name](one.parameters(), lr=0.1, momentum=0.5)
    clipper, args, settings = TABLE[name]
    plain = SGD(other.parameters(), lr=0.1, momentum=0.5)
    attached = getattr(autoclip.torch, clipper).as_optimizer(plain, *args, **settings)
    assert type(made) is SGD
    assert torch.equal(train(made, one, sizes), train(attached, other, sizes))
    assert str(made.state_dict()) == str(attached.state_dict())


def test_each_optimizer_has_a_clipper_of_its_own() -> None:
    factory = FACTORIES["quantile"]
    first, second = factory(model().parameters(), lr=0.1), factory(model().parameters(), lr=0.1)
    assert first.clipper is not second.clipper  # type: ignore[attr-defined]


def test_groups_keep_their_settings() -> None:
    layer = nn.Linear(3, 2)
    optimizer: Any = FACTORIES["quantile"](
        [{"params": [layer.weight], "quantile": 0.2}, {"params": [layer.bias]}], lr=0.1
    )
    assert [group["quantile"] for group in optimizer.clipper.param_groups] == [0.2, 0.5]


def test_factories_of_other_settings_or_classes_differ() -> None:
    makes = [
        QuantileClip.optimizer_factory(SGD, quantile=0.5),
        QuantileClip.optimizer_factory(SGD, quantile=0.6),
        QuantileClip.optimizer_factory(Adam, quantile=0.5),
        Clipper.optimizer_factory(SGD, Quantile(0.5)),
        SGD,
        Doubling,
    ]
    assert all((a == b) == (a is b) for a in makes for b in makes)
    assert len(set(makes)) == len(makes)


def test_it_reaches_a_spawned_worker() -> None:
    factories = list(FACTORIES.values())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert list(pool.map(repr, factories)) == [repr(each) for each in factories]
        assert list(pool.map(copy.copy, factories)) == factories


def test_subclasses_of_a_factory_make_their_own_instances() -> None:
    layer = model()
    optimizer: Any = Doubling(layer.parameters(), lr=0.0)
    before = layer.weight.detach().clone()
    train(optimizer, layer, [1.0, 2.0])
    assert type(optimizer) is Doubling and isinstance(optimizer, Doubling)
    assert not isinstance(SGD(layer.parameters()), Doubling)
    assert torch.equal(layer.weight, 4 * before)
    assert {len(w) for w in optimizer.clipper.export_state().groups[0].windows()} == {2}
    assert pickle.loads(pickle.dumps(Doubling)) is Doubling


def test_the_repr_says_what_it_makes() -> None:
    assert repr(FACTORIES["quantile"]) == (
        "QuantileClip.optimizer_factory(torch.optim.sgd.SGD, quantile=0.5, history_length=16)"
    )
    assert repr(Doubling).startswith("<class ")


def test_help_shows_every_setting() -> None:
    names = list(inspect.signature(QuantileClip.optimizer_factory).parameters)
    expected = ["optimizer_class", "quantile", "history_length", "global_clipping"]
    assert names[:4] == expected
