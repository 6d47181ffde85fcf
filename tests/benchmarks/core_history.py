"""The cost of recording in `autoclip.core.History`, by rows and by history_length."""

from __future__ import annotations

import time

import numpy as np
from measure import factors

from autoclip.core import History, Quantile, Rule, Standard


def microseconds(rule: Rule, rows: int, history_length: int, steps: int = 3000) -> float:
    """The median time of a step when the windows are full."""
    generator = np.random.default_rng(0)
    history = History(rows, rule, history_length)
    history.write(
        range(rows),
        [factors(generator, history_length) for _ in range(rows)],
        [history_length] * rows,
    )
    norms = [factors(generator, rows) for _ in range(steps)]
    times = []
    for each in norms:
        start = time.perf_counter()
        history.record(each)
        times.append(time.perf_counter() - start)
    return float(np.mean(times)) * 1e6


def main() -> None:
    """Print a table; the rival of each row of it is its history_length of 1,000."""
    lengths = (1_000, 10_000, 100_000)
    print(f"{'mean µs a step':<24}" + "".join(f"{length:>12,}" for length in lengths))
    for rule, rows in ((Quantile(), 1), (Quantile(), 160), (Standard(), 1), (Standard(), 160)):
        found = [microseconds(rule, rows, n) for n in lengths if rows * n <= 2_000_000]
        cells = "".join(f"{t:>7.0f} {t / found[0]:4.2f}" for t in found)
        print(f"{f'{rule.name}, {rows} rows':<24}{cells}")


if __name__ == "__main__":
    main()
