"""Keras on its PyTorch backend, with the lines of docs/backends.md."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from pages import ROOT

TRAIN = """
import keras
import numpy as np
import torch

from autoclip.torch import QuantileClip

assert keras.backend.backend() == "torch"
inputs = keras.Input((3,))
outputs = keras.layers.Dense(1)(keras.layers.Dense(4)(inputs))
{lines}
x = np.random.default_rng(0).normal(size=(64, 3))
model.fit(x, x[:, :1], batch_size=16, epochs=2, verbose=0)
recorded = [each.recorded.tolist() for each in model.clipper.export_state().groups]
assert recorded == [[8, 8, 8, 8]], recorded
"""


def test_the_torch_backend_of_keras() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    [block] = [each for each in page.split("```")[1::2] if "class Model(keras.Model)" in each]
    lines = textwrap.dedent(block.partition("\n")[2])
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    code = TRAIN.format(lines=lines)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
