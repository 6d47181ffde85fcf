"""Where the history of each row lives: with the device of its gradient, or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core import History, Report, Rule
from autoclip.torch._histories import TensorHistory

__all__ = ["Norms", "Rows", "uses_numpy"]

Norms: TypeAlias = npt.NDArray[np.float64] | Tensor
"""Norms of all parameters: a NumPy array on the CPU, a tensor on any other device."""

_CPU = torch.device("cpu")


def uses_numpy(device: torch.device) -> bool:
    """Whether histories of gradients on `device` are kept by the core, in NumPy.

    On the CPU that needs no copy, and nothing is asynchronous there that could be waited for.
    """
    return device.type == "cpu"


class _Bank(NamedTuple):
    """Rows that are recorded together: one device, one history length."""

    device: torch.device
    history: History | TensorHistory
    rows: list[int]
    # The rows as an index on the device, or all of them in order.
    index: Any


class Rows:
    """The histories of all rows of a clipper, grouped so that a step costs few operations.

    Rows are numbered in the order in which they were added. Where a row lives follows its
    gradient: it starts on the CPU and moves when a gradient comes from elsewhere.
    """

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.history_lengths: list[int] = []
        self.banks: list[_Bank] = []
        self._homes: list[torch.device] = []

    def __len__(self) -> int:
        return len(self.rules)

    def add(self, rule: Rule, history_length: int, count: int) -> None:
        """Append `count` empty rows."""
        contents = self.read()
        self.rules += [rule] * count
        self.history_lengths += [history_length] * count
        self._homes += [_CPU] * count
        empty = [np.empty(0, np.float32)] * count
        self._arrange([*contents[0], *empty], np.pad(contents[1], (0, count)))

    def settle(self, homes: Sequence[torch.device | None]) -> None:
        """Move each row to its device; None means that it stays where it is."""
        if all(home is None or home == now for home, now in zip(homes, self._homes)):
            return
        contents = self.read()
        self._homes = [home or now for home, now in zip(homes, self._homes)]
        self._arrange(*contents)

    def _arrange(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        members: dict[tuple[torch.device, int], list[int]] = {}
        for row, key in enumerate(zip(self._homes, self.history_lengths)):
            members.setdefault(key, []).append(row)
        self.banks = []
        for (device, history_length), rows in members.items():
            rules = [self.rules[row] for row in rows]
            history: History | TensorHistory
            index: Any = slice(None) if len(rows) == len(self.rules) else np.array(rows)
            if uses_numpy(device):
                history = History(len(rows), rules, history_length)
            else:
                history = TensorHistory(rules, history_length, device)
                index = index if isinstance(index, slice) else torch.from_numpy(index).to(device)
            self.banks.append(_Bank(device, history, rows, index))
        self.write(windows, recorded)

    def record(self, bank: _Bank, norms: Norms) -> Report[Any]:
        """Record a step in the rows of one bank.

        Args:
            bank: one of `banks`.
            norms: [len(self)], of all rows, on the bank's device.
        """
        return bank.history.record(norms[bank.index])

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """All windows, oldest norm first, and how many norms each row has ever recorded."""
        windows = [np.empty(0, np.float32)] * len(self)
        recorded = np.zeros(len(self), np.int64)
        for bank in self.banks:
            found, counts = bank.history.read(range(len(bank.rows)))
            recorded[bank.rows] = counts
            for row, window in zip(bank.rows, found):
                windows[row] = window
        return windows, recorded

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows."""
        for bank in self.banks:
            bank.history.write(
                range(len(bank.rows)), [windows[row] for row in bank.rows], recorded[bank.rows]
            )
