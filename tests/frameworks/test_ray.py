"""Ray Train and RLlib."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from recipes import Watch, run_recipe, windows_of
from torch import nn

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values

EPOCHS, WORKERS, BATCH, BATCHES = 3, 2, 2, 4


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
        ray.init(num_cpus=4, object_store_memory=100 * 2**20, **options)
        yield
        ray.shutdown()


def test_workers_continue_after_a_failure(tmp_path: Path) -> None:
    size = WORKERS * BATCH * BATCHES
    failed = tmp_path / "failed"

    # Inside, so that they travel to the workers, which cannot import this file.
    class Data(torch.utils.data.Dataset[Any]):
        def __init__(self, fails: bool) -> None:
            self.left = size * 3 // WORKERS // 2 if fails else -1
            self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
            self.x *= torch.logspace(-1, 1, size)[:, None]

        def __len__(self) -> int:
            return size

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.left -= 1
            if self.left == 0 and not failed.exists():  # in the middle of the second epoch
                failed.touch()
                raise RuntimeError("a worker fails")
            return self.x[index], self.x[index].sum()[None]

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def make_loader() -> Any:
        return torch.utils.data.DataLoader(Data(fails=True), batch_size=BATCH)

    given = {"make_model": make_model, "make_loader": make_loader, "storage": str(tmp_path)}
    result = run_recipe("ray", **given)["result"]
    assert failed.exists()
    with result.checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / "state.pt")
    assert saved["epoch"] == EPOCHS - 1

    model = make_model()
    optimizer = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=0.9)
    with Watch(quantile=0.9) as watch:
        for _ in range(EPOCHS):
            # Each of the workers has every second sample.
            for x, y in torch.utils.data.DataLoader(Data(fails=False), batch_size=WORKERS * BATCH):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
    assert watch.steps() == [EPOCHS * BATCHES]
    assert watch.clipped > 5
    resumed = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=0.9)
    resumed.load_state_dict(saved["optimizer"])
    for row, window in windows_of(optimizer).items():
        np.testing.assert_allclose(windows_of(resumed)[row], window, rtol=1e-4)
    for name, value in log_values(optimizer.clipper).items():
        np.testing.assert_allclose(result.metrics[name], value, rtol=1e-4)


def test_rllib_recipe(tmp_path: Path) -> None:
    def optimizer_of(algorithm: Algorithm) -> Any:
        return algorithm.learner_group._learner.get_optimizer("default_policy")

    sizes = {"train_batch_size": 128, "minibatch_size": 64, "num_epochs": 3}
    with Watch(quantile=0.9) as watch:
        names = run_recipe("rllib", sizes=sizes)
    (steps,) = watch.steps()
    assert steps >= 6
    assert watch.clipped > 5
    assert "autoclip/total_norm" in names["result"]["learners"]["default_policy"]

    algorithm = names["algorithm"]
    algorithm.save_to_path(tmp_path)
    other = Algorithm.from_checkpoint(tmp_path)
    assert windows_of(optimizer_of(other)) == windows_of(optimizer_of(algorithm))
    with Watch(quantile=0.9) as watch:
        other.train()
    assert watch.steps()[0] >= 6
    assert len(windows_of(optimizer_of(other))[0]) == steps + watch.steps()[0]
