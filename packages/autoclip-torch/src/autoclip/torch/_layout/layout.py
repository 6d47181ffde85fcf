"""The layout of a clipper's gradients: made once, checked at each step, remade if it does not fit.

Gradient values change every step; shapes, dtypes and devices rarely do. So the gradients that are
small, their offsets in buffers and the rows that they belong to are worked out once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress, count
from operator import attrgetter, eq
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoclip.core import Report
from autoclip.core.adapter import Histories, Storage
from autoclip.torch import _ops
from autoclip.torch._groups import Groups
from autoclip.torch._layout.nonfinite import NonfiniteGradients
from autoclip.torch._layout.norms import CpuNorms, DeviceNorms, Gradients
from autoclip.torch._layout.rows import Norms, RowMap, joint_norms, norms_on, row_devices, to_device
from autoclip.torch._layout.scaling import CpuScaling, DeviceScaling
from autoclip.torch._private import is_fake

# A sum of squares between these has lost nothing at either end of float64's range.
_SMALLEST, _LARGEST = 1e-280, 1e300
# At or below this many numbers, Python floats are faster than NumPy arrays.
_FEW = 64
_traits = attrgetter("shape", "dtype", "layout", "device")
_traits_on_cpu = attrgetter("shape", "dtype", "layout", "is_cpu")


class Part(NamedTuple):
    """The gradients on one device: measured and scaled with NumPy on the CPU, else with tensors.

    Both take and return values for all gradients: the norm of one elsewhere is 0.
    """

    norms: CpuNorms | DeviceNorms
    scaling: CpuScaling | DeviceScaling

    @classmethod
    def of(cls, gradients: Gradients, device: torch.device, indices: Iterable[int]) -> Part:
        """The gradients at `indices`, all of them on `device`; some may have no memory."""
        indices = [i for i in indices if gradients[i].numel() and not is_fake(gradients[i])]
        if _ops.uses_numpy(device):
            return cls(CpuNorms(gradients, indices), CpuScaling(gradients, indices))
        return cls(DeviceNorms(device, indices), DeviceScaling(gradients, device, indices))


class Layout:
    """Measures and scales the gradients in this process, and knows the row of each.

    Args:
        gradients: plain tensors, on any devices, of any floating or complex dtype, strided or
            sparse; None for none.
        groups: the clipper's.
        histories: the clipper's.

    Attributes:
        nonfinite: the treatment of gradients that are not finite; None if all of them are kept.
    """

    nonfinite: NonfiniteGradients | None = None

    def __init__(
        self, gradients: Sequence[Tensor | None], groups: Groups, histories: Histories[Any]
    ) -> None:
        self._groups, self._histories = groups, histories
        # Of groups and histories when the rows were arranged.
        self._versions = (-1, -1)
        # The class tells a FakeTensor, which has no memory, from the tensor it stands for.
        self._types = [*map(type, gradients)]
        self._here = [gradient is not None for gradient in gradients]
        present = [gradient for gradient in gradients if gradient is not None]
        self._is_complete = len(present) == len(gradients)
        devices = [gradient.device for gradient in present]
        # A comparison of devices takes longer than all others.
        is_on_cpu = all(device.type == "cpu" for device in devices)
        self._traits_of = _traits_on_cpu if is_on_cpu else _traits
        self._traits = [*map(self._traits_of, present)]
        indices: dict[torch.device, list[int]] = {}
        for i, device in zip(compress(count(), self._here), devices):
            indices.setdefault(device, []).append(i)
        self._parts = {
            device: Part.of(gradients, device, members) for device, members in indices.items()
        }

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """True if these gradients can be measured and scaled by this layout.

        They cannot if one has appeared, vanished, or changed its shape, dtype, layout or device.
        Strides and lazy conjugation do not matter.
        """
        if [*map(type, gradients)] != self._types:
            return False
        here = gradients if self._is_complete else compress(gradients, self._here)
        # No list of them all: the garbage collector would look at thousands of tuples.
        return all(map(eq, map(self._traits_of, here), self._traits))

    # -- rows --------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Find the row of each gradient, and bring the histories to the gradients' devices."""
        groups, histories, mode = self._groups, self._histories, self._groups.mode
        histories.arrange(row_devices(groups, histories))
        rows = groups.row_of_parameters()
        skips = [settings.on_spike == "skip" for settings in histories.settings]
        self._skips = any(skips)
        measured = self._measured_devices
        self._maps = [
            RowMap(storage, rows, mode, skips)
            for storage in histories.storages
            if mode.joins or storage.device in measured
        ]
        accelerators = [device for device in measured if not _ops.uses_numpy(device)]
        self._total_device: torch.device = (
            self._maps[0].storage.device if mode.has_one_row else (accelerators or measured)[0]
        )
        all_are_kept = {*groups.per_parameter("on_nonfinite")} <= {"keep"}
        self.nonfinite = None if all_are_kept else NonfiniteGradients(groups)
        self._versions = groups.version, histories.version

    @property
    def _measured_devices(self) -> list[torch.device]:
        """The devices of the norms that `measure` returns."""
        return [*self._parts]

    def rows(self, norms: Norms, total: Tensor | float) -> list[tuple[Storage[Any], Any]]:
        """The norms of the rows, by storage.

        Args:
            norms: of the gradients.
            total: the norm of all gradients together.
        """
        if len(self._maps) == 1 and self._maps[0].is_identity:  # the usual case
            return [(self._maps[0].storage, norms[self._total_device])]
        return [(each.storage, each.norms(norms, total)) for each in self._maps]

    # -- norms -------------------------------------------------------------------------------

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Norms:
        """The true norms of the gradients; empty if there is none.

        Args:
            gradients: tensors that this layout `fits`; None for none.
            scale: 0-d, the loss scale that the gradients still have; None if they have none.
            found_inf: 0-d, nonzero if a loss scaler skips this step: then all norms are NaN and
                nothing is recorded. None without a loss scaler.
        """
        norms = self._measured(gradients)
        versions = self._groups.version, self._histories.version
        if versions != self._versions and norms:
            self._arrange()
        if scale is None and found_inf is None:
            return norms
        return {device: _unscaled(each, scale, found_inf) for device, each in norms.items()}

    def _measured(self, gradients: Sequence[Tensor | None]) -> Norms:
        norms = {}
        for device, part in self._parts.items():
            norms[device] = part.norms.of(gradients)
        return norms

    def total(self, norms: Norms) -> Tensor | float:
        """The norm of all gradients together: a number, or 0-d on an accelerator."""
        is_alone = len(norms) == 1 and self._total_device in norms
        found = norms[self._total_device] if is_alone else norms_on(norms, self._total_device)
        if not isinstance(found, np.ndarray):
            norm: Tensor = joint_norms(found[None])[0]
            return norm
        if len(found) <= _FEW:
            total = math.hypot(*found.tolist())
            if total < math.inf:  # with an infinity, hypot overlooks a NaN
                return total
        with np.errstate(over="ignore"):
            square = float(found.dot(found))
        if _SMALLEST < square < _LARGEST:
            return math.sqrt(square)
        return float(joint_norms(found[None])[0])

    # -- scaling -----------------------------------------------------------------------------

    def scale(
        self,
        gradients: list[Tensor | None],
        reports: Sequence[tuple[Storage[Any], Report[Any]]],
        parameters: Sequence[Tensor],
        zeroed: Norms | None = None,
        can_defer: Callable[[], bool] | None = None,
    ) -> tuple[Sequence[int], Tensor | None]:
        """Multiply each gradient by the coefficient of its row.

        Args:
            gradients: the gradients; one that shares memory gets its own first.
            reports: of the rows, by storage, with their coefficients.
            parameters: the parameters of the gradients.
            zeroed: see `NonfiniteGradients.apply`.
            can_defer: tells if the caller can skip the whole update on the device; None for no.

        Returns:
            The gradients that were left as they were since their parameters are not to be updated
            (`on_spike="skip"`), and if only the device knows it, bool, 0-d: True if no parameter
            is to be updated.
        """
        skipped: list[int] = []
        skips_update = None
        coefficients = [report.coefficients for _, report in reports]
        if self._skips:
            is_deferred = can_defer is not None and can_defer()
            coefficients, skipped, skips_update = self._without_spikes(coefficients, is_deferred)
        renew = partial(_renewed, parameters)
        for device, part in self._parts.items():
            if zeroed and device in zeroed:
                part.scaling.zero(gradients, zeroed[device], renew)
            each: Any = None
            for rows, factors in zip(self._maps, coefficients):
                here = rows.storage.device
                if rows.is_one_for_all:
                    each = to_device(factors, device)
                elif rows.is_identity and here == device:
                    each = factors
                elif rows.joins or here == device:
                    each = rows.write(factors, each, device)
            if each is not None:
                part.scaling.apply(gradients, each, renew)
        return skipped, skips_update

    def _without_spikes(
        self, coefficients: Sequence[Any], is_deferred: bool
    ) -> tuple[list[Any], list[int], Tensor | None]:
        """The coefficients, 1 for gradients to be skipped; and these, as `scale` returns them."""
        left: list[Any] = []
        indices: list[int] = []
        skips_update = None
        for each, factors in zip(self._maps, coefficients):
            if each.skips is not None:
                spikes = each.skips & (factors == 0.0)
                if isinstance(factors, np.ndarray):
                    indices += each.indices_of(spikes)
                    factors = np.where(spikes, 1.0, factors)
                else:
                    if is_deferred and each.is_one_for_all:
                        skips_update = spikes.reshape(())
                    else:
                        indices += each.indices_of(spikes.cpu().numpy())
                    factors = torch.where(spikes, 1.0, factors)
            left.append(factors)
        return left, indices, skips_update


def _unscaled(norms: Any, scale: Tensor | None, found_inf: Tensor | None) -> Any:
    if isinstance(norms, np.ndarray):
        if scale is not None:
            norms = norms / float(scale)
        return norms if found_inf is None or not float(found_inf) else np.full_like(norms, np.nan)
    if scale is not None:
        norms = norms / scale.to(norms)
    if found_inf is not None:
        norms = torch.where(found_inf.to(norms.device) > 0, torch.nan, norms)
    return norms


def _renewed(parameters: Sequence[Tensor], index: int) -> Tensor:
    """Give a parameter a copy of its gradient in memory of its own; the part of it that is here."""
    gradient = parameters[index].grad
    assert gradient is not None
    parameters[index].grad = own = gradient.clone()
    to_local: Callable[[], Tensor] | None = getattr(own, "to_local", None)  # of a DTensor
    return own if to_local is None else to_local()
