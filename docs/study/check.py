"""Run a slice of the confirmation again and compare: `hatch run study:check`.

One task, one condition, two arms, two seeds by default. The numbers are the same with the versions
and the commit that the page names; others round differently, and training magnifies it.
"""

from __future__ import annotations

import argparse
import sys

import results
from arms import CANDIDATE, CONFIRMED, NONE
from confirm import FOLDER, TOGETHER, constant_of, perform, use_one_thread
from design import CONFIRMATION, FIRST_SEED, SEEDS

COMPARED = ("test", "validation", "finite", "clipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(CONFIRMATION), default="convolution")
    parser.add_argument("--condition", default="SGD")
    parser.add_argument("--arms", nargs="+", choices=CONFIRMED, default=[NONE, CANDIDATE])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    use_one_thread()
    condition = next(
        c for c in CONFIRMATION[options.task].conditions if c.name == options.condition
    )
    # Seeds that were trained together are trained together again.
    count = SEEDS if options.task in TOGETHER else options.seeds
    stored = results.load(options.task, FOLDER)
    different = 0
    for arm in options.arms:
        constant = constant_of(options.task, condition, arm)
        seeds = range(FIRST_SEED, FIRST_SEED + count)
        for record in perform(options.task, condition, arm, constant, seeds):
            before = stored[results.key_of(record)]
            same = all(record[name] == before[name] for name in COMPARED)
            different += not same
            verdict = "the same" if same else f"stored {before['test']}"
            print(f"{options.task}, {condition.name}, {arm}, seed {record['seed']}: "
                  f"{record['test']} ({verdict})")  # fmt: skip
    if different:
        sys.exit(f"{different} runs differ; an image more or less (0.14 to 0.28 %) is rounding.")


if __name__ == "__main__":
    main()
