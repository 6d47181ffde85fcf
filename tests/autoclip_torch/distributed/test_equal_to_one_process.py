"""Thresholds and clipped gradients are those of one process on the whole batch, on every rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import (
    MODES,
    TOLERANCE,
    Net,
    SequenceNet,
    assert_equal_reports,
    assert_same_everywhere,
    assert_trains_alike,
    batches,
    mode_on_each_commit,
    own_part,
    parallelize,
    shard,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from autoclip.torch import QuantileClip


def own() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


@pytest.mark.processes(2)
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("global_clipping", MODES)
def test_ddp(global_clipping, views):
    """Also where all gradients are views of one bucket, in which they stay."""
    models = []

    def wrap(model):
        models.append(
            nn.parallel.DistributedDataParallel(
                model, find_unused_parameters=True, gradient_as_bucket_view=views
            )
        )
        return models[0]

    assert_trains_alike(wrap, global_clipping, part=own())
    storages = {p.grad.untyped_storage().data_ptr() for p in models[0].parameters()}
    assert (len(storages) == 1) is views


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_parts_that_share_memory(global_clipping):
    """`torch.autograd.grad` returns one DTensor for both terms of a sum."""
    mesh = init_device_mesh("cpu", (2,))
    ours = [nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)])) for _ in range(2)]
    clipper = QuantileClip(ours, 0.0, global_clipping=global_clipping)
    for size in (1.0, 4.0):
        found = torch.autograd.grad(((ours[0] + ours[1]) * size).sum(), ours)
        for mine, gradient in zip(ours, found):
            mine.grad = gradient
        clipper.step()
    assert [mine.grad.full_tensor().tolist() for mine in ours] == [[1.0] * 6] * 2


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_fsdp2_on_two(global_clipping):
    assert_trains_alike(shard, global_clipping, part=own())


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
def test_fsdp2_on_four(global_clipping):
    clipper = assert_trains_alike(shard, global_clipping, part=own())
    # What is saved knows the parameters as a whole.
    shapes = [p.shape for group in clipper.export_state().groups for p in group.parameters]
    assert shapes == [tuple(p.shape) for p in Net().parameters()]


@pytest.mark.processes(4)
@mode_on_each_commit(False)
def test_hybrid_sharding(global_clipping):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert_trains_alike(lambda model: shard(model, mesh=mesh), global_clipping, part=own())


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
@mode_on_each_commit(True)
def test_fsdp2_and_tensor_parallel(global_clipping):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = (mesh["dp"].get_local_rank(), 2)

    def spread(model):
        return shard(parallelize(model, mesh["tp"]), mesh=mesh["dp"])

    assert_trains_alike(spread, global_clipping, net=SequenceNet, part=place)


@pytest.mark.processes(4)
@mode_on_each_commit(False)
def test_tensor_parallel_on_four(global_clipping):
    """Ten features over four ranks: three for each, and one for the last."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    plan = {"first": ColwiseParallel(use_local_output=False), "second": RowwiseParallel()}

    class Pair(Net):
        def forward(self, x):
            return self.second(torch.relu(self.first(x))) * self.scale

    assert_trains_alike(
        lambda model: parallelize_module(model, mesh, plan),
        global_clipping,
        net=Pair,
        detours=False,
    )


@pytest.mark.processes(4)
@mode_on_each_commit(True)
def test_plain_tensors_beside_sharded_ones(global_clipping):
    """Parameters that fully_shard is told to leave alone, and that the user averages."""

    def spread(model):
        fully_shard(model, ignored_params={model.scale, model.norm.weight})
        return model

    def average(model):
        for parameter in (model.scale, model.norm.weight):
            assert type(parameter.grad) is torch.Tensor
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    assert_trains_alike(spread, global_clipping, part=own(), finish_backward=average)


@pytest.mark.processes(4)
@pytest.mark.parametrize(
    ("reduced", "global_clipping"),
    [
        ("float32", True),
        ("bfloat16", False),
        pytest.param("float32", False, marks=pytest.mark.nightly),
        pytest.param("bfloat16", True, marks=pytest.mark.nightly),
    ],
)
def test_mixed_precision_policy(reduced, global_clipping):
    """The oracle is a clipper that gets, whole, the very gradients that FSDP2 has made."""
    policy = MixedPrecisionPolicy(torch.bfloat16, getattr(torch, reduced))
    assert_clips_what_it_gets(lambda model: shard(model, mp_policy=policy), global_clipping)


@pytest.mark.processes(4)
@mode_on_each_commit(False)
def test_pure_bfloat16(global_clipping):
    assert_clips_what_it_gets(lambda model: shard(model.bfloat16()), global_clipping)


def assert_clips_what_it_gets(spread: Any, global_clipping: bool) -> None:
    model = spread(Net())
    ours = list(model.parameters())
    whole = [nn.Parameter(torch.zeros(p.shape, dtype=p.dtype)) for p in ours]
    settings = {"quantile": 0.5, "global_clipping": global_clipping}
    clipper, oracle = QuantileClip(ours, **settings), QuantileClip(whole, **settings)
    clipped = 0
    for step, batch in enumerate(batches(6)):
        model.zero_grad()
        inputs = own_part(batch, *own()).to(whole[0].dtype)
        (model(inputs, step % 2 == 1).square().mean() * (1, 4, 2, 8)[step % 4]).backward()
        for mine, other in zip(ours, whole):
            other.grad = None if mine.grad is None else mine.grad.full_tensor().clone()
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=TOLERANCE, atol=0)
        assert_equal_reports(clipper, oracle)
        for mine, other in zip(ours, whole):
            if other.grad is not None:
                # Both are rounded to 16 bits once; a coefficient's last bit can move that.
                tolerance = 2**-7 if other.grad.dtype is torch.bfloat16 else TOLERANCE
                torch.testing.assert_close(
                    mine.grad.full_tensor(), other.grad, rtol=tolerance, atol=1e-7
                )
        clipped += int((oracle.last.coefficients < 1).sum())
    assert clipped
    assert_same_everywhere(clipper)


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_ddp_with_parameters_that_one_rank_alone_uses(global_clipping):
    torch.manual_seed(0)
    reference = Net()
    model = nn.parallel.DistributedDataParallel(
        copy.deepcopy(reference), find_unused_parameters=True
    )
    settings = {"quantile": 0.5, "global_clipping": global_clipping}
    clipper = QuantileClip(model.parameters(), **settings)
    oracle = QuantileClip(reference.parameters(), **settings)
    rank, count = own()
    for step, batch in enumerate(batches(6)):
        model.zero_grad()
        reference.zero_grad()
        model(own_part(batch, rank, count), detour=rank == step % 3).square().mean().backward()
        losses = [
            reference(own_part(batch, i, count), detour=i == step % 3).square().mean()
            for i in range(count)
        ]
        torch.stack(losses).mean().backward()
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=TOLERANCE, atol=0)
        assert_equal_reports(clipper, oracle)
        assert_same_everywhere(clipper)


@pytest.mark.processes(4)
def test_empty_and_uneven_shards_are_what_was_tested():
    model = shard(Net())
    shapes = {name: p.to_local().numel() for name, p in model.named_parameters()}
    counts: list[Any] = [None] * 4
    dist.all_gather_object(counts, shapes)
    assert [count["scale"] for count in counts] == [1, 0, 0, 0]
    assert [count["second.bias"] for count in counts] == [2, 2, 2, 1]
