"""The histories of a clipper's rows, in as few storages as settings and devices allow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from autoclip.core._clipper.commit import Change, commit
from autoclip.core._history import BaseHistory
from autoclip.core._settings.settings import GroupSettings
from autoclip.core._step import Report

HistoryT = TypeVar("HistoryT", bound=BaseHistory)


@dataclass(eq=False)
class Storage(Generic[HistoryT]):
    """Rows that are recorded together: on one device, with settings of one structure.

    Attributes:
        device: the device of their history; None if the framework places it.
        rows: their numbers.
        history: the history, whose k-th row is `rows[k]`.
        is_outdated: True if changed settings have not been copied into the history yet.
    """

    device: Any
    rows: list[int]
    history: HistoryT
    is_outdated: bool = False


class Histories(Generic[HistoryT]):
    """The windows of all rows of a clipper.

    Rows are arranged in storages when they are first needed, so a clipper with thousands of groups
    is made in one go.

    Args:
        make: makes an empty history from the settings of each of its rows and a device.
        settings: of each row.

    Attributes:
        settings: of each row.
        storages: the rows as they were arranged last.
        version: another number whenever `settings` or `storages` have changed.
    """

    def __init__(
        self,
        make: Callable[[Sequence[GroupSettings], Any], HistoryT],
        settings: Sequence[GroupSettings] = (),
    ) -> None:
        self.settings = [*settings]
        self.storages: list[Storage[HistoryT]] = []
        self.version = 0
        self._make = make
        self._devices: list[Any] = []
        self._is_arranged = not settings
        # Storages that others took over from since the last step, whose report needs their rows.
        self._former: list[Storage[HistoryT]] = []
        # The parts of a step, a load or a change of settings in several storages, while at work.
        self._unfinished: Sequence[Callable[[], Any]] = ()

    def __len__(self) -> int:
        return len(self.settings)

    # -- rows --------------------------------------------------------------------------------

    def insertion(
        self, settings: Sequence[GroupSettings], moved: Sequence[int] | None = None
    ) -> list[Change]:
        """The changes, for `commit`, that insert empty rows.

        Args:
            settings: of all rows after it.
            moved: for each present row its number after it; None if they stay.
        """
        own = {"settings": [*settings], "_is_arranged": False, "version": self.version + 1}
        changes: list[Change] = [(vars(self), own)]
        if moved is not None:
            changes += [
                (vars(storage), {"rows": [moved[row] for row in storage.rows]})
                for storage in (*self.storages, *self._former)
            ]
        return changes

    def change(self, rows: Iterable[int], settings: GroupSettings) -> list[Change]:
        """The changes, for `commit` and then `finish`, that give `rows` other settings.

        They keep their windows, the newest norms of longer ones.
        """
        self.finish()
        changed, new, structure = set(rows), self.settings.copy(), settings.structure
        for row in changed:
            new[row] = settings
        keeps = self._is_arranged and all(
            self.settings[row].structure == structure for row in changed
        )
        concerned = [
            each
            for each in self.storages
            if keeps and not each.is_outdated and not changed.isdisjoint(each.rows)
        ]
        own = {
            "settings": new,
            "_is_arranged": keeps,
            "version": self.version + 1,
            "_unfinished": [
                partial(self._update, each) for each in concerned if each.history.changes_at_once
            ],
        }
        return [(vars(self), own), *((vars(each), {"is_outdated": True}) for each in concerned)]

    def _update(self, storage: Storage[HistoryT]) -> None:
        if storage.is_outdated:
            storage.history.settings = tuple(self.settings[row] for row in storage.rows)
            storage.is_outdated = False

    def arrange(self, devices: Sequence[Any]) -> None:
        """Bring all rows into storages that live on `devices`, one a row, with their windows.

        A storage that stays the same keeps its history and its memory.
        """
        self.finish()
        if self._is_arranged and self._devices == devices:
            for storage in self.storages:
                self._update(storage)
            return
        present = {(storage.device, *storage.rows): storage for storage in self.storages}
        arranged: list[Storage[HistoryT]] = []
        read: tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]] | None = None
        for rows in rows_by_storage(self.settings, devices):
            device = devices[rows[0]]
            settings = [self.settings[row] for row in rows]
            same = present.get((device, *rows))
            if same is not None and same.history.settings[0].structure == settings[0].structure:
                same.is_outdated = True
                self._update(same)
                arranged.append(same)
                continue
            history = self._make(settings, device)
            if self.storages:
                read = windows, recorded = self._read() if read is None else read
                if recorded[rows].any():
                    history.write(range(len(rows)), [windows[row] for row in rows], recorded[rows])
            arranged.append(Storage(device, rows, history))
        former = [*self._former, *set(self.storages).difference(arranged)]
        own = {
            "storages": arranged,
            "version": self.version + 1,
            "_devices": list(devices),
            "_is_arranged": True,
            "_former": former,
        }
        commit((vars(self), own))

    # -- steps -------------------------------------------------------------------------------

    def record(
        self, norms: Sequence[tuple[Storage[HistoryT], Any]]
    ) -> list[tuple[Storage[HistoryT], Report[Any]]]:
        """Record a step in some storages, in all of them or in none.

        Args:
            norms: storages, and the norms of their rows.

        Returns:
            The storages and their reports.
        """
        if self._unfinished:
            self.finish()
        self._former = []
        if len(norms) == 1:
            [(storage, only)] = norms
            return [(storage, storage.history.record(only))]
        if self._is_resumable:
            self._unfinished = [storage.history.once(each) for storage, each in norms]
        reports = [(storage, storage.history.record(each)) for storage, each in norms]
        self._unfinished = ()
        return reports

    @property
    def _is_resumable(self) -> bool:
        """True if a later call may complete an interrupted step."""
        return True

    def thresholds(self) -> list[tuple[Storage[HistoryT], Any]]:
        """The storages, and the thresholds of their windows as they are now."""
        self.finish()
        return [(storage, storage.history.thresholds) for storage in self.storages]

    def finish(self) -> None:
        """Complete a step, a load or a change of settings, also one that was interrupted."""
        for part in self._unfinished:
            part()
        self._unfinished = ()

    # -- contents ----------------------------------------------------------------------------

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """All windows, oldest norm first, and how many norms each row has ever recorded."""
        self.finish()
        return self._read()

    def _read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        windows = [np.empty(0, np.float32)] * len(self)
        recorded = np.zeros(len(self), np.int64)
        for storage in self.storages:
            found, recorded[storage.rows] = storage.history.read(range(len(storage.rows)))
            for row, window in zip(storage.rows, found):
                windows[row] = window[-self.settings[row].history_length :]
        return windows, recorded

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows, or none if interrupted; the rows are arranged."""
        self.finish()
        self._unfinished = [
            storage.history.stage(
                range(len(storage.rows)),
                [windows[row] for row in storage.rows],
                recorded[storage.rows],
            )
            for storage in self.storages
        ]
        self.finish()

    def reset(self) -> None:
        """Forget all norms."""
        self.write([np.empty(0, np.float32)] * len(self), np.zeros(len(self), np.int64))


def rows_by_storage(
    settings: Sequence[GroupSettings], *keys: Sequence[Hashable]
) -> list[list[int]]:
    """The rows that can be recorded together: those with equal `structure`.

    Args:
        settings: of each row.
        keys: other values that they must share, one a row, such as a device.
    """
    found: dict[Hashable, list[int]] = {}
    # Groups share their settings among many rows, and a look at each row's structure takes long.
    known = {id(each): each.structure for each in {id(each): each for each in settings}.values()}
    for row, each in enumerate(settings):
        found.setdefault((known[id(each)], *(values[row] for values in keys)), []).append(row)
    return list(found.values())
