"""From the norms of gradients to those of rows, and from rows' coefficients to gradients.

Norms, like coefficients, are NumPy arrays on the CPU, and tensors on any other device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core.adapter import Histories, Mode, Storage
from autoclip.torch import _ops
from autoclip.torch._groups import Groups
from autoclip.torch._ops import as_tensor, norm_dtype

Norms: TypeAlias = Mapping[torch.device, Any]
"""The norms of all gradients by device, [n] each: 0 for a gradient on another one."""

_CPU = torch.device("cpu")
# The classes of parameters that are whole on each process.
_PLAIN = {Tensor, torch.nn.Parameter}


class RowMap:
    """The gradients that the rows of one storage stand for.

    Args:
        storage: the storage.
        rows: the row of each parameter.
        mode: the meaning of a row.
        skips: for each row of the clipper, True if its `on_spike` is `"skip"`.

    Attributes:
        storage: the storage.
        skips: bool[rows of the storage], as above, on its device; None if no row skips.
        is_identity: True if there is a row for each parameter, in order: the usual case.
        is_one_for_all: True if there is one row for all gradients.
        joins: True if a row may stand for gradients on several devices.
    """

    def __init__(
        self, storage: Storage[Any], rows: Sequence[int], mode: Mode, skips: Sequence[bool]
    ) -> None:
        self.storage = storage
        self._count = len(rows)
        own = {row: k for k, row in enumerate(storage.rows)}
        pairs = [(own[row], i) for i, row in enumerate(rows) if row in own]
        if not mode.joins:
            pairs.sort()
        # The k-th row of each gradient, and the gradient's index.
        self._members = np.array([k for k, _ in pairs], np.int64)
        self._indices = np.array([i for _, i in pairs], np.int64)
        self.is_identity = not mode.joins and self._indices.tolist() == [*range(len(rows))]
        self.is_one_for_all, self.joins = mode.has_one_row, mode.joins
        self._index = array_to(self._indices, storage.device)
        self._member_index = array_to(self._members, storage.device)
        mask = np.array([skips[row] for row in storage.rows])
        self.skips = array_to(mask, storage.device) if mask.any() else None
        self._table = self._make_table() if mode.joins and not mode.has_one_row else None

    def _make_table(self) -> Any:
        """int64[rows, longest]: the gradients of each row; `count` where it has fewer."""
        counts = np.bincount(self._members, minlength=len(self.storage.rows))
        table = np.full((len(counts), max(1, counts.max())), self._count, np.int64)
        # Parameters of a group are neighbors, so rows come in order here.
        columns = np.arange(len(self._members)) - np.repeat(np.cumsum(counts) - counts, counts)
        table[self._members, columns] = self._indices
        return array_to(table, self.storage.device)

    def norms(self, norms: Norms, total: Tensor | float) -> Any:
        """The norms of the rows, on the storage's device.

        Args:
            norms: of the gradients.
            total: the norm of all gradients together.
        """
        device = self.storage.device
        if self.is_one_for_all:
            return total.reshape(1) if isinstance(total, Tensor) else [total]
        if self._table is None:
            return norms[device][self._index]
        found = norms_on(norms, device)
        is_array = isinstance(found, np.ndarray)
        with_zero = np.append(found, 0.0) if is_array else torch.cat([found, found.new_zeros(1)])
        # Not index_add: on CUDA its sums depend on the order of the threads.
        return joint_norms(with_zero[self._table])

    def indices_of(self, mask: npt.NDArray[np.bool_]) -> list[int]:
        """The gradients of the rows that `mask` selects."""
        found: list[int] = self._indices[mask[self._members]].tolist()
        return found

    def write(self, coefficients: Any, into: Any, device: torch.device) -> Any:
        """Write the rows' coefficients to those of their gradients.

        Args:
            coefficients: of the rows.
            into: [all gradients], on `device`; None for ones.
            device: the device of the result.
        """
        if into is None:
            into = (
                np.ones(self._count)
                if _ops.uses_numpy(device)
                else torch.ones(self._count, dtype=norm_dtype(device), device=device)
            )
        each = to_device(coefficients[self._member_index], device)
        if isinstance(into, np.ndarray):
            into[self._indices] = each
        else:
            is_here = device == self.storage.device
            into.index_copy_(0, self._index if is_here else array_to(self._indices, device), each)
        return into


def array_to(array: npt.NDArray[Any], device: torch.device) -> Any:
    """An array as it is, or as a tensor on a device that is not the CPU."""
    return array if _ops.uses_numpy(device) else torch.from_numpy(array).to(device)


def to_device(norms: Any, device: torch.device) -> Any:
    """Norms or coefficients on another device."""
    if _ops.uses_numpy(device):
        return norms if isinstance(norms, np.ndarray) else norms.cpu().double().numpy()
    return as_tensor(norms).to(device, norm_dtype(device))


def norms_on(norms: Norms, device: torch.device) -> Any:
    """The norms of all gradients on one device."""
    first, *others = norms.values()
    if not others and device in norms:  # the usual case
        return first
    return sum((to_device(each, device) for each in others), to_device(first, device))


def joint_norms(norms: Any) -> Any:
    """The norm of each row's entries together: [n] from [n, m]."""
    is_array = isinstance(norms, np.ndarray)
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    largest = norms.max(axis=1, initial=0.0) if is_array else norms.amax(dim=1)
    where: Any = np.where if is_array else torch.where
    scale = where((largest > 0) & (largest < math.inf), largest, 1.0)
    return ((norms / scale[:, None]) ** 2).sum(1) ** 0.5 * scale


def row_devices(groups: Groups, histories: Histories[Any]) -> list[torch.device]:
    """The device of each row's history: its gradient's or its parameter's.

    One of several that is not the CPU.

    Args:
        groups: the clipper's.
        histories: the clipper's.
    """
    parameters = groups.parameters()  # first: new ones add rows to the histories
    devices = [_CPU] * len(histories)
    trained = [False] * len(histories)
    # If any parameter is sharded, another process may have a gradient that is missing here.
    are_sharded = dtensor_class(parameters) is not None
    for row, parameter in zip(groups.row_of_parameters(), parameters):
        gradient = None if are_sharded else parameter.grad
        device = (parameter if gradient is None else gradient).device
        # Parameters on the meta device have no gradients, and trained ones come before frozen ones.
        if device.type not in ("cpu", "meta") and (
            devices[row] is _CPU or (parameter.requires_grad and not trained[row])
        ):
            devices[row], trained[row] = device, parameter.requires_grad
    return devices


def dtensor_class(parameters: Sequence[Tensor]) -> type[Any] | None:
    """The class of DTensors if a parameter is one."""
    if _PLAIN.issuperset(map(type, parameters)):  # the usual case
        return None
    # Importing DTensor takes a second. If it was not imported, no DTensor exists.
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return found if any(isinstance(each, found) for each in parameters) else None
    return None
