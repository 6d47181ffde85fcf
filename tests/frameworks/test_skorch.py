"""skorch: the optimizer is a factory, through pickling, cloning and searching."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import Watch, run_recipe, weights
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, LoadInitState
from torch import nn

from autoclip.torch import QuantileClip

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(64, 4)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int64)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2), nn.Softmax(-1))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        probabilities: torch.Tensor = self.layers(X)
        return probabilities


def factory(quantile: float = 0.5) -> Any:
    return QuantileClip.optimizer_factory(torch.optim.Adam, quantile=quantile)


def make(**settings: Any) -> Any:
    options = {"optimizer": factory(), "max_epochs": 3, "batch_size": 16, "verbose": 0, **settings}
    return NeuralNetClassifier(Module, train_split=None, **options)


def test_recipe() -> None:
    with Watch(quantile=0.9) as watch:
        net = run_recipe("skorch", module=Module, X=X, y=Y)["net"]
    assert watch.steps() == [10]  # one batch in each of skorch's ten epochs
    assert net.optimizer_.defaults["weight_decay"] == 0.1
    (norms,) = watch.norms.values()
    expected = [np.sqrt(np.nansum(norm**2)) for norm in norms]
    np.testing.assert_allclose(net.history[:, "autoclip/total_norm"], expected, rtol=1e-5)


def test_one_norm_a_step_as_numpy_clips() -> None:
    net = make()
    with Watch(quantile=0.5) as watch:
        net.fit(X, Y)
    assert watch.steps() == [12]
    assert watch.clipped > 5


@pytest.mark.parametrize("how", ["pickle", "params", "callbacks"])
def test_resume_bit_for_bit(how: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(monitor=None, dirname=str(tmp_path))
    net = make(callbacks=[checkpoint] if how == "callbacks" else None).fit(X, Y)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    elif how == "callbacks":
        other = make(callbacks=[LoadInitState(checkpoint)])
    else:
        files = {f"f_{part}": tmp_path / part for part in ("params", "optimizer", "history")}
        net.save_params(**files)
        other = make().initialize()
        other.load_params(**files)
    with Watch(quantile=0.5) as watch:
        other.partial_fit(X, Y)
    assert watch.steps() == [12]
    net.partial_fit(X, Y)
    assert torch.equal(weights(other.module_), weights(net.module_))
    state = net.optimizer_.clipper.state_dict()
    assert other.optimizer_.clipper.state_dict() == state


def test_clone_and_set_params() -> None:
    net = make().fit(X, Y)
    other = clone(net)
    assert other.get_params()["optimizer"] == net.get_params()["optimizer"]
    other.fit(X, Y)
    assert other.optimizer_.clipper.state_dict() == net.optimizer_.clipper.state_dict()
    # On a net that is initialized, skorch itself refuses another class.
    other = clone(net).set_params(optimizer=factory(0.1), optimizer__lr=0.5)
    other.fit(X, Y)
    assert other.optimizer_.clipper.defaults["quantile"] == 0.1
    assert other.optimizer_.defaults["lr"] == 0.5


@pytest.mark.parametrize("jobs", [1, 2])
def test_search_over_factories(jobs: int) -> None:
    grid = {"optimizer": [factory(0.1), factory(0.9)], "optimizer__lr": [0.01, 0.1]}
    search = GridSearchCV(make(), grid, cv=2, scoring="accuracy", n_jobs=jobs)
    search.fit(X, Y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_params_["optimizer"] in grid["optimizer"]
    quantile = search.best_estimator_.optimizer_.clipper.defaults["quantile"]
    assert factory(quantile) == search.best_params_["optimizer"]


def test_cross_validation_in_workers() -> None:
    scores = [cross_val_score(make(), X, Y, cv=2, n_jobs=jobs) for jobs in (1, 2)]
    np.testing.assert_array_equal(*scores)
