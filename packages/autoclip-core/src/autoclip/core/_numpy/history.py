"""The histories of many rows in NumPy: norms in, thresholds and coefficients out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._history import BaseHistory
from autoclip.core._numpy.ring import OPS, RingBuffer, Rows
from autoclip.core._numpy.tracker import FewRows, Tracker, tracker_of
from autoclip.core._ops import is_recorded, refuse_negative
from autoclip.core._rules.rule import Rule
from autoclip.core._settings.mode import Mode
from autoclip.core._settings.settings import GroupSettings, Record
from autoclip.core._state.saving import Saveable
from autoclip.core._state.state import MAX_RECORDED, ParameterInfo, State
from autoclip.core._step import NUMBERS, Report, numbers_of, record, record_few, thresholds_of


class _NumpyWindows:
    """The windows of all rows, their settings, and a tracker if the rule has one.

    `record` takes it in the place of `Windows`: rows of different lengths, thresholds
    from the tracker. A history replaces it as a whole, so an interrupted load changes nothing.
    """

    ops = OPS

    def __init__(self, settings: Sequence[GroupSettings], ring: RingBuffer) -> None:
        self.settings, self.ring, self.shape = settings, ring, (len(settings),)
        self.numbers = {
            # Rows with the same setting share the results that a rule computes from it.
            name: OPS.common(column) if name.startswith("rule/") else column
            for name, column in numbers_of(settings).items()
        }
        self.tracker = tracker_of([each.rule for each in settings], ring.history_length)
        self.few: Any = self.tracker if isinstance(self.tracker, FewRows) else None
        # For each of `NUMBERS` one a row; None if no row uses the setting.
        self.lists = [
            self.numbers[name][:, 0].tolist() if name in self.numbers else None for name in NUMBERS
        ]
        # Whether the ring has changed, or is about to, since the tracker followed it.
        self.is_stale = True

    @property
    def recorded(self) -> npt.NDArray[np.int64]:
        """int64[rows, 1]: how many norms each row has ever recorded."""
        return self.ring.recorded[:, None]

    def finished(self) -> _NumpyWindows:
        """These windows, after a step that an interrupt has cut short has been completed."""
        if self.is_stale:
            self.ring.finish()
            if self.tracker is not None:
                self.tracker.rebuild(self.ring)
            self.is_stale = False
        return self

    def push(self, norms: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_]) -> _NumpyWindows:
        """Append one norm to each row where `usable`; both [rows, 1]."""
        rows: Rows = slice(None) if usable.all() else np.flatnonzero(usable)
        entered = norms[rows, 0]
        if not len(entered):
            return self
        self.is_stale = True
        self.ring = self.ring.reserved(rows)
        left = self.ring.push(rows, entered)
        if isinstance(self.tracker, Tracker):
            if not self.ring.is_full:
                left = np.where(left > 0, left, np.float32(np.nan))
            self.tracker.update(self.ring, rows, entered, left)
        self.is_stale = False
        return self

    def apply(self, rule: Rule, arguments: Mapping[str, Any], norm: Any = None) -> tuple[Any, Any]:
        """See `Windows.apply`."""
        if self.tracker is not None:
            if isinstance(self.tracker, Tracker):
                found = self.tracker.thresholds.copy()
            else:
                found = np.array(self.tracker.thresholds(self.ring))
            column = found[:, None]
            return column, column
        thresholds = np.empty((self.ring.rows, 1))
        scales_elsewhere = norm is not None and type(rule).clip_to is not Rule.clip_to
        targets = np.empty_like(thresholds) if scales_elsewhere else thresholds
        for some, windows in self.ring.windows():
            own = {
                name: value[some] if isinstance(value, np.ndarray) and len(value) > 1 else value
                for name, value in arguments.items()
            }
            thresholds[some], targets[some] = windows.apply(
                rule, own, norm[some] if scales_elsewhere else None
            )
        return thresholds, targets

    def push_each(self, entered: Sequence[float]) -> None:
        """Append one norm to each row, 0 for none, for a step in Python's numbers."""
        self.is_stale = True
        if not self.ring.is_full:
            self.ring = self.ring.reserved(np.flatnonzero(entered))
        self.few.update(self.ring, entered, self.ring.push_each(entered))
        self.is_stale = False


class History(BaseHistory, Saveable):
    """The windows of many rows, all of one length and under one kind of rule.

    A row stands for one gradient: one parameter's, or that of all parameters together. At each
    step `record` compares the rows' norms with their thresholds and appends them to the windows
    (Seetharaman et al., 2020, arXiv:2007.14469, Algorithm 1).

    Args:
        rows: the number of rows.
        rule: the rule that turns a window into a threshold, such as `Quantile` or
            `Standard`: one for all rows, or a sequence with one a row, all of the same class.
        history_length: the number of norms a row keeps, the newest ones.
        max_norm: a ceiling on every threshold; None for none.
        warmup_steps: the number of norms a row records before its rule counts; None for the rule's
            default.
        include_current: True if a norm is part of the window that it is compared with; None for
            the rule's default.
        record: `"raw"` records the norms as given, `"clipped"` as they are after clipping.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    >>> import numpy as np
    >>> from autoclip.core import History, Quantile
    >>> history = History(rows=2, rule=Quantile(0.5), history_length=100)
    >>> for norms in ([1.0, 10.0], [2.0, np.nan], [6.0, 30.0]):
    ...     report = history.record(norms)
    >>> report.thresholds
    array([ 2., 20.])
    >>> gradient = np.full(4, 3.0)  # its norm is 6.0, the first row's
    >>> float(np.linalg.norm(gradient * report.coefficients[0]))
    2.0
    """

    changes_at_once = False  # making new trackers waits for the last of many changes

    def __init__(
        self,
        rows: int,
        rule: Rule | Sequence[Rule],
        history_length: int = 1000,
        *,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        include_current: bool | None = None,
        record: Record = "raw",
    ) -> None:
        if not isinstance(rule, (Rule, Sequence)):
            raise TypeError(
                "rule must be a Rule such as Quantile(0.9), or a sequence with one a row, but got "
                f"{rule!r:.200} of type {type(rule).__name__}."
            )
        rules = [rule] * rows if isinstance(rule, Rule) else list(rule)
        if len(rules) != rows:
            raise ValueError(f"rule must be one rule, or one a row: {rows}, but got {len(rules)}.")
        made = {
            each: GroupSettings(
                each,
                history_length,
                max_norm=max_norm,
                warmup_steps=warmup_steps,
                include_current=include_current,
                record=record,
            )
            for each in dict.fromkeys(rules)
        }
        self._set_up([made[each] for each in rules])

    @classmethod
    def of(cls, settings: Sequence[GroupSettings]) -> History:
        """Make a history from the settings of each of its rows, of equal `structure`."""
        history = cls.__new__(cls)
        history._set_up(settings)
        return history

    def _set_up(self, settings: Sequence[GroupSettings]) -> None:
        settings = list(settings)
        for each in dict.fromkeys(settings):
            if each.structure != settings[0].structure:
                raise TypeError(
                    "The rules of a history must be of one class, with settings that differ in "
                    f"numbers only, but got {settings[0].rule} and {each.rule}."
                )
        empty = [np.empty(0, np.float32)] * len(settings)
        length = settings[0].history_length if settings else 1
        ring = RingBuffer(empty, np.zeros(len(settings), np.int64), length)
        self._windows = _NumpyWindows(settings, ring)

    def __getstate__(self) -> dict[str, Any]:
        windows = self._windows.finished()
        return {"settings": windows.settings, "ring": windows.ring}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._windows = _NumpyWindows(state["settings"], state["ring"])

    @property
    def _settings(self) -> Sequence[GroupSettings]:
        return self._windows.settings

    @property
    def _ring(self) -> RingBuffer:
        return self._windows.finished().ring

    def _change(self, settings: tuple[GroupSettings, ...], rows: list[int]) -> None:
        self._windows = _NumpyWindows(settings, self._ring)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rule of each row."""
        return tuple(each.rule for each in self._settings)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms each window holds now."""
        return self._ring.lengths

    @property
    def recorded(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms each row has ever recorded."""
        return self._ring.recorded.copy()

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """float64[rows]: the thresholds of the windows as they are now.

        Infinite where nothing was recorded yet or the row is still warming up; never above
        `max_norm`. Without `include_current` the next norms are compared with these.
        """
        if not self.rows:
            return np.empty(0)
        windows = self._windows.finished()
        with np.errstate(all="ignore"):  # empty rows
            found = thresholds_of(windows.settings[0], windows.numbers, windows)
        return np.ravel(found)

    def record(self, norms: npt.ArrayLike) -> Report[npt.NDArray[np.float64]]:
        """Compare one norm a row with its threshold, and append it to the row's window.

        A norm that is zero (below `SMALLEST_NORM`), NaN or infinite stands for a gradient that
        says nothing: its row records nothing and its coefficient is 1.

        Args:
            norms: [rows], L2 norms ≥ 0; rounded once, to float32.

        Returns:
            The step's norms, thresholds and coefficients.

        Raises:
            ValueError: the shape is not [rows], or a norm is negative. Nothing is recorded.
        """
        windows = self._windows
        given = np.array(norms, np.float64)  # a copy: the report keeps it
        if given.shape != windows.shape:
            raise ValueError(
                f"norms must have one number per row, shape ({self.rows},), got {given.shape}."
            )
        if windows.is_stale:
            windows.finished()
        if windows.few is not None:
            return record_few(windows, given)
        if not windows.settings:
            return Report(given, np.empty(0), np.empty(0))
        refuse_negative(given)
        with np.errstate(all="ignore"):  # norms beyond float32, empty rows, NaN
            column = given[:, None]
            _, report = record(windows.settings[0], windows.numbers, windows, column)
        return Report(given, report.thresholds[:, 0], report.coefficients[:, 0])

    def read(
        self, rows: Sequence[int]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy the windows of `rows`, oldest norm first, and how many norms each ever recorded."""
        index, ring = list(rows), self._ring
        return [ring.read(row) for row in index], ring.recorded[index]

    def stage(
        self,
        rows: Sequence[int],
        windows: Sequence[npt.NDArray[np.float32]],
        recorded: Sequence[int] | npt.NDArray[np.int64],
    ) -> Callable[[], None]:
        index = list(rows)
        if not len(index) == len(windows) == len(recorded):
            raise ValueError(
                "windows and recorded must have one entry for each row, but got "
                f"{len(index)} rows, {len(windows)} windows and {len(recorded)} numbers."
            )
        return super().stage(index, *_checked(index, windows, recorded))

    def _stage_all(
        self, windows: list[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> Callable[[], None]:
        ring = RingBuffer(windows, recorded, self.history_length)
        return partial(setattr, self, "_windows", _NumpyWindows(self._settings, ring))

    def _mark(self) -> npt.NDArray[np.int64]:
        return self.recorded

    def export_state(self) -> State:
        return self._state(*self.read(range(self.rows)))

    def describe_state(self) -> State:
        return self._state()

    def _state(self, *contents: Any) -> State:
        if not self._settings:
            raise ValueError("A history without rows has no state to save.")
        groups = [list(run) for _, run in groupby(range(self.rows), self._settings.__getitem__)]
        return State.of(
            "numpy",
            Mode.PARAMETER,
            [self._settings[rows[0]] for rows in groups],
            [[ParameterInfo(None, None)] * len(rows) for rows in groups],
            *contents,
        )

    def commit_state(self, state: State) -> None:
        self.write(range(self.rows), *state.by_row())

    def __repr__(self) -> str:
        kinds = ", ".join(map(str, dict.fromkeys(self.rules)))
        return f"History(rows={self.rows}, rule={kinds}, history_length={self.history_length})"


def _checked(
    rows: Sequence[int], windows: Sequence[Any], recorded: Any
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    """The windows and numbers of recorded norms of some rows, if a history can have them."""
    with np.errstate(over="ignore"):
        norms = [np.asarray(window, np.float32) for window in windows]
    counts, lengths = np.asarray(recorded), np.array([each.size for each in norms])
    if (
        any(each.ndim != 1 for each in norms)
        or counts.dtype.kind not in "iu"
        or not is_recorded(np.concatenate([np.empty(0, np.float32), *norms])).all()
        or (counts < lengths).any()
        or counts.max(initial=0) > MAX_RECORDED
    ):  # find the row and the fault
        for row, window, count in zip(rows, norms, recorded):
            _check_row(row, window, count)
    return norms, counts.astype(np.int64)


def _check_row(row: int, norms: npt.NDArray[np.float32], count: Any) -> None:
    if norms.ndim != 1 or not is_recorded(norms).all():
        raise ValueError(
            f"The window of row {row} is not a list of norms that a history records: one is zero, "
            "negative, NaN or infinite in float32."
        )
    if isinstance(count, (bool, np.bool_)) or int(count) != count:
        raise TypeError(f"recorded must be ints, but got {count!r} for row {row}.")
    if not len(norms) <= count <= MAX_RECORDED:
        raise ValueError(
            f"The window of row {row} has {len(norms)} norms, but the row is said to have recorded "
            f"{count}; it must be from {len(norms)} to 2**62."
        )
