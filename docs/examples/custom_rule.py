"""A custom rule, in PyTorch and in Keras. `python custom_rule.py [STEPS]`."""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from sklearn.datasets import load_digits

from autoclip.core import Rule, register_rule, setting

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
digits = load_digits()
images, labels = digits.data.astype("float32") / 16, digits.target


@register_rule
@dataclass(frozen=True)
class MedianAbsoluteDeviation(Rule):
    """The median plus some median absolute deviations: spikes do not move it."""

    deviations: float = setting(3.0, ge=0)
    name: ClassVar[str] = "median_absolute_deviation"
    defaults: ClassVar[dict[str, Any]] = {"include_current": False, "warmup_steps": 10}

    @staticmethod
    def threshold(window: Any, deviations: Any) -> Any:
        median = window.quantile(0.5)
        return median + deviations * window.quantile(0.5, abs(window.norms - median))


def in_torch() -> np.ndarray:
    import torch

    from autoclip.torch import Clipper

    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = Clipper.as_optimizer(optimizer, MedianAbsoluteDeviation(3.0))
    for batch in torch.randint(len(labels), (STEPS, 64)):
        optimizer.zero_grad()
        outputs = model(torch.tensor(images[batch]))
        torch.nn.functional.cross_entropy(outputs, torch.tensor(labels[batch])).backward()
        optimizer.step()
    return optimizer.clipper.thresholds.numpy()


def in_keras() -> np.ndarray:
    import keras

    from autoclip.tf import Clipper

    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(10)])
    optimizer = Clipper.as_optimizer(keras.optimizers.AdamW(1e-2), MedianAbsoluteDeviation(3.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    model.fit(images, labels, batch_size=64, steps_per_epoch=min(STEPS, 28), verbose=0)
    return optimizer.clipper.thresholds.numpy()


print("PyTorch:", in_torch())
print("Keras:  ", in_keras())
