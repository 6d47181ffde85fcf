"""ultralytics: the class in docs/examples/ultralytics_yolo.py."""

from __future__ import annotations

import csv
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import ROOT, Watch, weights
from ultralytics import YOLO, settings
from ultralytics.models.yolo.detect import DetectionTrainer

from autoclip.torch import QuantileClip

EXAMPLE = ROOT / "docs" / "examples" / "ultralytics_yolo.py"
NAMES = runpy.run_path(str(EXAMPLE))
TRAINER: Any = NAMES["AutoClipTrainer"]


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def offline() -> None:
    settings.update({"sync": False})


@pytest.fixture(params=["detect"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / "data" / part / "train").mkdir(parents=True)
    for i in range(8):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / "train" / f"{i}.png")
        size = generator.uniform(0.2, 0.8)
        box = f"0.5 0.5 {size:.3f} 0.5"
        polygon = f"0.1 0.1 {size:.3f} 0.1 {size:.3f} 0.9 0.1 0.9"
        label = f"{i % 2} {polygon if request.param == 'segment' else box}\n"
        (tmp_path / "data" / "labels" / "train" / f"{i}.txt").write_text(label)
    file = tmp_path / "data.yaml"
    file.write_text(
        f"path: {tmp_path / 'data'}\ntrain: images/train\nval: images/train\n"
        "names: {0: one, 1: two}\n"
    )
    return file


def options(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": str(data),
        "project": str(data.parent / "runs"),
        "imgsz": 32,
        "batch": 4,
        "workers": 0,
        "device": "cpu",
        "plots": False,
        "verbose": False,
        "nbs": 4,
        "warmup_epochs": 0,
        "optimizer": "AdamW",
        **more,
    }


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "MuSGD"])
def test_one_norm_a_step_as_numpy_clips(data: Path, optimizer: str) -> None:
    model = YOLO("yolo11n.yaml")
    with Watch(quantile=0.9) as watch:
        model.train(trainer=TRAINER, epochs=2, **options(data, optimizer=optimizer))
    assert watch.steps() == [4]
    assert any(norm > 10 for norms in watch.norms.values() for (norm,) in norms)
    (file,) = data.parent.glob("runs/*/results.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    (norms,) = watch.norms.values()
    logged = [float(row["autoclip/total_norm"]) for row in rows]
    np.testing.assert_allclose(logged, [norms[1][0], norms[3][0]], rtol=1e-4)


@pytest.mark.parametrize("data", ["segment"], indirect=True)
def test_another_task(data: Path, tmp_path: Path) -> None:
    """The example with another base class, as the page says."""
    source = EXAMPLE.read_text("utf-8")
    for one, other in (("DetectionTrainer", "SegmentationTrainer"), ("detect", "segment")):
        source = source.replace(one, other)
    (tmp_path / "segment.py").write_text(source, "utf-8")
    trainer = runpy.run_path(str(tmp_path / "segment.py"))["AutoClipTrainer"]
    with Watch(quantile=0.9) as watch:
        YOLO("yolo11n-seg.yaml").train(trainer=trainer, epochs=2, **options(data))
    assert watch.steps() == [4]


def interrupted(data: Path, trainer: Any) -> tuple[Path, list[Any]]:
    """Train one epoch of three and a second one, whose checkpoint is the last.

    Returns:
        The checkpoint, and what was in the optimizer's state then.
    """
    saved: list[Any] = []

    def interrupt(trainer: Any) -> None:
        if trainer.epoch == 1:
            saved.append(trainer.optimizer.state_dict().get("autoclip"))
            raise Interrupted

    model = YOLO("yolo11n.yaml")
    model.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        model.train(trainer=trainer, epochs=3, **options(data))
    (last,) = data.parent.glob("runs/*/weights/last.pt")
    return last, saved


def test_resume_restores_the_history(data: Path) -> None:
    last, saved = interrupted(data, TRAINER)
    found: list[Any] = []
    resumed = YOLO(last)
    resumed.add_callback("on_train_start", lambda t: found.append(t.optimizer.clipper.state_dict()))
    with Watch(quantile=0.9) as watch:
        resumed.train(trainer=TRAINER, resume=True)
    assert found == saved
    assert watch.steps() == [2]  # of three epochs with two steps each, the last


class Never(TRAINER):  # type: ignore[misc]
    """The example's trainer, with a clipper that never clips."""

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = DetectionTrainer.build_optimizer(self, *args, **kwargs)
        return QuantileClip.as_optimizer(optimizer, quantile=1.0)


class Plain(TRAINER):  # type: ignore[misc]
    """The same without a clipper."""

    build_optimizer = DetectionTrainer.build_optimizer
    save_metrics = DetectionTrainer.save_metrics


def test_resumed_weights_are_those_without_a_clipper(data: Path) -> None:
    """ultralytics resumes from 16 bits; a clipper that never clips changes nothing about that."""
    ends = []
    for trainer in (Never, Plain):
        last, _ = interrupted(data, trainer)
        resumed = YOLO(last)
        resumed.add_callback("on_train_end", lambda t: ends.append(weights(t.model)))
        resumed.train(trainer=trainer, resume=True)
        shutil.rmtree(data.parent / "runs")
    assert torch.equal(*ends)
