"""Composer: the optimizer, and a callback that keeps the history in checkpoints."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from recipes import Watch, run_recipe, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoclip.torch import QuantileClip


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, batch: Any) -> Any:
        return self.layers(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(outputs, batch[1])


def loader() -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator) * torch.logspace(-1, 1, 32)[:, None]
    y = torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def make(epochs: int, quantile: float = 0.5, **options: Any) -> Any:
    model = Model()
    optimizer = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=quantile)
    return Trainer(
        model=model,
        train_dataloader=loader(),
        optimizers=optimizer,
        max_duration=f"{epochs}ep",
        device="cpu",
        progress_bar=False,
        **options,
    )


def clipper_of(trainer: Any) -> Any:
    return trainer.state.optimizers[0].clipper


def test_recipe_resumes_bit_for_bit() -> None:
    logger = InMemoryLogger()
    with Watch(quantile=0.9) as watch:
        names = run_recipe("composer", model=Model(), loader=loader(), loggers=logger)
    assert watch.steps() == [16]
    assert len(logger.data["autoclip/total_norm"]) == 16
    whole = names["trainer"]
    whole.fit(duration="2ep")

    model = Model()
    optimizer = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no 'autoclip' entry")
        resumed = Trainer(
            model=model,
            train_dataloader=loader(),
            optimizers=optimizer,
            max_duration="4ep",
            callbacks=names["KeepHistory"](optimizer),
            load_path="checkpoints/ep2-ba16-rank0.pt",
            device="cpu",
            progress_bar=False,
        )
    with Watch(quantile=0.9) as watch:
        resumed.fit()
    assert watch.steps() == [16]
    assert torch.equal(weights(model), weights(whole.state.model))
    assert optimizer.clipper.state_dict() == clipper_of(whole).state_dict()


@pytest.mark.parametrize("microbatch", [4, 2])
def test_as_numpy_clips(microbatch: int) -> None:
    """One norm an optimizer step, also where batches are split."""
    trainer = make(3, device_train_microbatch_size=microbatch)
    with Watch(quantile=0.5) as watch:
        trainer.fit()
    assert watch.steps() == [24]
    assert watch.clipped > 5


def test_without_the_callback_the_history_is_dropped() -> None:
    make(1, save_folder="checkpoints").fit()
    with pytest.warns(UserWarning, match="no 'autoclip' entry"):
        make(2, load_path="checkpoints/latest-rank0.pt")
