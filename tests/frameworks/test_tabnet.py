"""TabNet, an estimator that takes the optimizer's class."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_tabnet.tab_model import TabNetClassifier
from recipes import Watch, run_recipe, windows_of

from autoclip.torch import QuantileClip

X = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(int)


def test_recipe() -> None:
    with Watch(quantile=0.9) as watch:
        classifier = run_recipe("tabnet", X=X, y=Y)["classifier"]
    assert watch.steps() == [8]
    assert watch.clipped > 5
    assert len(classifier.history["autoclip/total_norm"]) == 2


@pytest.mark.parametrize("clips", [True, False])
def test_own_clipping_is_off_with_none_and_pickles_keep_the_history(clips: bool) -> None:
    settings: dict[str, Any] = {} if clips else {"clip_value": None}
    classifier = TabNetClassifier(
        optimizer_fn=QuantileClip.optimizer_factory(torch.optim.Adam, quantile=0.5),
        verbose=0,
        **settings,
    )
    classifier.fit(X, 100 * Y, max_epochs=3, batch_size=64)
    totals = [
        np.sqrt(sum(window[step] ** 2 for window in windows_of(classifier._optimizer).values()))
        for step in range(12)
    ]
    assert (max(totals) <= 1.0 + 1e-5) == clips
    copied = pickle.loads(pickle.dumps(classifier))
    assert windows_of(copied._optimizer) == windows_of(classifier._optimizer)
