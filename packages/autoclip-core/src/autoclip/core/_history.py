"""Histories of gradient norms in NumPy: norms in, thresholds and coefficients out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from autoclip.core._rules import Rows, Rule, Tracker
from autoclip.core._saving import Saveable
from autoclip.core._settings import DEFAULT_HISTORY_LENGTH, check_history_length
from autoclip.core._state import GroupState, ParameterInfo, State
from autoclip.core._version import __version__
from autoclip.core._windows import SMALLEST_NORM, Windows

__all__ = ["History", "Report"]

ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True)
class Report(Generic[ArrayT]):
    """What one step did, row by row.

    Attributes:
        norms: [rows], the norms that were given; 0 for a row without a gradient.
        thresholds: [rows], the threshold of each row after this step's norm; infinite for a row
            that has recorded nothing yet.
        coefficients: [rows], what each gradient is multiplied by, `min(1, threshold / norm)`; 1
            for a row that recorded nothing in this step.
    """

    norms: ArrayT
    thresholds: ArrayT
    coefficients: ArrayT


class History(Saveable):
    """The windows of many rows, all of one length and under one kind of rule.

    A row stands for one gradient: one parameter's, or that of all parameters together. At each
    step `record` appends the rows' norms and answers with their thresholds (Seetharaman et al.,
    2020, arXiv:2007.14469, Algorithm 1: the current norm counts).

    Args:
        rows: how many rows.
        rule: how a window becomes a threshold, `Quantile` or `Standard`: one for all rows, or a
            sequence with one a row, all of the same class.
        history_length: how many norms a row keeps, the newest ones.

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
        history_length: int = DEFAULT_HISTORY_LENGTH,
    ) -> None:
        rules = [rule] * rows if isinstance(rule, Rule) else list(rule)
        if len(rules) != rows:
            raise ValueError(f"rule takes one rule, or one a row: {rows}, but got {len(rules)}.")
        for each in rules:
            if not isinstance(each, Rule):
                raise TypeError(
                    f"rule takes a Rule such as Quantile(0.9), but got {each!r} of type "
                    f"{type(each).__name__}."
                )
            if type(each) is not type(rules[0]):
                raise TypeError(
                    f"A history takes rules of one class, but got {type(rules[0]).__name__} and "
                    f"{type(each).__name__}."
                )
        self._rules = rules
        self._windows = Windows(rows, check_history_length(history_length))
        self._tracker = self._track()

    def _track(self) -> Tracker | None:
        # No rows, no rule to ask: an empty history tracks nothing.
        return type(self._rules[0]).track(self._rules, self._windows) if self._rules else None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._rules)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rule of each row."""
        return tuple(self._rules)

    @property
    def history_length(self) -> int:
        """How many norms a row keeps at most."""
        return self._windows.history_length

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms each window holds now."""
        return np.array(self._windows.lengths)

    @property
    def recorded(self) -> npt.NDArray[np.int64]:
        """int64[rows]: how many norms each row has ever recorded."""
        return np.array(self._windows.recorded)

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """float64[rows]: the rows' thresholds, infinite where nothing was recorded yet."""
        return self._tracker.thresholds.copy() if self._tracker else np.empty(0)

    def record(self, norms: npt.ArrayLike) -> Report[npt.NDArray[np.float64]]:
        """Append one norm to each row and say by what its gradient is to be multiplied.

        A norm that is zero (below `SMALLEST_NORM`), NaN or infinite stands for a gradient that
        says nothing: its row records nothing and its coefficient is 1.

        Args:
            norms: [rows], L2 norms ≥ 0; rounded once, to float32.

        Raises:
            ValueError: the shape is not [rows], or a norm is negative. Nothing is recorded.
        """
        given = np.array(norms, np.float64)  # a copy: the report keeps it
        if given.shape != (self.rows,):
            raise ValueError(
                f"record takes one norm a row, shape ({self.rows},), but got shape {given.shape}."
            )
        with np.errstate(over="ignore"):  # a float64 norm may be too large for float32
            rounded = given.astype(np.float32)
        usable = (rounded >= SMALLEST_NORM) & (rounded < np.inf)
        if usable.all():
            rows: Rows = slice(None)
        else:
            if (given < 0).any():
                raise ValueError(f"A norm is never negative, but got {np.nanmin(given)}.")
            rows = np.flatnonzero(usable)
        coefficients = np.ones(self.rows)
        if self._tracker is None or not usable.any():
            return Report(given, self.thresholds, coefficients)
        entered = rounded[rows]
        left = self._windows.push(rows, entered)
        self._tracker.update(rows, entered, left)
        thresholds = self._tracker.thresholds
        # The ratio to the *rounded* norm, the one in the window: so the largest never clips.
        coefficients[rows] = np.minimum(1.0, thresholds[rows] / entered)
        return Report(given, thresholds.copy(), coefficients)

    def add_rows(self, rules: Sequence[Rule]) -> None:
        """Append one empty row for each of `rules`, which are of the class of the others."""
        contents = self.read(range(self.rows))
        everything = History(self.rows + len(rules), [*self._rules, *rules], self.history_length)
        everything.write(range(self.rows), *contents)
        self.__dict__.update(everything.__dict__)

    def read(
        self, rows: Sequence[int]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy the windows of `rows`.

        Returns:
            One float32[length] a row, oldest norm first, and int64[len(rows)], how many norms
            each has ever recorded.
        """
        index = list(rows)
        return [self._windows.read(row) for row in index], self._windows.recorded[index]

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
            ValueError: there is not one window and one number for each row, a norm could not have
                been recorded, or a window is longer than what its row recorded. Nothing changed.
        """
        index = list(rows)
        if not len(index) == len(windows) == len(recorded):
            raise ValueError(
                "write takes one window and one number of recorded norms for each row, but got "
                f"{len(index)} rows, {len(windows)} windows and {len(recorded)} numbers."
            )
        for row, window, count in zip(index, windows, recorded):
            norms = np.asarray(window)
            if not ((norms >= SMALLEST_NORM) & (norms < np.inf)).all():
                raise ValueError(
                    f"The window of row {row} holds a norm that is zero, negative, NaN or "
                    "infinite; no history records such a norm."
                )
            if count < len(norms):
                raise ValueError(
                    f"The window of row {row} has {len(norms)} norms, which is more than the "
                    f"{count} that it is said to have recorded."
                )
        if not index:
            return
        fresh = History(self.rows, self._rules, self.history_length)
        kept, kept_recorded = self.read(range(self.rows))
        for row, window, count in zip(index, windows, recorded):
            kept[row], kept_recorded[row] = window, count
        for row, (window, count) in enumerate(zip(kept, kept_recorded)):
            fresh._windows.write(row, window[-self.history_length :], int(count))
        if fresh._tracker is not None:
            fresh._tracker.rebuild(np.flatnonzero(fresh._windows.lengths))
        self.__dict__.update(fresh.__dict__)

    def _export_state(self) -> State:
        if not self._rules:
            raise ValueError("A history without rows has no state to save.")
        groups, start = [], 0
        for rule, run in groupby(self._rules):
            stop = start + len(list(run))
            windows, recorded = self.read(range(start, stop))
            settings = {**rule.settings, "history_length": self.history_length}
            parameters = [ParameterInfo(None, None)] * (stop - start)
            groups.append(GroupState.from_windows(settings, parameters, windows, recorded))
            start = stop
        return State(self._rules[0].name, False, "numpy", tuple(groups), __version__)

    def _commit_state(self, state: State) -> None:
        windows = [window for group in state.groups for window in group.windows()]
        recorded = np.concatenate([group.recorded for group in state.groups])
        self.write(range(self.rows), windows, recorded)

    def __repr__(self) -> str:
        kinds = ", ".join(map(str, dict.fromkeys(self._rules)))
        return f"History(rows={self.rows}, rule={kinds}, history_length={self.history_length})"
