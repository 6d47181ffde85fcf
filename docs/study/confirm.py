"""Confirm the candidate on new seeds: `hatch run study:confirm`. It goes on where it stopped.

The plan is in `docs/study/confirmation.md`, which was written before the first of these runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import results
from arms import COMPARED, CONFIRMED, TUNED
from design import CONFIRMATION, FIRST_SEED, RATES, SEEDS, TASKS, Condition, condition
from run import SERIES, rounded
from tqdm import tqdm

FOLDER = results.FOLDER / "confirmation"
# Tasks that train all seeds of an arm at once.
TOGETHER = ("rows", "pixels")

LOW, LARGE = ("SGD", "Adam"), ("SGD, lr ×10", "Adam, lr ×10")
SWEEP = tuple(condition(o, 1, f).name for o in LOW for f in RATES)
HARDER = tuple(c.name for c in CONFIRMATION["rows"].conditions if c.variant)
# In this order, so that whatever is complete is what matters most: task, conditions, arms, seeds.
PLAN = (
    ("convolution", (*LOW, *LARGE), CONFIRMED, (0, SEEDS)),
    ("pixels", ("SGD", "SGD, lr ×3"), CONFIRMED, (0, SEEDS)),
    ("rows", SWEEP, CONFIRMED, (0, SEEDS)),
    ("rows", HARDER, COMPARED, (0, SEEDS)),
    ("pixels", ("Adam",), COMPARED, (0, SEEDS)),
    ("characters", ("Adam, cosine", "Adam, lr ×10, cosine"), COMPARED, (0, 3)),
    ("convolution", ("SGD, lr ×3", "Adam, lr ×3"), CONFIRMED, (0, SEEDS)),
    ("pixels", ("Adam, lr ×3",), COMPARED, (0, SEEDS)),
    # Added after the plan: such batches did nothing to the GRU, whose gates saturate.
    ("convolution", ("SGD, bad inputs", "Adam, bad inputs"), COMPARED, (0, SEEDS)),
)


def perform(
    task: str, condition: Condition, arm: str, constant: float | None, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The records of an arm's runs."""
    run = importlib.import_module(f"tasks.{task}").run
    if task in TOGETHER:
        outcomes = run(condition, arm, constant, seeds)
    else:
        outcomes = (run(condition, arm, constant, seed) for seed in seeds)
    for seed, outcome in zip(seeds, outcomes):
        yield {
            "condition": condition.name,
            "arm": arm,
            "constant": constant,
            "seed": seed,
        } | {name: rounded(value) for name, value in asdict(outcome).items() if name not in SERIES}


def complete(
    task: str,
    condition: Condition,
    arm: str,
    constant: float | None,
    seeds: Sequence[int],
    folder: Path,
) -> None:
    """Run what is missing; all seeds again in tasks that train them at once."""
    runs = results.load(task, folder)
    missing = [s for s in seeds if (condition.name, arm, constant, s) not in runs]
    if missing and task in TOGETHER:
        missing = list(seeds)
    if missing:
        for record in perform(task, condition, arm, constant, missing):
            runs[results.key_of(record)] = record
            results.save(task, runs, folder)


def constant_of(task: str, condition: Condition, arm: str) -> float | None:
    """The first edition's tuned constant for the same optimizer and data; none is tuned here."""
    if arm != TUNED:
        return None
    first = {"convolution": "images"}.get(task, "digits")
    return results.tuned_constant(results.load(first), TASKS[first], condition.family)


def use_one_thread() -> None:
    for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[variable] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(CONFIRMATION))
    parser.add_argument("--conditions", nargs="+", help="some of the tasks', by name")
    parser.add_argument("--arms", nargs="+", choices=CONFIRMED)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    use_one_thread()
    jobs = [
        (task, condition, arm, range(FIRST_SEED + first, FIRST_SEED + last))
        for task, conditions, arms, (first, last) in PLAN
        for condition in CONFIRMATION[task].conditions
        if condition.name in conditions
        for arm in arms
        if task in (options.tasks or (task,))
        and condition.name in (options.conditions or (condition.name,))
        and arm in (options.arms or (arm,))
    ]
    seconds = [CONFIRMATION[task].seconds * len(seeds) for task, _, _, seeds in jobs]
    with tqdm(total=sum(seconds)) as progress:
        for (task, condition, arm, seeds), cost in zip(jobs, seconds):
            progress.set_postfix_str(f"{task}: {condition.name}, {arm}")
            constant = constant_of(task, condition, arm)
            complete(task, condition, arm, constant, seeds, options.output)
            progress.update(cost)


if __name__ == "__main__":
    main()
