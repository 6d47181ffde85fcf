"""timm: its optimizers, its scaler, its checkpoints."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from recipes import Watch, run_recipe, weights
from timm.models import resume_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, update_summary
from torch import nn

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values


def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=3,
    )
    return made


def batches(count: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 3, 16, 16, generator=generator) * (1 + 9 * (step % 3)),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for step in range(count)
    ]


def with_optimizer(opt: str = "adamw", **options: Any) -> tuple[nn.Module, Any]:
    network = model()
    optimizer = timm.optim.create_optimizer_v2(network, opt=opt, lr=1e-3, **options)
    return network, QuantileClip.as_optimizer(optimizer, quantile=0.5)


def train(network: nn.Module, optimizer: Any, scaler: Any, steps: list[Any]) -> None:
    for x, y in steps:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        scaler(loss, optimizer, clip_grad=None, parameters=network.parameters())


def test_recipe() -> None:
    network = model()
    with Watch(quantile=0.9, left_alone=False) as watch:  # the scaler divides by its scale
        names = run_recipe("timm", model=network, batches=batches())
    assert watch.steps() == [8]
    assert watch.clipped > 5
    assert names["optimizer"].clipper.defaults["quantile"] == 0.9


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion"])
def test_resume_bit_for_bit(opt: str, tmp_path: Path) -> None:
    network, optimizer = with_optimizer(opt)
    scaler = NativeScaler("cpu")
    train(network, optimizer, scaler, batches()[:4])
    saver = CheckpointSaver(network, optimizer, amp_scaler=scaler, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    other, second, third = *with_optimizer(opt), NativeScaler("cpu")
    resume_checkpoint(other, str(tmp_path / "last.pth.tar"), second, third)
    assert second.clipper.state_dict() == optimizer.clipper.state_dict()
    train(network, optimizer, scaler, batches()[4:])
    train(other, second, third, batches()[4:])
    assert torch.equal(weights(other), weights(network))
    assert second.clipper.state_dict() == optimizer.clipper.state_dict()


def test_logs_into_the_summary(tmp_path: Path) -> None:
    network, optimizer = with_optimizer()
    train(network, optimizer, NativeScaler("cpu"), batches())
    metrics = {"loss": 1.0, **log_values(optimizer.clipper)}
    file = tmp_path / "summary.csv"
    update_summary(0, metrics, {}, str(file), write_header=True)
    (row,) = csv.DictReader(file.open())
    total = float(optimizer.clipper.last.norms.square().sum().sqrt())
    assert float(row["train_autoclip/total_norm"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_lamb_clips_again_unless_told_not_to(max_grad_norm: float | None) -> None:
    """Its update does not depend on the gradients' scale, but their ratio changes the moments."""
    network, optimizer = with_optimizer("lamb", max_grad_norm=max_grad_norm)
    plain = model()
    reference = timm.optim.Lamb(
        timm.optim.param_groups_weight_decay(plain, 0.0), lr=1e-3, max_grad_norm=None
    )
    clipper = QuantileClip(
        [{"params": group["params"]} for group in reference.param_groups], quantile=0.5
    )
    for x, y in batches():
        for net in (network, plain):
            net.zero_grad()
            (100 * nn.functional.cross_entropy(net(x), y)).backward()
        optimizer.step()
        clipper.step()
        reference.step()
    assert torch.allclose(weights(network), weights(plain)) == (max_grad_norm is None)
