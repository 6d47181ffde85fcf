"""On request trainers log values for each parameter, under its name in the model."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoclip.core.inspect import read_states

NAMES = ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
THREE = {"autoclip/total_norm", "autoclip/clipped_norm", "autoclip/clipped"}


def keys(names: list[str]) -> set[str]:
    return {f"autoclip/{what}/{name}" for what in ("norm", "threshold") for name in names}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning(tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from autoclip.torch.lightning import AutoClipCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=2,
        logger=CSVLogger(tmp_path),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AutoClipCallback(quantile=0.5, log_parameters=r"weight$")],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 2, 4), batch_size=None))
    [log] = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(log.open()))
    assert set(rows[0]) == {*THREE, *keys(NAMES[::2]), "epoch", "step"}
    assert [row["step"] for row in rows] == ["1", "3", "5", "7"]
    # The command finds the history in the folder of checkpoints.
    [state] = read_states(tmp_path).values()
    assert state.groups[0].recorded.tolist() == [8] * 4


def test_hugging_face(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from autoclip.torch.transformers import AutoClipCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean()}

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"x": torch.full((4,), 1.0 + i)}

    trainer = Trainer(
        Model(),
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            logging_steps=2,
            save_steps=2,
            max_grad_norm=0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Rows(),
        callbacks=[AutoClipCallback(quantile=0.5, log_parameters=True)],
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2
    for row in logs:
        assert {name for name in row if name.startswith("autoclip/")} == {*THREE, *keys(NAMES)}
    [state] = read_states(tmp_path).values()  # of the newest checkpoint
    assert state.groups[0].recorded.tolist()[0] == 4


def test_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from autoclip.torch import QuantileClip
    from autoclip.torch.logging import log_values

    accelerator = Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    optimizer: Any = QuantileClip.as_optimizer(torch.optim.SGD(net.parameters()), quantile=0.5)
    model, prepared = accelerator.prepare(net, optimizer)
    accelerator.backward(model(torch.ones(2, 4)).square().mean())
    prepared.step()
    names = [name.removeprefix("net.") for name in NAMES]
    values = log_values(optimizer.clipper, True, model=model)
    assert values.keys() == {*THREE, *keys(names)}
    accelerator.save_state(str(tmp_path))
    [state] = read_states(tmp_path).values()
    assert state.to_bytes() == optimizer.clipper.state_dict()["data"]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_wrong_patterns_are_refused_at_once(name: str) -> None:
    import importlib

    callback = importlib.import_module(f"autoclip.torch.{name}").AutoClipCallback
    with pytest.raises(ValueError, match="is not a regular expression"):
        callback(log_parameters="*")
    with pytest.raises(TypeError, match="must be a bool or a regular expression"):
        callback(log_parameters=3)
