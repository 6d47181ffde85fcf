"""Optimizers as other libraries write them, by stand-ins with the same interface.

`Quantized` overrides what bitsandbytes' optimizers (0.50) override, `Sam` has the methods of
pytorch_optimizer's SAM (4.1), and `Lomo` those of its LOMO. `WarmingUp` has a hyperparameter with
the name of a clipper's setting, as schedulefree's optimizers (1.4) and heavyball's (3.2) do,
`Container` is torchtitan's container of optimizers, and `Lookahead` pytorch_optimizer's.
`distributed` makes an optimizer as Horovod (0.28) does. The libraries are not installed here.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from rules import each_mode
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW, Optimizer

from autoclip.core.adapter import CLIPPER_SETTINGS
from autoclip.torch import QuantileClip, StandardClip, StateError

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


def distributed(optimizer: Optimizer) -> Any:
    """Another optimizer over the same groups, whose step first replaces the gradients, as Horovod's
    does with their average over processes."""

    class Distributed(type(optimizer)):  # type: ignore[misc]
        waits = True

        def synchronize(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)

        @contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            self.waits = False
            yield
            self.waits = True

        def step(self, closure: Any = None) -> Any:
            if self.waits:
                self.synchronize()
            return super().step(closure)

    return Distributed(optimizer.param_groups)


class Lomo(SGD):
    def fused_backward(self, loss: Tensor, lr: float) -> None:
        """The weights are updated in here."""


class WarmingUp(SGD):
    """With hyperparameters of its own, by any name."""

    def __init__(self, params: Any, lr: float = 0.1, **own: Any) -> None:
        super().__init__(params, lr)
        for name, value in (own or {"warmup_steps": 0}).items():
            self.defaults[name] = value
            for group in self.param_groups:
                group.setdefault(name, value)


class Container(Optimizer):
    def __init__(self, params: Any, **settings: Any) -> None:
        params = list(params)
        self.inner = AdamW(params, **settings)
        super().__init__(params, settings)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class Lookahead(Optimizer):
    """Shares the groups of the optimizer inside, and has defaults of its own."""

    def __init__(self, optimizer: Optimizer, k: int = 2) -> None:
        super().__init__(optimizer.param_groups, {"k": k})
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "optimizer" in vars(self):  # not while torch's __init__ calls it
            self.optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class OwnStep(AdamW):
    """A torch optimizer with a step of its own, which knows nothing of the attribute."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=group["lr"])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make(kind: Callable[..., Optimizer]) -> tuple[nn.Module, Any]:
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


# -- optimizers inside others --------------------------------------------------------------------


class Chain(Optimizer):
    """Steps a list of optimizers."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> None:
        for each in self.optimizers:
            each.step()


@pytest.mark.parametrize("path", [".optimizer", ".optimizers[0]", ".optimizer.optimizer"])
def test_a_clipper_inside_and_one_outside_are_refused(path: str) -> None:
    """Each would clip, and nothing would tell."""
    model = make_model()
    inner = AdamW(model.parameters())
    outer: Any = Chain([inner]) if "optimizers" in path else Lookahead(inner)
    if path.count(".") == 2:
        outer = Lookahead(outer)
    message = rf"`optimizer{re.escape(path)}`, has a clipper, and two would clip twice"
    QuantileClip.as_optimizer(inner)
    with pytest.raises(RuntimeError, match=message):
        QuantileClip.as_optimizer(outer)
    train(model, outer, range(2))  # by the inner one alone
    inner.clipper.detach()  # type: ignore[attr-defined]
    QuantileClip.as_optimizer(outer)
    QuantileClip.as_optimizer(inner)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            train(model, outer, range(1))
    inner.clipper.detach()  # type: ignore[attr-defined]
    train(model, outer, range(2))
    unrelated: Any = Chain([QuantileClip.as_optimizer(AdamW([nn.Parameter(torch.ones(1))]))])
    unrelated.param_groups = [{"params": [nn.Parameter(torch.ones(1))]}]
    QuantileClip.as_optimizer(unrelated)  # of other parameters


class Unprintable(nn.Parameter):
    def __repr__(self) -> str:  # type: ignore[override]
        raise AssertionError("printing a parameter copies it from its device")


def test_the_search_for_optimizers_inside_prints_no_parameter() -> None:
    """The keys of an optimizer's state are parameters."""
    parameter = Unprintable(torch.ones(3))
    optimizer = AdamW([parameter])
    for attach in (lambda: None, lambda: QuantileClip.as_optimizer(optimizer)):
        attach()
        parameter.grad = torch.ones(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was trained before
            optimizer.step()
    assert optimizer.clipper.has_history  # type: ignore[attr-defined]


class Offloading:
    """Has an optimizer for each parameter but one, as torchao's CPUOffloadOptimizer (0.18)."""

    def __init__(self, parameters: Iterable[nn.Parameter], make_optimizer: Any) -> None:
        first, *others = parameters
        self.d_opt = self.optimizer = make_optimizer([first])
        self.optim_dict = {parameter: make_optimizer([parameter]) for parameter in others}

    def step(self) -> None:
        self.d_opt.step()
        for optimizer in self.optim_dict.values():
            optimizer.step()


def test_each_of_several_optimizers_inside_gets_a_clipper() -> None:
    """The message is short, and names no optimizer twice."""
    parameters = [Unprintable(torch.ones(3)) for _ in range(10)]
    with pytest.raises(TypeError) as caught:
        QuantileClip.as_optimizer(cast("Any", Offloading(parameters, AdamW)))
    assert str(caught.value).endswith(
        "Attach a clipper to each of the 10 optimizers inside: `.optimizer`, "
        "`.optim_dict[<Unprintable 0>]`, `.optim_dict[<Unprintable 1>]`, …."
    )
    model = make_model()
    factory = QuantileClip.optimizer_factory(SGD, **SETTINGS)  # the way out, in one line
    offloading = Offloading(model.parameters(), lambda own: factory(own, lr=0.1))
    train(model, cast("Any", _Zeroing(offloading, model)), range(4))
    expected, plain = make(lambda parameters: SGD(parameters, lr=0.1))
    train(expected, plain, range(4))
    assert torch.equal(weights(model), weights(expected))


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


class OwnCopies(Adam):
    """Copies what it likes, as pytorch_optimizer's and schedulefree's wrappers do."""

    def __getstate__(self) -> dict[str, Any]:
        return {"own": (self.state, self.param_groups, self.defaults)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "own" in state:
            self.state, self.param_groups, self.defaults = state["own"]
            state = {}
        super().__setstate__(state)


class CopiesEverything(Adam):
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


class CopiesByConstructor(Adam):
    def __reduce__(self) -> Any:
        return type(self), (self.param_groups,), super().__getstate__()


class OwnDeepcopy(Adam):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


COPYING = [*OVERRIDING, OwnCopies, CopiesEverything, CopiesByConstructor, OwnDeepcopy]


def through_torch_save(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", COPYING)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_clips_with_a_history_of_its_own(kind: type[Optimizer], duplicate: Any) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin_model, twin = duplicate((model, optimizer))
        twin_of_twin_model, twin_of_twin = duplicate((twin_model, twin))
        train(twin_model, twin, range(4, 9))
        train(twin_of_twin_model, twin_of_twin, range(4, 9))
    assert twin.clipper is not optimizer.clipper
    train(model, optimizer, range(4, 9))
    for other_model, other in ((twin_model, twin), (twin_of_twin_model, twin_of_twin)):
        assert torch.equal(weights(other_model), weights(model))
        assert other.clipper.state_dict() == optimizer.clipper.state_dict()
        assert bool((other.clipper.last.coefficients < 1).any())
    # It is attached like any other: once, and without a trace after it has been detached.
    twin.clipper.detach()
    train(twin_model, twin, range(1))
    assert "autoclip" not in twin.state_dict()
    assert not hasattr(twin, "clipper")
    assert type(copy.deepcopy(twin)) is kind


@pytest.mark.parametrize("kind", COPYING)
def test_a_shallow_copy_shares_parameters_and_has_a_history_of_its_own(
    kind: type[Optimizer],
) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(3))
    other = copy.copy(optimizer)
    assert other.param_groups[0]["params"][0] is model[0].weight
    train(model, other, range(3, 5))
    assert [len(w) for w in other.clipper.export_state().groups[0].windows()] == [5] * 4
    assert [len(w) for w in optimizer.clipper.export_state().groups[0].windows()] == [3] * 4
    train(model, optimizer, range(3, 4))
    assert [len(w) for w in optimizer.clipper.export_state().groups[0].windows()] == [4] * 4


class Forgetful(Adam):
    """A class whose copies have other parameters than those that were copied."""

    def __reduce__(self) -> Any:
        return type(self), (list(nn.Linear(2, 2).parameters()),)


def test_a_copy_that_cannot_clip_says_so_at_its_first_step() -> None:
    _, optimizer = make(Forgetful)
    twin = copy.deepcopy(optimizer)
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match="its steps are not clipped: .* same parameters") as caught:
        twin.step()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.step()


@pytest.mark.parametrize("kind", OVERRIDING)
def test_nothing_is_kept_alive(kind: type[Optimizer]) -> None:
    _, optimizer = make(kind)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


# -- wrappers that call no hook ------------------------------------------------------------------


class ScheduleFreeWrapper:
    """Not an optimizer, as schedulefree's; fastai's `OptimWrapper` has it as `opt`."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    def step(self) -> None:
        self.base.step()


class UnhookedLookahead(Optimizer):
    """Does not call torch's __init__, as timm's (1.0)."""

    def __init__(self, base_optimizer: Optimizer) -> None:
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self._base_optimizer.step()


@pytest.mark.parametrize(
    ("wrap", "name"), [(ScheduleFreeWrapper, "base"), (UnhookedLookahead, "_base_optimizer")]
)
def test_a_wrapper_is_refused_with_the_name_of_the_optimizer_inside(wrap: Any, name: str) -> None:
    model = make_model()
    wrapper = wrap(SGD(model.parameters(), lr=0.1))
    for attach in (QuantileClip.as_optimizer, QuantileClip(model.parameters()).attach):
        with pytest.raises(TypeError, match=rf"optimizer inside, its attribute `\.{name}`"):
            attach(wrapper)
    QuantileClip.as_optimizer(getattr(wrapper, name), **SETTINGS)  # the way out works
    train(model, cast("Any", _Zeroing(wrapper, model)), range(4))
    expected, plain = make(lambda parameters: SGD(parameters, lr=0.1))
    train(expected, plain, range(4))
    assert torch.equal(weights(model), weights(expected))


class _Zeroing:
    def __init__(self, wrapper: Any, model: nn.Module) -> None:
        self.step, self.zero_grad = wrapper.step, model.zero_grad


# -- a checkpoint whose entry was dropped ----------------------------------------------------------


def test_the_entry_that_distributed_checkpoints_drop() -> None:
    """The true cause; and nothing if the history was saved separately and loaded before."""
    model, optimizer = make(Adam)
    train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer)
    history = optimizer.clipper.state_dict()
    other_model, other = make(Adam)
    with pytest.warns(UserWarning, match=r"torch\.distributed\.checkpoint keeps only") as caught:
        set_optimizer_state_dict(other_model, other, saved)
    assert len(caught) == 1
    other_model, other = make(Adam)
    other.clipper.load_state_dict(history)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_optimizer_state_dict(other_model, other, copy.deepcopy(saved))
        train(other_model, other, range(3, 5))
    assert [len(w) for w in other.clipper.export_state().groups[0].windows()] == [5] * 4


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
    """In `step(closure)` by itself; between the two steps by hand, as the warning says."""
    model, optimizer = make_sam()
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(lambda step=step: backward(model, step))
    by_hand = make_model()
    plain = Sam(by_hand.parameters(), SGD, lr=0.1)
    clipper = QuantileClip(by_hand.parameters(), **SETTINGS)
    train_sam(by_hand, plain, clipper.step)
    assert torch.equal(weights(by_hand), weights(model))
    assert clipper.state_dict() == optimizer.clipper.state_dict()


@pytest.mark.parametrize("by_hand", [False, True])
def test_gradients_that_a_step_averages_are_clipped_afterwards(by_hand: bool) -> None:
    expected, plain = make(lambda parameters: SGD(parameters, lr=0.1))
    model = make_model()
    optimizer = distributed(SGD(model.parameters(), lr=0.1))
    QuantileClip.as_optimizer(optimizer, **SETTINGS)
    for step in range(5):
        backward(expected, step)
        for parameter in expected.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
        plain.step()
        plain.zero_grad()
        backward(model, step)
        if by_hand:
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.clipper.state_dict() == plain.clipper.state_dict()
    assert torch.equal(weights(model), weights(expected))


def test_weights_that_are_updated_in_the_backward_pass() -> None:
    """Each optimizer that a hook steps may have a clipper; one after the pass comes too late."""
    expected, plain = make(lambda parameters: SGD(parameters, lr=0.1))
    train(expected, plain, range(5))
    model = make_model()
    optimizers: dict[Tensor, Any] = {}
    late = QuantileClip(model.parameters(), **SETTINGS)

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        optimizers[parameter] = QuantileClip.as_optimizer(SGD([parameter], lr=0.1), **SETTINGS)
        parameter.register_post_accumulate_grad_hook(update)
    for step in range(5):
        backward(model, step)
    assert torch.equal(weights(model), weights(expected))
    with pytest.warns(UserWarning, match="hooks that run in the backward pass"):
        late.step()


class Releasing(SGD):
    """Updates one parameter at a time, and frees its gradient, as optimi's optimizers (0.3) can."""

    def release_gradients(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Tensor) -> None:
        self.step()
        parameter.grad = None


@each_mode
def test_one_optimizer_that_steps_for_each_parameter(mode: dict[str, Any]) -> None:
    """Right for each parameter by itself; the norm of several can only be that of a part."""
    expected, plain = make(lambda parameters: SGD(parameters, lr=0.1))
    train(expected, plain, range(5))
    model = make_model()
    optimizer = Releasing(model.parameters(), lr=0.1)
    QuantileClip.as_optimizer(optimizer, **SETTINGS, **mode)
    optimizer.release_gradients()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            backward(model, step)
            optimizer.step()  # nothing is left
    if mode:
        assert ["inside the backward pass" in str(each.message) for each in caught] == [True]
    else:
        assert not caught
        assert torch.equal(weights(model), weights(expected))


def test_parameters_that_are_never_trained() -> None:
    """As in the optimizer that stands for others in layer-wise training."""
    dummy = SGD([torch.zeros(1)], lr=0.1)
    dummy.optimizer_dict = {}  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"SGD\.step\(\) updates nothing.*galore_adamw"):
        QuantileClip.as_optimizer(dummy)
    with pytest.warns(UserWarning, match="none of its parameters requires one"):
        dummy.step()


def test_lomo() -> None:
    with pytest.warns(UserWarning, match=r"Lomo\.fused_backward updates the weights"):
        QuantileClip.as_optimizer(Lomo(make_model().parameters()))


# -- hyperparameters with the names of settings --------------------------------------------------

# Settings of the clippers below, and values that no clipper has by default.
OWN: dict[str, Any] = {
    "quantile": 0.123,
    "factor": 7.0,
    "history_length": 77,
    "max_norm": 1e-3,
    "warmup_steps": 2000,
    "include_current": False,
    "record": "clipped",
    "on_spike": "skip",
    "on_nonfinite": "raise",
}


def test_every_setting_is_tried() -> None:
    assert {*CLIPPER_SETTINGS, "quantile", "factor"} == OWN.keys()


@pytest.mark.parametrize("how", ["as_optimizer", "attach", "wrapped"])
@each_mode
def test_an_optimizers_hyperparameter_is_no_setting(how: str, mode: dict[str, Any]) -> None:
    """Whatever its name: the clipper's settings are those that it was given."""
    model = make_model()
    optimizer: Any = WarmingUp(model[0].parameters(), **OWN)
    if how == "wrapped":
        optimizer = Lookahead(optimizer)
    if how == "attach":
        QuantileClip(model[0].parameters(), **SETTINGS, **mode).attach(optimizer)
    else:
        QuantileClip.as_optimizer(optimizer, **SETTINGS, **mode)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(model[2].parameters()), **OWN})
    train(model, optimizer, range(2, 4))
    clipper = optimizer.clipper
    for group in clipper.param_groups:
        assert {name: group[name] for name in OWN} == clipper.defaults
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["history_length"] for group in clipper.param_groups] == [16, 16]
    windows = [w for g in clipper.export_state().groups for w in g.windows()]
    assert (
        sum(map(len, windows))
        == {"": 12, "group_clipping": 6, "global_clipping": 4}[next(iter(mode), "")]
    )


def test_an_optimizers_warm_up_does_not_replace_the_clippers() -> None:
    model = make_model()
    standard: Any = StandardClip.as_optimizer(WarmingUp(model.parameters(), warmup_steps=2000))
    assert standard.clipper.param_groups[0]["warmup_steps"] == 25
    expected, other = make_model(), WarmingUp(model.parameters(), warmup_steps=2000)
    plain = SGD(expected.parameters(), lr=0.1)
    for clipped, parameters in ((other, model), (plain, expected)):
        QuantileClip.as_optimizer(clipped, quantile=0.1)
        train(parameters, clipped, range(6))
    assert torch.equal(weights(model), weights(expected))


def test_what_a_user_wrote_into_a_group_is_a_setting() -> None:
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "quantile": 0.3, "warmup_steps": 5},
        {"params": model[2].parameters(), "max_norm": 2.0},
    ]
    optimizer = QuantileClip.as_optimizer(WarmingUp(groups), warmup_steps=7)
    found = optimizer.clipper.param_groups  # type: ignore[attr-defined]
    assert [group["quantile"] for group in found] == [0.3, 0.9]
    assert [group["max_norm"] for group in found] == [None, 2.0]
    assert [group["warmup_steps"] for group in found] == [7, 7]  # the groups' are the optimizer's
    found[0]["warmup_steps"] = 3
    assert [group["warmup_steps"] for group in optimizer.param_groups] == [5, 0]


# -- a step that is skipped on the device --------------------------------------------------------


@pytest.mark.parametrize("kind", [Container, OwnStep, "lookahead", AdamW])
def test_a_spike_is_skipped_whatever_reads_found_inf(path: str, kind: Any) -> None:
    """All of these have groups with `fused=True`; only torch's own step looks at `found_inf`."""
    weight = nn.Parameter(torch.zeros(4))
    if kind == "lookahead":
        optimizer: Any = Lookahead(AdamW([weight], lr=0.1, fused=True))
    else:
        optimizer = kind([weight], lr=0.1, fused=True)
    QuantileClip.as_optimizer(
        optimizer, global_clipping=True, include_current=False, factor=3.0, on_spike="skip"
    )
    for size in (1.0, 1.0, 1.0, 100.0, 1.0):
        before = weight.detach().clone()
        weight.grad = torch.full((4,), size)
        optimizer.step()
        assert torch.equal(weight, before) is (size == 100.0)
        assert weight.grad is not None
        assert not hasattr(optimizer, "found_inf")
    assert bool(optimizer.clipper.last.spikes[0]) is False


# -- subclasses of a clipper ---------------------------------------------------------------------


class Trainable(QuantileClip):
    """Looks at its parameters first, as subclasses of torch's optimizers do."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        parameters = list(parameters)
        self.kinds = {type(each) for each in parameters}
        self.count = len(parameters)
        super().__init__((each for each in parameters), **settings)


def test_a_subclass_may_iterate_over_its_parameters() -> None:
    expected, plain = make(SGD)
    train(expected, plain, range(4))

    def run(optimizer: Any, model: nn.Module) -> Any:
        train(model, Trainable.as_optimizer(optimizer, **SETTINGS), range(4))
        assert torch.equal(weights(model), weights(expected))
        return optimizer.clipper

    model = make_model()
    clipper = run(SGD(model.parameters()), model)
    assert (clipper.kinds, clipper.count) == ({nn.Parameter}, 4)
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    optimizer = SGD([{"params": model.parameters(), "param_names": names}])
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # writes into the groups
    clipper = run(optimizer, model)
    assert (clipper.kinds, clipper.count) == ({tuple}, 4)
    assert clipper.last.names == tuple(names)
    model = make_model()
    groups = [{"params": model[0].parameters(), "lr": 0.001}, {"params": model[2].parameters()}]
    clipper = run(SGD(groups), model)
    assert (clipper.count, len(clipper.param_groups)) == (2, 2)
    # One group that has a setting: the setting must reach the clipper.
    one = Trainable.as_optimizer(SGD([{"params": model.parameters(), "quantile": 0.25}]))
    assert one.clipper.param_groups[0]["quantile"] == 0.25  # type: ignore[attr-defined]
