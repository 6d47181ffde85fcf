"""Summaries of histories: which rows are clipped, how often and how hard."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from autoclip.core._clipper.logging import log_values, recorded_rows
from autoclip.core._clipper.notices import idle_notice, state_notices
from autoclip.core._errors import StateError
from autoclip.core._state.files import PathLike
from autoclip.core._state.saving import Saveable
from autoclip.core._state.state import State
from autoclip.core._step import Report
from autoclip.core.inspect._reading import read_states
from autoclip.core.inspect._replay import shares_clipped
from autoclip.core.inspect._rows import Rows
from autoclip.core.inspect._text import describe

Source = Union[Saveable, State, "Summary", PathLike]
"""A source of histories: a clipper, a `State`, a `Summary`, or the path of a file."""

CANDIDATES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""The quantiles that are compared by default."""

_MOST_NORMS_COMPARED = 2_000


def rows_of(source: Source) -> Rows:
    """The rows of a clipper, a state, or a file with one history.

    Raises:
        StateError: the file is damaged, or holds no history or several.
        OSError: it cannot be read.
        TypeError: it is something else.
    """
    if isinstance(source, Summary):
        return source._rows
    if isinstance(source, State):
        return Rows.of(source)
    if isinstance(source, Saveable):
        return Rows.of(source.export_state())
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "source must be a clipper, such as optimizer.clipper, a State or the path of a file, "
            f"got {type(source).__name__}."
        )
    states = read_states(source)
    if len(states) > 1:
        raise StateError(
            f"{source} holds {len(states)} histories: {', '.join(map(repr, states))}. Choose one "
            "of the states that read_states returns."
        )
    [state] = states.values()
    return Rows.of(state)


@dataclass(frozen=True)
class RowSummary:
    """One row of a history: a parameter, a parameter group, or all parameters.

    Attributes:
        name: the parameter's name, or the group.
        group: the number of its parameter group.
        shape: the parameter's shape; None if it is unknown or the row stands for several.
        length: the number of norms in the window.
        recorded: the number of norms the row has ever recorded.
        newest: the norm that was recorded last; NaN if the window is empty.
        median: the median of the window; NaN if it is empty.
        threshold: of the window as it is; infinite if there is none yet, NaN if the rule is unknown
            in this process.
        clipped: the share of the norms in the window that were above their threshold, 0 … 1; see
            `Summary`.
        coefficient: the mean factor of these gradients.
    """

    name: str
    group: int
    shape: tuple[int, ...] | None
    length: int
    recorded: int
    newest: float
    median: float
    threshold: float
    clipped: float
    coefficient: float


@dataclass(frozen=True, eq=False)
class Summary:
    """The result of `summarize`. Printed, it is a table.

    The shares come from the windows: each norm in a window is compared with the threshold that the
    norms before it give under the saved settings. Of a window that has lost its oldest norms, the
    newer half is counted. Where norms are recorded after clipping (`record="clipped"`) or the rule
    is unknown in this process, the shares are NaN.

    Attributes:
        state: the history.
        rows: one summary a row, in the order of the parameter groups.
        last: the values of `log_values` for the clipper's last step; empty if there is none.
        last_coefficients: the factor of each row's gradient in that step, by name.
        notices: sentences about faults outside of AutoClip: total norms that do not vary, because
            something clips first, and a last step that recorded nothing.
    """

    state: State
    rows: tuple[RowSummary, ...]
    last: dict[str, float]
    last_coefficients: dict[str, float]
    notices: tuple[str, ...]
    _rows: Rows = field(repr=False)

    @property
    def shows_clipping(self) -> bool:
        """True if the norms show clipping: recorded before clipping, and the rule known."""
        return self._rows.shows_clipping

    def hardest(self, count: int = 10) -> list[RowSummary]:
        """The rows that are clipped hardest: those with the lowest mean coefficient below 1."""
        order = [self.rows[row] for row in self._rows.hardest_first()]
        return [row for row in order if row.coefficient < 1.0][:count]

    def clipped_at(
        self, quantiles: Sequence[float] = CANDIDATES, max_rows: int = 200
    ) -> dict[float, float]:
        """The share of norms that would be clipped at other quantiles, all else as it is.

        The same comparison as for `RowSummary.clipped`, over at most the newest 2000 norms of a
        row. For a steady history it is 1 - q; a history that rises is clipped more, one that falls
        less.

        Args:
            quantiles: in [0, 1].
            max_rows: the number of rows that stand for all of them, evenly spaced; replaying more
                takes time.

        Returns:
            The mean over rows for each quantile; NaN where no row shows clipping.
        """
        rows = self._rows
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), max_rows)).astype(int))
        if not rows.shows_clipping or rows.settings is None or not len(rows):
            return dict.fromkeys(quantiles, math.nan)
        windows = rows.newest(_MOST_NORMS_COMPARED)
        shares = shares_clipped(
            [rows.settings[row] for row in chosen],
            [windows[row] for row in chosen],
            rows.recorded[chosen],
            quantiles,
        )
        shares = shares[~np.isnan(shares).any(1)]
        means = shares.mean(0) if len(shares) else np.full(len(quantiles), np.nan)
        return dict(zip(quantiles, means.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON's types, None for NaN and infinity."""
        state = self.state
        return {
            "rule": state.rule,
            "mode": state.mode,
            "framework": state.framework,
            "library_version": state.library_version,
            "groups": [
                {"settings": dict(group.settings), "parameters": len(group.parameters)}
                for group in state.groups
            ],
            "rows": [
                {each.name: _json(getattr(row, each.name)) for each in fields(row)}
                for row in self.rows
            ],
            "last": {name: _json(value) for name, value in self.last.items()},
            "notices": list(self.notices),
            "clipped_at": {f"{q:g}": _json(share) for q, share in self.clipped_at().items()},
        }

    def __str__(self) -> str:
        return self.describe()

    def describe(self, max_rows: int | None = 30, width: int = 80) -> str:
        """The summary as text.

        Args:
            max_rows: the most rows in the table; if there are more, it has those that are clipped
                hardest. None for all rows.
            width: the most characters in a line: long names lose their middle, and then columns
                are left out.
        """
        return describe(self, max_rows, width)


def summarize(source: Source, report: Report[Any] | None = None) -> Summary:
    """Summarize a history: thresholds, shares clipped, and the rows that are clipped hardest.

    Args:
        source: a clipper of any framework, a `State`, or the path of a file that holds one history.
        report: the clipper's last step, in NumPy's arrays. `autoclip.torch.logging.summarize` and
            `autoclip.tf.logging.summarize` give it for you.

    Raises:
        StateError: the file is damaged, or holds no history or several.
        OSError: it cannot be read.

    >>> from autoclip.core import History, Quantile
    >>> from autoclip.core.inspect import summarize
    >>> history = History(rows=1, rule=Quantile(0.5))
    >>> for norm in (1.0, 2.0, 3.0, 12.0):
    ...     report = history.record([norm])
    >>> summary = summarize(history)
    >>> summary.rows[0].threshold, summary.rows[0].clipped
    (2.5, 0.75)
    """
    rows = rows_of(source)
    shapes: list[tuple[int, ...] | None] = [None] * len(rows)
    if not rows.state.mode.joins:
        shapes = [each.shape for group in rows.state.groups for each in group.parameters]
    summaries = map(
        RowSummary,
        rows.names,
        rows.groups,
        shapes,
        map(len, rows.windows),
        rows.recorded.tolist(),
        (float(window[-1]) if len(window) else math.nan for window in rows.windows),
        map(_median, rows.windows),
        rows.thresholds.tolist(),
        rows.shares.tolist(),
        rows.coefficients.tolist(),
    )
    last, by_name, notices = {}, {}, state_notices(rows.state)
    if report is not None:
        last = log_values(report)
        by_name = dict(zip(report.names, np.asarray(report.coefficients, np.float64).tolist()))
        if not recorded_rows(report).any():
            notices.append(idle_notice("The last step", last["autoclip/total_norm"]))
    return Summary(rows.state, tuple(summaries), last, by_name, tuple(notices), rows)


def _median(window: npt.NDArray[np.float32]) -> float:
    """The median of a window; NaN if it is empty. Several times as fast as `numpy.median`."""
    if not len(window):
        return math.nan
    low, high = np.sort(window)[[(len(window) - 1) // 2, len(window) // 2]].tolist()
    return float((low + high) / 2)


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
