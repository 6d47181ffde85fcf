"""The clippers by name: one class a rule."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer

from autoclip.core import (
    DEFAULT_DEVIATIONS,
    DEFAULT_HISTORY_LENGTH,
    DEFAULT_QUANTILE,
    OnNonfinite,
    Quantile,
    Standard,
)
from autoclip.torch._clipper import Clipper, ParamsT

__all__ = ["QuantileClip", "StandardClip"]

_COMMON = """
    Args:
        parameters: tensors, `named_parameters()` pairs, or group dicts such as
            `{{"params": [...], "{setting}": {value}}}`, as torch's optimizers take them.
        {setting}: {meaning}
        history_length: how many norms each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each parameter.
        on_nonfinite: what happens to a gradient that holds a NaN or an infinity; its norm is
            recorded in no case. `"keep"`: it is left as it is. `"zero"`: it is set to zero.
            `"raise"`: FloatingPointError, at the price of waiting for the device at each step.

    Raises:
        TypeError: a setting or a parameter has the wrong type.
        ValueError: a setting has the wrong value, `parameters` is empty or holds one twice.
"""


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
    )

    _rule_class = Quantile

    def __init__(
        self,
        parameters: ParamsT,
        quantile: float = DEFAULT_QUANTILE,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        *,
        on_nonfinite: OnNonfinite = "keep",
        global_threshold: bool | None = None,
    ) -> None:
        global_clipping = _renamed(global_clipping, global_threshold)
        super().__init__(
            parameters, Quantile(quantile), history_length, global_clipping, on_nonfinite
        )

    @classmethod
    def as_optimizer(
        cls,
        optimizer: Optimizer,
        quantile: float = DEFAULT_QUANTILE,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        *,
        on_nonfinite: OnNonfinite = "keep",
        global_threshold: bool | None = None,
    ) -> Any:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        Schedulers, `GradScaler`, trainers and `isinstance` go on working. The clipper is
        `optimizer.clipper`, its groups are the optimizer's, one to one, and its state travels in
        `optimizer.state_dict()["autoclip"]`. Copies and pickles of the optimizer are not
        attached: torch drops an optimizer's hooks.

        Args:
            optimizer: a torch optimizer. A group of its own with a `"quantile"` or a
                `"history_length"` overrides the setting for that group.
            quantile: see the class.
            history_length: see the class.
            global_clipping: see the class.
            on_nonfinite: see the class; `"keep"` whenever a loss scaler is at work.
            global_threshold: the name of `global_clipping` in autoclip 0.2.1; deprecated.

        Raises:
            TypeError: it is no torch optimizer, or a setting has the wrong type.
            ValueError: a setting has the wrong value.
            RuntimeError: the optimizer has a clipper already.
        """
        global_clipping = _renamed(global_clipping, global_threshold)
        return cls._attached(
            optimizer, Quantile(quantile), history_length, global_clipping, on_nonfinite
        )


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
    >>> import torch
    >>> from autoclip.torch import StandardClip
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = StandardClip([weight], deviations=1.0)
    >>> for size in (2.0, 6.0):
    ...     weight.grad = torch.full((4,), size / 2)
    ...     total_norm = clipper.step()
    >>> clipper.last.thresholds  # the mean is 4, the deviation 2
    tensor([6.])
    """
    )

    _rule_class = Standard

    def __init__(
        self,
        parameters: ParamsT,
        deviations: float = DEFAULT_DEVIATIONS,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        *,
        on_nonfinite: OnNonfinite = "keep",
        global_threshold: bool | None = None,
    ) -> None:
        global_clipping = _renamed(global_clipping, global_threshold)
        super().__init__(
            parameters, Standard(deviations), history_length, global_clipping, on_nonfinite
        )

    @classmethod
    def as_optimizer(
        cls,
        optimizer: Optimizer,
        deviations: float = DEFAULT_DEVIATIONS,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        *,
        on_nonfinite: OnNonfinite = "keep",
        global_threshold: bool | None = None,
    ) -> Any:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        See `QuantileClip.as_optimizer`; `deviations` stands in the place of `quantile`.
        """
        global_clipping = _renamed(global_clipping, global_threshold)
        return cls._attached(
            optimizer, Standard(deviations), history_length, global_clipping, on_nonfinite
        )


def _renamed(global_clipping: bool, global_threshold: bool | None) -> bool:
    """`global_clipping`, or what autoclip 0.2.1 called so."""
    if global_threshold is None:
        return global_clipping
    warnings.warn(
        "global_threshold is called global_clipping now.", DeprecationWarning, stacklevel=3
    )
    return global_threshold
