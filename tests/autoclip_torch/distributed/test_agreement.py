"""Ranks stay together: the same collectives at every step, and the same bits in every history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from oracles import (
    MODES,
    Net,
    SequenceNet,
    assert_same_everywhere,
    batches,
    full,
    mode_on_each_commit,
    own_part,
    parallelize,
    placed,
    shard,
    zeros,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from autoclip.torch import QuantileClip, StandardClip


class Collectives(TorchDispatchMode):
    """Writes down each collective: which, over which ranks, and of how many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors, group = args[0], args[1]
            group = dist.ProcessGroup.unbox(group)
            count = sum(tensor.numel() for tensor in tensors)
            name = function._schema.name.partition("::")[2]
            self.seen.append((name, dist.get_process_group_ranks(group), count))
        return function(*args, **(kwargs or {}))


def collectives_of(step: Callable[[], Any]) -> list[tuple[str, Any, int]]:
    with Collectives() as collectives:
        step()
    return collectives.seen


def assert_same_shape_everywhere(seen: list[tuple[str, Any, int]]) -> None:
    """All ranks made the same collectives, of the same length, each in its own group."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [(name, len(ranks), count) for name, ranks, count in seen])
    assert all(other == gathered[0] for other in gathered)


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_collectives_do_not_depend_on_what_is_missing(dimensions, global_clipping):
    """The numbers that docs/distributed.md tells, whatever is None or empty where."""
    shape = (4,) if dimensions == 1 else (2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[:dimensions])
    # Two elements, four ranks: two of them have an empty shard.
    ours = [zeros(mesh, (2, 3)) for _ in range(20)]
    where = [Shard(0)] * dimensions
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    rank, n = dist.get_rank(), len(ours)
    reduced = [("allreduce_", 2 * n + 1)] * dimensions
    sent = [("broadcast_", 2 * n + 1)] * (dimensions - 1)
    handshake = [("allreduce_", n)] * dimensions
    # The first one also tells whether mode, settings and history are the same.
    first = [("allreduce_", n + 6)] * dimensions

    def seen_when(has_gradient: Callable[[int], bool]) -> list[tuple[str, int]]:
        for i, mine in enumerate(ours):
            gradient = placed(torch.ones(2, 3), mesh, where)
            mine.grad = gradient if has_gradient(i) else None
        seen = collectives_of(clipper.step)
        assert_same_shape_everywhere(seen)
        return [(name, count) for name, _, count in seen]

    # Until every row's placement is known to all, each step asks for it, once a dimension.
    assert seen_when(lambda i: False) == first + reduced + sent
    assert seen_when(lambda i: i != 0 and rank == i % 4) == handshake + reduced + sent
    assert seen_when(lambda i: True) == handshake + reduced + sent
    for has_gradient in (
        lambda i: True,
        lambda i: False,
        lambda i: rank == 3,
        lambda i: rank != i % 4,
        lambda i: i == 1,
    ):
        assert seen_when(has_gradient) == reduced + sent
    assert_same_everywhere(clipper)


@pytest.mark.processes(4)
def test_partial_sums_are_added_up_in_one_collective_a_dimension():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    placements = [[Partial(), Shard(0)], [Shard(0), Partial()], [Partial(), Partial()]] * 5
    ours = [zeros(mesh, (4, 3)) for _ in placements]
    clipper = QuantileClip(ours, 0.5)
    n = 2 * len(ours) + 1
    for step in range(4):
        for mine, where in zip(ours, placements):
            mine.grad = placed(torch.ones(4, 3), mesh, where)
            if dist.get_rank() == step:
                mine.grad = None
        seen = collectives_of(clipper.step)
        assert_same_shape_everywhere(seen)
    elements = 5 * (2 * 3 + 4 * 3)  # of the sums along one dimension, as far as they lie here
    assert [(name, count) for name, _, count in seen] == [
        ("allreduce_", elements),
        ("allreduce_", elements),
        ("allreduce_", n),
        ("allreduce_", n),
        ("broadcast_", n),
    ]


@pytest.mark.processes(2)
def test_without_dtensors_there_is_no_collective():
    model = nn.parallel.DistributedDataParallel(Net())
    clipper = QuantileClip(model.parameters())
    for batch in batches(3):
        model(own_part(batch, dist.get_rank(), 2), detour=True).square().mean().backward()
        assert collectives_of(clipper.step) == []


def steps(count: int) -> Any:
    """Of a few steps on each commit, and of all of them nightly."""
    return pytest.mark.parametrize("steps", [24, pytest.param(count, marks=pytest.mark.nightly)])


def assert_identical_after(steps: int, spread: Any, net: Any, place: int, places: int) -> None:
    torch.manual_seed(0)
    model = spread(net())
    settings = {"quantile": 0.7, "history_length": min(64, steps // 2)}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    QuantileClip.as_optimizer(optimizer, **settings)
    # One training for both modes: what the one has clipped, the other gets.
    globally = QuantileClip(model.parameters(), global_clipping=True, **settings)
    clipped = torch.zeros(2)
    for step, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = full(model(own_part(batch, place, places), step % 3 == 1)).square().mean()
        (loss * (1 + step * step % 7)).backward()
        globally.step()
        optimizer.step()
        for i, clipper in enumerate((optimizer.clipper, globally)):
            clipped[i] += (clipper.last.coefficients < 1).sum()
    assert clipped.min() > steps / 7
    for clipper in (optimizer.clipper, globally):
        assert int(clipper.export_state().by_row()[1].max()) == steps
        assert_same_everywhere(clipper)


@pytest.mark.processes(2)
@steps(200)
def test_histories_are_identical_after_many_steps_of_ddp(steps):
    def spread(model):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    assert_identical_after(steps, spread, Net, dist.get_rank(), 2)


@pytest.mark.processes(4)
@steps(200)
def test_histories_are_identical_after_many_steps_of_fsdp2(steps):
    assert_identical_after(steps, shard, Net, dist.get_rank(), 4)


@pytest.mark.processes(4)
@steps(80)
def test_histories_are_identical_after_many_steps_of_fsdp2_and_tensor_parallel(steps):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def spread(model):
        return shard(parallelize(model, mesh["tp"]), mesh=mesh["dp"])

    assert_identical_after(steps, spread, SequenceNet, mesh["dp"].get_local_rank(), 2)


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
def test_histories_are_identical_where_groups_round_otherwise(global_clipping):
    """Replicas that are not quite equal, and groups of processes that add in another order.

    Gloo adds in the same order everywhere. NCCL may not: here each group gets an error of its own.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    ours = [zeros(mesh, (64,)) for _ in range(6)]
    where = [[Shard(0), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Replicate()]]
    for i, mine in enumerate(ours):
        mine.grad = placed(torch.ones(64), mesh, where[i % 3])
    all_reduce = dist.all_reduce

    def round_otherwise(tensor, op=dist.ReduceOp.SUM, group=None):
        all_reduce(tensor, op, group)
        if tensor.is_floating_point():
            tensor *= 1 + 1e-6 * min(dist.get_process_group_ranks(group))

    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    for _ in range(30):
        for i, mine in enumerate(ours):
            local = mine.grad.to_local()
            local.copy_(torch.rand(local.shape, generator=generator) * 10.0 ** (i - 3))
        with patch.object(dist, "all_reduce", round_otherwise):
            clipper.step()
    assert_same_everywhere(clipper)


# -- clippers that differ ------------------------------------------------------------------------


DIFFERENT: dict[str, tuple[str, Any]] = {
    "quantile": ("settings", lambda p, r: QuantileClip(p, quantile=0.5 + 0.1 * r)),
    "history_length": ("settings", lambda p, r: QuantileClip(p, history_length=16 + r)),
    "max_norm": ("settings", lambda p, r: QuantileClip(p, max_norm=[None, 1.0][r])),
    "on_nonfinite": ("settings", lambda p, r: QuantileClip(p, on_nonfinite=["keep", "zero"][r])),
    "rule": ("settings", lambda p, r: [QuantileClip, StandardClip][r](p)),
    "group": (
        "settings",
        lambda p, r: QuantileClip([{"params": p[:2], "factor": 1.0 + r}, {"params": p[2:]}]),
    ),
    "groups": (
        "settings",
        lambda p, r: QuantileClip([{"params": p[: 1 + r]}, {"params": p[1 + r :]}]),
    ),
    "global_clipping": ("mode", lambda p, r: QuantileClip(p, global_clipping=r == 1)),
    "group_clipping": (
        "mode",
        lambda p, r: QuantileClip(p, group_clipping=r == 0, global_clipping=r == 1),
    ),
}


@pytest.mark.processes(2)
@pytest.mark.parametrize("attached", [False, True])
def test_other_settings_on_one_process_are_an_error_on_all(attached):
    rank = dist.get_rank()
    for fact, make in DIFFERENT.values():
        model = shard(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = make(list(model.parameters()), rank)
        step: Any = clipper.step
        if attached:
            clipper.attach(optimizer)
            step = optimizer.step
        start = [full(p.detach()).clone() for p in model.parameters()]
        for batch in batches(2):
            optimizer.zero_grad()
            full(model(own_part(batch, rank, 2), True)).square().mean().backward()
            words = rf"different {fact}.*Nothing was recorded"
            with pytest.raises(RuntimeError, match=words) as caught:
                step()
            assert repr(clipper) in str(caught.value)  # what this process has
        assert not any(group.recorded.any() for group in clipper.export_state().groups)
        assert all(map(torch.equal, start, (full(p.detach()) for p in model.parameters())))


@pytest.mark.processes(2)
@mode_on_each_commit(False)
def test_a_history_that_one_process_has_loaded_is_an_error_on_all(global_clipping):
    rank = dist.get_rank()
    torch.manual_seed(0)

    def make() -> tuple[nn.Module, Any]:
        model = shard(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, QuantileClip.as_optimizer(optimizer, global_clipping=global_clipping)

    def train(model: nn.Module, optimizer: Any) -> None:
        for batch in batches(2):
            optimizer.zero_grad()
            full(model(own_part(batch, rank, 2), True)).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    saved = optimizer.clipper.state_dict()
    model, optimizer = make()
    if rank == 0:
        optimizer.clipper.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"different history.*load the same checkpoint"):
        train(model, optimizer)
    optimizer.clipper.load_state_dict(saved)  # on both: now they agree
    train(model, optimizer)
    assert {n for g in optimizer.clipper.export_state().groups for n in g.recorded} <= {2, 4}
    assert_same_everywhere(optimizer.clipper)
