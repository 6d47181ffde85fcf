"""Handwritten digits, read pixel by pixel by a GRU: 64 steps an image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from design import Condition
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from training import Outcome, train

BATCH, EPOCHS, HIDDEN = 64, 20, 48


class PixelGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.gru(images)
        return self.head(states[:, -1])


@cache
def load_parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Images as float32[n, 64, 1] in [0, 1] and labels as int64[n]: 60, 20 and 20 % of them."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)[..., None]
    labels = torch.tensor(digits.target)
    training, rest = train_test_split(
        np.arange(len(labels)), test_size=0.4, random_state=0, stratify=digits.target
    )
    validation, test = train_test_split(
        rest, test_size=0.5, random_state=0, stratify=digits.target[rest]
    )
    parts = {"train": training, "validation": validation, "test": test}
    return {part: (images[chosen], labels[chosen]) for part, chosen in parts.items()}


def batches(seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = load_parts()["train"]
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):
            yield images[batch], labels[batch]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def evaluate(model: nn.Module, part: str) -> float:
    images, labels = load_parts()[part]
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    torch.manual_seed(seed)
    model = PixelGRU()
    steps = batches(seed, 1 if quick else EPOCHS)
    return train(model, condition, arm, constant, steps, loss_of, evaluate)
