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
from autoclip.core._step import apply_limits, numbers_of

_ROWS_AT_ONCE = 4096
"""The rows that are replayed together, so that windows at all quantiles fit into memory."""


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
        drops: bool[rows, 1], which rows zero or skip a gradient above its threshold.
    """

    norms: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]
    counts: npt.NDArray[np.bool_]
    final: npt.NDArray[np.float64]
    drops: npt.NDArray[np.bool_]

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
        """float64[rows]: the mean of `min(1, threshold / norm)` over the steps that count.

        0 for a gradient that is dropped. A rule's own `clip_to` is not computed again.
        """
        with np.errstate(invalid="ignore"):
            each = np.minimum(1.0, self.thresholds / self.norms)
        each[self.drops & self.clipped] = 0.0
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
    after = _rule_thresholds(settings, norms)
    before = np.hstack([np.full((len(windows), 1), np.inf), after])
    current = np.array([[bool(each.include_current)] for each in settings], bool).reshape(-1, 1)
    compared = np.hstack([np.where(current, after, before[:, :-1]), before[:, -1:]])
    # How many norms each row had recorded before each step, and after the last.
    counted = recorded[:, None] + np.arange(-steps, 1)
    numbers = numbers_of(settings, always=("warmup_steps",))
    thresholds = apply_limits(OPS, numbers, counted >= numbers["warmup_steps"], compared)
    # Where norms have left the window, the older half stands for them.
    unknown = np.where(recorded > lengths, lengths // 2, 0)
    counts = np.arange(steps) >= (steps - lengths + unknown)[:, None]
    drops = np.array([[each.on_spike != "clip"] for each in settings], bool).reshape(-1, 1)
    return Replay(norms.astype(np.float64), thresholds[:, :-1], counts, thresholds[:, -1], drops)


def _rule_thresholds(
    settings: Sequence[GroupSettings], norms: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """The rule's threshold after each step, as if no norm ever left a window.

    Args:
        settings: of each row.
        norms: float32[rows, steps], NaN before the oldest norm.

    Returns:
        float64[rows, steps]; infinite before the oldest norm.
    """
    found = np.full(norms.shape, np.inf)
    # The window holds all recorded norms: none leaves it here.
    length = max(1, norms.shape[1])
    plain = {
        each: GroupSettings(each.rule, length, warmup_steps=0, include_current=True)
        for each in dict.fromkeys(settings)
    }
    for rows in rows_by_storage([plain[each] for each in settings]):
        own = [plain[settings[row]] for row in rows]
        rules = [each.rule for each in own if isinstance(each.rule, Standard)]
        if rules and not rules[0].log:  # whose rounding would decide where norms lie on thresholds
            found[rows] = _running_moments(norms[rows], rules)
            continue
        history = History.of(own)
        after = [history.record(each).thresholds for each in norms[rows].T]
        found[rows] = np.transpose(after)
    return found


def _running_moments(
    norms: npt.NDArray[np.float32], rules: Sequence[Standard]
) -> npt.NDArray[np.float64]:
    """`_rule_thresholds` of many rows at once, 20 to 300 times as fast as recording each norm.

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
    others = {}
    for each in dict.fromkeys(settings):
        factor = each.rule.factor if isinstance(each.rule, Quantile) else 1.0
        others[each] = [replace(each, rule=Quantile(q, factor)) for q in quantiles]
    shares = []
    for some in np.array_split(
        np.arange(len(windows)), -(-len(windows) * len(quantiles) // _ROWS_AT_ONCE) or 1
    ):
        rows = np.repeat(some, len(quantiles)).tolist()
        found = replay(
            [other for row in some for other in others[settings[row]]],
            [windows[row] for row in rows],
            recorded[rows],
        )
        shares.append(found.shares.reshape(len(some), len(quantiles)))
    return np.concatenate(shares)


def _ratio(
    numerators: npt.NDArray[Any], denominators: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        ratio: npt.NDArray[np.float64] = np.true_divide(numerators, denominators)
    return ratio
