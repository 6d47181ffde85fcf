"""The layout of a clipper's gradients: made once, checked at each step, remade if it does not fit.

Gradient values change every step; shapes, dtypes and devices rarely do. So the gradients that are
small, their offsets in buffers and the rows that they belong to are worked out once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress, count
from operator import attrgetter, eq
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoclip.core.adapter import Histories, Storage, nonfinite_message
from autoclip.torch import _ops
from autoclip.torch._groups import Groups
from autoclip.torch._layout.norms import CpuNorms, DeviceNorms
from autoclip.torch._layout.rows import (
    Norms,
    RowMap,
    are_finite,
    joined,
    joint_norms,
    joint_norms_of,
    moved,
    row_devices,
)
from autoclip.torch._layout.scaling import CpuScaling, DeviceScaling

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


class Layout:
    """The layout of gradients in this process.

    Args:
        gradients: plain tensors, on any devices, of any floating or complex dtype, strided or
            sparse; None for none.

    Attributes:
        parts: the gradients of each device, in the order of the gradients.
        is_complete: True if no gradient is missing.
        is_empty: True if there is no gradient.
        version: the versions of groups and histories that `arrange` was called for.
        storages: the storages of the rows that record a norm.
        skips: True if a row's `on_spike` is `"skip"`.
        treats_nonfinite: True if a gradient's `on_nonfinite` is not `"keep"`.
        is_sharded: True if gradients are spread over processes.
    """

    is_sharded = False
    skips = False
    treats_nonfinite = False

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        # The class tells a FakeTensor, which has no memory, from the tensor it stands for.
        self._types = [*map(type, gradients)]
        self._here = [gradient is not None for gradient in gradients]
        present = [gradient for gradient in gradients if gradient is not None]
        self.is_complete = len(present) == len(gradients)
        devices = [gradient.device for gradient in present]
        # A comparison of devices takes longer than all others.
        is_on_cpu = all(device.type == "cpu" for device in devices)
        self._traits_of = _traits_on_cpu if is_on_cpu else _traits
        self._traits = [*map(self._traits_of, present)]
        indices: dict[torch.device, list[int]] = {}
        for i, device in zip(compress(count(), self._here), devices):
            indices.setdefault(device, []).append(i)
        self.parts = {
            device: Part(CpuNorms(gradients, members), CpuScaling(gradients, members))
            if _ops.uses_numpy(device)
            else Part(
                DeviceNorms(gradients, device, members), DeviceScaling(gradients, device, members)
            )
            for device, members in indices.items()
        }
        self.is_empty = not self.parts
        self.version = (-1, -1)
        self.storages: list[Storage[Any]] = []
        self._maps: list[RowMap] = []

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """True if these gradients can be measured and scaled by this layout.

        They cannot if one has appeared, vanished, or changed its shape, dtype, layout or device.
        Strides and lazy conjugation do not matter.
        """
        if [*map(type, gradients)] != self._types:
            return False
        here = gradients if self.is_complete else compress(gradients, self._here)
        # No list of them all: the garbage collector would look at thousands of tuples.
        return all(map(eq, map(self._traits_of, here), self._traits))

    # -- rows --------------------------------------------------------------------------------

    def arrange(
        self,
        groups: Groups,
        histories: Histories[Any],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Find the row of each gradient, and bring the histories to the gradients' devices."""
        rows, mode = groups.row_of_parameters(), groups.mode
        histories.arrange(row_devices(rows, len(histories), parameters, gradients))
        skips = [settings.on_spike == "skip" for settings in histories.settings]
        self.skips = any(skips)
        measured = self._measured_devices
        self._maps = [
            RowMap(storage, rows, mode, skips)
            for storage in histories.storages
            if mode.joins or storage.device in measured
        ]
        self.storages = [each.storage for each in self._maps]
        accelerators = [device for device in measured if not _ops.uses_numpy(device)]
        self._home: torch.device = (
            self._maps[0].storage.device if mode.has_one_row else (accelerators or measured)[0]
        )
        self._names = groups.names
        choices = np.array(groups.per_parameter("on_nonfinite"), object)
        self._zeros, self._raises = choices == "zero", choices == "raise"
        self._zeros_on: dict[torch.device, Tensor] = {}
        self.treats_nonfinite = bool((self._zeros | self._raises).any())
        self.version = groups.version, histories.version

    @property
    def _measured_devices(self) -> list[torch.device]:
        """The devices of the norms that `measure` returns."""
        return [*self.parts]

    def rows(self, norms: Norms, total: Tensor | float) -> list[tuple[Storage[Any], Any]]:
        """The norms of the rows, by storage.

        Args:
            norms: of the gradients.
            total: the norm of all gradients together.
        """
        if len(self._maps) == 1 and self._maps[0].is_identity:  # the usual case
            return [(self.storages[0], norms[self._home])]
        return [(each.storage, each.norms(norms, total)) for each in self._maps]

    # -- norms -------------------------------------------------------------------------------

    def measure(self, gradients: Sequence[Tensor | None]) -> Norms:
        """The true norms of the gradients."""
        norms = {}
        for device, part in self.parts.items():
            norms[device] = part.norms.of(gradients)
        return norms

    def refuse_loss_scaler(self, found_inf: Tensor | None) -> None:
        """See `ShardedLayout.refuse_loss_scaler`."""

    def total(self, norms: Norms) -> Tensor | float:
        """The norm of all gradients together: a number, or 0-d on an accelerator."""
        is_alone = len(norms) == 1 and self._home in norms
        found = norms[self._home] if is_alone else joined(norms, self._home)
        if not isinstance(found, np.ndarray):
            return joint_norms_of(found[None])[0]
        if len(found) <= _FEW:
            total = math.hypot(*found.tolist())
            if total < math.inf:  # with an infinity, hypot overlooks a NaN
                return total
        with np.errstate(over="ignore"):
            square = float(found.dot(found))
        if _SMALLEST < square < _LARGEST:
            return math.sqrt(square)
        return float(joint_norms(found[None])[0])

    @staticmethod
    def unscale(norms: Norms, scale: Tensor | None, found_inf: Tensor | None) -> Norms:
        """The norms of the gradients without the loss scale; NaN, so not recorded, on overflow."""
        return {device: _unscaled(each, scale, found_inf) for device, each in norms.items()}

    # -- NaN and infinity --------------------------------------------------------------------

    def zero(
        self, gradients: list[Tensor | None], norms: Norms, parameters: Sequence[Tensor]
    ) -> Norms:
        """Zero the gradients that are not finite, where `on_nonfinite` says so.

        Returns:
            The norms; 0 for a zeroed gradient.

        Raises:
            FloatingPointError: one is not finite, and its `on_nonfinite` is `"raise"`. Nothing has
                changed.
        """
        if self._raises.any():
            finite = np.all([are_finite(each) for each in norms.values()], 0)
            broken = np.flatnonzero(self._raises & ~finite)
            if len(broken):
                names = self._names()
                raise FloatingPointError(nonfinite_message([names[i] for i in broken]))
        if not self._zeros.any():
            return norms
        renew = partial(_renewed, parameters)
        found = dict(norms)
        for device, each in norms.items():
            part = self.parts.get(device)
            if isinstance(each, np.ndarray):
                here = self._zeros & ~np.isfinite(each)
                if part is None or not here.any():
                    continue
                concerned: Any = np.where(here, each, 0.0)
                found[device] = np.where(here, 0.0, each)
            else:
                if device not in self._zeros_on:
                    self._zeros_on[device] = torch.from_numpy(self._zeros).to(device)
                concerned = torch.where(self._zeros_on[device], each, 0.0)
                found[device] = torch.where(concerned < torch.inf, each, 0.0)
            if part is not None:
                part.scaling.zero_nonfinite(gradients, concerned, renew)
        return found

    # -- scaling -----------------------------------------------------------------------------

    def spikes(
        self, coefficients: Sequence[Any], *, is_deferred: bool
    ) -> tuple[list[Any], list[int], Tensor | None]:
        """The gradients whose parameters are not to be updated, since `on_spike` is `"skip"`.

        Args:
            coefficients: of the rows, by storage.
            is_deferred: True if the caller can skip the whole update on the device.

        Returns:
            The coefficients that are left, 1 for these gradients; their indices; and if only the
            device knows it, bool, 0-d: True if no parameter is to be updated.
        """
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

    def scale(
        self,
        gradients: list[Tensor | None],
        coefficients: Sequence[Any],
        parameters: Sequence[Tensor],
    ) -> None:
        """Multiply each gradient by the coefficient of its row.

        Args:
            gradients: the gradients; one that shares memory gets its own first.
            coefficients: of the rows, by storage.
            parameters: the parameters of the gradients.
        """
        renew = partial(_renewed, parameters)
        for device, part in self.parts.items():
            each: Any = None
            for rows, factors in zip(self._maps, coefficients):
                here = rows.storage.device
                if rows.is_one_for_all:
                    each = moved(factors, device)
                elif rows.is_identity and here == device:
                    each = factors
                elif rows.joins or here == device:
                    each = rows.write(factors, each, device)
            if each is not None:
                part.scaling.apply(gradients, each, renew)


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
