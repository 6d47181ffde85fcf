"""Thresholds over time, recomputed from a window of norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._clipper.histories import rows_by_storage
from autoclip.core._numpy.history import History
from autoclip.core._numpy.ring import OPS
from autoclip.core._rules.quantile import Quantile
from autoclip.core._rules.standard import Standard
from autoclip.core._settings.settings import GroupSettings
from autoclip.core._window import interpolate

__all__ = ["Replay", "replay", "running_quantiles", "shares_clipped"]

_ROWS_AT_ONCE = 4096
_FEW_ROWS = 8
"""At or below this many rows, recording norm by norm is faster."""


@dataclass(frozen=True, eq=False)
class Replay:
    """The steps in the windows of some rows.

    Norms before the window's oldest one are unknown, so the thresholds of the first
    steps of a full window come from fewer norms than they came from in training.

    Attributes:
        norms: float64[rows, steps], oldest first; a shorter window begins with NaN.
        thresholds: float64[rows, steps], compared with the norms; infinite where there was
            no threshold.
        counts: bool[rows, steps], which steps count in shares: those whose threshold is exact, or,
            of a window that has lost norms, the newer half.
        final: float64[rows], the thresholds after the last step; infinite for an empty window.
    """

    norms: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]
    counts: npt.NDArray[np.bool_]
    final: npt.NDArray[np.float64]

    @property
    def clipped(self) -> npt.NDArray[np.bool_]:
        """bool[rows, steps]: which norms are above their threshold."""
        return self.norms > self.thresholds

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """float64[rows]: of the steps that count, the share that is clipped; NaN without any."""
        return _ratio((self.clipped & self.counts).sum(1), self.counts.sum(1))

    @cached_property
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
    """Record the norms of each row's window again, from an empty history.

    Args:
        settings: of each row. Norms are compared as they are in the window, also where they were
            recorded after clipping.
        windows: float32[length] a row, oldest norm first.
        recorded: int64[rows], how many norms each row has ever recorded.
    """
    lengths = np.array([len(window) for window in windows], np.int64)
    steps = int(lengths.max(initial=0))
    norms = np.full((len(windows), steps), np.nan, np.float32)
    held = np.arange(steps) >= (steps - lengths)[:, None]
    norms[held] = np.concatenate([np.empty(0, np.float32), *windows])
    after = _rule_thresholds(settings, norms, lengths)
    # How many norms each row had recorded before each step, and after the last.
    counted = recorded[:, None] + np.arange(-steps, 1)
    limited = _limited(settings, np.hstack([np.full((len(windows), 1), np.inf), after]), counted)
    thresholds = limited[:, :-1]
    current = np.array([bool(each.include_current) for each in settings], bool)
    if current.any():
        thresholds = np.where(
            current[:, None], _limited(settings, after, counted[:, :-1]), thresholds
        )
    # Where norms have left the window, the older half stands for them.
    unknown = np.where(recorded > lengths, lengths // 2, 0)
    counts = np.arange(steps) >= (steps - lengths + unknown)[:, None]
    return Replay(norms.astype(np.float64), thresholds, counts, limited[:, -1])


def _rule_thresholds(
    settings: Sequence[GroupSettings],
    norms: npt.NDArray[np.float32],
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """The rule's threshold after each step, as if no norm ever left a window.

    Args:
        settings: of each row.
        norms: float32[rows, steps], NaN before the oldest norm.
        lengths: int64[rows], how many norms each row has.

    Returns:
        float64[rows, steps]; infinite before the oldest norm.
    """
    found = np.full(norms.shape, np.inf)
    steps = norms.shape[1]
    plain = {each: _plain(each, steps) for each in dict.fromkeys(settings)}
    for rows in rows_by_storage([plain[each] for each in settings]):
        rules: list[Any] = [settings[row].rule for row in rows]
        running = _RUNNING.get(type(rules[0])) if len(rows) > _FEW_ROWS else None
        if isinstance(rules[0], Standard) and rules[0].log:
            running = None
        if running is not None and steps:
            for some in np.array_split(np.arange(len(rows)), -(-len(rows) // _ROWS_AT_ONCE)):
                index = np.asarray(rows)[some]
                found[index] = running(norms[index], lengths[index], [rules[k] for k in some])
            continue
        history = History.of([plain[settings[row]] for row in rows])
        for step in range(steps):
            found[rows, step] = history.record(norms[rows, step]).thresholds
    return found


def _running_quantiles(
    norms: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64], rules: Sequence[Quantile]
) -> npt.NDArray[np.float64]:
    found = running_quantiles(norms, lengths, np.array([rule.quantile for rule in rules]))
    return np.array([[rule.factor] for rule in rules]) * found


def _running_moments(
    norms: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64], rules: Sequence[Standard]
) -> npt.NDArray[np.float64]:
    """Mean and deviations of each norm and those before it.

    Updated with each norm as in West (1979): the sum of weighted squares never becomes negative.
    """
    decay, deviations, factor = (
        np.array([getattr(rule, name) for rule in rules], np.float64)
        for name in ("decay", "deviations", "factor")
    )
    decay = np.where(np.isnan(decay), 1.0, decay)  # None
    weight, mean, squares = np.zeros((3, len(rules)))
    found = np.full(norms.shape[::-1], np.inf)
    for step, given in enumerate(np.ascontiguousarray(norms.T, np.float64)):
        held = given == given  # NaN before the oldest norm
        difference = np.where(held, given - mean, 0.0)
        before = decay * weight
        weight = np.where(held, before + 1.0, weight)
        mean = mean + difference / np.maximum(weight, 1.0)
        squares = decay * squares + before * difference * difference / np.maximum(weight, 1.0)
        std = np.sqrt(squares / np.maximum(weight, 1.0))
        found[step] = np.where(held, factor * (mean + deviations * std), np.inf)
    return found.T


def running_quantiles(
    norms: npt.NDArray[np.float32],
    lengths: npt.NDArray[np.int64],
    quantiles: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """A quantile of each norm and those before it, with the same bits as `numpy.quantile`.

    Each row is sorted once, as a linked list. From the newest norm to the oldest, every norm is
    taken out of the list again, and the order statistic that is asked for moves by at most one.

    Args:
        norms: float32[rows, steps], NaN before the oldest norm.
        lengths: int64[rows], how many norms each row has.
        quantiles: float64[rows], in [0, 1].

    Returns:
        float64[rows, steps]; infinite before the oldest norm.
    """
    rows, steps = norms.shape
    longest_first = np.argsort(-lengths, kind="stable")
    norms, lengths = norms[longest_first], lengths[longest_first]
    quantiles = quantiles[longest_first]
    order = np.argsort(norms, axis=1)  # NaN comes last
    # Nodes of the list: an end, the sorted norms, the other end, row after row.
    width = steps + 2
    first = np.arange(rows) * width
    values = np.full((rows, width), np.inf)
    values[:, 1:-1] = np.take_along_axis(norms, order, axis=1)
    nodes = np.empty((rows, steps), np.int64)
    np.put_along_axis(nodes, order, first[:, None] + np.arange(1, steps + 1), axis=1)
    values, nodes = values.ravel(), np.ascontiguousarray(nodes.T)
    before, after = np.arange(-1, rows * width - 1), np.arange(1, rows * width + 1)
    node = first + 1 + (quantiles * (lengths - 1)).astype(np.int64)
    found = np.full((steps, rows), np.inf)
    for step in range(steps - 1, -1, -1):
        count = lengths - (steps - 1 - step)
        some = slice(int(np.searchsorted(-count, 0)))  # rows that have recorded a norm by then
        count, here = count[some], node[some]
        position = quantiles[some] * (count - 1)
        lower = position.astype(np.int64)
        a = values[here]
        b = np.where(lower + 1 < count, values[after[here]], a)
        found[step, some] = interpolate(OPS, a, b, position - lower)
        leaving = nodes[step, some]
        left, right = before[leaving], after[leaving]
        after[left], before[right] = right, left
        rank = lower - (leaving < here)
        here = np.where(leaving == here, right, here)
        rank -= (quantiles[some] * (count - 2)).astype(np.int64)
        node[some] = np.where(rank > 0, before[here], np.where(rank < 0, after[here], here))
    result = np.empty((rows, steps))
    result[longest_first] = found.T
    return result


def _limited(
    settings: Sequence[GroupSettings],
    thresholds: npt.NDArray[np.float64],
    recorded: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Thresholds after warm-up and below the ceiling; [rows, steps]."""
    by_kind = dict.fromkeys(settings)
    if any(each.warmup_steps for each in by_kind):
        warmups = np.array([[each.warmup_steps or 0] for each in settings], np.int64)
        thresholds = np.where(recorded >= warmups, thresholds, np.inf)
    if any(each.max_norm is not None for each in by_kind):
        ceilings = [[np.inf if each.max_norm is None else each.max_norm] for each in settings]
        thresholds = np.minimum(thresholds, np.array(ceilings, np.float64))
    return thresholds


def shares_clipped(
    settings: Sequence[GroupSettings],
    windows: Sequence[npt.NDArray[np.float32]],
    recorded: npt.NDArray[np.int64],
    quantiles: Sequence[float],
) -> npt.NDArray[np.float64]:
    """The share of each row's steps that other quantiles would clip, all else as it is.

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


_RUNNING: dict[type, Any] = {Quantile: _running_quantiles, Standard: _running_moments}
"""Built-in rules, all steps at once; any other rule is recorded norm by norm."""


def _plain(settings: GroupSettings, steps: int) -> GroupSettings:
    # The window holds all recorded norms: none leaves it here.
    return replace(
        settings,
        max_norm=None,
        warmup_steps=0,
        include_current=True,
        record="raw",
        on_spike="clip",
        on_nonfinite="keep",
        history_length=max(1, steps),
    )


def _with_quantile(settings: GroupSettings, quantile: float) -> Quantile:
    factor = settings.rule.factor if isinstance(settings.rule, Quantile) else 1.0
    return Quantile(quantile, factor)


def _ratio(
    numerators: npt.NDArray[Any], denominators: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        ratio: npt.NDArray[np.float64] = np.true_divide(numerators, denominators)
    return ratio
