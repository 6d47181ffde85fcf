"""Runs that were added after the plan: `hatch run study:supplement`. It goes on where it stopped.

They are exploratory: nothing was written down before them, and nothing is tested. Their seeds, 20
and higher, are used nowhere else; those of deep clustering are the first edition's, since a run is
long: the first edition has the runs to compare with, and the exploration has seed 0. For their
tables, see `additions.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import results
from arms import (
    BOUNDED_DEFAULT,
    BOUNDED_LOW,
    BOUNDED_ONE,
    COMPARED,
    CONFIRMED,
    FIRST_STEPS,
    NONE,
    TUNED,
    UNBOUNDED_ZCLIP,
    ZCLIP,
)
from confirm import HARDER, LARGE, LOW, SWEEP, complete, constant_of, use_one_thread
from design import CLUSTERING, FIRST_EXTRA_SEED, FORGETTING, SUPPLEMENT, Condition
from tqdm import tqdm

FOLDER = results.FOLDER / "supplement"
# Arms that are a constant by name, where none has been tuned.
CONSTANTS = {"constant 1": 1.0, "constant 0.5": 0.5}
LOW_QUANTILE, DEFAULT, PERCENTILE = "quantile 0.1, global", "quantile 0.9 (default)", "percentile 5"
RIVALS = (*CONFIRMED, "constant 1", BOUNDED_ONE, ZCLIP, UNBOUNDED_ZCLIP)
HARD = tuple(arm for arm in RIVALS if arm not in (LOW_QUANTILE, UNBOUNDED_ZCLIP))
PACKAGE = (NONE, "constant 1", BOUNDED_ONE, ZCLIP, UNBOUNDED_ZCLIP)
# In this order: task, conditions, arms.
PLAN = (
    ("rows", HARDER, HARD),
    ("convolution", ("SGD, bad inputs", "Adam, bad inputs"), (*RIVALS, BOUNDED_DEFAULT)),
    (
        "control",
        ("Adam", "Adam, lr ×30"),
        (NONE, "constant 0.5", DEFAULT, PERCENTILE),
    ),
    ("convolution", (*LOW, *LARGE), PACKAGE),
    ("rows", SWEEP, PACKAGE[:-1]),
    ("pixels", ("SGD", "SGD, lr ×3"), PACKAGE[:-1]),
    (
        "gpt",
        ("Adam, lr ×10, cosine", "Adam, cosine"),
        (NONE, "constant 1", DEFAULT, PERCENTILE),
    ),
    # Beside the runs of none, of the constant and of 0.1 that the first edition has.
    ("separation", (CLUSTERING.name,), (FIRST_STEPS, BOUNDED_LOW)),
    ("separation", (FORGETTING.name,), (NONE,)),
    ("convolution", ("SGD, lr ×3", "Adam, lr ×3"), CONFIRMED),
    ("pixels", ("Adam", "Adam, lr ×3"), COMPARED),
    ("images", (*LOW, "SGD, lr ×3", "Adam, lr ×3", *LARGE), COMPARED),
)


def seeds_of(task: str) -> range:
    """The seeds of a task's runs."""
    first = 1 if task == "separation" else FIRST_EXTRA_SEED
    return range(first, first + SUPPLEMENT[task].seeds)


def constant_for(task: str, condition: Condition, arm: str) -> float | None:
    """The constant of an arm that is one: by its name, or tuned in the first edition."""
    return CONSTANTS.get(arm) if arm != TUNED else constant_of(task, condition, arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(SUPPLEMENT))
    parser.add_argument("--conditions", nargs="+", help="some of the tasks', by name")
    parser.add_argument("--arms", nargs="+", help="some of the arms, by name")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    use_one_thread()
    jobs = [
        (task, condition, arm)
        for task, conditions, arms in PLAN
        for condition in SUPPLEMENT[task].conditions
        if condition.name in conditions
        for arm in arms
        if task in (options.tasks or (task,))
        and condition.name in (options.conditions or (condition.name,))
        and arm in (options.arms or (arm,))
    ]
    with tqdm(total=sum(SUPPLEMENT[t].seconds * SUPPLEMENT[t].seeds for t, _, _ in jobs)) as bar:
        for task, condition, arm in jobs:
            bar.set_postfix_str(f"{task}: {condition.name}, {arm}")
            seeds = seeds_of(task)
            constant = constant_for(task, condition, arm)
            complete(task, condition, arm, constant, seeds, options.output)
            bar.update(SUPPLEMENT[task].seconds * len(seeds))


if __name__ == "__main__":
    main()
