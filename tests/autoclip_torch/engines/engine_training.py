"""References of the engines' tests: the same training in one process, on the whole batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoclip.torch import QuantileClip

NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
LEARNING_RATE = 0.1
QUANTILE = 0.5
# Some gradients must be larger than those before.
WEIGHTS = (1.0, 4.0, 2.0, 16.0, 8.0, 1.0, 3.0, 6.0)
STEPS = len(WEIGHTS)
BATCH = 8
WIDTH = 6


def make_model() -> nn.Module:
    """Sizes that no number of processes divides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3)
    )


def batches(steps: int = STEPS) -> Iterator[Tensor]:
    """Whole batches, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(BATCH, WIDTH, generator=generator)


def own_part(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


class Reference:
    """One process, AutoClip's own global clipping by the past."""

    def __init__(self, **settings: Any) -> None:
        self.model = make_model()
        self.optimizer = QuantileClip.as_optimizer(
            torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE),
            **{"quantile": QUANTILE, **settings},
            global_clipping=True,
            include_current=False,
        )
        self.clipper = self.optimizer.clipper

    def train(self, batch: Tensor, weight: float) -> None:
        self.optimizer.zero_grad()
        (self.model(batch).square().mean() * weight).backward()
        self.optimizer.step()


def assert_same_everywhere(clipper: Any) -> None:
    """The clipper's state is the same, bit for bit, on all ranks."""
    data = clipper.state_dict()["data"]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, data)
    assert all(other == data for other in gathered)


def assert_equal_reports(ours: Any, theirs: Any, tolerance: float) -> None:
    for name in ("norms", "thresholds", "coefficients"):
        torch.testing.assert_close(
            torch.as_tensor(getattr(ours.last, name)).float(),
            torch.as_tensor(getattr(theirs.last, name)).float(),
            rtol=tolerance,
            atol=0.0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
