"""The memory of histories in bytes for each norm that they hold, in each backend.

The promise is 8 bytes for each row and norm of `history_length`, plus a constant: a window in
float32, and a second copy in order where a rule asks for quantiles. What is more than that is
counted as bytes for each row.
"""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
import torch

from autoclip.core import History, Quantile, Rule, Standard
from autoclip.core.adapter import ClipperSettings, GroupSettings
from autoclip.tf._histories import TensorHistory as TensorFlowHistory
from autoclip.torch._histories import TensorHistory as TorchHistory

RULES = (Quantile(), Standard())
SIZES = ((1, 1_000), (1, 100_000), (160, 1_000), (160, 10_000))


def settings(rule: Rule, rows: int, history_length: int) -> list[GroupSettings]:
    """The settings of each row."""
    made = ClipperSettings.make("Clipper", rule, history_length=history_length)
    return [made.default] * rows


def in_numpy(rule: Rule, rows: int, history_length: int) -> int:
    """Memory that Python allocates for a history in the core, which PyTorch's CPU path uses too."""
    windows = list(np.random.default_rng(0).lognormal(size=(rows, history_length)))
    each = settings(rule, rows, history_length)
    history = History.of(each[:1])  # modules and caches are there already
    history.record([1.0])
    tracemalloc.start()
    history = History.of(each)
    history.write(range(rows), windows, [history_length] * rows)
    history.record(np.ones(rows))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


def in_torch(rule: Rule, rows: int, history_length: int) -> int:
    """The tensors of PyTorch's device path, here on the CPU."""
    history = TorchHistory(settings(rule, rows, history_length), torch.device("cpu"))
    windows = np.random.default_rng(0).lognormal(size=(rows, history_length)).astype(np.float32)
    history.write(range(rows), list(windows), [history_length] * rows)
    return sum(tensor.nbytes for tensor in _values(history, torch.Tensor))


def in_tensorflow(rule: Rule, rows: int, history_length: int) -> int:
    """The variables of TensorFlow's histories, which are allocated in full."""
    history = TensorFlowHistory(settings(rule, rows, history_length))
    variables = _values(history, tf.Variable)
    return sum(int(np.prod(each.shape)) * each.dtype.size for each in variables)


def _values(history: object, kind: type) -> Iterator[object]:
    """The attributes of a kind, also those of what the history holds."""
    for value in vars(history).values():
        inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        inner = inner.get("_variables", inner)
        for found in (value, *inner.values()):
            if isinstance(found, kind):
                yield found


BACKENDS: dict[str, Callable[[Rule, int, int], int]] = {
    "NumPy (and PyTorch on the CPU)": in_numpy,
    "PyTorch on a device": in_torch,
    "TensorFlow": in_tensorflow,
}


def main() -> None:
    """Print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(
        f"{'':<32}{'rule':<10}{'rows':>6}{'history_length':>16}{'bytes a norm':>14}{'beyond 8':>12}"
    )
    for name, measure in BACKENDS.items():
        for rule in RULES:
            for rows, length in SIZES:
                size = measure(rule, rows, length)
                if size < 4 * rows * length:
                    raise RuntimeError(f"{name} holds its norms where this does not look")
                beyond = max(0.0, size - 8 * rows * length) / rows
                print(
                    f"{name:<32}{rule.name:<10}{rows:>6}{length:>16,}"
                    f"{size / rows / length:>14.2f}{beyond:>7.0f} a row",
                    flush=True,
                )


if __name__ == "__main__":
    main()
