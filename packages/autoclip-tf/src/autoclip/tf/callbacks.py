"""A Keras callback that logs what AutoClip does, and reports faults that XLA cannot."""

from __future__ import annotations

from typing import Any

import keras

from autoclip.tf._clipper import Clipper
from autoclip.tf.logging import log_values

__all__ = ["AutoClipCallback"]


class AutoClipCallback(keras.callbacks.Callback):
    """Log the clipper's numbers at the end of each epoch, and check it after each batch.

    The three values of `autoclip.tf.logging.log_values` for the epoch's last step join Keras's
    own logs, so they stand in `History` and in the logs of every callback after this one, such as
    `CSVLogger` and `TensorBoard`. With `on_nonfinite="raise"` it calls the clipper's `check` after
    each batch, which waits for the device.

    Raises:
        ValueError: at the start of the training, if the model's optimizer has no clipper.

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

    @property
    def clipper(self) -> Clipper:
        """The clipper of the model's optimizer."""
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        clipper = getattr(optimizer, "clipper", None)
        if not isinstance(clipper, Clipper):
            raise ValueError(
                "AutoClipCallback logs what a clipper does, but the model's optimizer has none. "
                "Compile with optimizer=QuantileClip.as_optimizer(optimizer)."
            )
        return clipper

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the clipper; Keras calls this."""
        _ = self.clipper

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise if the gradient was not finite; Keras calls this."""
        self.clipper.check()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add to the logs; Keras calls this."""
        if logs is not None:
            logs.update(log_values(self.clipper))
