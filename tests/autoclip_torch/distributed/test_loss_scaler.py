"""GradScaler where gradients are spread: what is recorded, and where it is refused."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from oracles import (
    TOLERANCE,
    WIDTH,
    Net,
    assert_equal_reports,
    assert_same_everywhere,
    batches,
    full,
    own_part,
    shard,
)
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from autoclip.torch import QuantileClip

SCALE = 2.0**12
OVERFLOWS = 3


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def hybrid(model: nn.Module) -> nn.Module:
    return shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))


SPREADS = {"ddp": ddp, "fsdp2": shard, "hsdp": hybrid}


@pytest.mark.processes(4)
@pytest.mark.parametrize(
    ("fused", "global_clipping"),
    [
        pytest.param(False, True, id="plain, global"),
        pytest.param(True, False, id="fused"),
        pytest.param(False, False, id="plain", marks=pytest.mark.nightly),
        pytest.param(True, True, id="fused, global", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("spread", SPREADS)
def test_what_is_recorded_is_unscaled_and_no_overflow_is(spread, fused, global_clipping):
    """As in one process without a scaler that leaves out the step with the overflow."""
    torch.manual_seed(0)
    reference = Net()
    model = SPREADS[spread](copy.deepcopy(reference))
    settings: dict[str, Any] = {"quantile": 0.5, "global_clipping": global_clipping}
    ours = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-2, fused=fused)
    theirs = torch.optim.Adam(reference.parameters(), lr=0.01, eps=1e-2)
    for optimizer in (ours, theirs):
        QuantileClip.as_optimizer(optimizer, **settings)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    rank, count = dist.get_rank(), dist.get_world_size()
    for step, batch in enumerate(batches(6)):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        weight = (1, 4, 2, 16)[step % 4]
        loss = model(own_part(batch, rank, count), detour=True).square().mean() * weight
        scaler.scale(loss).backward()
        if step == OVERFLOWS:
            # In one shard alone; in all of its replicas, which torch makes equal in backward.
            shards = {"ddp": 1, "fsdp2": 4, "hsdp": 2}[spread]
            if rank % shards == shards - 1:
                local_part(getattr(model, "module", model).first.weight.grad)[:1] = float("inf")
        scaler.step(ours)
        scaler.update()
        if step == OVERFLOWS:
            assert scaler.get_scale() == SCALE / 2
            continue
        (reference(batch, detour=True).square().mean() * weight).backward()
        theirs.step()
        assert_equal_reports(ours.clipper, theirs.clipper)
        for mine, other in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(
                full(mine.detach()), other.detach(), rtol=TOLERANCE, atol=1e-6
            )
    assert int(ours.clipper.export_state().by_row()[1].max()) == 5
    assert_same_everywhere(ours.clipper)


def local_part(gradient: Any) -> Any:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


class Layers(nn.Module):
    """Without plain tensors, since GradScaler itself refuses them beside DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def tensor_parallel() -> Any:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    return parallelize_module(Layers(), mesh, PLAN)


def fsdp2_and_tensor_parallel() -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(parallelize_module(Layers(), mesh["tp"], PLAN), mesh=mesh["dp"])


def several_meshes() -> Any:
    """Each layer on a mesh of its own."""
    model = Layers()
    fully_shard(model.first, mesh=init_device_mesh("cpu", (4,)))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    fully_shard(model.second, mesh=square)
    return model


PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}
REFUSED = {
    "tensor parallel": tensor_parallel,
    "fsdp2 and tensor parallel": fsdp2_and_tensor_parallel,
    "several meshes": several_meshes,
}


@pytest.mark.processes(4)
@pytest.mark.parametrize(
    ("case", "fused"),
    [
        pytest.param(
            case,
            fused,
            marks=[pytest.mark.nightly] * (fused and case != "fsdp2 and tensor parallel"),
            id=f"{case}-{'fused' if fused else 'plain'}",
        )
        for case in REFUSED
        for fused in (False, True)
    ],
)
def test_refused_on_all_ranks_before_any_collective(case, fused):
    model = REFUSED[case]()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    QuantileClip.as_optimizer(optimizer)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(full(model(next(batches(1)))).square().mean()).backward()
    with (
        # Torch's own collectives in here go another way.
        patch.object(dist, "all_reduce", side_effect=AssertionError("a collective")),
        patch.object(dist, "broadcast", side_effect=AssertionError("a collective")),
        pytest.raises(RuntimeError, match="GradScaler does not work with AutoClip under tensor"),
    ):
        scaler.step(optimizer)
    assert optimizer.clipper.export_state().by_row()[1].max() == 0
    # Without a scaler all of these work.
    optimizer.step()
    assert optimizer.clipper.export_state().by_row()[1].min() == 1
