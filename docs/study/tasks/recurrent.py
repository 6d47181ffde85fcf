"""Handwritten digits read by GRUs, all seeds of an arm at once, as one batch of matrices.

Seeds share nothing: each has its own weights, order of data, parameter group and history. One at a
time they would spend most of their time on the overhead of small operations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice

import numpy as np
import torch
from arms import NONE, clipped_by_group
from design import MOMENTUM, Condition
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from training import EVERY, Outcome, share_of_rate

# In the variant `bad inputs`, this share of batches has inputs that are this many times too large.
BAD_BATCHES, TOO_LARGE = 0.02, 100.0


@dataclass(frozen=True)
class Reading:
    """A way to read images: pixels per time step, hidden units, images per batch, steps."""

    pixels: int
    hidden: int
    batch: int
    steps: int
    # A last, smaller batch of each epoch.
    keep_last: bool = False
    fine_tuning_steps: int = 100
    fine_tuning_images: int = 200


class ImageGRU(nn.Module):
    """The parameters of one seed's model, initialized as PyTorch does."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.gru = nn.GRU(reading.pixels, reading.hidden, batch_first=True)
        self.head = nn.Linear(reading.hidden, 10)


def forward(models: Sequence[ImageGRU], images: Tensor) -> Tensor:
    """Logits of each model for its own images: [models, batch, 64] to [models, batch, 10].

    Arithmetic is in float32 for weights of any type.
    """

    def stacked(name: str) -> Tensor:
        return torch.stack([model.get_parameter(name) for model in models]).float()

    def affine(x: Tensor, weight: str, bias: str) -> Tensor:
        return torch.baddbmm(stacked(bias)[:, None], x, stacked(weight).mT)

    pixels, hidden = models[0].gru.input_size, models[0].gru.hidden_size
    inputs = images.unflatten(-1, (-1, pixels))
    batch, length = inputs.shape[1:3]
    # Time first, so that each step reads one block of memory.
    inputs = inputs.transpose(1, 2).flatten(1, 2)
    inputs = affine(inputs, "gru.weight_ih_l0", "gru.bias_ih_l0").unflatten(1, (length, batch))
    weight, bias = stacked("gru.weight_hh_l0").mT, stacked("gru.bias_hh_l0")[:, None]
    state = images.new_zeros(len(models), batch, hidden)
    for x in inputs.unbind(1):
        h = torch.baddbmm(bias, state, weight)
        gates = torch.sigmoid(x[..., : 2 * hidden] + h[..., : 2 * hidden])
        reset, update = gates.chunk(2, -1)
        new = torch.tanh(torch.addcmul(x[..., 2 * hidden :], reset, h[..., 2 * hidden :]))
        state = torch.lerp(new, state, update)
    return affine(state, "head.weight", "head.bias")


@cache
def load_parts(low: int = 0, high: int = 9) -> dict[str, tuple[Tensor, Tensor]]:
    """Digits from low to high: float32[n, 64] in [0, 1], int64[n]; 60, 20 and 20 % of all."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    training, rest = train_test_split(
        np.arange(len(labels)), test_size=0.4, random_state=0, stratify=digits.target
    )
    validation, test = train_test_split(
        rest, test_size=0.5, random_state=0, stratify=digits.target[rest]
    )
    parts = {}
    for part, chosen in {"train": training, "validation": validation, "test": test}.items():
        chosen = chosen[(digits.target[chosen] >= low) & (digits.target[chosen] <= high)]
        parts[part] = images[chosen], labels[chosen]
    return parts


def batches(
    reading: Reading, images: Tensor, labels: Tensor, seed: int, bad: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """A seed's batches without end, each epoch in another order."""
    order = torch.Generator().manual_seed(seed)
    spoiling = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(len(labels), generator=order).split(reading.batch):
            if reading.keep_last or len(batch) == reading.batch:
                spoilt = torch.rand((), generator=spoiling) < BAD_BATCHES and bad
                yield images[batch] * (TOO_LARGE if spoilt else 1.0), labels[batch]


def make_optimizer(models: Sequence[ImageGRU], condition: Condition) -> torch.optim.Optimizer:
    groups = [{"params": list(model.parameters())} for model in models]
    if condition.optimizer == "SGD":
        return torch.optim.SGD(groups, condition.learning_rate, momentum=MOMENTUM)
    return torch.optim.Adam(groups, condition.learning_rate)


def fit(
    models: Sequence[ImageGRU],
    condition: Condition,
    arm: str,
    constant: float | None,
    streams: Sequence[Iterator[tuple[Tensor, Tensor]]],
    steps: int,
) -> list[float | None]:
    """Train the models, each on its stream; the share of clipped rows of each."""
    optimizer = clipped_by_group(make_optimizer(models, condition), arm, constant)
    schedule = None
    if condition.variant.startswith("cosine"):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, total=steps))
    clipped = []
    for step, parts in enumerate(islice(zip(*streams), steps)):
        images, labels = (torch.stack(part) for part in zip(*parts))
        logits = forward(models, images)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        optimizer.zero_grad()
        # The sum over the models: the gradient of one does not depend on the others.
        losses.unflatten(0, labels.shape).mean(1).sum().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step % EVERY == 0 and hasattr(optimizer, "clipper"):
            rows = (optimizer.clipper.last.coefficients < 1).float().view(len(models), -1)
            clipped.append(rows.mean(1).tolist())
    return np.mean(clipped, 0).tolist() if clipped else [None] * len(models)


def run(
    reading: Reading,
    pretraining: Condition,
    condition: Condition,
    arm: str,
    constant: float | None,
    seeds: Sequence[int],
    *,
    quick: bool = False,
) -> list[Outcome]:
    """One outcome for each seed; the time is divided among them."""
    begin = time.process_time()
    if quick:
        reading = replace(reading, steps=5, fine_tuning_steps=5)
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(ImageGRU(reading))

    def streams(low: int, high: int, images: int | None = None) -> list:
        data = [tensor[:images] for tensor in load_parts(low, high)["train"]]
        bad = condition.variant == "bad inputs"
        return [batches(reading, *data, seed, bad) for seed in seeds]

    low, high, steps, images = 0, 9, reading.steps, None
    if condition.variant == "fine-tuning":
        fit(models, pretraining, NONE, None, streams(0, 4), steps)
        low, high, steps = 5, 9, reading.fine_tuning_steps
        images = reading.fine_tuning_images
    if condition.variant == "bfloat16":
        models = [model.bfloat16() for model in models]
    clipped = fit(models, condition, arm, constant, streams(low, high, images), steps)
    accuracy = {}
    with torch.no_grad():
        for part in ("validation", "test"):
            inputs, labels = load_parts(low, high)[part]
            guesses = forward(models, inputs.expand(len(seeds), *inputs.shape)).argmax(-1)
            accuracy[part] = (100 * (guesses == labels).float().mean(1)).tolist()
    finite = [all(bool(p.isfinite().all()) for p in model.parameters()) for model in models]
    seconds = (time.process_time() - begin) / len(seeds)
    return [
        Outcome(test, validation, whole, seconds=seconds, clipped=part)
        for test, validation, whole, part in zip(
            accuracy["test"], accuracy["validation"], finite, clipped
        )
    ]
