"""A Keras callback that logs norms and thresholds, and reports faults that XLA cannot."""

from __future__ import annotations

import re
from typing import Any

import keras
import tensorflow as tf

from autoclip.core.adapter import (
    EQUAL,
    MANY,
    check_parameters,
    constant_notice,
    idle_notice,
    warn_user,
)
from autoclip.tf._attachment import optimizers_in
from autoclip.tf._clipper import Clipper
from autoclip.tf._sums import Sums

__all__ = ["AutoClipCallback"]


class AutoClipCallback(keras.callbacks.Callback):
    """Log norms and clipping after each epoch or batch, and check the clipper after each batch.

    The values of `autoclip.tf.logging.log_values` join Keras's own logs, so they are in `History`
    and in the logs of every callback after this one, such as `CSVLogger` and `TensorBoard`. They
    are means over the optimizer's updates, each of which counts once: of an epoch at its end, of
    the batches since the last ones during it. `"autoclip/clipped"` is then the share of gradients
    that were clipped. Norms that are not finite do not count; a mean over nothing is NaN.

    The sums stay inside the graph, also with `steps_per_execution`, and are read once an epoch.
    With `on_nonfinite="raise"`, the callback calls the clipper's `check` after each batch, which
    waits for the device.

    At the end of an epoch it warns, once each, if updates passed by the clipper or are missing in
    the logs, if no update recorded a norm, or if the total norm did not vary, since something clips
    first.

    Args:
        clipper: the clipper to log. None for that of the model's optimizer; give it if a model has
            several optimizers, and one callback for each.
        prefix: the beginning of the values' names, such as `"generator/"`.
        update_freq: `"epoch"`, or `"batch"` to log values after each batch as well, or an int to
            log them each time that number of batches has passed; batches without an update have
            none. With `steps_per_execution`, Keras calls the callback once for several batches,
            which count as one. Each of these waits for the device.
        log_parameters: True to log values for each variable; a string is a regular expression
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
                f"clipper must be a clipper, such as optimizer.clipper, got {clipper!r:.200} "
                f"({type(clipper).__name__})."
            )
        check_parameters(log_parameters)
        self._given = clipper
        self._logged: Clipper | None = None
        self._prefix = prefix
        self._every = _batches_between(update_freq)
        self._parameters = log_parameters
        self._batches = 0
        # Of the epoch, and since values of batches were logged.
        self._epoch, self._batch = Sums(), Sums()
        self._before = (0, 0)
        self._said: set[str] = set()

    @property
    def clipper(self) -> Clipper:
        """The clipper that was given, or that of the model's optimizer as training began."""
        if known := self._given or self._logged:
            return known
        found = [
            optimizer.clipper
            for optimizer in optimizers_in(getattr(self.model, "optimizer", None))
            if isinstance(getattr(optimizer, "clipper", None), Clipper)
        ]
        if not found:
            raise ValueError(
                "AutoClipCallback logs values of a clipper, but the model's optimizer has none. "
                "Compile with optimizer=QuantileClip.as_optimizer(optimizer). If the model has "
                "optimizers of its own, give the clipper: AutoClipCallback(clipper="
                "model.my_optimizer.clipper)."
            )
        if len(found) > 1:
            raise ValueError(
                f"The model's optimizer has {len(found)} clippers. Give each its own callback: "
                'AutoClipCallback(clipper=optimizer.clipper, prefix="first/").'
            )
        return found[0]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the clipper and add up its steps from now on; Keras calls this."""
        self._logged = None  # that of a training before, of which the model may be another
        self._logged = self.clipper
        sums = self.clipper._sums
        sums.enabled = True
        self._epoch, self._batch = sums.open(), sums.open()
        # In a custom training loop there may be no model.
        if isinstance(self.model, keras.Model) and self.model not in sums.models:
            # A step that was traced before adds up nothing. Keras has made the function for this
            # training already, and traces it at its first call.
            self.model.make_train_function(force=True)
            sums.models.add(self.model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin the epoch's means; Keras calls this."""
        self._epoch.clear()
        self._before = self._counts()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise if the gradient was not finite, and log; Keras calls this."""
        self.clipper.check()
        self._batches += 1
        if self._every and self._batches % self._every == 0:
            self.clipper._sums.read()
            if logs is not None and self._batch.steps:
                logs.update(self._values(self._batch))
            self._batch.clear()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the epoch's means to the logs; Keras calls this."""
        self.clipper._sums.read()
        if logs is not None and self.clipper.built:
            logs.update(self._values(self._epoch))
        self._look(self._epoch)

    def _values(self, sums: Sums) -> dict[str, float]:
        values = {
            "autoclip/total_norm": sums.total_norm,
            "autoclip/clipped_norm": sums.clipped_norm,
            "autoclip/clipped": sums.clipped,
        }
        names = self.clipper._groups.row_names()
        if len(names) == 1:
            values["autoclip/threshold"] = float(sums.thresholds[0])
        if self._parameters is not False and not self.clipper.global_clipping:
            pattern = "" if self._parameters is True else self._parameters
            for name, norm, threshold in zip(names, sums.norms, sums.thresholds):
                if re.search(pattern, name):
                    values[f"autoclip/norm/{name}"] = float(norm)
                    values[f"autoclip/threshold/{name}"] = float(threshold)
        return {f"{self._prefix}{name}": value for name, value in values.items()}

    # -- faults that an epoch shows -----------------------------------------------------------

    def _counts(self) -> tuple[int, int]:
        """The number of updates of the optimizer, and of steps of the clipper."""
        attachment, last = self.clipper._attachment, self.clipper._last
        optimizer = None if attachment is None else attachment.optimizer
        updates = 0 if optimizer is None else int(tf.convert_to_tensor(optimizer.iterations))
        return updates, 0 if last is None else last.steps

    def _look(self, sums: Sums) -> None:
        updates, seen = (now - before for now, before in zip(self._counts(), self._before))
        if updates > 0 and not seen:
            self._say(
                "unseen",
                f"{updates} updates passed by the clipper in this epoch, unclipped: the training "
                "step was traced before the clipper was attached. Attach it before the first step, "
                "or call model.compile again.",
            )
        elif seen and not sums.steps:
            self._say(
                "unlogged",
                f"{seen} updates of this epoch are missing in the logs: your tf.function was "
                "traced before on_train_begin of AutoClipCallback. Use it from the first step, or "
                "create the function again.",
            )
        elif sums.steps >= MANY and not sums.recorded:
            self._say("idle", idle_notice(f"{sums.steps} updates in a row", sums.total_norm))
        elif sums.steps >= MANY and sums.spread < EQUAL:
            which = f"those of all {sums.steps} updates in this epoch"
            self._say("constant", constant_notice(which, sums.total_norm))

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn_user(message)


def _batches_between(update_freq: str | int) -> int:
    """The number of batches from one whose values are logged to the next; 0 for none."""
    takes = f'update_freq must be "epoch", "batch" or an int ≥ 1, got {update_freq!r:.200}'
    if isinstance(update_freq, bool) or not isinstance(update_freq, (str, int)):
        raise TypeError(f"{takes} ({type(update_freq).__name__}).")
    if update_freq == "epoch":
        return 0
    if update_freq == "batch":
        return 1
    if isinstance(update_freq, str) or update_freq < 1:
        raise ValueError(f"{takes}.")
    return update_freq
