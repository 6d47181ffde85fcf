"""The two clippers that users know by name: `Clipper` with a built-in rule's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoclip.core import Quantile, Standard
from autoclip.core.adapter import warn_user
from autoclip.torch._clipper import Clipper
from autoclip.torch._parameters import ParamsT

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from autoclip.core.adapter import QuantileSettings, StandardSettings

__all__ = ["QuantileClip", "StandardClip"]


class QuantileClip(Clipper):
    """Clip each gradient to a quantile of the history of its norms.

    At each step the gradient's L2 norm is appended to its history, and the gradient is multiplied
    by `min(1, threshold / norm)`, the threshold being the quantile of the history with linear
    interpolation. Seetharaman, Wichern, Pardo, Le Roux: "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", MLSP 2020, arXiv:2007.14469, Algorithm 1.

    Args:
        parameters: see `Clipper`.
        quantile: a real number in [0, 1]; 1 never clips, lower values clip more often.
        history_length: how many norms each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each parameter.
        global_threshold: the name of `global_clipping` in autoclip 0.2.1; deprecated.
        settings: `factor` (1.0), what the quantile is multiplied by, and those of `Clipper`.

    Raises:
        TypeError, ValueError: see `Clipper`.

    >>> import torch
    >>> from autoclip.torch import QuantileClip
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = QuantileClip([weight], quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> total_norm, weight.grad.norm()
    (tensor(9.), tensor(2.))
    """

    def __init__(
        self,
        parameters: ParamsT,
        quantile: float = 0.9,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        global_threshold: bool | None = None,
        **settings: Unpack[QuantileSettings],
    ) -> None:
        self._set_up(
            Quantile,
            parameters,
            quantile=quantile,
            history_length=history_length,
            global_clipping=_renamed(global_clipping, global_threshold),
            **settings,
        )


class StandardClip(Clipper):
    """Clip each gradient to some standard deviations above the mean of its norms' history.

    The threshold is `mean + deviations * std` (population deviation) of the norms before the
    current one, once 25 have been recorded; see `include_current` and `warmup_steps`.

    Args:
        parameters: see `Clipper`.
        deviations: a finite real number ≥ 0.
        history_length: how many norms each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together instead of one for each
            parameter.
        global_threshold: the name of `global_clipping` in autoclip 0.2.1; deprecated.
        settings: `decay` (None), `factor` (1.0), `shrink` (False) and `log` (False), see
            `autoclip.core.Standard`, and those of `Clipper`.

    Raises:
        TypeError, ValueError: see `Clipper`.

    >>> import torch
    >>> from autoclip.torch import StandardClip
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = StandardClip([weight], deviations=1.0, warmup_steps=2)
    >>> for size in (2.0, 6.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)
    ...     total_norm = clipper.step()
    >>> clipper.last.thresholds  # of the norms 2 and 6 the mean is 4, the deviation 2
    tensor([6.])
    """

    def __init__(
        self,
        parameters: ParamsT,
        deviations: float = 2.0,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        global_threshold: bool | None = None,
        **settings: Unpack[StandardSettings],
    ) -> None:
        self._set_up(
            Standard,
            parameters,
            deviations=deviations,
            history_length=history_length,
            global_clipping=_renamed(global_clipping, global_threshold),
            **settings,
        )


def _renamed(global_clipping: bool, global_threshold: bool | None) -> bool:
    """`global_clipping`, or what autoclip 0.2.1 called so."""
    if global_threshold is None:
        return global_clipping
    warn_user("global_threshold is called global_clipping now.", DeprecationWarning)
    return global_threshold
