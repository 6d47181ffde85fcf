"""The digits with wrong labels again, in PyTorch: quick, and under harder conditions.

Network, data, batches and initial distributions are those of `images`; a run takes under a second.
Conditions with a variant change one thing:

* `cosine`: the learning rate warms up over a tenth of the steps and decays along a cosine;
* `bad inputs`: in 2 % of the batches, the inputs are 100 times too large;
* `bfloat16`: weights, gradients and the optimizer's state have 16 bits;
* `fine-tuning`: a model that was trained on the digits 0 to 4 learns the digits 5 to 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from arms import NONE
from design import Condition
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from training import Outcome, train

BATCH, EPOCHS, WRONG_LABELS = 32, 15, 0.2
BAD_BATCHES, TOO_LARGE = 0.02, 100.0
PRETRAINED = Condition("pre-training", "SGD", "SGD", 0.03)

Parts = dict[str, tuple[Tensor, Tensor]]


def build() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    # As Keras initializes.
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


@cache
def load_parts(low: int, high: int) -> Parts:
    """Digits from low to high: float32[n, 1, 8, 8] in [0, 1] and int64[n]; 40, 20 and 40 %."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    training, rest = train_test_split(
        np.arange(len(labels)), test_size=0.6, random_state=0, stratify=digits.target
    )
    validation, test = train_test_split(
        rest, test_size=2 / 3, random_state=0, stratify=digits.target[rest]
    )
    parts = {}
    for part, chosen in {"train": training, "validation": validation, "test": test}.items():
        chosen = chosen[(digits.target[chosen] >= low) & (digits.target[chosen] <= high)]
        parts[part] = images[chosen], labels[chosen]
    return parts


def batches(parts: Parts, seed: int, epochs: int, bad: bool) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = parts["train"]
    random = np.random.default_rng(seed)
    wrong = torch.from_numpy(random.random(len(labels)) < WRONG_LABELS)
    guesses = torch.from_numpy(random.integers(10, size=len(labels)))
    labels = torch.where(wrong, guesses, labels)
    for _ in range(epochs):
        for chosen in torch.from_numpy(random.permutation(len(labels))).split(BATCH):
            scale = TOO_LARGE if random.random() < BAD_BATCHES and bad else 1.0
            yield scale * images[chosen], labels[chosen]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    torch.manual_seed(seed)
    model = build()
    epochs = 1 if quick else EPOCHS
    low, high = 0, 9
    if condition.variant == "fine-tuning":
        first = load_parts(0, 4)
        train(model, PRETRAINED, NONE, None, batches(first, seed, epochs, False), loss_of, None)
        low, high = 5, 9
    parts = load_parts(low, high)
    if condition.variant == "bfloat16":
        model.bfloat16()

    def evaluate(model: nn.Module, part: str) -> float:
        images, labels = parts[part]
        dtype = next(model.parameters()).dtype
        return 100 * (model(images.to(dtype)).argmax(1) == labels).float().mean().item()

    steps = list(batches(parts, seed, epochs, condition.variant == "bad inputs"))
    return train(model, condition, arm, constant, iter(steps), loss_of, evaluate, len(steps))
