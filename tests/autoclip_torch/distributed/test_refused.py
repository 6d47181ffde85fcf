"""Gradients without a true norm are refused, on all ranks, before anything is recorded."""

from __future__ import annotations

import sys
import types
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from oracles import MODES, Net, assert_same_everywhere, batches, full, own_part, placed, zeros
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from autoclip.torch import Clipper, QuantileClip


def backward(model: nn.Module) -> None:
    batch = own_part(next(batches(1)), dist.get_rank(), dist.get_world_size())
    full(model(batch, True)).square().mean().backward()


def assert_refused(clipper: Clipper, step: Any, words: str) -> None:
    """Every step raises, with no collective that other ranks could wait in."""
    before = clipper.state_dict()
    for _ in range(2):
        with (
            patch.object(dist, "all_reduce", side_effect=AssertionError("a collective")),
            patch.object(dist, "broadcast", side_effect=AssertionError("a collective")),
            pytest.raises(RuntimeError, match=words),
        ):
            step()
    assert clipper.state_dict() == before


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1(use_orig_params, attached, global_clipping):
    model = FullyShardedDataParallel(
        Net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = QuantileClip(model.parameters(), global_clipping=global_clipping)
    step = clipper.step
    if attached:
        clipper.attach(optimizer)
        step = optimizer.step
    backward(model)
    weights = [p.detach().clone() for p in model.parameters()]
    assert_refused(clipper, step, r"FSDP1.*Use autoclip\.torch\.fsdp\.attach")
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)  # the optimizer did not go on without us


@pytest.mark.processes(2)
def test_a_part_of_a_model_in_fsdp1():
    """As wrapping policies and `ignored_modules` leave it: some parameters are plain."""
    model = Net()
    model.detour = FullyShardedDataParallel(
        model.detour, device_id=torch.device("cpu"), use_orig_params=True
    )
    clipper = QuantileClip(model.parameters())
    backward(model)
    assert_refused(clipper, clipper.step, "FSDP1")


# What the libraries set on their parameters. They themselves need a GPU to be installed.
DEEPSPEED = {
    "ZeRO-3": {"ds_id": 7},  # deepspeed.runtime.zero.partition_parameters
    "ZeRO-1 and ZeRO-2": {"_hp_mapping": None},  # deepspeed.utils.mixed_precision_linkage
}
MEGATRON = {
    "split": {"tensor_model_parallel": True, "partition_dim": 0},  # tensor_parallel.layers
    "whole": {"tensor_model_parallel": False},
    "its own data parallel": {"main_grad": torch.zeros(6)},  # distributed.param_and_grad_buffer
}


def marked(attributes: dict[str, Any]) -> nn.Module:
    """A model of which only the last parameter is managed by somebody."""
    model = Net()
    for name, value in attributes.items():
        setattr(model.scale, name, value)
    return model


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("stage", DEEPSPEED)
def test_deepspeed(stage, global_clipping):
    model = marked(DEEPSPEED[stage])
    clipper = QuantileClip(model.parameters(), global_clipping=global_clipping)
    backward(model)
    assert_refused(clipper, clipper.step, r"DeepSpeed.*Use autoclip\.torch\.deepspeed\.attach")


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("kind", MEGATRON)
def test_megatron(kind, global_clipping):
    model = marked(MEGATRON[kind])
    clipper = QuantileClip(model.parameters(), global_clipping=global_clipping)
    backward(model)
    # TransformerEngine sets the same attributes, also where no Megatron is and nothing is split.
    clipper.step()
    assert clipper.export_state().by_row()[1].max() == 1
    name = "megatron.core.parallel_state"
    with patch.dict(sys.modules, {name: types.ModuleType(name)}):
        assert_refused(clipper, clipper.step, r"Megatron-LM.*autoclip\.core\.MaxNorm")


@pytest.mark.parametrize("attributes", [*DEEPSPEED.values(), *MEGATRON.values()])
def test_in_a_process_by_itself_nothing_is_split(attributes):
    model = marked(attributes)
    model(next(batches(1)), True).square().mean().backward()
    clipper = QuantileClip(model.parameters())
    clipper.step()
    assert clipper.export_state().by_row()[1].min() == 1


@pytest.mark.processes(4)
@pytest.mark.parametrize("name", ["pp", "pipeline", "stage"])
def test_a_stage_of_a_pipeline_with_global_clipping(name):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=(name, "dp"))
    model = fully_shard(Net(), mesh=mesh["dp"])
    clipper = QuantileClip(model.parameters(), global_clipping=True)
    backward(model)
    words = f"one stage of a pipeline.*{name!r}.*Use parameter-wise clipping"
    assert_refused(clipper, clipper.step, words)
    # For each parameter its whole gradient is here.
    parameter_wise = QuantileClip(model.parameters())
    norms = [p.grad.full_tensor().norm() for p in model.parameters()]
    parameter_wise.step()
    torch.testing.assert_close(parameter_wise.last.norms, torch.stack(norms))


@pytest.mark.processes(4)
def test_a_dimension_of_another_name_or_of_one_stage_is_no_pipeline():
    for names, shape in ((("dp", "tp"), (2, 2)), (("pp", "dp"), (1, 4))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        model = fully_shard(Net(), mesh=mesh[names[1]])
        clipper = QuantileClip(model.parameters(), global_clipping=True)
        backward(model)
        clipper.step()
        assert clipper.export_state().by_row()[1].tolist() == [1]


@pytest.mark.processes(4)
def test_meshes_of_different_processes_with_global_clipping():
    """Experts on halves of the processes, all else on all: each half would get its own norm."""
    everywhere = init_device_mesh("cpu", (4,))
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("experts", "dp"))["dp"]
    ours = [zeros(everywhere, (8,)), zeros(halves, (8,))]
    for mine, mesh in zip(ours, (everywhere, halves)):
        mine.grad = placed(torch.ones(8) * (1 + dist.get_rank() // 2), mesh, [Shard(0)])
    clipper = QuantileClip(ours, global_clipping=True)
    words = "meshes of different processes.*Use parameter-wise clipping"
    assert_refused(clipper, clipper.step, words)
    parameter_wise = QuantileClip(ours)
    parameter_wise.step()
    expected = [mine.grad.full_tensor().norm() for mine in ours]
    torch.testing.assert_close(parameter_wise.last.norms, torch.stack(expected))


@pytest.mark.processes(4)
@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_a_reduction_that_is_neither_sum_nor_mean(where):
    """On one rank alone, the others learn of it and raise as well."""
    mesh = init_device_mesh("cpu", (4,))
    weight, other = zeros(mesh, (8,)), zeros(mesh, (8,))
    clipper = QuantileClip([("weight", weight), ("other", other)])
    before = clipper.state_dict()
    other.grad = placed(torch.ones(8), mesh, [Shard(0)])
    if where == "everywhere" or dist.get_rank() == 2:
        weight.grad = DTensor.from_local(torch.ones(8), mesh, [Partial("max")])
    knows = weight.grad is not None
    with pytest.raises(RuntimeError, match=r"weight is placed.*max" if knows else "on another"):
        clipper.step()
    assert clipper.state_dict() == before
    weight.grad = None
    clipper.step()
    assert clipper.export_state().by_row()[1].tolist() == [0, 1]
    assert_same_everywhere(clipper)


@pytest.mark.processes(2)
@pytest.mark.parametrize("attached", [False, True])
def test_a_clipper_made_before_fully_shard_says_that_it_sees_nothing(attached):
    """Its parameters are no longer the model's, and torch's own optimizer says nothing."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = QuantileClip(model.parameters())
    if attached:
        clipper.attach(optimizer)
    fully_shard(model)
    backward(model)
    with pytest.warns(UserWarning, match=r"no gradient on any parameter.*sharded.*afterwards"):
        optimizer.step() if attached else clipper.step()
    assert clipper.export_state().by_row()[1].max() == 0
    if attached:  # the optimizer has been told of them: the clipper follows
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.step()
        assert clipper.export_state().by_row()[1].min() == 1
        assert_same_everywhere(clipper)
