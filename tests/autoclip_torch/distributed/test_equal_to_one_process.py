"""Thresholds and clipped gradients are those of one process on the whole batch, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import MODES, Net, SequenceNet, assert_trains_alike
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def own() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    fully_shard(model.detour, **settings)
    return fully_shard(model, **settings)


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_ddp(global_clipping):
    assert_trains_alike(
        lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
        global_clipping,
        part=own(),
    )


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_fsdp2_on_two(global_clipping):
    assert_trains_alike(shard, global_clipping, part=own())


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
def test_fsdp2_on_four(global_clipping):
    clipper = assert_trains_alike(shard, global_clipping, part=own())
    # What is saved knows the parameters as a whole.
    shapes = [p.shape for group in clipper._export_state().groups for p in group.parameters]
    assert shapes == [tuple(p.shape) for p in Net().parameters()]


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
def test_hybrid_sharding(global_clipping):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert_trains_alike(lambda model: shard(model, mesh=mesh), global_clipping, part=own())


def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
    """Tensor parallel, and sequence parallel in between; `scale` stays a plain tensor."""
    plan = {
        "first": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "detour": ColwiseParallel(input_layouts=Shard(-1)),
        "down": RowwiseParallel(),
    }
    return parallelize_module(model, mesh, plan)


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_tensor_parallel(global_clipping):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    models = []

    def spread(model):
        models.append(parallelize(model, mesh))
        return models[0]

    assert_trains_alike(spread, global_clipping, net=SequenceNet)
    (model,) = models
    # The very case: this gradient is a sum that nobody has added up, the other is not sharded.
    assert model.norm.weight.grad.placements[0].is_partial()
    assert type(model.scale.grad) is torch.Tensor


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
def test_fsdp2_and_tensor_parallel(global_clipping):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = (mesh["dp"].get_local_rank(), 2)

    def spread(model):
        return shard(parallelize(model, mesh["tp"]), mesh=mesh["dp"])

    assert_trains_alike(spread, global_clipping, net=SequenceNet, part=place)
