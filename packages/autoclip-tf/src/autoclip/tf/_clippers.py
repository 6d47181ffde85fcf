"""The clippers by name: one class a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from autoclip.core import (
    DEFAULT_DEVIATIONS,
    DEFAULT_HISTORY_LENGTH,
    DEFAULT_QUANTILE,
    OnNonfinite,
    Quantile,
    Standard,
)
from autoclip.tf._clipper import Clipper

__all__ = ["QuantileClip", "StandardClip"]

_COMMON = """
    Args:
        {setting}: {meaning}
        history_length: how many norms each history keeps, the newest ones; an int ≥ 1. Memory for
            all of them, 8 bytes each and variable, is taken at once.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each variable.
        on_nonfinite: what happens to a gradient that holds a NaN or an infinity; its norm is
            recorded in no case. `"keep"`: it is left as it is. `"zero"`: it is set to zero.
            `"raise"`: FloatingPointError, in a graph `tf.errors.InvalidArgumentError`; compiled
            by XLA it is set to zero, and `check` raises.
        param_groups: settings for some of the variables, such as
            `[{{"match": "embedding", "{setting}": {value}}}]`: a regular expression that is
            searched in the variable's `path`, or in its `name` if it has none. The first group
            that matches counts.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting has the wrong value.
"""


@keras.saving.register_keras_serializable("autoclip")
class QuantileClip(Clipper):
    __doc__ = (
        """Clip each gradient to a quantile of the history of its norms.

    At each step the gradient's L2 norm is appended to its history, and the gradient is multiplied
    by `min(1, threshold / norm)`, the threshold being the quantile of the history with linear
    interpolation. Seetharaman, Wichern, Pardo, Le Roux: "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", MLSP 2020, arXiv:2007.14469, Algorithm 1.
"""
        + _COMMON.format(
            setting="quantile",
            value=0.5,
            meaning="a real number in [0, 1]; 1 never clips, lower values clip more often.",
        )
        + """
    >>> import tensorflow as tf
    >>> from autoclip.tf import QuantileClip
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = QuantileClip(quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     gradient = tf.fill([4], size / 2)  # a norm of 1, 2, 9
    ...     [(clipped, _)] = clipper([(gradient, weight)])
    >>> float(tf.norm(clipped))
    2.0
    """
    )

    _rule_class = Quantile

    def __init__(
        self,
        quantile: float = DEFAULT_QUANTILE,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        on_nonfinite: OnNonfinite = "keep",
        param_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            Quantile(quantile), history_length, global_clipping, on_nonfinite, param_groups
        )

    @classmethod
    def as_optimizer(
        cls,
        optimizer: Any,
        quantile: float = DEFAULT_QUANTILE,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        on_nonfinite: OnNonfinite = "keep",
        param_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> Any:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        Learning-rate schedules, callbacks, `isinstance` and hyperparameters go on working. The
        clipper is `optimizer.clipper`; its state is saved wherever the optimizer's is.

        Args:
            optimizer: a Keras optimizer. Of a `LossScaleOptimizer` the inner one gets the clipper.
            quantile: see the class.
            history_length: see the class.
            global_clipping: see the class.
            on_nonfinite: see the class.
            param_groups: see the class.

        Raises:
            TypeError: it is no optimizer of Keras on TensorFlow, or one with optimizers inside,
                or a setting has the wrong type.
            ValueError: a setting has the wrong value.
            RuntimeError: the optimizer has a clipper already.
        """
        return cls._attached(
            optimizer,
            quantile=quantile,
            history_length=history_length,
            global_clipping=global_clipping,
            on_nonfinite=on_nonfinite,
            param_groups=param_groups,
        )


@keras.saving.register_keras_serializable("autoclip")
class StandardClip(Clipper):
    __doc__ = (
        """Clip each gradient to some standard deviations above its history's mean norm.

    Like `QuantileClip`, with the threshold `mean + deviations * std` (population deviation).
"""
        + _COMMON.format(
            setting="deviations",
            value=3.0,
            meaning="a finite real number ≥ 0.",
        )
        + """
    >>> import tensorflow as tf
    >>> from autoclip.tf import StandardClip
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = StandardClip(deviations=1.0)
    >>> for size in (2.0, 6.0):
    ...     pairs = clipper([(tf.fill([4], size / 2), weight)])
    >>> clipper.last.thresholds.numpy()  # the mean is 4, the deviation 2
    array([6.], dtype=float32)
    """
    )

    _rule_class = Standard

    def __init__(
        self,
        deviations: float = DEFAULT_DEVIATIONS,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        on_nonfinite: OnNonfinite = "keep",
        param_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            Standard(deviations), history_length, global_clipping, on_nonfinite, param_groups
        )

    @classmethod
    def as_optimizer(
        cls,
        optimizer: Any,
        deviations: float = DEFAULT_DEVIATIONS,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        on_nonfinite: OnNonfinite = "keep",
        param_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> Any:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        See `QuantileClip.as_optimizer`; with `deviations` instead of a quantile.
        """
        return cls._attached(
            optimizer,
            deviations=deviations,
            history_length=history_length,
            global_clipping=global_clipping,
            on_nonfinite=on_nonfinite,
            param_groups=param_groups,
        )
