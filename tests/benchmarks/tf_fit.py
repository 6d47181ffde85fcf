"""`fit` of a small Keras model with Adam: no clipping, Keras's own, and `QuantileClip`.

The last two rows have `AutoClipCallback`; compare them with the two before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from measure import Timing, add_output_options, compare, write_output

from autoclip.tf import QuantileClip
from autoclip.tf.callbacks import AutoClipCallback

LAYERS, WIDTH, STEPS, BATCH = 6, 32, 200, 32
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "no clipping": keras.optimizers.Adam,
    "clipnorm=1.0": partial(keras.optimizers.Adam, clipnorm=1.0),
    "global_clipnorm=1.0": partial(keras.optimizers.Adam, global_clipnorm=1.0),
    "QuantileClip, parameter-wise": lambda: QuantileClip.as_optimizer(keras.optimizers.Adam()),
    "QuantileClip, global": lambda: QuantileClip.as_optimizer(
        keras.optimizers.Adam(), global_clipping=True
    ),
}


def main() -> None:
    """Print times of an epoch and their ratios to the one without clipping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    add_output_options(parser)
    options = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(STEPS * BATCH, WIDTH)).astype(np.float32)
    y = x.sum(axis=1, keepdims=True)
    timings: list[Timing] = []
    for jit_compile in (False, True):
        epochs: dict[str, Callable[[], Any]] = {}
        for name, make in OPTIMIZERS.items():
            fit = partial(make_model(make(), jit_compile).fit, x, y, batch_size=BATCH, verbose=0)
            epochs[name] = fit
        for name in [name for name in OPTIMIZERS if "QuantileClip" in name]:
            model = make_model(OPTIMIZERS[name](), jit_compile)
            fit = partial(model.fit, x, y, batch_size=BATCH, verbose=0)
            epochs[f"{name}, callback"] = partial(fit, callbacks=[AutoClipCallback()])
        timings += compare(
            "no clipping",
            epochs,
            lambda: None,
            f"fit, {2 * LAYERS + 2} variables, {STEPS} steps, {'XLA' if jit_compile else 'graph'}",
            options.repetitions,
        )
    write_output(options, timings, {"Keras": keras.__version__})


def make_model(optimizer: Any, jit_compile: bool) -> Any:
    """A compiled multilayer perceptron."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(LAYERS)]
    model = keras.Sequential([keras.layers.Input((WIDTH,)), *hidden, keras.layers.Dense(1)])
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model


if __name__ == "__main__":
    main()
