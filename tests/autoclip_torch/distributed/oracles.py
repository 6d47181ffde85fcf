"""References of the distributed tests: the same training in one process, on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from autoclip.torch import Clipper, QuantileClip

MODES = [False, True]
"""`global_clipping`."""
BATCH = 8
WIDTH = 6
TOLERANCE = 1e-5


def mode_on_each_commit(often: bool) -> pytest.MarkDecorator:
    """Parametrize `global_clipping`: `often` on each commit, both nightly.

    For layouts of parameters whose parts other tests have in both modes.
    """
    modes = [often, pytest.param(not often, marks=pytest.mark.nightly)]
    return pytest.mark.parametrize("global_clipping", modes)


class Net(nn.Module):
    """Shapes that no number of processes divides: short last shards, and empty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 10)
        self.norm = nn.LayerNorm(10)
        self.second = nn.Linear(10, 7)
        self.detour = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, detour: bool = False) -> Tensor:
        x = self.second(torch.relu(self.norm(self.first(x))))
        if detour:
            x = self.detour(x)
        return x * self.scale


class SequenceNet(nn.Module):
    """For sequences: a normalization of each token, between layers that split its features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 10)
        self.detour = nn.Linear(10, 10)
        self.down = nn.Linear(10, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, detour: bool = False) -> Tensor:
        x = torch.relu(self.up(self.norm(self.first(x))))
        if detour:
            x = self.detour(x)
        return self.down(x) * self.scale


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    """FSDP2, in two parts."""
    fully_shard(model.detour, **settings)
    return fully_shard(model, **settings)


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


def placed(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
    """A tensor spread so that it adds up to `tensor`, with other summands on each rank."""
    sharding = [p if p.is_shard() else Replicate() for p in placements]
    local = distribute_tensor(tensor, mesh, sharding).to_local().clone()
    for dimension, placement in enumerate(placements):
        if placement.is_partial():
            size, place = mesh.size(dimension), mesh.get_local_rank(dimension)
            weights = torch.arange(1.0, size + 1, dtype=torch.float64)
            weights = weights / weights.sum() * (size if placement.reduce_op == "avg" else 1)
            local = (local * weights[place]).to(tensor.dtype)
    return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def zeros(mesh: Any, shape: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A parameter that all ranks of a mesh have."""
    whole = torch.zeros(shape, dtype=dtype)
    return distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim).requires_grad_()


def batches(steps: int) -> Iterator[Tensor]:
    """Global batches of sequences, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(BATCH, 4, WIDTH, generator=generator)


def own_part(batch: Tensor, rank: int, count: int) -> Tensor:
    return batch.chunk(count)[rank]


def full(tensor: Any) -> Tensor:
    """The whole tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_everywhere(clipper: Clipper) -> None:
    """The clipper's state is the same, bit for bit, on all ranks."""
    data = clipper.state_dict()["data"]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, data)
    assert all(other == data for other in gathered)


def assert_equal_reports(ours: Clipper, theirs: Clipper) -> None:
    for name in ("norms", "thresholds", "coefficients"):
        torch.testing.assert_close(
            getattr(ours.last, name),
            getattr(theirs.last, name),
            rtol=TOLERANCE,
            atol=1e-7,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_trains_alike(
    spread: Callable[[nn.Module], nn.Module],
    global_clipping: bool,
    *,
    net: Callable[[], nn.Module] = Net,
    part: tuple[int, int] | None = None,
    steps: int = 6,
    detours: bool = True,
    finish_backward: Callable[[nn.Module], None] = lambda model: None,
) -> Clipper:
    """Train a model that is spread over processes, and the same in this one alone.

    Args:
        spread: makes a model one that is spread over processes.
        part: which part of the batch this rank takes, of how many.
        detours: leave some parameters without a gradient on every other step.
        finish_backward: what a training loop does to the gradients after backward.

    Returns:
        The clipper of the model that is spread.
    """
    torch.manual_seed(0)
    reference = net()
    model = spread(copy.deepcopy(reference))
    settings: dict[str, Any] = {"quantile": 0.5, "global_clipping": global_clipping}
    ours = QuantileClip.as_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    theirs = QuantileClip.as_optimizer(torch.optim.SGD(reference.parameters(), lr=0.1), **settings)
    clipped = 0
    rank, count = part or (0, 1)
    weights = (1.0, 4.0, 2.0, 16.0, 8.0)  # some gradients must be larger than those before
    for step, batch in enumerate(batches(steps)):
        arguments = (step % 2 == 1,) if detours else ()
        for optimizer, network, inputs in (
            (theirs, reference, batch),
            (ours, model, own_part(batch, rank, count)),
        ):
            optimizer.zero_grad()
            loss = full(network(inputs, *arguments)).square().mean()
            (loss * weights[step % 5]).backward()
        finish_backward(model)
        theirs.step()
        ours.step()
        assert_equal_reports(ours.clipper, theirs.clipper)
        for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (a.grad is None) is (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(
                    full(a.grad),
                    b.grad,
                    rtol=TOLERANCE,
                    atol=1e-7,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
        clipped += int((theirs.clipper.last.coefficients < 1).sum())
    assert clipped, "nothing was clipped, so nothing was compared"
    assert_same_everywhere(ours.clipper)
    return ours.clipper
