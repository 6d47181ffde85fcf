"""Windows of norms on an accelerator: what `autoclip.core.History` does, as tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core import Report, Rule
from autoclip.core.adapter import GroupSettings, is_recorded, needs_order, rule_arguments
from autoclip.torch._norms import norm_dtype
from autoclip.torch._window import TensorWindow

__all__ = ["TensorHistory"]

_FIRST_CAPACITY = 16
# Up to this size the windows are allocated in full at once, so that a CUDA graph can be captured.
_ALLOCATE_AT_ONCE = 64 * 2**20


class TensorHistory:
    """The windows of many rows on one device; `record` never waits for the device.

    A norm takes 4 bytes, and 4 more under a rule that asks for quantiles of the norms: their
    windows are also kept sorted, by a shift of what lies between the norm that leaves and the one
    that comes, for all rows at once. Rows that do not record are masked, and the counters live on
    the device, so that a captured CUDA graph counts.

    Args:
        settings: of each row, with equal `structure`.
        device: where.
    """

    def __init__(self, settings: Sequence[GroupSettings], device: torch.device) -> None:
        self.device = device
        self.history_length = settings[0].history_length
        self._dtype = norm_dtype(device)
        self._rule = type(settings[0].rule)
        self._includes_current = bool(settings[0].include_current)
        self._records_clipped = settings[0].record == "clipped"
        self._keeps_order = needs_order(settings[0].rule)
        self._settings = list(settings)
        rows = len(settings)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._recorded = torch.zeros(rows, dtype=torch.int64, device=device)
        self._next = torch.zeros(rows, dtype=torch.int64, device=device)
        # More windows may be filled than this, but none further: known without asking the device.
        self._longest = 0
        whole = rows * self.history_length * 4 <= _ALLOCATE_AT_ONCE
        self._allocate(self.history_length if whole else min(_FIRST_CAPACITY, self.history_length))
        self._arguments: dict[str, Any] = {}
        self._ceilings: Tensor | None = None
        self._warmups: Tensor | None = None
        self._drops: Tensor | None = None
        self._read_numbers()

    def _allocate(self, capacity: int) -> None:
        shape = (self.rows, capacity)
        # Unused slots hold infinity: a window that is not full loses one of them at each step.
        self._values = torch.full(shape, torch.inf, dtype=torch.float32, device=self.device)
        self._ordered = self._values.clone() if self._keeps_order else None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._settings)

    # -- settings ----------------------------------------------------------------------------

    @property
    def settings(self) -> tuple[GroupSettings, ...]:
        """The settings of each row. Setting them keeps the windows.

        Numbers that were there before are written in place, where a captured CUDA graph reads
        them; `max_norm`, `warmup_steps` or `on_spike` that no row had need a new capture.

        Raises:
            ValueError: the new ones are not one a row, or differ in more than numbers.
        """
        return tuple(self._settings)

    @settings.setter
    def settings(self, settings: Sequence[GroupSettings]) -> None:
        structure = self._settings[0].structure
        if len(settings) != self.rows or any(each.structure != structure for each in settings):
            raise ValueError(
                "settings takes one GroupSettings a row that differs from the present one in "
                "numbers only."
            )
        self._settings = list(settings)
        self._read_numbers()

    def _read_numbers(self) -> None:
        settings = self._settings
        for name, value in rule_arguments([each.rule for each in settings]).items():
            if isinstance(value, np.ndarray):
                column = np.broadcast_to(value, (self.rows, 1)).copy()
                self._arguments[name] = self._written(self._arguments.get(name), column)
            else:
                self._arguments[name] = value
        # What most clippers do not use costs them nothing: None.
        self._ceilings = self._column([each.max_norm for each in settings], np.inf, self._ceilings)
        warmups = [each.warmup_steps or None for each in settings]
        self._warmups = self._column(warmups, 0, self._warmups)
        drops = [True if each.on_spike != "clip" else None for each in settings]
        self._drops = self._column(drops, False, self._drops)

    def _column(self, values: Sequence[Any], none: Any, present: Tensor | None) -> Tensor | None:
        """One number a row; None where no row has any."""
        if all(value is None for value in values):
            return None
        array = np.array([none if value is None else value for value in values])
        return self._written(present, array)

    def _written(self, present: Tensor | None, array: npt.NDArray[Any]) -> Tensor:
        """The numbers on the device, in the tensor that is there already if there is one."""
        tensor = torch.from_numpy(array)
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.to(self.device) if present is None else present.copy_(tensor)

    # -- a step ------------------------------------------------------------------------------

    @property
    def thresholds(self) -> Tensor:
        """float64[rows] (float32 on MPS); see `autoclip.core.History.thresholds`."""
        return self._limited(self._judge()[0], self._recorded)

    def record(self, norms: Tensor) -> Report[Tensor]:
        """Compare one norm a row, and append those that are usable; see `core.History.record`.

        Args:
            norms: float64[rows] (float32 on MPS), on the device.

        Returns:
            A report of tensors like `norms`, on the device.
        """
        self._reserve()
        self._longest += 1
        rounded = norms.float()
        usable = is_recorded(rounded)
        before = self._recorded
        if self._includes_current:
            if self._warmups is not None:
                before = before.clone()
            self._push(usable, rounded)
        raw, clip_to = self._judge(rounded)
        thresholds = self._limited(raw, before)
        targets = thresholds if clip_to is raw else self._limited(clip_to, before)
        # The ratio to the *rounded* norm, the one in the window: so the largest never clips.
        wide = rounded.to(self._dtype)
        coefficients = torch.where(usable, (targets / wide).clamp(max=1.0), 1.0)
        if not self._includes_current:
            if self._records_clipped:
                rounded = (wide * coefficients).float()
                usable = usable & is_recorded(rounded)  # clipped to what no history records
            self._push(usable, rounded)
        if self._drops is not None:
            coefficients = torch.where((coefficients < 1.0) & self._drops, 0.0, coefficients)
        return Report(norms, thresholds, coefficients)

    def _judge(self, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rule's thresholds, and what it scales `norms` above them down to."""
        newest = torch.remainder(self._next - 1, self.history_length)
        window = TensorWindow(self._values, self._ordered, self._lengths, newest, self._dtype)
        found = self._full(self._rule.threshold(window, **self._arguments))
        filled = self._lengths > 0
        raw = torch.where(filled, found[:, 0], torch.inf)
        if norms is None or self._rule.clip_to is Rule.clip_to:
            return raw, raw
        norm = norms[:, None].to(self._dtype)
        target = self._full(self._rule.clip_to(window, norm, found, **self._arguments))
        return raw, torch.where(filled & (norm > found)[:, 0], target[:, 0], torch.inf)

    def _full(self, column: Any) -> Tensor:
        """What a rule returned, as [rows, 1]."""
        if not isinstance(column, Tensor):  # a rule may return a constant
            return torch.full((self.rows, 1), column, dtype=self._dtype, device=self.device)
        return column.expand(self.rows, 1)

    def _limited(self, thresholds: Tensor, recorded: Tensor) -> Tensor:
        """Thresholds after warm-up and below the ceiling."""
        if self._warmups is not None:
            thresholds = torch.where(recorded >= self._warmups, thresholds, torch.inf)
        if self._ceilings is not None:
            thresholds = torch.minimum(thresholds, self._ceilings)
        return thresholds

    def _reserve(self) -> None:
        capacity = self._values.shape[1]
        if capacity == self.history_length:
            return
        # Also while there is room: replays are not counted here, and would run out of it.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"A history of {self.rows} rows of {self.history_length} norms grows with use, "
                "and memory cannot grow inside a CUDA graph. Capture with a shorter "
                f"history_length: up to {_ALLOCATE_AT_ONCE // (4 * self.rows)}."
            )
        if self._longest < capacity:
            return
        values, ordered = self._values, self._ordered
        self._allocate(min(2 * capacity, self.history_length))
        self._values[:, :capacity] = values
        if self._ordered is not None and ordered is not None:
            self._ordered[:, :capacity] = ordered

    def _push(self, usable: Tensor, entered: Tensor) -> None:
        """Append one norm to each usable row."""
        slot = self._next[:, None]
        held = self._values.gather(1, slot)
        # A row that does not record lets infinity come and go: nothing changes.
        came = torch.where(usable, entered, torch.inf)[:, None]
        self._values.scatter_(1, slot, torch.where(usable[:, None], came, held))
        if self._ordered is not None:
            _replace_in_order(self._ordered, came, torch.where(usable[:, None], held, torch.inf))
        self._next.copy_(torch.where(usable, (self._next + 1) % self.history_length, self._next))
        self._recorded += usable
        self._lengths += usable & (self._lengths < self.history_length)

    # -- contents ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all norms, in place."""
        self._longest = 0
        self._values.fill_(torch.inf)
        if self._ordered is not None:
            self._ordered.fill_(torch.inf)
        for counter in (self._lengths, self._recorded, self._next):
            counter.zero_()

    def read(
        self, rows: Sequence[int]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy the windows of `rows` to the host; see `autoclip.core.History.read`."""
        lengths, recorded = self._lengths.tolist(), self._recorded.cpu().numpy()
        ends, values = self._next.tolist(), self._values.cpu().numpy()
        windows = []
        for row in rows:
            slots = np.arange(ends[row] - lengths[row], ends[row]) % self.history_length
            windows.append(values[row, slots])
        return windows, recorded[list(rows)]

    def write(
        self,
        rows: Sequence[int],
        windows: Sequence[npt.NDArray[np.float32]],
        recorded: Sequence[int] | npt.NDArray[np.int64],
    ) -> None:
        """Replace the windows of `rows`; see `autoclip.core.History.write`."""
        kept, counts = self.read(range(self.rows))
        for row, window, count in zip(rows, windows, recorded):
            kept[row], counts[row] = window[-self.history_length :], count
        longest = max(map(len, kept), default=0)
        capacity = self._values.shape[1]
        while capacity < longest:
            capacity = min(2 * capacity, self.history_length)
        table = np.full((len(kept), capacity), np.inf, np.float32)
        for row, window in enumerate(kept):
            table[row, : len(window)] = window
        lengths = np.array([len(window) for window in kept], np.int64)
        if capacity > self._values.shape[1]:  # a captured CUDA graph writes where they are now
            self._allocate(capacity)
        self._longest = longest
        self._values.copy_(torch.from_numpy(table))
        if self._ordered is not None:
            self._ordered.copy_(torch.from_numpy(np.sort(table, axis=1)))
        self._lengths.copy_(torch.from_numpy(lengths))
        self._recorded.copy_(torch.from_numpy(np.asarray(counts, np.int64)))
        self._next.copy_(torch.from_numpy(lengths % self.history_length))


def _replace_in_order(ordered: Tensor, came: Tensor, left: Tensor) -> None:
    """Take `left` out of sorted rows and put `came` in, in place; both float32[rows, 1].

    In a sorted row with the value v inserted, place j holds v clamped to what was at j - 1 and at
    j. Of two neighbours in that, the lower one stays wherever it is smaller than the value that
    leaves, and the upper one moves down everywhere else: no search, no gather.
    """
    end = torch.full_like(left, torch.inf)
    inserted = torch.maximum(
        torch.minimum(came, torch.cat([ordered, end], dim=1)), torch.cat([-end, ordered], dim=1)
    )
    lower, upper = inserted[:, :-1], inserted[:, 1:]
    torch.where(lower < left, lower, upper, out=ordered)
