"""A Keras callback that logs what AutoClip does, and reports faults that XLA cannot."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import keras

from autoclip.core.adapter import check_parameters
from autoclip.tf._attach import optimizers_in
from autoclip.tf._clipper import Clipper
from autoclip.tf.logging import log_values

__all__ = ["AutoClipCallback"]


class AutoClipCallback(keras.callbacks.Callback):
    """Log what the clipper does, at the end of each epoch or batch, and check it after each batch.

    The values of `autoclip.tf.logging.log_values` join Keras's own logs, so they are in `History`
    and in the logs of every callback after this one, such as `CSVLogger` and `TensorBoard`. At the
    end of an epoch they are means over its batches, as Keras's losses are: `"autoclip/clipped"` is
    the share of gradients that were clipped in the epoch. Batches where a value is not finite do
    not count. With `steps_per_execution=n`, only every n-th batch is seen.

    The callback calls the clipper's `check` after each batch. Keras waits for each batch's loss
    when there is such a callback; to read the clipper's values then adds no wait of its own.

    Args:
        clipper: the clipper to log. None for that of the model's optimizer; give it if a model has
            several optimizers, and one callback for each.
        prefix: what the names of the values begin with, such as `"generator/"`.
        update_freq: `"epoch"`, or `"batch"` to log each batch's values as well, or an int to log
            those of every so many batches, as in `keras.callbacks.TensorBoard`.
        log_parameters: whether to log values for each variable; a string is a regular expression
            that is searched in their names. See `log_values`.

    Raises:
        TypeError: `clipper` is not a clipper, or another argument has the wrong type.
        ValueError: `update_freq` or `log_parameters` has a wrong value, or, at the start of
            the training, the model's optimizer has no clipper, or several have one.

    >>> import keras
    >>> import numpy as np
    >>> from autoclip.tf import QuantileClip
    >>> from autoclip.tf.callbacks import AutoClipCallback
    >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(QuantileClip.as_optimizer(keras.optimizers.SGD()), loss="mse")
    >>> history = model.fit(
    ...     np.ones((8, 3)), np.ones((8, 1)), callbacks=[AutoClipCallback()], verbose=0
    ... )
    >>> sorted(history.history)
    ['autoclip/clipped', 'autoclip/clipped_norm', 'autoclip/total_norm', 'loss']
    """

    def __init__(
        self,
        clipper: Clipper | None = None,
        prefix: str = "",
        *,
        update_freq: str | int = "epoch",
        log_parameters: bool | str = False,
    ) -> None:
        super().__init__()
        if not (clipper is None or isinstance(clipper, Clipper)):
            raise TypeError(
                f"AutoClipCallback takes a clipper, such as optimizer.clipper, but got "
                f"{clipper!r:.200} of type {type(clipper).__name__}."
            )
        check_parameters(log_parameters)
        self._given = clipper
        self._prefix = prefix
        self._every = _batches_between(update_freq)
        self._parameters = log_parameters
        self._batches = 0
        self._seen: dict[str, list[float]] = defaultdict(list)

    @property
    def clipper(self) -> Clipper:
        """The clipper that was given, or that of the model's optimizer."""
        if self._given is not None:
            return self._given
        found = [
            optimizer.clipper
            for optimizer in optimizers_in(self.model.optimizer)
            if isinstance(getattr(optimizer, "clipper", None), Clipper)
        ]
        if not found:
            raise ValueError(
                "AutoClipCallback logs what a clipper does, but the model's optimizer has none. "
                "Compile with optimizer=QuantileClip.as_optimizer(optimizer)."
            )
        if len(found) > 1:
            raise ValueError(
                f"The model's optimizer has {len(found)} clippers. Give each its own callback: "
                'AutoClipCallback(clipper, prefix="first/").'
            )
        return found[0]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the clipper; Keras calls this."""
        _ = self.clipper

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin the epoch's means; Keras calls this."""
        self._seen = defaultdict(list)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise if the gradient was not finite, and log; Keras calls this."""
        clipper = self.clipper
        clipper.check()
        values = log_values(clipper, self._parameters)
        for name, value in values.items():
            self._seen[name].append(value)
        self._batches += 1
        if logs is not None and self._every and self._batches % self._every == 0:
            logs.update({f"{self._prefix}{name}": value for name, value in values.items()})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the epoch's means to the logs; Keras calls this."""
        if logs is not None:
            logs.update(
                {f"{self._prefix}{name}": _mean(values) for name, values in self._seen.items()}
            )


def _batches_between(update_freq: str | int) -> int:
    """How many batches there are from one whose values are logged to the next; 0 for none."""
    takes = f'update_freq takes "epoch", "batch" or an int ≥ 1, but got {update_freq!r:.200}'
    if isinstance(update_freq, bool) or not isinstance(update_freq, (str, int)):
        raise TypeError(f"{takes} of type {type(update_freq).__name__}.")
    every = {"epoch": 0, "batch": 1}.get(update_freq) if isinstance(update_freq, str) else None
    if every is not None:
        return every
    if isinstance(update_freq, str) or update_freq < 1:
        raise ValueError(f"{takes}.")
    return update_freq


def _mean(values: list[float]) -> float:
    """The mean of those that are finite, or the last one if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else values[-1]
