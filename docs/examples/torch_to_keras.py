"""Begin in PyTorch, continue in Keras with the same weights and history.

`python torch_to_keras.py [STEPS]`. Both must be installed: `pip install "autoclip[all]"`.
"""

import sys
from contextlib import suppress

with suppress(ImportError):
    import triton  # noqa: F401  PyTorch's builds for CUDA need it before TensorFlow

import keras
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import autoclip.tf
import autoclip.torch

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
digits = load_digits()
images, labels = digits.data.astype("float32") / 16, digits.target
generator = np.random.default_rng(0)

torch.manual_seed(0)
first = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = autoclip.torch.QuantileClip.as_optimizer(
    torch.optim.SGD(first.parameters(), lr=0.1), quantile=0.9
)
for _ in range(STEPS):
    batch = generator.integers(len(labels), size=64)
    optimizer.zero_grad()
    outputs = first(torch.tensor(images[batch]))
    nn.functional.cross_entropy(outputs, torch.tensor(labels[batch])).backward()
    optimizer.step()
optimizer.clipper.save("history.autoclip")
print("thresholds in PyTorch:", optimizer.clipper.thresholds.numpy())

second = keras.Sequential(
    [keras.layers.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)]
)
for layer, trained in zip(second.layers, (first[0], first[2])):
    layer.set_weights([trained.weight.detach().numpy().T, trained.bias.detach().numpy()])
optimizer = autoclip.tf.QuantileClip.as_optimizer(keras.optimizers.SGD(0.1), quantile=0.9)
optimizer.clipper.load("history.autoclip")  # waits for the variables
second.compile(
    optimizer=optimizer,
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
optimizer.build(second.trainable_variables)
print("thresholds in Keras:  ", optimizer.clipper.thresholds.numpy())
second.fit(images, labels, batch_size=64, epochs=1, verbose=2)
