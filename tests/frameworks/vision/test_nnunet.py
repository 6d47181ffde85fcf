"""nnU-Net v2: the class in docs/examples/nnunet_trainer.py, from planning to resuming."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import ROOT, Watch, weights

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
EXAMPLE = ROOT / "docs" / "examples" / "nnunet_trainer.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A made data set of 2D images, planned and preprocessed by nnU-Net's own command."""
    folder = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        (folder / "trainers").mkdir()
        shutil.copy(EXAMPLE, folder / "trainers" / EXAMPLE.name)
        patch.setenv("nnUNet_extTrainer", str(folder / "trainers"))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_compile", "f")
        raw = folder / "nnUNet_raw" / "Dataset001_Made"
        generator = np.random.default_rng(0)
        for part in ("imagesTr", "labelsTr"):
            (raw / part).mkdir(parents=True)
        for i in range(6):
            label = np.zeros((32, 32), np.uint8)
            row, column = generator.integers(4, 20, 2)
            label[row : row + 8, column : column + 8] = 1
            pixels = (generator.normal(80, 20, (32, 32)) + 90 * label).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(raw / "imagesTr" / f"case{i}_0000.png")
            Image.fromarray(label).save(raw / "labelsTr" / f"case{i}.png")
        description = {
            "channel_names": {"0": "gray"},
            "labels": {"background": 0, "square": 1},
            "numTraining": 6,
            "file_ending": ".png",
        }
        (raw / "dataset.json").write_text(json.dumps(description))
        plan = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import *; "
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"{plan}plan_and_preprocess_entry()",
                *("-d", "1", "-c", "2d", "-np", "1", "-npfp", "1"),
            ],
            env={**os.environ, "nnUNet_n_proc_DA": "1"},
            check=True,
        )
        yield folder


def make(folder: Path, epochs: int, resume: bool = False) -> Any:
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(
        "1", "2d", 0, "nnUNetTrainerAutoClip", device=torch.device("cpu"), continue_training=resume
    )
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 4, 1
    trainer.num_epochs = epochs
    torch.manual_seed(0)
    trainer.initialize()
    return trainer


def batches(trainer: Any, count: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    size = trainer.configuration_manager.patch_size
    target = torch.randint(0, 2, (2, 1, *size), generator=generator)
    scales = trainer._get_deep_supervision_scales()
    targets = [nearest(target, [round(n * s) for n, s in zip(size, scale)]) for scale in scales]
    return [
        {
            "data": torch.randn(2, 1, *size, generator=generator) * (1 + 9 * (step % 3)),
            "target": targets,
        }
        for step in range(count)
    ]


def nearest(target: torch.Tensor, size: list[int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(target.float(), size=size, mode="nearest")


def test_nnunet_finds_it_trains_and_resumes(folder: Path) -> None:
    """A real training of two epochs, interrupted by none, and one more from its checkpoint."""
    trainer = make(folder, 2)
    with Watch(quantile=0.9) as watch:
        trainer.run_training()
    assert watch.steps() == [8]
    log = "".join(file.read_text() for file in Path(trainer.output_folder).glob("training_log*"))
    assert log.count("autoclip/total_norm") == 2

    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    other = make(folder, 3, resume=True)
    other.load_checkpoint(str(final))
    state = trainer.optimizer.clipper.state_dict()
    assert other.optimizer.clipper.state_dict() == state
    with Watch(quantile=0.9) as watch:
        other.run_training()
    assert watch.steps() == [4]


def test_clips_as_numpy_and_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, 2)
    with Watch(quantile=0.9) as watch:
        for batch in batches(trainer):
            trainer.train_step(batch)
    assert watch.steps() == [6]
    assert watch.clipped > 0
    trainer.logger.log("epoch_start_timestamps", 0.0, 0)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    other = make(folder, 2)
    other.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    for batch in batches(trainer):
        trainer.train_step(batch)
        other.train_step(batch)
    assert torch.equal(weights(other.network), weights(trainer.network))
    assert other.optimizer.clipper.state_dict() == trainer.optimizer.clipper.state_dict()


def test_nnunets_own_trainer_clips_at_12(folder: Path) -> None:
    """The limit that the class leaves out, on gradients larger than that."""
    trainer = make(folder, 2)
    base = type(trainer).__mro__[1]
    (batch,) = batches(trainer, 1)
    trainer.loss = lambda *args, loss=trainer.loss: 1000 * loss(*args)
    with Watch(quantile=0.9):
        base.train_step(trainer, batch)
        with pytest.raises(AssertionError, match="something changed the gradient"):
            base.train_step(trainer, batch)
    with Watch(quantile=0.9) as watch:
        for _ in range(3):
            trainer.train_step(batch)
    assert max(norms[0] for each in watch.norms.values() for norms in each) > 12
