"""diffusers: the loop of its training scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from recipes import Watch, run_recipe, weights


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def run(images: torch.Tensor) -> dict[str, Any]:
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    return run_recipe("diffusers", model=unet(), loader=loader)


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    with Watch(quantile=0.9, left_alone=False) as watch:  # the gradients are accumulated
        names = run(images)
    assert watch.steps() == [4]
    assert watch.clipped > 5

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    other = run(3 * images)
    assert other["clipper"].state_dict() != names["clipper"].state_dict()
    other["accelerator"].load_state(tmp_path / "checkpoint")
    assert other["clipper"].state_dict() == names["clipper"].state_dict()
    assert torch.equal(weights(other["model"]), weights(names["model"]))
