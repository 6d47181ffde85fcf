"""Handwritten digits again, as images, by a small convolutional network in Keras."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import keras
import numpy as np
from arms import clipped_keras_optimizer
from design import MOMENTUM, Condition
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from training import Outcome

BATCH, EPOCHS = 32, 15
# So many training labels are wrong, as where people label in a hurry.
WRONG_LABELS = 0.2


class Watch(keras.callbacks.Callback):
    """The CPU time of each step and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.times.append(time.process_time() - self._start)


@cache
def load_parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images as float32[n, 8, 8, 1] in [0, 1] and labels as int64[n]: 40, 20 and 40 % of them."""
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    training, rest = train_test_split(
        np.arange(len(images)), test_size=0.6, random_state=0, stratify=digits.target
    )
    validation, test = train_test_split(
        rest, test_size=2 / 3, random_state=0, stratify=digits.target[rest]
    )
    parts = {"train": training, "validation": validation, "test": test}
    return {part: (images[chosen], digits.target[chosen]) for part, chosen in parts.items()}


def build() -> keras.Model:
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def make_optimizer(condition: Condition) -> keras.optimizers.Optimizer:
    if condition.optimizer == "SGD":
        return keras.optimizers.SGD(condition.learning_rate, momentum=MOMENTUM)
    return keras.optimizers.Adam(condition.learning_rate)


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    begin = time.process_time()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model = build()
    optimizer = clipped_keras_optimizer(make_optimizer(condition), arm, constant)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = load_parts()["train"]
    random = np.random.default_rng(seed)
    wrong = random.random(len(labels)) < WRONG_LABELS
    labels = np.where(wrong, random.integers(10, size=len(labels)), labels)
    order = np.concatenate([random.permutation(len(labels)) for _ in range(1 if quick else EPOCHS)])
    watch = Watch()
    model.fit(
        images[order], labels[order], BATCH, shuffle=False, verbose=0,
        callbacks=[watch, keras.callbacks.TerminateOnNaN()],
    )  # fmt: skip
    outcome = Outcome(step_ms=1e3 * float(np.median(watch.times)))
    outcome.finite = all(np.isfinite(weight).all() for weight in model.get_weights())
    if outcome.finite:
        outcome.validation, outcome.test = (
            100 * float((np.argmax(model(images, training=False), 1) == labels).mean())
            for images, labels in (load_parts()["validation"], load_parts()["test"])
        )
    outcome.seconds = time.process_time() - begin
    return outcome
