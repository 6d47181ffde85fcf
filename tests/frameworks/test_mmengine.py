"""MMEngine: a factory in the registry of optimizers."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, OPTIMIZERS
from mmengine.runner import Runner
from recipes import Watch, run_recipe, weights
from torch import nn
from torch.utils.data import DataLoader

from autoclip.torch import QuantileClip

CLIPPED = QuantileClip.optimizer_factory(torch.optim.AdamW, quantile=0.5)
OPTIMIZERS.register_module(name="ClippedForTests", module=CLIPPED, force=True)


@MODELS.register_module(force=True)
class Toy(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "loss") -> Any:
        return {"loss": nn.functional.cross_entropy(self.layers(x), y)}


def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator) * torch.logspace(-1, 1, 32)[:, None]
    return list(zip(x, torch.randint(0, 3, (32,), generator=generator)))


def loader() -> Any:
    return DataLoader(rows(), batch_size=4)  # type: ignore[arg-type]


def make(folder: Path, epochs: int, resume: bool = False, **wrapper: Any) -> Runner:
    optimizer = {"type": "ClippedForTests", "lr": 1e-2}
    return Runner(
        Toy(),
        work_dir=str(folder),
        train_dataloader=loader(),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"type": "OptimWrapper", "optimizer": optimizer, **wrapper},
        resume=resume,
        experiment_name=uuid.uuid4().hex,  # MMEngine keeps its loggers by name
    )


def clipper_of(runner: Runner) -> Any:
    return runner.optim_wrapper.optimizer.clipper


def test_recipe(tmp_path: Path) -> None:
    with Watch(quantile=0.9) as watch:
        runner = run_recipe("mmengine", model=Toy(), train_dataloader=loader())["runner"]
    assert watch.steps() == [16]
    (file,) = tmp_path.glob("work/*/vis_data/scalars.json")
    scalars = [json.loads(line) for line in file.read_text().splitlines()]
    assert scalars and all("autoclip/total_norm" in each for each in scalars)
    assert clipper_of(runner).defaults["quantile"] == 0.9


@pytest.mark.parametrize("wrapper", [{}, {"accumulative_counts": 2}])
def test_as_numpy_clips(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    runner = make(tmp_path, 3, **wrapper)
    with Watch(quantile=0.5) as watch:
        runner.train()
    assert watch.steps() == [24 // wrapper.get("accumulative_counts", 1)]
    assert watch.clipped > 5


def test_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the page says: without it torch refuses to load MMEngine's checkpoints, its own classes.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    whole = make(tmp_path, 4)
    whole.train()
    split = tmp_path / "split"
    split.mkdir()
    make(split, 2).train()
    other = make(split, 4, resume=True)
    with Watch(quantile=0.5) as watch:
        other.train()
    assert watch.steps() == [16]
    assert torch.equal(weights(other.model), weights(whole.model))
    assert clipper_of(other).state_dict() == clipper_of(whole).state_dict()


def test_by_name_in_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(
        "optim_wrapper = dict(optimizer=dict(type='ClippedForTests', lr=0.1))\n", "utf-8"
    )
    optimizer = Config.fromfile(file).optim_wrapper.optimizer
    built = OPTIMIZERS.build({**optimizer, "params": Toy().parameters()})
    assert built.clipper.defaults["quantile"] == 0.5
