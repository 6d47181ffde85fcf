"""SpeechBrain: a factory as the optimizer's class."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from recipes import Watch, run_recipe, weights
from speechbrain.core import Brain, Stage
from speechbrain.utils.checkpoints import Checkpointer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values

CLIPPED = QuantileClip.optimizer_factory(torch.optim.Adam, quantile=0.5)


class Recipe(Brain):
    logged: dict[str, float]

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return nn.functional.cross_entropy(predictions, batch[1])

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        if stage == Stage.TRAIN:
            self.logged = log_values(self.optimizer.clipper)
            if self.checkpointer is not None:
                self.checkpointer.save_checkpoint()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loader() -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator) * torch.logspace(-1, 1, 32)[:, None]
    y = torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def make(folder: Path | None = None, **run_opts: Any) -> Recipe:
    model = network()
    return Recipe(
        modules={"model": model},
        opt_class=partial(CLIPPED, lr=1e-2),
        run_opts={"device": "cpu", "max_grad_norm": float("inf"), **run_opts},
        checkpointer=None if folder is None else Checkpointer(folder, {"model": model}),
    )


def test_recipe(tmp_path: Path) -> None:
    model = network()
    given = {
        "Recipe": Recipe,
        "model": model,
        "loader": loader(),
        "checkpointer": Checkpointer(tmp_path, {"model": model}),
    }
    with Watch(quantile=0.9) as watch:
        brain = run_recipe("speechbrain", **given)["brain"]
    assert watch.steps() == [16]
    assert "autoclip/total_norm" in brain.logged


@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_numpy_clips(accumulate: int) -> None:
    brain = make(grad_accumulation_factor=accumulate)
    with Watch(quantile=0.5) as watch:
        brain.fit(range(3), loader(), progressbar=False)
    assert watch.steps() == [24 // accumulate]
    assert watch.clipped > 5


def test_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = make(tmp_path / "one")
    whole.fit(range(4), loader(), progressbar=False)
    make(tmp_path / "two").fit(range(2), loader(), progressbar=False)
    other = make(tmp_path / "two")
    with Watch(quantile=0.5) as watch:
        other.fit(range(2), loader(), progressbar=False)
    assert watch.steps() == [16]
    assert torch.equal(weights(other.modules), weights(whole.modules))
    assert other.optimizer.clipper.state_dict() == whole.optimizer.clipper.state_dict()


def test_in_hyperpyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.py").write_text(
        "import torch\nfrom autoclip.torch import QuantileClip\n"
        "ClippedAdam = QuantileClip.optimizer_factory(torch.optim.Adam, quantile=0.5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = load_hyperpyyaml("opt_class: !name:recipe.ClippedAdam\n    lr: 0.01\n")
    optimizer = settings["opt_class"](network().parameters())
    assert optimizer.clipper.defaults["quantile"] == 0.5
    assert optimizer.defaults["lr"] == 0.01


@pytest.mark.parametrize(("off", "zero"), [(float("inf"), False), (0.0, True)])
def test_zero_does_not_switch_clipping_off(off: float, zero: bool) -> None:
    """The trap that the page names."""
    brain = make(max_grad_norm=off)
    before = weights(brain.modules)
    brain.fit(range(1), loader(), progressbar=False)
    assert torch.equal(weights(brain.modules), before) == zero
