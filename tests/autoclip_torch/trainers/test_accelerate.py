"""Accelerate in one process: one record an optimizer step, checkpoints, and trackers.

With several processes: `../distributed/test_accelerate.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autoclip.torch import Clipper, QuantileClip
from autoclip.torch.logging import log_values

SETTINGS: dict[str, Any] = {"quantile": 0.5, "history_length": 16}
BATCHES = 8
ACCUMULATED = 3
STEPS = 3  # three batches, three, and the two that are left


@pytest.fixture(autouse=True)
def no_state_of_other_tests() -> Iterator[None]:
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    examples = torch.randn(BATCHES, 5, 4, generator=generator)
    return DataLoader(examples * torch.tensor([1, 3, 0.5, 5, 2, 8, 0.3, 4])[:, None, None])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Loop:
    """A training loop as Accelerate's documentation has it."""

    def __init__(self, **settings: Any) -> None:
        settings = {"gradient_accumulation_steps": ACCUMULATED, **settings}
        self.accelerator = Accelerator(cpu=True, **settings)
        model = make_model()
        optimizer = QuantileClip.as_optimizer(torch.optim.Adam(model.parameters()), **SETTINGS)
        self.clipper: Clipper = optimizer.clipper
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, optimizer, loader()
        )
        self.step = 0

    def epoch(self, log_every: int = 0) -> None:
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(batch).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.step += 1
                if log_every and self.step % log_every == 0:
                    self.accelerator.log(log_values(self.clipper), step=self.step)


def by_hand(epochs: int = 1, autocast: bool = False) -> tuple[Tensor, bytes]:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    clipper = QuantileClip(model.parameters(), **SETTINGS)
    for _ in range(epochs):
        for i, batch in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                predicted = model(batch)
            (predicted.float().square().mean() / ACCUMULATED).backward()
            if (i + 1) % ACCUMULATED == 0 or i + 1 == BATCHES:
                clipper.step()
                optimizer.step()
                optimizer.zero_grad()
    return weights(model), clipper.state_dict()["data"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_records_once_a_step(precision: str) -> None:
    loop = Loop(mixed_precision=precision)
    for _ in range(2):
        loop.epoch()
    windows = [w for group in loop.clipper.export_state().groups for w in group.windows()]
    assert {len(window) for window in windows} == {2 * STEPS}
    expected, history = by_hand(2, autocast=precision == "bf16")
    assert torch.equal(weights(loop.model), expected)
    assert loop.clipper.state_dict()["data"] == history


def test_saved_states_carry_the_history(tmp_path: Path) -> None:
    loop = Loop()
    loop.epoch()
    loop.accelerator.save_state(str(tmp_path))
    saved = loop.clipper.state_dict()
    loop.epoch()
    other = Loop()
    other.accelerator.load_state(str(tmp_path))
    assert other.clipper.state_dict() == saved
    other.epoch()
    assert other.clipper.state_dict() == loop.clipper.state_dict()
    assert torch.equal(weights(other.model), weights(loop.model))


def test_values_go_to_the_trackers() -> None:
    rows: dict[int | None, dict[str, float]] = {}

    class Tracker(GeneralTracker):
        name = "rows"
        requires_logging_directory = False

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            rows[step] = values

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

    loop = Loop(log_with=Tracker())
    loop.accelerator.init_trackers("test")
    for _ in range(2):
        loop.epoch(log_every=2)
    assert rows.keys() == {2, 4, 6}
    assert rows[6] == log_values(loop.clipper)
    assert rows[6]["autoclip/total_norm"] == pytest.approx(float(loop.clipper.last.norms.norm()))
