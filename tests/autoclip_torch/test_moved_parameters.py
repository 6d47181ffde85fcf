"""Parameters that move in an attached optimizer's groups: histories, names and settings follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from autoclip.torch import QuantileClip

Move = Callable[[Optimizer, list[nn.Parameter], st.DataObject], None]


def permute(optimizer: Optimizer, _: list[nn.Parameter], data: st.DataObject) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = data.draw(st.permutations(group["params"]))


def permute_groups(optimizer: Optimizer, _: list[nn.Parameter], data: st.DataObject) -> None:
    optimizer.param_groups[:] = data.draw(st.permutations(optimizer.param_groups))


def move(optimizer: Optimizer, _: list[nn.Parameter], data: st.DataObject) -> None:
    """Move a parameter to another place, or to another group."""
    groups = [group["params"] for group in optimizer.param_groups]
    source = data.draw(st.sampled_from([group for group in groups if group]))
    parameter = source.pop(data.draw(st.integers(0, len(source) - 1)))
    target = data.draw(st.sampled_from(groups))
    target.insert(data.draw(st.integers(0, len(target))), parameter)


def regroup(optimizer: Optimizer, _: list[nn.Parameter], data: st.DataObject) -> None:
    """Move a parameter into a new group, for another learning rate."""
    groups = [group["params"] for group in optimizer.param_groups if group["params"]]
    source = data.draw(st.sampled_from(groups))
    parameter = source.pop(data.draw(st.integers(0, len(source) - 1)))
    optimizer.add_param_group({"params": [parameter], "lr": 0.0})


def insert(optimizer: Optimizer, model: list[nn.Parameter], data: st.DataObject) -> None:
    """Add a parameter before others."""
    model.append(nn.Parameter(torch.zeros(3)))
    params = data.draw(st.sampled_from(optimizer.param_groups))["params"]
    params.insert(data.draw(st.integers(0, len(params))), model[-1])


def rewrite(optimizer: Optimizer, _: list[nn.Parameter], __: st.DataObject) -> None:
    """Other lists and dicts with the same parameters, as after `load_state_dict`."""
    optimizer.param_groups = [
        {**group, "params": [*group["params"]]} for group in optimizer.param_groups
    ]


def join(optimizer: Optimizer, _: list[nn.Parameter], data: st.DataObject) -> None:
    """Move all parameters of a group to another one, and remove the group."""
    groups = optimizer.param_groups
    if len(groups) > 1:
        joined = groups.pop(data.draw(st.integers(0, len(groups) - 1)))
        data.draw(st.sampled_from(groups))["params"].extend(joined["params"])


MOVES: list[Move] = [permute, permute_groups, move, regroup, insert, rewrite, join]


class Model:
    """Parameters of one shape, each with a clipper of its own that no move concerns."""

    def __init__(self, own_groups: bool) -> None:
        self.parameters = [nn.Parameter(torch.zeros(3)) for _ in range(5)]
        first, second = self.parameters[:2], self.parameters[2:]
        plain = SGD([{"params": first}, {"params": second}], lr=0.0)
        self.optimizer: Any = plain
        if own_groups:  # not those of the optimizer
            QuantileClip(self.parameters[::-1], quantile=0.5).attach(plain)
        else:
            QuantileClip.as_optimizer(plain, quantile=0.5)
        self.twins: list[tuple[Tensor, QuantileClip]] = []

    def step(self, gradients: torch.Generator) -> None:
        while len(self.twins) < len(self.parameters):
            twin = torch.zeros(3, requires_grad=True)
            self.twins.append((twin, QuantileClip([twin], quantile=0.5)))
        for parameter, (twin, clipper) in zip(self.parameters, self.twins):
            twin.grad = torch.randn(3, generator=gradients)
            parameter.grad = twin.grad.clone()
            clipper.step()
        self.optimizer.step()
        for parameter, (twin, _) in zip(self.parameters, self.twins):
            torch.testing.assert_close(parameter.grad, twin.grad)


@pytest.mark.parametrize("own_groups", [False, True])
@settings(max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_each_parameter_keeps_its_history(own_groups: bool, data: st.DataObject, seed: int) -> None:
    model = Model(own_groups)
    gradients = torch.Generator().manual_seed(seed)
    for _ in range(3):
        model.step(gradients)
    for change in data.draw(st.lists(st.sampled_from(MOVES), min_size=1, max_size=3)):
        change(model.optimizer, model.parameters, data)
        for _ in range(data.draw(st.integers(0, 2))):
            model.step(gradients)
    saved = model.optimizer.state_dict()
    model.optimizer.load_state_dict(saved)
    assert model.optimizer.state_dict()["autoclip"] == saved["autoclip"]
    model.step(gradients)
    rows = sum(len(group["params"]) for group in model.optimizer.clipper.param_groups)
    assert rows == len(model.parameters) == len(model.optimizer.clipper.last.norms)


def named() -> tuple[dict[str, nn.Parameter], Any]:
    """Four parameters in two groups of other settings, after two steps of norms 1 to 4."""
    parameters = {name: nn.Parameter(torch.ones(1)) for name in "abcd"}
    # As torch ≥ 2.6 makes groups of named parameters.
    groups = [
        {"params": [parameters[name] for name in names], "param_names": [*names], **settings}
        for names, settings in (("ab", {"quantile": 0.25}), ("cd", {}))
    ]
    optimizer = QuantileClip.as_optimizer(SGD(groups, lr=0.0), quantile=0.75)
    for _ in range(2):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: dict[str, nn.Parameter], optimizer: Any) -> dict[str, float]:
    for norm, parameter in enumerate(parameters.values(), start=1):
        parameter.grad = torch.full((1,), float(norm))
    optimizer.step()
    last = optimizer.clipper.last
    return dict(zip(last.names, last.norms.tolist()))


NORMS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


def test_names_and_settings_move_too() -> None:
    parameters, optimizer = named()
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["params"].reverse()
    report = optimizer.clipper.last  # of the step before
    assert dict(zip(report.names, report.norms.tolist())) == NORMS
    assert step(parameters, optimizer) == NORMS
    groups = optimizer.clipper.param_groups
    assert [group["param_names"] for group in groups] == [["d", "c"], ["a", "b"]]
    assert [group["quantile"] for group in groups] == [0.75, 0.25]
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop(0))
    assert step(parameters, optimizer) == NORMS
    groups = optimizer.clipper.param_groups
    assert [group["param_names"] for group in groups] == [["c"], ["a", "b", "d"]]
    assert [group["quantile"] for group in groups] == [0.75, 0.25]


@pytest.mark.parametrize("kept", [0, 1])
def test_joined_groups_have_the_settings_of_the_one_that_is_left(kept: int) -> None:
    parameters, optimizer = named()
    joined = optimizer.param_groups.pop(1 - kept)
    optimizer.param_groups[0]["params"] += joined["params"]
    assert step(parameters, optimizer) == NORMS
    [group] = optimizer.clipper.param_groups
    assert group["quantile"] == [0.25, 0.75][kept]
    assert group["param_names"] == [*["abcd", "cdab"][kept]]
    windows = optimizer.clipper.export_state().groups[0].windows()
    norms = [NORMS[name] for name in group["param_names"]]
    assert [window.tolist() for window in windows] == [[norm] * 3 for norm in norms]


@pytest.mark.parametrize("mode", ["group_clipping", "global_clipping"])
def test_rows_of_several_parameters(mode: str) -> None:
    """A group's history moves with the group; that of all parameters has nowhere to go."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer: Any = QuantileClip.as_optimizer(SGD(groups, lr=0.0), quantile=1.0, **{mode: True})
    for norm in (1.0, 2.0):
        parameters[0].grad = torch.full((1,), norm)
        optimizer.step()
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["params"].reverse()
    optimizer.step()
    windows = [
        w.tolist() for group in optimizer.clipper.export_state().groups for w in group.windows()
    ]
    assert windows == ([[], [1.0, 2.0, 2.0]] if mode == "group_clipping" else [[1.0, 2.0, 2.0]])
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["group_clipping", "global_clipping"])
def test_joined_groups_with_histories_of_several_parameters(mode: str) -> None:
    """The histories of two groups are not one; that of all parameters stays."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer: Any = QuantileClip.as_optimizer(SGD(groups, lr=0.0), quantile=0.5, **{mode: True})
    backward(parameters)
    optimizer.step()
    optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
    if mode == "group_clipping":
        with pytest.raises(RuntimeError, match="cannot be joined"):
            optimizer.step()
        optimizer.clipper.detach()
        QuantileClip.as_optimizer(optimizer, quantile=0.5, group_clipping=True)
        optimizer.step()
    optimizer.step()
    [window] = optimizer.clipper.export_state().groups[0].windows()
    assert window.tolist() == [2.0, 2.0]


def backward(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)


def test_a_shift_is_noticed() -> None:
    """One that is gone and another that is added at the end shift all between them."""
    shapes = [(1,), (2,), (3,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = QuantileClip.as_optimizer(SGD(parameters, lr=0.0))
    params = optimizer.param_groups[0]["params"]
    params[:] = [*params[1:], nn.Parameter(torch.zeros(4))]
    backward(params)
    with pytest.warns(UserWarning, match="1 of the optimizer's group 0 is parameter 0 of group 0"):
        optimizer.step()


@pytest.mark.parametrize("size", [1, 5])
def test_exchanged_objects_are_no_shift(size: int) -> None:
    """Also with other sizes, as in gsplat, and where a new object has the id of an old one."""
    parameters = [nn.Parameter(torch.zeros(1, n)) for n in (1, 2, 3)]
    optimizer = QuantileClip.as_optimizer(SGD(parameters, lr=0.0), quantile=0.0)
    backward(parameters)
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    for _ in range(4):
        for i in range(3):
            parameters[i] = params[i] = nn.Parameter(torch.zeros(size, i + 1))
        backward(params)
        optimizer.step()
    assert optimizer.clipper.thresholds.tolist() == pytest.approx([1.0, 2**0.5, 3**0.5])
