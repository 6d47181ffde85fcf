"""The cost of recording in `autoclip.core.History`, by rows and by history_length.

The second table is about single steps: no stream of norms, however unkind, may make one step take
much longer than the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from measure import factors

from autoclip.core import History, Quantile, Rule, Standard

Norms = npt.NDArray[np.float32]
STEPS = 3000


def full(rule: Rule, rows: int, history_length: int) -> History:
    """A history with full windows."""
    generator = np.random.default_rng(0)
    history = History(rows, rule, history_length)
    windows = [factors(generator, history_length) for _ in range(rows)]
    history.write(range(rows), windows, [history_length] * rows)
    assert np.isfinite(history.thresholds).all()  # trackers follow a load at the next read or step
    return history


def times(history: History, norms: Iterable[Norms]) -> Norms:
    """The processor time of each step, in microseconds."""
    found = []
    for each in norms:
        start = time.thread_time()
        history.record(each)
        found.append(time.thread_time() - start)
    return np.array(found, np.float32) * np.float32(1e6)


def streams(rows: int) -> dict[str, Norms]:
    """Norms that move quantiles as quickly as possible, for all rows alike; [steps, rows]."""
    steps = np.arange(STEPS)
    noise = factors(np.random.default_rng(1), STEPS * rows).reshape(STEPS, rows)
    by_step = {
        "as in training": noise,
        "rising": noise * 0 + (1.0 + steps)[:, None],
        "falling": noise * 0 + (STEPS - steps)[:, None],
        "alternating": noise * np.where(steps % 2, 1e-3, 1e3)[:, None],
        "jumps": noise * np.where(steps // 500 % 2, 1e-3, 1e3)[:, None],
    }
    return {name: norms.astype(np.float32) for name, norms in by_step.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each stream of the second table")
    options = parser.parse_args()
    lengths = (1_000, 10_000, 100_000)
    print(f"{'mean µs a step, and its ratio':<34}" + "".join(f"{n:>14,}" for n in lengths))
    # 140 rows are the most that the quantile's tracker for a few rows takes.
    sizes = [(Quantile(), rows) for rows in (1, 140, 141, 160)]
    for rule, rows in (*sizes, (Standard(), 1), (Standard(), 160)):
        noise = streams(rows)["as in training"]
        means = [
            float(times(full(rule, rows, n), noise).mean()) for n in lengths if rows * n <= 2e6
        ]
        cells = "".join(f"{mean:>9.0f} {mean / means[0]:4.2f}" for mean in means)
        print(f"{f'{rule.name}, {rows} rows':<34}{cells}", flush=True)
    print(f"{'161 rows of 1,000':<34}{'median µs':>14}{'worst step':>14}")
    for rule in (Quantile(), Standard()):
        for name, norms in streams(161).items():
            # The same steps take the same time: what is longer in one run only is not ours.
            runs = [times(full(rule, 161, 1_000), norms) for _ in range(options.repeats)]
            steps = np.min(runs, axis=0)
            middle = float(np.median(steps))
            worst = f"{steps.max() / middle:.1f} x"
            print(f"{f'{rule.name}, {name}':<34}{middle:>14.0f}{worst:>14}", flush=True)


if __name__ == "__main__":
    main()
