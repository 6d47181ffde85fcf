"""Windows of norms on an accelerator: what `autoclip.core.History` does, as tensor operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core import SMALLEST_NORM, Report, Rule
from autoclip.torch._norms import norm_dtype
from autoclip.torch._rules import tensor_rule

__all__ = ["TensorHistory"]

_FIRST_CAPACITY = 16
# Up to this size the windows are allocated in full at once, so that a CUDA graph can be captured.
_ALLOCATE_AT_ONCE = 64 * 2**20


class TensorHistory:
    """The windows of many rows on one device; `record` never waits for the device.

    Besides the ring of norms it keeps the windows sorted: a step moves what lies between the
    norm that leaves and the one that comes by one place, for all rows at once. Rows that do not
    record are masked, and the counters live on the device, so that a captured CUDA graph counts.

    Args:
        rules: one rule a row, all of one class.
        history_length: how many norms a row keeps.
        device: where.
    """

    def __init__(self, rules: Sequence[Rule], history_length: int, device: torch.device) -> None:
        self.rules = tuple(rules)
        self.history_length = history_length
        self.device = device
        rows = len(rules)
        self._rule = tensor_rule(rules, device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._recorded = torch.zeros(rows, dtype=torch.int64, device=device)
        self._next = torch.zeros(rows, dtype=torch.int64, device=device)
        self._thresholds = torch.full((rows,), torch.inf, dtype=norm_dtype(device), device=device)
        # More windows may be filled than this, but none further: known without asking the device.
        self._longest = 0
        whole = rows * history_length * 4 <= _ALLOCATE_AT_ONCE
        self._allocate(history_length if whole else min(_FIRST_CAPACITY, history_length))

    def _allocate(self, capacity: int) -> None:
        shape = (len(self.rules), capacity)
        # Unused slots hold infinity: a window that is not full loses one of them at each step.
        self._values = torch.full(shape, torch.inf, dtype=torch.float32, device=self.device)
        self._ordered = self._values.clone()

    def _reserve(self) -> None:
        capacity = self._values.shape[1]
        if capacity == self.history_length:
            return
        # Also while there is room: replays are not counted here, and would run out of it.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"A history of {len(self.rules)} rows of {self.history_length} norms grows with "
                "use, and memory cannot grow inside a CUDA graph. Capture with a shorter "
                f"history_length: up to {_ALLOCATE_AT_ONCE // (4 * len(self.rules))}."
            )
        if self._longest < capacity:
            return
        values, ordered = self._values, self._ordered
        self._allocate(min(2 * capacity, self.history_length))
        self._values[:, :capacity], self._ordered[:, :capacity] = values, ordered

    def record(self, norms: Tensor) -> Report[Tensor]:
        """Append one norm to each row that has a usable one; see `autoclip.core.History.record`.

        Args:
            norms: float64[rows] (float32 on MPS), on the device.

        Returns:
            A report of tensors like `norms`, on the device.
        """
        self._reserve()
        self._longest += 1
        rounded = norms.float()
        usable = (rounded >= SMALLEST_NORM) & (rounded < torch.inf)
        slot = self._next[:, None]
        held = self._values.gather(1, slot)
        # A row that does not record lets infinity come and go: nothing changes.
        entered = torch.where(usable, rounded, torch.inf)[:, None]
        left = torch.where(usable[:, None], held, torch.inf)
        self._values.scatter_(1, slot, torch.where(usable[:, None], entered, held))
        self._replace_in_order(entered, left)
        self._next.copy_(torch.where(usable, (self._next + 1) % self.history_length, self._next))
        self._recorded += usable
        self._lengths += usable & (self._lengths < self.history_length)
        thresholds = self._rule.thresholds(self._ordered, self._lengths)
        self._thresholds.copy_(torch.where(self._lengths > 0, thresholds, torch.inf))
        ratios = (self._thresholds / rounded.to(self._thresholds.dtype)).clamp(max=1.0)
        return Report(norms, self._thresholds.clone(), torch.where(usable, ratios, 1.0))

    def _replace_in_order(self, entered: Tensor, left: Tensor) -> None:
        """Take `left` out of the sorted windows and put `entered` in; both float32[rows, 1].

        In a sorted row with the value v inserted, place j holds v clamped to what stood at j - 1
        and at j. Of two neighbours in that, the lower one stays wherever it is smaller than the
        value that leaves, and the upper one moves down everywhere else: no search, no gather.
        """
        end = torch.full_like(left, torch.inf)
        inserted = torch.maximum(
            torch.minimum(entered, torch.cat([self._ordered, end], dim=1)),
            torch.cat([-end, self._ordered], dim=1),
        )
        lower, upper = inserted[:, :-1], inserted[:, 1:]
        torch.where(lower < left, lower, upper, out=self._ordered)

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
        kept, counts = self.read(range(len(self.rules)))
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
        self._ordered.copy_(torch.from_numpy(np.sort(table, axis=1)))
        self._lengths.copy_(torch.from_numpy(lengths))
        self._recorded.copy_(torch.from_numpy(np.asarray(counts, np.int64)))
        self._next.copy_(torch.from_numpy(lengths % self.history_length))
        thresholds = self._rule.thresholds(self._ordered, self._lengths)
        self._thresholds.copy_(torch.where(self._lengths > 0, thresholds, torch.inf))
