"""Statistics and tables that both editions' reports use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    random = np.random.default_rng(0)
    means = random.choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t interval of the mean."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's method (1927)."""
    result = stats.binomtest(count, total).proportion_ci(method="wilson")
    return float(result.low), float(result.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979)."""
    order = np.argsort(p_values)
    steps = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected.tolist()


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact test that two arms fail equally often in the same pairs."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def monotone(shares: np.ndarray) -> np.ndarray:
    """The closest sequence that never falls: pools adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for share in shares:
        value, size = float(share), 1
        while blocks and blocks[-1][0] > value:
            before, count = blocks.pop()
            value = (before * count + value * size) / (count + size)
            size += count
        blocks.append((value, size))
    return np.concatenate([[value] * size for value, size in blocks])


def half_rate(rates: Sequence[float], shares: np.ndarray) -> float:
    """The rate at which the share reaches a half, interpolated over the rate's logarithm.

    Infinity if it does not; the smallest rate if it is reached there.
    """
    smooth = monotone(shares)
    if smooth[-1] < 0.5:
        return float(np.inf)
    i = int(np.argmax(smooth >= 0.5))
    if i == 0:
        return float(rates[0])
    logs = np.log(rates)
    weight = (0.5 - smooth[i - 1]) / (smooth[i] - smooth[i - 1])
    return float(np.exp(logs[i - 1] + weight * (logs[i] - logs[i - 1])))


def probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
