"""Accelerate with several processes: DDP, and the FSDP2 that it prepares.

Accelerate takes up FSDP where it finds an accelerator only; on a CPU it falls back to DDP and says
nothing. So the test sets its state as it would be there, and the preparation is Accelerate's own.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import (
    MODES,
    TOLERANCE,
    Net,
    assert_equal_reports,
    assert_same_everywhere,
    batches,
    full,
    own_part,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from autoclip.torch import Clipper, QuantileClip

ACCUMULATED = 2
STEPS = 4


def make_accelerator(kind: str) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    if kind != "ddp":
        # In both: the one takes over from the other whenever it is made.
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="NO_WRAP",
            cpu_ram_efficient_loading=kind == "fsdp2, loaded late",
        )
        assert accelerator.is_fsdp2
    return accelerator


class Model(Net):
    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """Attribute that Accelerate takes for granted, as the models of transformers have it."""
        return self.get_parameter(name)


class Loop:
    def __init__(self, kind: str, model: torch.nn.Module, global_clipping: bool) -> None:
        self.accelerator = make_accelerator(kind)
        optimizer = QuantileClip.as_optimizer(
            torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-2),
            quantile=0.5,
            global_clipping=global_clipping,
        )
        self.clipper: Clipper = optimizer.clipper
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(self, batch: Tensor, weight: float) -> None:
        """One step, in several parts of the batch."""
        for part in own_part(batch, dist.get_rank(), dist.get_world_size()).chunk(ACCUMULATED):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(part, True).square().mean() * weight)
                self.optimizer.step()
                self.optimizer.zero_grad()


KINDS = ["ddp", "fsdp2", "fsdp2, loaded late"]


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_record_a_step_and_the_norms_of_one_process(kind, global_clipping):
    """The optimizer is attached before Accelerate exchanges its parameters for sharded ones."""
    torch.manual_seed(0)
    reference = Model()
    loop = Loop(kind, copy.deepcopy(reference), global_clipping)
    is_sharded = [isinstance(p, DTensor) for p in loop.model.parameters()]
    assert set(is_sharded) == {kind != "ddp"}
    theirs = QuantileClip.as_optimizer(
        torch.optim.Adam(reference.parameters(), lr=0.01, eps=1e-2),
        quantile=0.5,
        global_clipping=global_clipping,
    )
    clipped = 0
    for step, batch in enumerate(batches(STEPS)):
        weight = (1.0, 4.0, 2.0, 16.0)[step]
        loop.train(batch, weight)
        theirs.zero_grad()
        (reference(batch, True).square().mean() * weight).backward()
        theirs.step()
        assert_equal_reports(loop.clipper, theirs.clipper)
        for mine, other in zip(loop.model.parameters(), reference.parameters()):
            torch.testing.assert_close(
                full(mine.detach()), other.detach(), rtol=TOLERANCE, atol=1e-6
            )
        clipped += int((theirs.clipper.last.coefficients < 1).sum())
    assert clipped
    assert set(loop.clipper.export_state().by_row()[1]) == {STEPS}
    assert_same_everywhere(loop.clipper)


@pytest.mark.processes(2)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_saved_states_carry_the_history(kind, tmp_path):
    """Under FSDP2 as an object of its own: torch drops what it does not know of an optimizer."""
    torch.manual_seed(0)
    model = Model()
    loop, other = (Loop(kind, copy.deepcopy(model), False) for _ in range(2))
    for each in (loop, other):
        if kind == "fsdp2":
            each.accelerator.register_for_checkpointing(each.clipper)
    for batch in batches(2):
        loop.train(batch, 1.0)
    folder = str(Path(tmp_path) / "state")
    loop.accelerator.save_state(folder)
    loop.accelerator.wait_for_everyone()
    saved = loop.clipper.state_dict()
    if kind == "fsdp2":
        with pytest.warns(UserWarning, match="has no 'autoclip' entry"):
            other.accelerator.load_state(folder)
    else:
        other.accelerator.load_state(folder)
    assert other.clipper.state_dict() == saved
    for batch in batches(2):
        loop.train(batch, 4.0)
        other.train(batch, 4.0)
    assert other.clipper.state_dict() == loop.clipper.state_dict()
    assert_same_everywhere(other.clipper)
