"""Thresholds over time, recomputed from a window of norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autoclip.core._history import History
from autoclip.core._quantile import Quantile
from autoclip.core._settings import GroupSettings, batches

__all__ = ["Replay", "replay", "shares_clipped"]

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class Replay:
    """The steps in the windows of some rows.

    What was recorded before the window's oldest norm is unknown, so the thresholds of the first
    steps of a full window come from fewer norms than they came from in training.

    Attributes:
        norms: float64[rows, steps], oldest first; a shorter window begins with NaN.
        thresholds: float64[rows, steps], what each norm was compared with; infinite where there was
            no threshold.
        counts: bool[rows, steps], which steps count in shares: those whose threshold is exact, or,
            of a window that has lost norms, the newer half.
    """

    norms: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]
    counts: npt.NDArray[np.bool_]

    @property
    def clipped(self) -> npt.NDArray[np.bool_]:
        """bool[rows, steps]: which norms are above their threshold."""
        return self.norms > self.thresholds

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """float64[rows]: of the steps that count, the share that is clipped; NaN without any."""
        return _ratio((self.clipped & self.counts).sum(1), self.counts.sum(1))

    @property
    def coefficients(self) -> npt.NDArray[np.float64]:
        """float64[rows]: the mean of `min(1, threshold / norm)` over the steps that count."""
        with np.errstate(invalid="ignore"):
            each = np.minimum(1.0, self.thresholds / self.norms)
        return _ratio(np.where(self.counts, each, 0.0).sum(1), self.counts.sum(1))


def replay(
    settings: Sequence[GroupSettings],
    windows: Sequence[npt.NDArray[np.float32]],
    recorded: npt.NDArray[np.int64],
) -> Replay:
    """Record the norms of each row's window anew, from an empty history.

    Args:
        settings: of each row. Norms are compared as they are in the window, also where they were
            recorded after clipping.
        windows: float32[length] a row, oldest norm first.
        recorded: int64[rows], how many norms each row has ever recorded.
    """
    lengths = np.array([len(window) for window in windows], np.int64)
    steps = int(lengths.max(initial=0))
    norms = np.full((len(windows), steps), np.nan)
    for row, window in enumerate(windows):
        norms[row, steps - len(window) :] = window
    thresholds = np.full_like(norms, np.nan)
    plain = {each: _plain(each, steps) for each in dict.fromkeys(settings)}
    for rows in batches([plain[each] for each in settings]).values():
        history = History.of([plain[settings[row]] for row in rows])
        empty = [np.empty(0, np.float32)] * len(rows)
        history.write(range(len(rows)), empty, (recorded - lengths)[rows])
        for step in range(steps):
            thresholds[rows, step] = history.record(norms[rows, step]).thresholds
    # Where norms have left the window, the older half stands for them.
    unknown = np.where(recorded > lengths, lengths // 2, 0)
    counts = np.arange(steps) >= (steps - lengths + unknown)[:, None]
    return Replay(norms, thresholds, counts)


def shares_clipped(
    settings: Sequence[GroupSettings],
    windows: Sequence[npt.NDArray[np.float32]],
    recorded: npt.NDArray[np.int64],
    quantiles: Sequence[float],
) -> npt.NDArray[np.float64]:
    """Which share of each row's steps would be clipped at other quantiles, all else as it is.

    Args:
        settings: of each row; a rule other than `Quantile` is replaced by it.
        windows: float32[length] a row, oldest norm first.
        recorded: int64[rows], how many norms each row has ever recorded.
        quantiles: in [0, 1].

    Returns:
        float64[rows, quantiles]; see `Replay.shares`.
    """
    shares = np.full((len(windows), len(quantiles)), np.nan)
    known = {
        (each, q): replace(each, rule=_with_quantile(each, q))
        for each in dict.fromkeys(settings)
        for q in quantiles
    }
    at_once = max(1, _ROWS_AT_ONCE // max(1, len(quantiles)))
    for start in range(0, len(windows), at_once):
        rows = range(start, min(start + at_once, len(windows)))
        repeated = [(row, q) for row in rows for q in quantiles]
        found = replay(
            [known[settings[row], q] for row, q in repeated],
            [windows[row] for row, _ in repeated],
            recorded[[row for row, _ in repeated]],
        )
        shares[rows.start : rows.stop] = found.shares.reshape(len(rows), len(quantiles))
    return shares


def _plain(settings: GroupSettings, steps: int) -> GroupSettings:
    # The window holds what was recorded, and no norm leaves it here.
    return replace(
        settings, record="raw", on_spike="clip", on_nonfinite="keep", history_length=max(1, steps)
    )


def _with_quantile(settings: GroupSettings, quantile: float) -> Quantile:
    factor = settings.rule.factor if isinstance(settings.rule, Quantile) else 1.0
    return Quantile(quantile, factor)


def _ratio(
    numerators: npt.NDArray[np.generic], denominators: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.float64(1.0) * numerators / denominators  # type: ignore[operator, no-any-return]
