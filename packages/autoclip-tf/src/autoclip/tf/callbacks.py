"""A Keras callback that logs what AutoClip does, and reports faults that XLA cannot."""

from __future__ import annotations

from typing import Any

import keras

from autoclip.tf._attach import optimizers_in
from autoclip.tf._clipper import Clipper
from autoclip.tf.logging import log_values

__all__ = ["AutoClipCallback"]


class AutoClipCallback(keras.callbacks.Callback):
    """Log the clipper's numbers at the end of each epoch, and check it after each batch.

    The three values of `autoclip.tf.logging.log_values` for the epoch's last step join Keras's
    own logs, so they are in `History` and in the logs of every callback after this one, such as
    `CSVLogger` and `TensorBoard`. It calls the clipper's `check` after each batch; with
    `on_nonfinite="raise"` that waits for the device.

    Args:
        clipper: the clipper to log. None for that of the model's optimizer; give it if a model has
            several optimizers, and one callback for each.
        prefix: what the names of the values begin with, such as `"generator/"`.

    Raises:
        TypeError: `clipper` is not a clipper.
        ValueError: at the start of the training, if the model's optimizer has no clipper, or
            several have one.

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
    ['autoclip/clipped', 'autoclip/threshold', 'autoclip/total_norm', 'loss']
    """

    def __init__(self, clipper: Clipper | None = None, prefix: str = "") -> None:
        super().__init__()
        if not (clipper is None or isinstance(clipper, Clipper)):
            raise TypeError(
                f"AutoClipCallback takes a clipper, such as optimizer.clipper, but got "
                f"{clipper!r:.200} of type {type(clipper).__name__}."
            )
        self._given = clipper
        self._prefix = prefix

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

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise if the gradient was not finite; Keras calls this."""
        self.clipper.check()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add to the logs; Keras calls this."""
        if logs is not None:
            values = log_values(self.clipper)
            logs.update({f"{self._prefix}{name}": value for name, value in values.items()})
