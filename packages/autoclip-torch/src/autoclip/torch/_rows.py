"""The rows of a clipper's history, in batches that are recorded together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core import History, Report
from autoclip.core.adapter import GroupSettings, batches
from autoclip.torch._history import TensorHistory

__all__ = ["RowBatch", "Rows", "as_tensor", "uses_numpy"]


def uses_numpy(device: torch.device) -> bool:
    """Whether histories of gradients on `device` are kept by the core, in NumPy.

    On the CPU that needs no copy, and nothing is asynchronous there that could be waited for.
    """
    return device.type == "cpu"


def as_tensor(values: npt.NDArray[Any] | Tensor) -> Tensor:
    """The values of a history as a tensor, where they are.

    `torch.as_tensor` would move them to the device of `torch.set_default_device`.
    """
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


@dataclass(eq=False)
class RowBatch:
    """Rows that are recorded together: on one device, with settings of one structure.

    Attributes:
        device: where their history lives.
        rows: which rows.
        history: the history, whose k-th row is `rows[k]`.
        is_outdated: whether the history has yet to take over numbers from the settings.
    """

    device: torch.device
    rows: list[int]
    history: History | TensorHistory
    is_outdated: bool = False


class Rows:
    """The histories of all rows of a clipper, in as few batches as settings and devices allow.

    Rows are numbered in the order in which they were added. They are arranged in batches when they
    are first needed: so a clipper with thousands of groups is made in one go.

    Attributes:
        settings: of each row.
        batches: the rows as they were arranged last.
        version: another number whenever `settings` or `batches` have changed.
    """

    def __init__(self) -> None:
        self.settings: list[GroupSettings] = []
        self.batches: list[RowBatch] = []
        self.version = 0
        self._devices: list[torch.device] = []
        self._is_arranged = True
        # The parts of a step or load of several batches, while one is at work.
        self._unfinished: Sequence[Callable[[], Any]] = ()

    def __len__(self) -> int:
        return len(self.settings)

    def add(self, settings: GroupSettings, count: int) -> range:
        """Append `count` empty rows; return their numbers."""
        start = len(self)
        self.settings += [settings] * count
        self._is_arranged = False
        self.version += 1
        return range(start, start + count)

    def change(self, rows: Iterable[int], settings: GroupSettings) -> None:
        """Give `rows` other settings. They keep their windows, the newest norms of longer ones."""
        changed = set(rows)
        for row in changed:
            if self.settings[row].structure != settings.structure:
                self._is_arranged = False
            self.settings[row] = settings
        self.version += 1
        for batch in self.batches:
            if self._is_arranged and not changed.isdisjoint(batch.rows):
                batch.is_outdated = True
                # At once where a captured CUDA graph may read them; NumPy's trackers are made
                # anew, and that is worth waiting for the next of many changes.
                if isinstance(batch.history, TensorHistory):
                    self._update(batch)

    def _update(self, batch: RowBatch) -> None:
        if batch.is_outdated:
            batch.history.settings = [self.settings[row] for row in batch.rows]
            batch.is_outdated = False

    def arrange(self, devices: Sequence[torch.device]) -> None:
        """Bring all rows into batches that live on `devices`, one a row, with their windows.

        A batch that stays the same keeps its history where it is.
        """
        self._finish()
        if self._is_arranged and self._devices == devices:
            for batch in self.batches:
                self._update(batch)
            return
        present = {(batch.device, *batch.rows): batch for batch in self.batches}
        old, arranged = self.batches, list[RowBatch]()
        windows, recorded = None, np.zeros(0, np.int64)
        for rows in batches(self.settings, devices).values():
            device = devices[rows[0]]
            settings = [self.settings[row] for row in rows]
            same = present.get((device, *rows))
            if same is not None and same.history.settings[0].structure == settings[0].structure:
                same.is_outdated = True
                self._update(same)
                arranged.append(same)
                continue
            history: History | TensorHistory = (
                History.of(settings) if uses_numpy(device) else TensorHistory(settings, device)
            )
            if old and windows is None:
                windows, recorded = self._read(old)
            if windows is not None and recorded[rows].any():
                history.write(range(len(rows)), [windows[row] for row in rows], recorded[rows])
            arranged.append(RowBatch(device, rows, history))
        self.version += 1  # first: an interrupt must not leave others with the old batches
        self.batches = arranged
        self._devices = list(devices)
        self._is_arranged = True

    def record(self, norms: Sequence[tuple[RowBatch, Any]]) -> list[Report[Any]]:
        """Record a step in some batches, in all of them or in none.

        Args:
            norms: batches, and the norms of their rows.

        Returns:
            The reports of the batches.
        """
        self._finish()
        if len(norms) > 1:
            self._unfinished = [batch.history.once(each) for batch, each in norms]
        reports: list[Report[Any]] = [batch.history.record(each) for batch, each in norms]
        self._unfinished = ()
        return reports

    def _finish(self) -> None:
        """Complete a step or a load that an interrupt has cut short."""
        for part in self._unfinished:
            part()
        self._unfinished = ()

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """All windows, oldest norm first, and how many norms each row has ever recorded."""
        self._finish()
        return self._read(self.batches)

    def _read(
        self, some: Sequence[RowBatch]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        windows = [np.empty(0, np.float32)] * len(self)
        recorded = np.zeros(len(self), np.int64)
        for batch in some:
            found, recorded[batch.rows] = batch.history.read(range(len(batch.rows)))
            for row, window in zip(batch.rows, found):
                windows[row] = window[-self.settings[row].history_length :]
        return windows, recorded

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows, or none if interrupted; the rows are arranged."""
        self._finish()
        self._unfinished = [
            batch.history.stage(
                range(len(batch.rows)), [windows[row] for row in batch.rows], recorded[batch.rows]
            )
            for batch in self.batches
        ]
        self._finish()

    def reset(self) -> None:
        """Forget all norms."""
        self.write([np.empty(0, np.float32)] * len(self), np.zeros(len(self), np.int64))
