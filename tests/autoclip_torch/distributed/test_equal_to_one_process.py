"""Thresholds and clipped gradients are those of one process on the whole batch, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import BATCH, MODES, Net, assert_trains_alike
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
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
