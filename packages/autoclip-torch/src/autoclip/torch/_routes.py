"""Between the norms of gradients and the rows of a history, in every mode.

Norms, like coefficients, are NumPy arrays where histories are, and tensors on any other device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core.adapter import Mode
from autoclip.torch import _rows
from autoclip.torch._norms import norm_dtype
from autoclip.torch._rows import RowBatch

__all__ = ["Norms", "Route", "coefficients_on", "merged", "total_norm", "unscaled"]

Norms: TypeAlias = npt.NDArray[np.float64] | Tensor
"""[n]: a NumPy array on the CPU, a tensor on any other device."""

# A sum of squares between these has lost nothing that counts at either end of float64's range.
_SMALLEST, _LARGEST = 1e-280, 1e300
# Up to so many numbers Python is quicker than NumPy.
_FEW = 64


class Route:
    """Which gradients a batch of rows stands for.

    Args:
        batch: the batch.
        rows: the row of each parameter.
        mode: what a row stands for.
        skips: of each row of the clipper, whether `on_spike` is `"skip"`.

    Attributes:
        batch: the batch.
        skips: bool[rows of the batch], as above, on the batch's device; None for nowhere.
    """

    def __init__(
        self, batch: RowBatch, rows: Sequence[int], mode: Mode, skips: Sequence[bool]
    ) -> None:
        self.batch = batch
        self._count = len(rows)
        place_of = {row: k for k, row in enumerate(batch.rows)}
        pairs = [(place_of[row], i) for i, row in enumerate(rows) if row in place_of]
        if mode == "parameter":
            pairs.sort()
        self._members = np.array([k for k, _ in pairs], np.int64)
        self._places = np.array([i for _, i in pairs], np.int64)
        # The usual case: a row for each parameter, in order.
        self._is_everything = mode == "parameter" and self._places.tolist() == [*range(len(rows))]
        device = batch.device
        self._index = self._to(device, self._places)
        self._member_index = self._to(device, self._members)
        mask = np.array([skips[row] for row in batch.rows])
        self.skips = self._to(device, mask) if mask.any() else None
        self._table = self._make_table() if mode == "group" else None

    @staticmethod
    def _to(device: torch.device, array: npt.NDArray[Any]) -> Any:
        return array if _rows.uses_numpy(device) else torch.from_numpy(array).to(device)

    def _make_table(self) -> Any:
        """int64[rows, longest]: the parameters of each row; `count` where it has fewer."""
        counts = np.bincount(self._members, minlength=len(self.batch.rows))
        table = np.full((len(counts), max(1, counts.max())), self._count, np.int64)
        # Parameters of a group are neighbours, so rows come in order here.
        columns = np.arange(len(self._members)) - np.repeat(np.cumsum(counts) - counts, counts)
        table[self._members, columns] = self._places
        return self._to(self.batch.device, table)

    def row_norms(self, norms: Norms) -> Norms:
        """The norms of the batch's rows from those of all parameters, on the batch's device."""
        if self._is_everything:
            return norms
        if self._table is None:
            return norms[self._index]
        if isinstance(norms, np.ndarray):
            return _joint_norms(np.append(norms, 0.0)[self._table])
        # Not index_add: on CUDA its sums depend on the order in which threads come.
        return _joint_norms_of(torch.cat([norms, norms.new_zeros(1)])[self._table])

    def places_of(self, mask: npt.NDArray[np.bool_]) -> list[int]:
        """The parameters of the batch's rows that `mask` selects."""
        places: list[int] = self._places[mask[self._members]].tolist()
        return places

    def spread(self, factors: Norms, device: torch.device, into: Norms | None) -> Norms:
        """Write the coefficients of the batch's rows at the places of their parameters.

        Args:
            factors: of the batch's rows.
            device: where the result is to be.
            into: [all parameters], on that device; 1 everywhere if None.
        """
        if into is None and self._is_everything and device == self.batch.device:
            return factors
        if into is None:
            into = (
                np.ones(self._count)
                if _rows.uses_numpy(device)
                else torch.ones(self._count, dtype=norm_dtype(device), device=device)
            )
        each = _moved(factors[self._member_index], device)
        if isinstance(into, np.ndarray):
            into[self._places] = each
        else:
            index = self._index if device == self.batch.device else self._to(device, self._places)
            into.index_copy_(0, index, each)  # type: ignore[arg-type]
        return into


def coefficients_on(
    device: torch.device, found: Sequence[tuple[Route, Norms]], mode: Mode
) -> Norms | None:
    """The coefficients of the gradients on a device: [all parameters], or [1] for all of them.

    Args:
        device: where.
        found: of the batches that recorded, the coefficients of their rows.
        mode: what a row stands for.

    Returns:
        None if no batch recorded there.
    """
    if mode == "global":
        return _moved(found[0][1], device)
    result: Norms | None = None
    for route, factors in found:
        if mode == "group" or route.batch.device == device:
            result = route.spread(factors, device, result)
    return result


def merged(measured: Mapping[torch.device, Norms], device: torch.device) -> Norms:
    """The norms of all gradients, wherever they are, on one device."""
    first, *others = measured.values()
    if not others and device in measured:  # the usual case
        return first
    return sum((_moved(each, device) for each in others), _moved(first, device))


def _moved(norms: Norms, device: torch.device) -> Norms:
    if _rows.uses_numpy(device):
        return norms if isinstance(norms, np.ndarray) else norms.cpu().double().numpy()
    return _rows.as_tensor(norms).to(device, norm_dtype(device))


def total_norm(measured: Mapping[torch.device, Norms], home: torch.device | None) -> Tensor | float:
    """The norm of all gradients together.

    Args:
        measured: the norms by device.
        home: where the result is to be; None for an accelerator if any gradient is there.

    Returns:
        A float, or 0-d on a device.
    """
    if home is None and len(measured) == 1:
        [home] = measured
    elif home is None:
        home = next((d for d in measured if not _rows.uses_numpy(d)), next(iter(measured)))
    norms = merged(measured, home)
    if not isinstance(norms, np.ndarray):
        return _joint_norms_of(norms[None])[0]
    if len(norms) <= _FEW:
        total = math.hypot(*norms.tolist())
        if total < math.inf:  # beside an infinity, hypot overlooks a NaN
            return total
    with np.errstate(over="ignore"):
        square = float(norms.dot(norms))
    if _SMALLEST < square < _LARGEST:
        return math.sqrt(square)
    return float(_joint_norms(norms[None])[0])


def _joint_norms(norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The norm of each row's entries together: [n] from [n, m]."""
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    largest = norms.max(axis=1, initial=0.0)
    scale = np.where((largest > 0) & (largest < np.inf), largest, 1.0)
    found: npt.NDArray[np.float64] = np.sqrt(np.square(norms / scale[:, None]).sum(axis=1)) * scale
    return found


def _joint_norms_of(norms: Tensor) -> Tensor:
    """`_joint_norms` on a device."""
    largest = norms.amax(dim=1)
    scale = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)
    return (norms / scale[:, None]).square().sum(dim=1).sqrt() * scale


def unscaled(norms: Norms, scale: Tensor | None, found_inf: Tensor | None) -> Norms:
    """The norms of the gradients without the loss scale; NaN, so not recorded, on overflow."""
    if isinstance(norms, np.ndarray):
        if scale is not None:
            norms = norms / float(scale)
        return norms if found_inf is None or not float(found_inf) else np.full_like(norms, np.nan)
    if scale is not None:
        norms = norms / scale.to(norms)
    if found_inf is not None:
        norms = torch.where(found_inf.to(norms.device) > 0, torch.nan, norms)
    return norms
