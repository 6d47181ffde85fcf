"""fastai: a factory inside OptimWrapper."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastai.basics import DataLoader, DataLoaders, Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper
from recipes import Watch, run_recipe, weights, windows_of
from torch import nn

from autoclip.torch import QuantileClip

CLIPPED = QuantileClip.optimizer_factory(torch.optim.AdamW, quantile=0.5)
LOSS = nn.CrossEntropyLoss()


def loaders() -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator) * torch.logspace(-1, 1, 32)[:, None]
    rows = list(zip(x, torch.randint(0, 3, (32,), generator=generator)))
    return DataLoaders(*(DataLoader(rows, bs=4, num_workers=0) for _ in range(2)), device="cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def make(folder: Path, **options: Any) -> Any:
    return Learner(
        loaders(),
        network(),
        loss_func=LOSS,
        opt_func=partial(OptimWrapper, opt=CLIPPED),
        path=folder,
        **options,
    )


def test_recipe(tmp_path: Path) -> None:
    with Watch(quantile=0.9) as watch:
        learner = run_recipe("fastai", dls=loaders(), model=network(), loss=LOSS)["learner"]
    assert watch.steps() == [16]
    (norms,) = watch.norms.values()
    expected = [np.sqrt(np.nansum(norms[step] ** 2)) for step in (7, 15)]
    column = list(learner.recorder.metric_names).index("total_norm") - 1  # after the epoch's number
    logged = [row[column] for row in learner.recorder.values]
    np.testing.assert_allclose(logged, expected, rtol=1e-5)
    assert (tmp_path / "models" / "half.pth").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_numpy_clips(tmp_path: Path, accumulate: int) -> None:
    learner = make(tmp_path, cbs=[GradientAccumulation(4 * accumulate)])
    with Watch(quantile=0.5) as watch, learner.no_bar(), learner.no_logging():
        learner.fit(3)
    assert watch.steps() == [24 // accumulate]
    assert watch.clipped > 5


def test_resume_bit_for_bit(tmp_path: Path) -> None:
    learner = make(tmp_path)
    with learner.no_bar(), learner.no_logging():
        learner.fit(2)
    learner.save("half")
    other = make(tmp_path)
    other.create_opt()
    other.load("half")
    assert other.opt.opt.clipper.state_dict() == learner.opt.opt.clipper.state_dict()
    for each in (learner, other):
        with each.no_bar(), each.no_logging():
            each.fit(2)
    assert torch.equal(weights(other.model), weights(learner.model))
    assert other.opt.opt.clipper.state_dict() == learner.opt.opt.clipper.state_dict()


def test_freeze(tmp_path: Path) -> None:
    def by_layer(model: nn.Module) -> Any:
        return [list(layer.parameters()) for layer in (model[0], model[2])]  # type: ignore[index]

    learner = make(tmp_path, splitter=by_layer)
    learner.freeze()
    with Watch(quantile=0.5) as watch, learner.no_bar(), learner.no_logging():
        learner.fit(1)
        learner.unfreeze()
        learner.fit(1)
    assert watch.steps() == [16]
    windows = windows_of(learner.opt.opt)
    assert [len(windows[row]) for row in range(4)] == [8, 8, 16, 16]


def test_save_model_callback(tmp_path: Path) -> None:
    learner = make(tmp_path, cbs=[SaveModelCallback(every_epoch=True, with_opt=True)])
    with learner.no_bar(), learner.no_logging():
        learner.fit(2)
    other = make(tmp_path)
    other.create_opt()
    other.load("model_0")
    with Watch(quantile=0.5) as watch, other.no_bar(), other.no_logging():
        other.fit(2, start_epoch=1)
    assert watch.steps() == [8]
    assert {len(window) for window in windows_of(other.opt.opt).values()} == {16}
