"""Frameworks that take the optimizer: Ignite, MONAI, PyTorch Geometric, Poutyne."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint
from monai.data import DataLoader as MonaiLoader
from monai.engines import GanTrainer, SupervisedTrainer
from monai.handlers import CheckpointLoader, StatsHandler
from poutyne import Model
from recipes import Watch, run_recipe, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR) * torch.logspace(-1, 1, 32)[:, None]
Y = torch.randint(0, 3, (32,), generator=GENERATOR)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)
LOSS = nn.CrossEntropyLoss()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def with_optimizer() -> tuple[nn.Module, Any]:
    model = network()
    return model, QuantileClip.as_optimizer(torch.optim.Adam(model.parameters()), quantile=0.5)


def same(one: tuple[nn.Module, Any], other: tuple[nn.Module, Any]) -> None:
    assert torch.equal(weights(one[0]), weights(other[0]))
    assert one[1].clipper.state_dict() == other[1].clipper.state_dict()


# -- Ignite ------------------------------------------------------------------------------------


def test_ignite_recipe(folder: Path) -> None:
    with Watch(quantile=0.9) as watch:
        names = run_recipe("ignite", model=network(), loss=LOSS, loader=LOADER)
    assert watch.steps() == [16]
    assert "autoclip/total_norm" in names["trainer"].state.metrics

    model, optimizer = network(), None
    optimizer = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=0.9)
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    (file,) = folder.glob("checkpoints/*.pt")
    saved = torch.load(file, weights_only=False)
    Checkpoint.load_objects({"model": model, "optimizer": optimizer, "trainer": trainer}, saved)
    same((model, optimizer), (names["model"], names["optimizer"]))
    trainer.run(LOADER, max_epochs=4)
    names["trainer"].run(LOADER, max_epochs=4)
    same((model, optimizer), (names["model"], names["optimizer"]))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4}])
def test_ignite_as_numpy_clips(options: dict[str, Any]) -> None:
    model, optimizer = with_optimizer()
    with Watch(quantile=0.5) as watch:
        create_supervised_trainer(model, optimizer, LOSS, **options).run(LOADER, max_epochs=3)
    assert watch.steps() == [24 // options.get("gradient_accumulation_steps", 1)]
    assert watch.clipped > 5


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_ignite_clips_unscaled_gradients() -> None:
    histories = []
    for scale in (None, 1024.0):
        model, optimizer = with_optimizer()
        options: dict[str, Any] = {}
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            options = {"amp_mode": "amp", "scaler": scaler}
        create_supervised_trainer(model, optimizer, LOSS, **options).run(LOADER, max_epochs=3)
        histories.append((weights(model), optimizer.clipper.state_dict()["data"]))
    assert scaler.state_dict()["_growth_tracker"] == 24
    assert torch.equal(histories[0][0], histories[1][0])
    assert histories[0][1] == histories[1][1]  # a power of two scales without rounding


# -- MONAI -------------------------------------------------------------------------------------


def monai_loader() -> Any:
    rows = [{"image": x, "label": y} for x, y in zip(X, Y)]
    return MonaiLoader(rows, batch_size=4)


def test_monai_recipe(folder: Path) -> None:
    with Watch(quantile=0.9) as watch:
        names = run_recipe("monai", network=network(), loss=LOSS, loader=monai_loader())
    assert watch.steps() == [16]

    model = network()
    optimizer = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=0.9)
    (file,) = folder.glob("runs/*.pt")
    CheckpointLoader(str(file), {"network": model, "optimizer": optimizer})
    loader = CheckpointLoader(str(file), {"network": model, "optimizer": optimizer})
    options: dict[str, Any] = {
        "device": torch.device("cpu"),
        "max_epochs": 1,
        "train_data_loader": monai_loader(),
        "loss_function": LOSS,
    }
    SupervisedTrainer(network=model, optimizer=optimizer, train_handlers=[loader], **options).run()
    SupervisedTrainer(network=names["network"], optimizer=names["optimizer"], **options).run()
    same((model, optimizer), (names["network"], names["optimizer"]))


def test_monai_as_numpy_clips_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = with_optimizer()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=monai_loader(),
        network=model,
        optimizer=optimizer,
        loss_function=LOSS,
        train_handlers=[StatsHandler(name="stats", output_transform=lambda _: None)],
    )

    def log_autoclip(engine: Any) -> None:
        engine.state.metrics.update(log_values(optimizer.clipper))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, log_autoclip)
    logging.getLogger("stats").addHandler(caplog.handler)  # MONAI's loggers do not propagate
    with Watch(quantile=0.5) as watch:
        trainer.run()
    assert watch.steps() == [24]
    assert watch.clipped > 5
    assert caplog.text.count("autoclip/total_norm") == 3


def test_monai_gan_trainer() -> None:
    torch.manual_seed(0)
    nets = {"g": nn.Linear(2, 4), "d": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))}
    made: dict[str, Any] = {}
    for part, net in nets.items():
        adam = torch.optim.Adam(net.parameters())
        made[f"{part}_network"] = net
        made[f"{part}_optimizer"] = QuantileClip.as_optimizer(adam, quantile=0.5)

    def d_loss(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        scores = nets["d"](fake.detach()), -nets["d"](real)
        return sum(nn.functional.softplus(score).mean() for score in scores)  # type: ignore[return-value]

    trainer = GanTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=MonaiLoader([{"reals": x} for x in X], batch_size=4),
        g_loss_function=lambda fake: nn.functional.softplus(-nets["d"](fake)).mean(),
        d_loss_function=d_loss,
        d_prepare_batch=lambda batch, *args, **kwargs: batch["reals"],
        latent_shape=2,
        **made,
    )
    with Watch(quantile=0.5) as watch:
        trainer.run()
    assert watch.steps() == [16, 16]
    assert watch.clipped > 5


# -- PyTorch Geometric -------------------------------------------------------------------------


def test_pyg_recipe() -> None:
    edges = torch.randint(0, 32, (2, 90), generator=GENERATOR)
    torch.manual_seed(0)
    data = Data(x=X, edge_index=edges, y=Y)
    with Watch(quantile=0.9) as watch:
        names = run_recipe("pyg", data=data)
    assert watch.steps() == [20]
    model = copy.deepcopy(names["model"])
    optimizer = QuantileClip.as_optimizer(
        torch.optim.Adam(model.parameters(), lr=0.01), quantile=0.9
    )
    optimizer.load_state_dict(copy.deepcopy(names["optimizer"].state_dict()))
    for each, its in ((model, optimizer), (names["model"], names["optimizer"])):
        for step in range(5):
            torch.manual_seed(step)  # of the dropout
            its.zero_grad()
            LOSS(each(data.x, data.edge_index), data.y).backward()
            its.step()
    same((model, optimizer), (names["model"], names["optimizer"]))


# -- Poutyne -----------------------------------------------------------------------------------


def test_poutyne_recipe() -> None:
    given = {"network": network(), "X": X, "y": Y}
    with Watch(quantile=0.9) as watch:
        names = run_recipe("poutyne", **given)
    assert watch.steps() == [2]
    assert [("autoclip/total_norm" in entry) for entry in names["history"]] == [True, True]
    other = network()
    optimizer = QuantileClip.as_optimizer(torch.optim.Adam(other.parameters()), quantile=0.9)
    other.load_state_dict(names["network"].state_dict())
    model = Model(other, optimizer, "cross_entropy")
    model.load_optimizer_state("optimizer.pt")
    same((other, optimizer), (names["network"], names["optimizer"]))
    for each in (model, names["model"]):
        torch.manual_seed(1)  # it shuffles
        each.fit(X, Y, epochs=2, batch_size=4, verbose=False)
    same((other, optimizer), (names["network"], names["optimizer"]))


@pytest.mark.parametrize("batches", [1, 2])
def test_poutyne_as_numpy_clips(batches: int) -> None:
    model, optimizer = with_optimizer()
    with Watch(quantile=0.5, left_alone=batches == 1) as watch:
        Model(model, optimizer, "cross_entropy").fit(
            X, Y, epochs=3, batch_size=4, batches_per_step=batches, verbose=False
        )
    assert watch.steps() == [24 // batches]
    assert watch.clipped > 5
    (norms,) = watch.norms.values()
    assert np.isfinite(norms).all()
