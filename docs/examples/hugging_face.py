"""Hugging Face Trainer: clip by a callback, resume. `python hugging_face.py [STEPS]`."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

from autoclip.torch.transformers import AutoClipCallback

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


digits = load_digits()
dataset = [
    {"pixels": torch.tensor(pixels / 16, dtype=torch.float32), "labels": int(label)}
    for pixels, label in zip(digits.data, digits.target)
]


def train(steps: int, resume: bool) -> None:
    arguments = TrainingArguments(
        "trainer",
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=max(steps // 4, 1),
        save_steps=max(steps // 2, 1),
        max_grad_norm=0,  # AutoClip takes its place
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    clip = AutoClipCallback(quantile=0.9, global_clipping=True)
    trainer = Trainer(Digits(), arguments, train_dataset=dataset, callbacks=[clip])
    trainer.train(resume_from_checkpoint=resume)


train(STEPS, resume=False)
train(2 * STEPS, resume=True)  # from the last checkpoint, with its history
