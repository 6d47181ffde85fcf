"""Other tools of torch: joined DDP, ZeroRedundancyOptimizer, offloading, pipeline stages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from oracles import (
    MODES,
    Net,
    assert_equal_reports,
    assert_same_everywhere,
    assert_trains_alike,
    batches,
    mode_on_each_commit,
    own_part,
    shard,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from autoclip.torch import QuantileClip


@pytest.mark.processes(2)
@mode_on_each_commit(True)
def test_fsdp2_with_offloading_trains_as_one_process(global_clipping):
    assert_trains_alike(
        lambda model: shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        global_clipping,
        part=(dist.get_rank(), 2),
    )


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_ddp_whose_ranks_join_early(global_clipping):
    """A rank that has joined no longer steps; the others' gradients are those of their batches."""
    torch.manual_seed(0)
    reference = Net()
    model = DistributedDataParallel(copy.deepcopy(reference), find_unused_parameters=True)
    settings = {"quantile": 0.5, "global_clipping": global_clipping}
    ours, theirs = (
        QuantileClip.as_optimizer(torch.optim.SGD(each.parameters(), lr=0.1), **settings)
        for each in (model, reference)
    )
    mine = 5 if dist.get_rank() == 0 else 3
    with model.join(divide_by_initial_world_size=False):
        for step, batch in enumerate(batches(mine)):
            ours.zero_grad()
            (
                model(own_part(batch, dist.get_rank(), 2), True).square().mean() * (1 + step)
            ).backward()
            ours.step()
            parts = batch.chunk(2) if step < 3 else batch.chunk(2)[:1]
            theirs.zero_grad()
            for part in parts:
                loss = reference(part, True).square().mean() * (1 + step) / len(parts)
                loss.backward()
            theirs.step()
            assert_equal_reports(ours.clipper, theirs.clipper)


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("by_hand", [False, True])
def test_zero_redundancy_optimizer(global_clipping, by_hand):
    """Its hooks see all parameters; DDP has given each rank whole gradients."""
    torch.manual_seed(0)
    reference = Net()
    model = DistributedDataParallel(copy.deepcopy(reference))
    settings = {"quantile": 0.5, "global_clipping": global_clipping}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    clipper = QuantileClip(model.parameters(), **settings)
    if not by_hand:
        clipper.attach(optimizer)
    theirs = QuantileClip.as_optimizer(torch.optim.SGD(reference.parameters(), lr=0.1), **settings)
    clipped = 0
    for step, batch in enumerate(batches(4)):
        for each, network, inputs in (
            (optimizer, model, own_part(batch, dist.get_rank(), 2)),
            (theirs, reference, batch),
        ):
            each.zero_grad()
            (network(inputs, True).square().mean() * (1 + 3 * step)).backward()
        if by_hand:
            clipper.step()
        optimizer.step()
        theirs.step()
        assert_equal_reports(clipper, theirs.clipper)
        clipped += int((clipper.last.coefficients < 1).sum())
        for mine, other in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert clipped
    assert_same_everywhere(clipper)
    if not by_hand:
        optimizer.consolidate_state_dict()
        saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved)
        history = clipper.state_dict()
        clipper.reset()
        optimizer.load_state_dict(saved[0])
        assert clipper.state_dict() == history


@pytest.mark.processes(2)
def test_a_clipper_of_a_part_of_the_parameters_is_refused():
    factory = QuantileClip.optimizer_factory(torch.optim.SGD, global_clipping=True)
    says = r"attach the clipper to it: as_optimizer\(ZeroRedundancyOptimizer\(parameters, SGD\), "
    with pytest.raises(RuntimeError, match=says):
        ZeroRedundancyOptimizer(Net().parameters(), factory, lr=0.1)


@pytest.mark.processes(2)
def test_stages_of_a_pipeline_clip_each_parameter_as_one_process():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)]
    reference = nn.Sequential(*copy.deepcopy(layers))
    rank = dist.get_rank()
    stage = PipelineStage(layers[rank], rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(
        stage, 2, loss_fn=lambda output, target: (output - target).square().mean()
    )
    ours = QuantileClip.as_optimizer(
        torch.optim.SGD(layers[rank].parameters(), lr=0.1), quantile=0.5
    )
    theirs = QuantileClip.as_optimizer(
        torch.optim.SGD(reference.parameters(), lr=0.1), quantile=0.5
    )
    for step, batch in enumerate(batches(4)):
        x, y = batch[:, 0], batch[:, 1] * (1 + 3 * step)
        ours.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=y)
        ours.step()
        theirs.zero_grad()
        (reference(x) - y).square().mean().backward()
        theirs.step()
        place = slice(2 * rank, 2 * rank + 2)
        for name in ("norms", "thresholds", "coefficients"):
            torch.testing.assert_close(
                getattr(ours.clipper.last, name),
                getattr(theirs.clipper.last, name)[place],
                rtol=1e-5,
                atol=1e-7,
            )
