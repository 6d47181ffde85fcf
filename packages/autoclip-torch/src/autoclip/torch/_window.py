"""What a rule sees of a `TensorHistory`: windows of norms as tensors on a device."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autoclip.core.adapter import Window

__all__ = ["TensorWindow"]


class TensorWindow(Window[Tensor]):
    """Windows as tensors. Nothing here waits for the device.

    Args:
        values: float32[rows, capacity], the norms in rings, infinite past the end of a window.
        ordered: the same in ascending order, if it is kept; else None.
        lengths: int64[rows], how many norms each window holds.
        newest: int64[rows], where the newest norm of each row lies.
        dtype: what to compute in.
    """

    def __init__(
        self,
        values: Tensor,
        ordered: Tensor | None,
        lengths: Tensor,
        newest: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._values = values
        self._ordered = ordered
        self._lengths = lengths
        self._newest = newest
        self._dtype = dtype

    @cached_property
    def norms(self) -> Tensor:  # type: ignore[override]
        """See `Window`; converted only for rules that ask."""
        return self._values.to(self._dtype)

    @cached_property
    def count(self) -> Tensor:  # type: ignore[override]
        """See `Window`."""
        return self._lengths.clamp(min=1)[:, None].to(self._dtype)

    @cached_property
    def age(self) -> Tensor:  # type: ignore[override]
        """See `Window`; computed only for rules that ask."""
        count = self._lengths.clamp(min=1)[:, None]
        return torch.remainder(self._newest[:, None] - self._places, count).to(self._dtype)

    @cached_property
    def _places(self) -> Tensor:
        return torch.arange(self._values.shape[1], device=self._values.device)

    @cached_property
    def _valid(self) -> Tensor:
        return self._places < self._lengths[:, None]

    def sum(self, values: Any = None) -> Tensor:
        """See `Window.sum`."""
        given = self.norms if values is None else values
        return torch.where(self._valid, given, 0.0).sum(dim=1, keepdim=True)

    def quantile(self, q: Any, values: Any = None) -> Tensor:
        """See `Window.quantile`."""
        if values is not None:
            ordered = torch.where(self._valid, values, torch.inf).sort(dim=1).values
        elif self._ordered is None:
            ordered = self._values.sort(dim=1).values
        else:
            ordered = self._ordered
        last = self.count - 1
        position = q * last
        lower = position.long()
        upper = torch.minimum(lower + 1, last.long())
        a = ordered.gather(1, lower).to(self._dtype)
        b = ordered.gather(1, upper).to(self._dtype)
        t, difference = position - lower, b - a
        # From the nearer one: the same bits as `numpy.quantile`.
        return torch.where(t < 0.5, a + difference * t, b - difference * (1 - t))
