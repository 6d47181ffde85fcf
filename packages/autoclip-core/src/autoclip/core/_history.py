"""The histories of many rows in NumPy: norms in, thresholds and coefficients out."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from autoclip.core._ring import SMALLEST_NORM, RingBuffer, Rows, is_recorded
from autoclip.core._rows import make_state
from autoclip.core._rule import Rule, rule_arguments
from autoclip.core._saving import Saveable
from autoclip.core._settings import GroupSettings, Record
from autoclip.core._state import MAX_RECORDED, ParameterInfo, State
from autoclip.core._tracker import FewRowsTracker, Tracker

__all__ = ["History", "Report"]

ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True)
class Report(Generic[ArrayT]):
    """What one step did, row by row.

    Attributes:
        norms: [rows], the norms that were given; 0 for a row without a gradient.
        thresholds: [rows], what each norm was compared with; infinite where nothing is known yet.
        coefficients: [rows], what each gradient is multiplied by, `min(1, threshold / norm)`; 1
            for a row that recorded nothing in this step. Where `on_spike` is `"zero"` or `"skip"`,
            0 for a norm above its threshold.
        names: what the rows stand for: parameters' names, groups, or all parameters.
    """

    norms: ArrayT
    thresholds: ArrayT
    coefficients: ArrayT
    names: tuple[str, ...] = ()

    @property
    def spikes(self) -> ArrayT:
        """bool[rows]: whether the norm was above its threshold, regardless of `on_spike`."""
        return self.coefficients < 1.0  # type: ignore[operator, return-value]


class History(Saveable):
    """The windows of many rows, all of one length and under one kind of rule.

    A row stands for one gradient: one parameter's, or that of all parameters together. At each
    step `record` compares the rows' norms with their thresholds and appends them to the windows
    (Seetharaman et al., 2020, arXiv:2007.14469, Algorithm 1).

    Args:
        rows: how many rows.
        rule: how a window becomes a threshold, such as `Quantile` or `Standard`: one for all rows,
            or a sequence with one a row, all of the same class.
        history_length: how many norms a row keeps, the newest ones.
        max_norm: a ceiling on every threshold; None for none.
        warmup_steps: how many norms a row records before its rule counts; None for the rule's
            default.
        include_current: whether a norm is part of the window that it is compared with; None for
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
                "rule takes a Rule such as Quantile(0.9), or a sequence with one a row, but got "
                f"{rule!r:.200} of type {type(rule).__name__}."
            )
        rules = [rule] * rows if isinstance(rule, Rule) else list(rule)
        if len(rules) != rows:
            raise ValueError(f"rule takes one rule, or one a row: {rows}, but got {len(rules)}.")
        made = {
            each: GroupSettings(
                each, history_length, max_norm, warmup_steps, include_current, record
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
        self._settings = list(settings)
        first = self._settings[0] if settings else None
        for each in dict.fromkeys(self._settings):
            if first is not None and each.structure != first.structure:
                raise TypeError(
                    "The rows of a history take rules of one class, whose settings differ in "
                    f"numbers only, but got {first.rule} and {each.rule}."
                )
        self._includes_current = first is None or bool(first.include_current)
        self._records_clipped = first is not None and first.record == "clipped"
        self._ring = RingBuffer(len(self._settings), first.history_length if first else 1)
        self._read_numbers()

    def _read_numbers(self) -> None:
        """Take up what settings that are numbers say of each row, and start to track."""
        settings = self._settings
        # What most clippers do not use costs them nothing: None.
        self._ceilings = _numbers([each.max_norm for each in settings], np.inf)
        self._warmups = _numbers([each.warmup_steps or None for each in settings], 0)
        drops = [each.on_spike != "clip" for each in settings]
        self._drops = np.array(drops) if any(drops) else None
        self._tracker: Tracker | None = None
        self._few: FewRowsTracker | None = None
        if not settings:
            return
        rules = [each.rule for each in settings]
        self._rule = type(rules[0])
        self._arguments = rule_arguments(rules)
        self._tracker = self._rule.track(rules, self._ring)
        if isinstance(self._tracker, FewRowsTracker) and self._drops is None:
            self._few = self._tracker
        if self._tracker is not None:
            self._tracker.rebuild(np.flatnonzero(self._ring.lengths))

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings, "ring": self._ring}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_up(state["settings"])
        self._ring = state["ring"]
        self._read_numbers()

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._settings)

    @property
    def settings(self) -> tuple[GroupSettings, ...]:
        """The settings of each row. Setting them keeps the windows.

        Raises:
            ValueError: the new ones are not one a row, or differ in more than numbers.
        """
        return tuple(self._settings)

    @settings.setter
    def settings(self, settings: Sequence[GroupSettings]) -> None:
        if len(settings) != self.rows or any(
            each.structure != self._settings[0].structure for each in settings
        ):
            raise ValueError(
                "settings takes one GroupSettings a row that differs from the present one in "
                "numbers only. Make a new History for others, and write the windows into it."
            )
        self._settings = list(settings)
        self._read_numbers()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rule of each row."""
        return tuple(each.rule for each in self._settings)

    @property
    def history_length(self) -> int:
        """How many norms a row keeps at most."""
        return self._ring.history_length

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms each window holds now."""
        return self._ring.lengths.copy()

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
        return self._limited(self._judge()[0], self._ring.recorded)

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
        given = np.array(norms, np.float64)  # a copy: the report keeps it
        if given.shape != (self.rows,):
            raise ValueError(
                f"record takes one norm a row, shape ({self.rows},), but got shape {given.shape}."
            )
        if self._few is not None:
            return self._record_few(self._few, given)
        with np.errstate(over="ignore"):  # a float64 norm may be too large for float32
            rounded = given.astype(np.float32)
        usable = is_recorded(rounded)
        rows: Rows = slice(None)
        if not usable.all():
            if (given < 0).any():
                raise ValueError(_negative_norm(given))
            rows = np.flatnonzero(usable)
            if not len(rows):
                return Report(given, self.thresholds, np.ones(self.rows))
        return self._record_many(given, rounded, rows)

    def _record_many(
        self, given: npt.NDArray[np.float64], rounded: npt.NDArray[np.float32], rows: Rows
    ) -> Report[npt.NDArray[np.float64]]:
        before = self._ring.recorded.copy() if self._warmups is not None else self._ring.recorded
        if self._includes_current:
            self._push(rows, rounded[rows])
        raw, clip_to = self._judge(rounded)
        thresholds = self._limited(raw, before)
        targets = thresholds if clip_to is raw else self._limited(clip_to, before)
        coefficients = np.ones(self.rows)
        # The ratio to the *rounded* norm, the one in the window: so the largest never clips.
        coefficients[rows] = np.minimum(1.0, targets[rows] / rounded[rows])
        if not self._includes_current:
            entered = rounded[rows]
            if self._records_clipped:
                entered = (entered * coefficients[rows]).astype(np.float32)
            self._push(rows, entered)
        if self._drops is not None:
            coefficients[(coefficients < 1.0) & self._drops] = 0.0
        return Report(given, thresholds, coefficients)

    def _record_few(
        self, tracker: FewRowsTracker, given: npt.NDArray[np.float64]
    ) -> Report[npt.NDArray[np.float64]]:
        """`record` in Python's numbers, which is quicker for a few rows."""
        listed = given.tolist()
        if [norm for norm in listed if norm < 0]:
            raise ValueError(_negative_norm(given))
        push, update = self._ring.push_one, tracker.update_one
        first, warmups, ceilings = self._includes_current, self._warmups, self._ceilings
        limits, coefficients = [], []
        for row, norm in enumerate(array("f", listed)):  # rounded; infinite beyond float32
            usable = SMALLEST_NORM <= norm < math.inf
            warm = warmups is None or self._ring.recorded[row] >= warmups[row]
            if usable and first:
                update(row, norm, push(row, norm))
            limit = tracker.thresholds[row] if warm else math.inf
            if ceilings is not None:
                limit = min(limit, float(ceilings[row]))
            coefficient = limit / norm if usable and limit < norm else 1.0
            if usable and not first:
                entered = float(np.float32(norm * coefficient)) if self._records_clipped else norm
                update(row, entered, push(row, entered))
            limits.append(limit)
            coefficients.append(coefficient)
        return Report(given, np.array(limits), np.array(coefficients))

    def _push(self, rows: Rows, entered: npt.NDArray[np.float32]) -> None:
        if self._records_clipped:  # clipped to nothing that a history records
            usable = is_recorded(entered)
            if not usable.all():
                index = np.arange(self.rows) if isinstance(rows, slice) else rows
                rows, entered = index[usable], entered[usable]
        left = self._ring.push(rows, entered)
        if self._tracker is not None:
            self._tracker.update(rows, entered, left)

    def _judge(
        self, norms: npt.NDArray[np.float32] | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The rule's thresholds, and what it scales `norms` above them down to."""
        if self._tracker is not None:
            thresholds = np.array(self._tracker.thresholds, np.float64)
            return thresholds, thresholds
        raw = np.full(self.rows, np.inf)
        if not self.rows:
            return raw, raw
        clip_to = raw if norms is None or self._rule.clip_to is Rule.clip_to else raw.copy()
        for rows, window in self._ring.windows():
            arguments = {
                name: value[rows] if isinstance(value, np.ndarray) and len(value) > 1 else value
                for name, value in self._arguments.items()
            }
            filled = self._ring.lengths[rows] > 0
            with np.errstate(all="ignore"):  # empty rows, and norms below their threshold
                found = np.broadcast_to(self._rule.threshold(window, **arguments), (len(rows), 1))
                raw[rows] = np.where(filled, found[:, 0], np.inf)
                if clip_to is not raw and norms is not None:
                    norm = norms[rows, None].astype(np.float64)
                    target = self._rule.clip_to(window, norm, found, **arguments)
                    clip_to[rows] = np.where(filled & (norm > found)[:, 0], target[:, 0], np.inf)
        return raw, clip_to

    def _limited(
        self, thresholds: npt.NDArray[np.float64], recorded: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Thresholds after warm-up and below the ceiling."""
        if self.rows and self._warmups is not None:
            thresholds = np.where(recorded >= self._warmups, thresholds, np.inf)
        if self.rows and self._ceilings is not None:
            thresholds = np.minimum(thresholds, self._ceilings)
        return thresholds

    def reset(self) -> None:
        """Forget all norms, as if nothing had been recorded."""
        self._set_up(self._settings)

    def read(
        self, rows: Sequence[int]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy the windows of `rows`.

        Returns:
            One float32[length] a row, oldest norm first, and int64[len(rows)], how many norms
            each has ever recorded.
        """
        index = list(rows)
        return [self._ring.read(row) for row in index], self._ring.recorded[index]

    def write(
        self,
        rows: Sequence[int],
        windows: Sequence[npt.NDArray[np.float32]],
        recorded: Sequence[int] | npt.NDArray[np.int64],
    ) -> None:
        """Replace the windows of `rows`; of one longer than `history_length` the newest stay.

        Args:
            rows: which rows.
            windows: one float32[length] a row, oldest norm first.
            recorded: [len(rows)], how many norms each row has ever recorded.

        Raises:
            TypeError: a number of recorded norms is not an int.
            ValueError: there is not one window and one number for each row, a norm could not have
                been recorded, or a window is longer than what its row recorded. Nothing changed.
        """
        index = list(rows)
        if not len(index) == len(windows) == len(recorded):
            raise ValueError(
                "write takes one window and one number of recorded norms for each row, but got "
                f"{len(index)} rows, {len(windows)} windows and {len(recorded)} numbers."
            )
        if not index:
            return
        kept, counts = self.read(range(self.rows))
        for row, window, count in zip(index, windows, recorded):
            norms, number = _checked(row, window, count)
            kept[row], counts[row] = norms[-self.history_length :], number
        self._ring.write(kept, counts)
        self._read_numbers()

    def export_state(self) -> State:
        return self._state(*self.read(range(self.rows)))

    def describe_state(self) -> State:
        return self._state()

    def _state(self, *contents: Any) -> State:
        if not self._settings:
            raise ValueError("A history without rows has no state to save.")
        groups = [list(run) for _, run in groupby(range(self.rows), self._settings.__getitem__)]
        return make_state(
            "numpy",
            self._rule.name,
            "parameter",
            [self._settings[rows[0]] for rows in groups],
            [[ParameterInfo(None, None)] * len(rows) for rows in groups],
            groups,
            *contents,
        )

    def commit_state(self, state: State) -> None:
        windows = [window for group in state.groups for window in group.windows()]
        recorded = np.concatenate([group.recorded for group in state.groups])
        self.write(range(self.rows), windows, recorded)

    def __repr__(self) -> str:
        kinds = ", ".join(map(str, dict.fromkeys(self.rules)))
        return f"History(rows={self.rows}, rule={kinds}, history_length={self.history_length})"


def _numbers(values: Sequence[float | None], none: float) -> npt.NDArray[Any] | None:
    """One number a row; None where no row has any."""
    if all(value is None for value in values):
        return None
    return np.array([none if value is None else value for value in values])


def _negative_norm(given: npt.NDArray[np.float64]) -> str:
    return f"A norm is never negative, but got {np.nanmin(given)}."


def _checked(row: int, window: Any, count: Any) -> tuple[npt.NDArray[np.float32], int]:
    """One row's window and number of recorded norms, if a history can have them."""
    with np.errstate(over="ignore"):
        norms = np.asarray(window, np.float32)
    if norms.ndim != 1 or not is_recorded(norms).all():
        raise ValueError(
            f"The window of row {row} is not a list of norms that a history records: one is zero, "
            "negative, NaN or infinite in float32."
        )
    if isinstance(count, (bool, np.bool_)) or int(count) != count:
        raise TypeError(f"Row {row} is said to have recorded {count!r} norms; it takes an int.")
    if not len(norms) <= count <= MAX_RECORDED:
        raise ValueError(
            f"The window of row {row} has {len(norms)} norms, but the row is said to have recorded "
            f"{count}: that takes a number from {len(norms)} to 2**62."
        )
    return norms, int(count)
