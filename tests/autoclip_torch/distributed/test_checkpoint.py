"""torch.distributed.checkpoint: saved by so many processes, loaded by another number of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracles import (
    MODES,
    TOLERANCE,
    Net,
    SequenceNet,
    assert_equal_reports,
    assert_same_everywhere,
    batches,
    full,
    own_part,
    parallelize,
    shard,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from autoclip.torch import QuantileClip

STEPS = 4
"""In each of the three runs."""


def weighted(step: int) -> float:
    return (1.0, 4.0, 2.0, 16.0, 8.0)[step % 5]


def train(model: nn.Module, optimizer: Any, first: int, part: tuple[int, int]) -> None:
    for step, batch in enumerate(batches(first + STEPS)):
        if step >= first:
            optimizer.zero_grad()
            output = full(model(own_part(batch, *part), step % 2 == 1))
            (output.square().mean() * weighted(step)).backward()
            optimizer.step()


@pytest.mark.processes(2, 4, 2)
@pytest.mark.parametrize(
    ("spread", "global_clipping"),
    [
        ("fsdp2", True),
        ("fsdp2 and tensor parallel", False),
        pytest.param("fsdp2", False, marks=pytest.mark.nightly),
        pytest.param("fsdp2 and tensor parallel", True, marks=pytest.mark.nightly),
    ],
)
def test_training_goes_on_with_another_number_of_processes(spread, global_clipping, tmp_path):
    rank, count = dist.get_rank(), dist.get_world_size()
    earlier = sorted(Path(tmp_path).glob("after *"))
    first = STEPS * len(earlier)
    torch.manual_seed(0)
    if spread == "fsdp2":
        reference: nn.Module = Net()
        model, part = shard(copy.deepcopy(reference)), (rank, count)
    else:
        reference = SequenceNet()
        mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("dp", "tp"))
        model = shard(parallelize(copy.deepcopy(reference), mesh["tp"]), mesh=mesh["dp"])
        part = (mesh["dp"].get_local_rank(), count // 2)
    settings = {"quantile": 0.5, "global_clipping": global_clipping}
    ours, theirs = (
        QuantileClip.as_optimizer(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5), **settings)
        for m in (model, reference)
    )
    clipper = ours.clipper

    def state() -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optim": get_optimizer_state_dict(model, ours),
            "clipper": clipper,
        }

    if earlier:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loaded = state()
        dcp.load(loaded, checkpoint_id=earlier[-1])
        model.load_state_dict(loaded["model"])
        set_optimizer_state_dict(model, ours, loaded["optim"])
        assert_same_everywhere(clipper)
        assert clipper.state_dict()["data"] == Path(tmp_path, "bytes").read_bytes()
    for start in range(0, first + STEPS, STEPS):
        train(reference, theirs, start, (0, 1))
    train(model, ours, first, part)
    assert_equal_reports(clipper, theirs.clipper)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(full(mine.detach()), other.detach(), rtol=TOLERANCE, atol=1e-6)
    assert_same_everywhere(clipper)
    dcp.save(state(), checkpoint_id=Path(tmp_path, f"after {len(earlier)}"))
    Path(tmp_path, "bytes").write_bytes(clipper.state_dict()["data"])


@pytest.mark.processes(2)
def test_the_optimizer_state_alone_has_no_history():
    """Why docs/distributed.md tells to save the clipper beside it."""
    model = shard(Net())
    optimizer = QuantileClip.as_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, 0, (dist.get_rank(), 2))
    assert "autoclip" in optimizer.state_dict()
    assert set(get_optimizer_state_dict(model, optimizer)) == {"state", "param_groups"}


@pytest.mark.processes(2)
@pytest.mark.parametrize("global_clipping", MODES)
def test_reading_an_optimizer_before_its_first_step_records_nothing(global_clipping):
    """Torch takes a step with gradients of zeros in order to have a state that it can read."""
    model = shard(Net())
    optimizer = QuantileClip.as_optimizer(
        torch.optim.Adam(model.parameters()), global_clipping=global_clipping
    )
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.clipper.export_state().by_row()[1].max() == 0
    train(model, optimizer, 0, (dist.get_rank(), 2))
    assert optimizer.clipper.export_state().by_row()[1].max() == STEPS
