"""Darts, NeuralForecast and PyTorch Forecasting, which train with Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from darts import TimeSeries
from darts.models import NBEATSModel
from lightning.pytorch import Trainer
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from recipes import Watch, run_recipe, weights, windows_of

from autoclip.torch import QuantileClip
from autoclip.torch.lightning import AutoClipCallback

CLIPPED = QuantileClip.optimizer_factory(torch.optim.Adam, quantile=0.5)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
VALUES = np.sin(np.arange(60)) * np.linspace(0.1, 3, 60)
SERIES = TimeSeries.from_values(VALUES.astype(np.float32))
SMALL = {"num_stacks": 1, "num_blocks": 1, "num_layers": 1, "layer_widths": 8}


def frame() -> pd.DataFrame:
    return pd.DataFrame({"unique_id": 1, "ds": np.arange(60), "y": VALUES})


def make_darts(epochs: int, **options: Any) -> Any:
    return NBEATSModel(
        input_chunk_length=8,
        output_chunk_length=2,
        n_epochs=epochs,
        batch_size=8,
        random_state=0,
        **SMALL,
        **options,
    )


def test_darts_recipe() -> None:
    with Watch(quantile=0.9) as watch:
        run_recipe("darts", series=SERIES, trainer_options=QUIET)
    assert watch.steps() == [4]  # 51 samples in batches of 32, twice


@pytest.mark.parametrize("by", ["callback", "factory"])
def test_darts_as_numpy_clips(by: str) -> None:
    trainer = {**QUIET, "log_every_n_steps": 1}
    options: dict[str, Any] = {"optimizer_cls": CLIPPED, "optimizer_kwargs": {"lr": 1e-2}}
    if by == "callback":
        options = {}
        trainer["callbacks"] = [AutoClipCallback(quantile=0.5)]
    model = make_darts(3, pl_trainer_kwargs=trainer, **options)
    with Watch(quantile=0.5) as watch:
        model.fit(SERIES)
    assert watch.steps() == [21]
    assert watch.clipped > 5
    if by == "callback":
        assert "autoclip/total_norm" in model.trainer.callback_metrics


def test_darts_resumes_the_history() -> None:
    trainer = {**QUIET, "enable_checkpointing": True, "callbacks": [AutoClipCallback(quantile=0.5)]}
    model = make_darts(
        2,
        save_checkpoints=True,
        model_name="clipped",
        force_reset=True,
        work_dir="work",
        pl_trainer_kwargs=trainer,
    )
    model.fit(SERIES)
    before = windows_of(model.trainer.optimizers[0])
    loaded = NBEATSModel.load_from_checkpoint("clipped", work_dir="work", best=False, trusted=True)
    with Watch(quantile=0.5) as watch:
        loaded.fit(SERIES, epochs=3)
    assert watch.steps() == [7]
    (optimizer,) = watch.norms
    after = windows_of(optimizer)
    assert before and {len(window) for window in after.values()} == {21}
    assert {row: window[:14] for row, window in after.items()} == before


def make_neural(**options: Any) -> Any:
    return MLP(h=2, input_size=8, max_steps=10, hidden_size=8, random_seed=1, **options, **QUIET)


def test_neuralforecast_recipe() -> None:
    with Watch(quantile=0.9) as watch:
        forecast = run_recipe("neuralforecast", frame=frame(), trainer_options=QUIET)["forecast"]
    assert watch.steps() == [10]
    assert len(forecast.predict()) == 2


@pytest.mark.parametrize("by", ["callback", "factory"])
def test_neuralforecast_as_numpy_clips(by: str) -> None:
    options: dict[str, Any] = {"optimizer": CLIPPED, "optimizer_kwargs": {"weight_decay": 0.1}}
    if by == "callback":
        options = {"callbacks": [AutoClipCallback(quantile=0.5)]}
    forecast = NeuralForecast([make_neural(**options, log_every_n_steps=1)], freq=1)
    with Watch(quantile=0.5) as watch:
        forecast.fit(frame())
    assert watch.steps() == [10]
    assert watch.clipped > 5
    logged = "autoclip/total_norm" in forecast.models[0].metrics
    assert logged == (by == "callback")


def test_neuralforecast_and_plain_give_the_same_weights_without_clipping() -> None:
    never = QuantileClip.optimizer_factory(torch.optim.Adam, quantile=1.0)
    made = []
    for optimizer in (never, torch.optim.Adam):
        forecast = NeuralForecast([make_neural(optimizer=optimizer)], freq=1)
        forecast.fit(frame())
        made.append(weights(forecast.models[0]))
    assert torch.equal(*made)


@pytest.mark.parametrize("has_callback", [True, False])
def test_pytorch_forecasting_as_numpy_clips_and_resumes(has_callback: bool, tmp_path: Path) -> None:
    table = pd.DataFrame({"time": np.arange(60), "value": VALUES, "series": "0"})
    series = TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=2,
        time_varying_unknown_reals=["value"],
    )
    loader = series.to_dataloader(train=True, batch_size=16, num_workers=0)

    def trainer(epochs: int) -> Trainer:
        callbacks = [AutoClipCallback(quantile=0.5)] if has_callback else []
        return Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)

    options = {} if has_callback else {"optimizer": CLIPPED}
    sizes = {"hidden_size": 4, "attention_head_size": 1, "hidden_continuous_size": 4}
    model = TemporalFusionTransformer.from_dataset(series, **sizes, **options)
    first = trainer(2)
    with Watch(quantile=0.5) as watch:
        first.fit(model, train_dataloaders=loader)
    steps = 2 * len(loader)
    assert watch.steps() == [steps]
    assert watch.clipped > 5
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(3)
    second.fit(model, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    before, after = (windows_of(each.optimizers[0]) for each in (first, second))
    for row, window in before.items():
        assert after[row][: len(window)] == window
        assert len(after[row]) == len(window) + len(loader)
