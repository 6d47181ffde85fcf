"""The clippers by name: one class for each rule that is built in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from autoclip.core import Quantile, Standard
from autoclip.core.adapter import QuantileSettings, StandardSettings
from autoclip.tf._clipper import Clipper

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["QuantileClip", "StandardClip"]


@keras.saving.register_keras_serializable("autoclip")
class QuantileClip(Clipper):
    """Clip each gradient to a quantile of the history of its norms (AutoClip).

    At each step the gradient's L2 norm is appended to its history, and the gradient is multiplied
    by `min(1, threshold / norm)`, the threshold being the quantile of the history with linear
    interpolation. Seetharaman, Wichern, Pardo, Le Roux: "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", MLSP 2020, arXiv:2007.14469, Algorithm 1.

    Args:
        quantile: a real number in [0, 1]; 1 never clips, lower values clip more often.
        history_length: see `Clipper`, as for the rest.
        global_clipping: see `Clipper`.
        group_settings: see `Clipper`; such as `[{"match": "embedding", "quantile": 0.5}]`.
        settings: `factor`, what the quantile is multiplied by, and those of `Clipper`.

    Raises:
        TypeError, ValueError: as `Clipper`.

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

    def __init__(
        self,
        quantile: float = 0.9,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_settings: Sequence[Mapping[str, Any]] | None = None,
        **settings: Unpack[QuantileSettings],
    ) -> None:
        self._set_up(
            Quantile,
            group_settings,
            quantile=quantile,
            history_length=history_length,
            global_clipping=global_clipping,
            **settings,
        )

    def _rule_config(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings


@keras.saving.register_keras_serializable("autoclip")
class StandardClip(Clipper):
    """Clip each gradient to some standard deviations above the mean of its earlier norms.

    Like `QuantileClip`, with the threshold `factor * (mean + deviations * std)` of the norms of
    the steps before; the first 25 steps are not clipped (`warmup_steps`).

    Args:
        deviations: a finite real number ≥ 0.
        history_length: see `Clipper`, as for the rest.
        global_clipping: see `Clipper`.
        group_settings: see `Clipper`; such as `[{"match": "embedding", "deviations": 3.0}]`.
        settings: `decay`, `factor`, `shrink` and `log`, see `autoclip.core.Standard`, and those of
            `Clipper`.

    Raises:
        TypeError, ValueError: as `Clipper`.

    >>> import tensorflow as tf
    >>> from autoclip.tf import StandardClip
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = StandardClip(deviations=1.0, warmup_steps=2)
    >>> for size in (2.0, 6.0, 9.0):
    ...     pairs = clipper([(tf.fill([4], size / 2), weight)])
    >>> clipper.last.thresholds.numpy()  # the mean is 4, the deviation 2
    array([6.], dtype=float32)
    """

    def __init__(
        self,
        deviations: float = 2.0,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_settings: Sequence[Mapping[str, Any]] | None = None,
        **settings: Unpack[StandardSettings],
    ) -> None:
        self._set_up(
            Standard,
            group_settings,
            deviations=deviations,
            history_length=history_length,
            global_clipping=global_clipping,
            **settings,
        )

    def _rule_config(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings
