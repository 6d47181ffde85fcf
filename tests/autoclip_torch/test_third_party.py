"""Optimizers as other libraries write them, by stand-ins with the same interface.

`Quantized` overrides what bitsandbytes' optimizers (0.50) override, `Sam` has the methods of
pytorch_optimizer's SAM (4.1), and `Lomo` those of its LOMO. The libraries are not installed here.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from autoclip.torch import QuantileClip, StateError

SETTINGS: dict[str, Any] = {"quantile": 0.5, "history_length": 16}


class Quantized(Adam):
    """Nests its state under other names, and loads it without torch's hooks."""

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        state_dict["state"] = {k: {"wrapped": dict(v)} for k, v in state_dict["state"].items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        state_dict = copy.deepcopy(state_dict)
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            raise ValueError("another number of parameters")
        places = {
            k: p
            for group, other in zip(groups, saved)
            for k, p in zip(other["params"], group["params"])
        }
        state: defaultdict[Any, Any] = defaultdict(dict)
        state.update({places[k]: v["wrapped"] for k, v in state_dict["state"].items()})
        loaded = [{**other, "params": group["params"]} for group, other in zip(groups, saved)]
        self.__setstate__({"state": state, "param_groups": loaded})


class OwnStateDict(Adam):
    """Makes its state by itself, without torch's hook."""

    def state_dict(self) -> dict[str, Any]:
        steps = {k: {} for group in self.param_groups for k in range(len(group["params"]))}
        groups = [{**g, "params": [*range(len(g["params"]))]} for g in self.param_groups]
        return {"state": steps, "param_groups": groups}


class CallingTorch(Adam):
    """Overrides both and calls torch's methods, with their hooks."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)


OVERRIDING = [Quantized, OwnStateDict, CallingTorch]


class Sam(Optimizer):
    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **kwargs: Any):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
                p.add_(p.grad * group["rho"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class Lomo(SGD):
    def fused_backward(self, loss: Tensor, lr: float) -> None:
        """The weights are updated in here."""


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make(kind: type[Optimizer]) -> tuple[nn.Module, Any]:
    model = make_model()
    return model, QuantileClip.as_optimizer(kind(model.parameters()), **SETTINGS)


def backward(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    loss: Tensor = model(torch.randn(5, 4, generator=generator) * (1 + step % 3)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -- own state_dict and load_state_dict ----------------------------------------------------------


@pytest.mark.parametrize("kind", OVERRIDING)
def test_the_history_travels_whatever_a_class_overrides(kind: type[Optimizer]) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    other_model, other = make(kind)
    other_model.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    assert other.clipper.state_dict() == optimizer.clipper.state_dict()
    if kind is not OwnStateDict:  # which drops its state
        train(model, optimizer, range(4, 8))
        train(other_model, other, range(4, 8))
        assert torch.equal(weights(other_model), weights(model))
        assert other.clipper.state_dict() == optimizer.clipper.state_dict()


def test_arguments_of_the_class_pass_through() -> None:
    model, optimizer = make(Quantized)
    train(model, optimizer, range(2))
    _, other = make(Quantized)
    other.load_state_dict(optimizer.state_dict(), move_to_device=False)
    assert other.clipper.state_dict() == optimizer.clipper.state_dict()


@pytest.mark.parametrize("kind", OVERRIDING)
@pytest.mark.parametrize("who", ["clipper", "optimizer"])
def test_a_refused_checkpoint_changes_neither(kind: type[Optimizer], who: str) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(3))
    other = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 4))
    before = copy.deepcopy(optimizer.state_dict())
    if who == "clipper":
        other["autoclip"]["data"] = other["autoclip"]["data"][:-1]
        with pytest.raises(StateError):
            optimizer.load_state_dict(other)
    else:
        other["param_groups"][0]["params"].pop()
        with pytest.raises(ValueError, match=r"number of parameters|match the size"):
            optimizer.load_state_dict(other)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("kind", OVERRIDING)
def test_a_checkpoint_without_a_history_warns(kind: type[Optimizer]) -> None:
    saved = kind(make_model().parameters()).state_dict()
    _, optimizer = make(kind)
    with pytest.warns(UserWarning, match="has no 'autoclip' entry") as caught:
        optimizer.load_state_dict(saved)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("kind", OVERRIDING)
def test_detaching_gives_the_methods_back(kind: type[Optimizer]) -> None:
    model = make_model()
    optimizer = kind(model.parameters())
    before = set(vars(optimizer))
    handle = QuantileClip(model.parameters()).attach(optimizer)
    handle.remove()
    assert set(vars(optimizer)) == before
    assert "autoclip" not in optimizer.state_dict()


@pytest.mark.parametrize("kind", OVERRIDING)
def test_copies_are_not_attached_and_nothing_is_kept_alive(kind: type[Optimizer]) -> None:
    _, optimizer = make(kind)
    assert "autoclip" not in copy.deepcopy(optimizer).state_dict()
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


# -- weights updated without step ----------------------------------------------------------------


def make_sam() -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = Sam(model.parameters(), SGD, lr=0.1)
    with pytest.warns(UserWarning, match=r"not in Sam\.first_step and second_step") as caught:
        QuantileClip.as_optimizer(optimizer, **SETTINGS)
    assert [warning.filename for warning in caught] == [__file__]
    return model, optimizer


def train_sam(model: nn.Module, optimizer: Sam, before_update: Callable[[], Any]) -> None:
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.first_step(zero_grad=True)
        backward(model, step)
        before_update()
        optimizer.second_step()


def test_sam_clips_what_its_weights_are_updated_with() -> None:
    """In `step(closure)` by itself, between the two steps by hand: the same weights."""
    model, optimizer = make_sam()
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(lambda step=step: backward(model, step))
    by_hand, other = make_sam()
    train_sam(by_hand, other, other.clipper.step)
    assert torch.equal(weights(by_hand), weights(model))
    assert other.clipper.state_dict() == optimizer.clipper.state_dict()

    expected = make_model()
    plain = Sam(expected.parameters(), SGD, lr=0.1)
    clipper = QuantileClip(expected.parameters(), **SETTINGS)
    train_sam(expected, plain, clipper.step)
    assert torch.equal(weights(expected), weights(model))


def test_weights_that_are_updated_in_the_backward_pass() -> None:
    with pytest.warns(UserWarning, match=r"Lomo\.fused_backward updates the weights"):
        QuantileClip.as_optimizer(Lomo(make_model().parameters()))
