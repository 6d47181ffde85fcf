"""A plan for the gradients of a clipper: made once, and followed at each step while it fits.

From one step to the next the numbers in the gradients change, and hardly ever anything else. Which
of them are small, where they go in a buffer and in which rows they are summed is therefore worked
out once. At each step `Plan.fits` compares what the plan was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoclip.torch._norms import CpuNorms, DeviceNorms
from autoclip.torch._scaling import CpuScaling, DeviceScaling

__all__ = ["CpuPlan", "DevicePlan", "Plan"]


class CpuPlan(NamedTuple):
    """How the gradients in the CPU's memory are measured and scaled, with NumPy arrays."""

    norms: CpuNorms
    scaling: CpuScaling


class DevicePlan(NamedTuple):
    """How the gradients on a device are measured and scaled, with tensors on it."""

    norms: DeviceNorms
    scaling: DeviceScaling


class Plan:
    """How to measure and scale a list of gradients.

    Args:
        gradients: plain tensors, on any devices, of any floating or complex dtype, strided or
            sparse; None for none.
        uses_numpy: whether the gradients on a device get a `CpuPlan`.

    Attributes:
        devices: the plan of each device that holds a gradient, in the order of the gradients. All
            take and return values for the whole list: the norm of a gradient elsewhere is 0.
    """

    def __init__(
        self, gradients: Sequence[Tensor | None], uses_numpy: Callable[[torch.device], bool]
    ) -> None:
        self._signature = _signature(gradients)
        places: dict[torch.device, list[int]] = {}
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                places.setdefault(gradient.device, []).append(i)
        self.devices: dict[torch.device, CpuPlan | DevicePlan] = {
            device: CpuPlan(CpuNorms(gradients, here), CpuScaling(gradients, here))
            if uses_numpy(device)
            else DevicePlan(
                DeviceNorms(gradients, device, here), DeviceScaling(gradients, device, here)
            )
            for device, here in places.items()
        }

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these gradients can be measured and scaled by this plan.

        They cannot if one has appeared, vanished, or changed its shape, dtype, layout or device.
        Strides and lazy conjugation do not matter.
        """
        return _signature(gradients) == self._signature


def _signature(gradients: Sequence[Tensor | None]) -> list[Any]:
    signature: list[Any] = []
    for g in gradients:
        if g is None:
            signature.append(None)
        else:
            # The class tells a FakeTensor, which has no memory, from the tensor it stands for. Not
            # a tuple each: of thousands, the garbage collector would look at all of them.
            signature += (type(g), g.shape, g.dtype, g.layout, g.device)
    return signature
