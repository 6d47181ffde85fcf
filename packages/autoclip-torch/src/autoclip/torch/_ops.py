"""PyTorch's operations for the step and the rules; none of them synchronizes with the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core.adapter import Ops


def uses_numpy(device: torch.device) -> bool:
    """True if norms and histories of gradients on `device` are NumPy arrays.

    On the CPU that takes no copy, and nothing there is asynchronous.
    """
    return device.type == "cpu"


def norm_dtype(device: torch.device) -> torch.dtype:
    """The widest float that `device` computes in: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_tensor(values: npt.NDArray[Any] | Tensor) -> Tensor:
    """An array or tensor as a tensor on its own device.

    `torch.as_tensor` would move it to the device of `torch.set_default_device`.
    """
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


class TorchOps(Ops):
    """Operations on tensors on one device; donated tensors are changed in place.

    Args:
        device: the device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dtype = norm_dtype(device)
        # Constants stay where a captured CUDA graph reads them.
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._full: dict[tuple[int, float], Tensor] = {}

    def narrow(self, x: Any) -> Any:
        return x.float()

    def wide(self, x: Any) -> Any:
        return x.to(self._dtype)

    def whole(self, x: Any) -> Any:
        return x.long()

    def where(self, condition: Any, x: Any, y: Any, into: Any = None) -> Any:
        if into is None:
            return torch.where(condition, x, y)
        return torch.where(condition, x, y, out=into)

    def minimum(self, x: Any, y: Any) -> Any:
        return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)

    def maximum(self, x: Any, y: Any) -> Any:
        return torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp(min=y)

    def log(self, x: Any) -> Any:
        return x.log()

    def exp(self, x: Any) -> Any:
        return x.exp()

    def sum(self, x: Any) -> Any:
        return x.sum(dim=1, keepdim=True)

    def sort(self, x: Any) -> Any:
        return x.sort(dim=1).values

    def concat(self, parts: list[Any]) -> Any:
        return torch.cat(parts, dim=1)

    def full(self, rows: int, value: float) -> Any:
        if (rows, value) not in self._full:
            self._full[rows, value] = torch.full(
                (rows, 1), value, dtype=torch.float32, device=self.device
            )
        return self._full[rows, value]

    def column(self, x: Any, rows: int) -> Any:
        if not isinstance(x, Tensor):  # a rule may return a constant
            return torch.full((rows, 1), x, dtype=self._dtype, device=self.device)
        return x.expand(rows, 1)

    def slots(self, count: int) -> Any:
        if len(self._slots) < count:
            self._slots = torch.arange(count, device=self.device)
        return self._slots[:count]

    def take(self, x: Any, index: Any) -> Any:
        return x.gather(1, index)

    def put(self, x: Any, index: Any, value: Any) -> Any:
        return x.scatter_(1, index, value)
