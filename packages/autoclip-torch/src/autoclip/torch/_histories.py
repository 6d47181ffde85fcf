"""The histories of a clipper's rows: in NumPy on the CPU, in tensors on any other device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core import History, Report, adapter
from autoclip.core.adapter import (
    BaseTensorHistory,
    GroupSettings,
    Storage,
    Windows,
    needs_order,
    numbers_of,
    pack,
    record,
    thresholds_of,
)
from autoclip.torch import _ops

_FIRST_CAPACITY = 16
# Up to this size the windows are allocated in full at once, so that a CUDA graph can be captured.
_ALLOCATE_AT_ONCE = 64 * 2**20


def _make(settings: Sequence[GroupSettings], device: torch.device) -> History | TensorHistory:
    return History.of(settings) if _ops.uses_numpy(device) else TensorHistory(settings, device)


class Histories(adapter.Histories[Any]):
    """The histories of a clipper's rows, a `History` or a `TensorHistory` for each storage."""

    def __init__(self) -> None:
        super().__init__(_make)

    def in_order(self, parts: Sequence[tuple[Storage[Any], Any]], fill: float) -> Tensor:
        """float32[rows] in the order of the rows, on the device of the first part.

        Args:
            parts: storages and one number for each of their rows.
            fill: the number of rows in no part.
        """
        tensors = [_ops.as_tensor(values) for _, values in parts]
        device = tensors[0].device if tensors else None
        result = torch.full((len(self),), fill, dtype=torch.float32, device=device)
        for (storage, _), values in zip(parts, tensors):
            result[storage.rows] = values.to(result)
        return result

    def joined(self, reports: Sequence[tuple[Storage[Any], Report[Any]]]) -> Report[Tensor]:
        """One report of all rows, from those of the storages that recorded."""
        fills = {"norms": 0.0, "thresholds": torch.inf, "coefficients": 1.0}
        norms, thresholds, coefficients = (
            self.in_order([(storage, getattr(each, name)) for storage, each in reports], fill)
            for name, fill in fills.items()
        )
        return Report(norms, thresholds, coefficients)


class _WindowsInPlace(Windows):
    """Windows that change in place, where a captured CUDA graph finds them.

    Several tensors change one after the other; after an interrupt between them, `finish` does the
    rest.
    """

    _unfinished: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def replace(self, slot: Tensor, came: Tensor, left: Tensor, counts: Tensor) -> Windows:
        """See `Windows.replace`."""
        vars(self)["_unfinished"] = slot, came, counts, self.before
        super().replace(slot, came, left, counts)
        self.counts.copy_(counts)
        vars(self)["_unfinished"] = None
        return self

    def copy_(self, values: Tensor, counts: Tensor, before: Tensor) -> None:
        """Replace the contents: all of them, even if interrupted."""
        slots = self.ops.slots(values.shape[1]).expand_as(values)
        vars(self)["_unfinished"] = slots, values, counts, before
        self.finish()

    def finish(self) -> None:
        """Complete an interrupted change."""
        if self._unfinished is None:
            return
        slots, came, counts, before = self._unfinished
        self.values.scatter_(1, slots, came)
        if self.ordered is not None:
            self.ordered.copy_(self.ops.sort(self.values))
        self.counts.copy_(counts)
        self.before.copy_(before)
        vars(self)["_unfinished"] = None

    @property
    def lengths(self) -> Any:
        """See `Windows.lengths`; not cached, since counts change in place."""
        return self.counts.clamp(max=self.history_length)

    def __reduce__(self) -> Any:
        self.finish()
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


class TensorHistory(BaseTensorHistory):
    """The windows of many rows on one device; `record` never synchronizes with it.

    A norm takes 4 bytes, and 4 more under a rule that takes quantiles of the norms, whose windows
    are also kept sorted. Rows that do not record are masked, and the counters live on the device,
    so a captured CUDA graph counts.

    Args:
        settings: of each row, with equal `structure`.
        device: the device of the windows.
    """

    def __init__(self, settings: Sequence[GroupSettings], device: torch.device) -> None:
        self.device = device
        self._ops = _ops.TorchOps(device)
        self._settings = tuple(settings)
        self._numbers: dict[str, Tensor] = {}
        self._numbers = self._numbers_of(settings)
        # Upper bound on the longest window, tracked on the host to avoid a device sync.
        self._used = 0
        whole = self.rows * self.history_length * 4 <= _ALLOCATE_AT_ONCE
        self._windows = self._allocated(self.history_length if whole else _FIRST_CAPACITY)

    def _allocated(self, capacity: int) -> _WindowsInPlace:
        shape = self.rows, min(capacity, self.history_length)
        values = torch.zeros(shape, dtype=torch.float32, device=self.device)
        ordered = torch.zeros_like(values) if needs_order(self._settings[0].rule) else None
        counts, before = torch.zeros((2, self.rows, 1), dtype=torch.int64, device=self.device)
        return _WindowsInPlace(self._ops, self.history_length, values, ordered, counts, before)

    # -- settings ----------------------------------------------------------------------------

    def _change(self, settings: tuple[GroupSettings, ...], rows: list[int]) -> None:
        # In place, so a captured CUDA graph reads the new numbers; a `max_norm`, `warmup_steps` or
        # `on_spike` that no row had before needs a new capture, and one that was removed stays.
        columns = numbers_of([settings[row] for row in rows], always=self._numbers)
        if columns.keys() == self._numbers.keys():
            for name, column in columns.items():
                self._numbers[name][rows] = self._as_numbers(column).to(self.device)
        else:
            self._numbers = self._numbers_of(settings)
        self._settings = settings  # last: after an interrupt, the same change counts again

    def _numbers_of(self, settings: Sequence[GroupSettings]) -> dict[str, Tensor]:
        numbers = {}
        for name, column in numbers_of(settings, always=self._numbers).items():
            tensor, present = self._as_numbers(column), self._numbers.get(name)
            numbers[name] = tensor.to(self.device) if present is None else present.copy_(tensor)
        return numbers

    def _as_numbers(self, column: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(column)
        return self._ops.wide(tensor) if tensor.is_floating_point() else tensor

    # -- a step ------------------------------------------------------------------------------

    @property
    def thresholds(self) -> Tensor:
        """float64[rows] (float32 on MPS); see `autoclip.core.History.thresholds`."""
        windows = self._read_windows()
        found: Tensor = thresholds_of(self._settings[0], self._numbers, windows)
        return found[:, 0]

    def record(self, norms: Tensor) -> Report[Tensor]:
        """Compare one norm a row, and append those that are usable; see `core.History.record`.

        Args:
            norms: float64[rows] (float32 on MPS), on the device.

        Returns:
            A report of tensors like `norms`, on the device.
        """
        self._windows.finish()
        self._reserve()
        _, report = record(self._settings[0], self._numbers, self._windows, norms[:, None])
        return Report(norms, report.thresholds[:, 0], report.coefficients[:, 0])

    def _reserve(self) -> None:
        capacity = self._windows.values.shape[1]
        if capacity == self.history_length:
            return
        # Even if there is room: replays are not counted here, and would exhaust it.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"A history of {self.rows} rows of {self.history_length} norms grows with use, "
                "and memory cannot grow inside a CUDA graph. Capture with a shorter "
                f"history_length: up to {_ALLOCATE_AT_ONCE // (4 * self.rows)}."
            )
        if self._used >= capacity:
            old, new = self._windows, self._allocated(2 * capacity)
            new.values[:, :capacity] = old.values
            if new.ordered is not None:
                new.ordered[:, -capacity:] = old.ordered
            new.counts.copy_(old.counts)
            new.before.copy_(old.before)
            self._windows = new
        self._used += 1

    # -- contents ----------------------------------------------------------------------------

    def _read_windows(self) -> Windows:
        self._windows.finish()
        return self._windows

    @staticmethod
    def _to_host(tensor: Tensor) -> npt.NDArray[Any]:
        return tensor.cpu().numpy()

    def _mark(self) -> Tensor:
        counts: Tensor = self._read_windows().counts
        return counts.clone()

    def _stage_all(
        self, windows: list[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> Callable[[], None]:
        used = max(map(len, windows))
        target = self._windows  # where a captured CUDA graph writes
        present = capacity = target.values.shape[1]
        while capacity < used:
            capacity = min(2 * capacity, self.history_length)
        if capacity > present:
            target = self._allocated(capacity)
        packed = pack(windows, recorded, self.history_length, capacity)
        contents = tuple(torch.from_numpy(each).to(self.device) for each in packed)
        return partial(self._adopt, target, used, contents)

    def _adopt(self, target: _WindowsInPlace, used: int, contents: tuple[Tensor, ...]) -> None:
        # A bound that is too large does no harm if an interrupt comes now.
        self._used = max(self._used, used)
        target.copy_(*contents)
        self._windows = target
        self._used = used
