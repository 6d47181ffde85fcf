"""Explore the grid of `arms.GRID` on a few conditions: `hatch run study:explore`.

The exploration looks for candidates; nothing of it enters the study's comparisons. It stores its
runs in a folder of their own and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import results
from arms import GRID, NONE
from design import CLUSTERING, CONFIRMATION, FORGETTING
from design import TASKS as FIRST
from run import Job, run_all
from tqdm import tqdm

SEPARATION = replace(FIRST["separation"], conditions=(CLUSTERING, FORGETTING))
TASKS = FIRST | CONFIRMATION | {"separation": SEPARATION}
FOLDER = results.FOLDER / "exploration"
# The two prices first (SGD slows down under a low quantile), then the protection.
CONDITIONS = {
    "digits": ("SGD", "SGD, lr ×3", "Adam", "Adam, lr ×3"),
    "rows": ("SGD, lr ×10", "SGD, lr ×30", "Adam, lr ×10", "Adam, lr ×30"),
    "pixels": ("SGD", "SGD, lr ×3", "Adam"),
    "convolution": ("SGD, lr ×10", "Adam, lr ×10", "SGD", "Adam"),
    "separation": (CLUSTERING.name, FORGETTING.name),
    "images": ("SGD, lr ×10", "Adam, lr ×10", "SGD", "Adam", "SGD, lr ×3", "Adam, lr ×3"),
}


def jobs(
    names: tuple[str, ...], task: str, conditions: tuple[str, ...], seeds: int
) -> Iterator[Job]:
    known = {condition.name: condition for condition in TASKS[task].conditions}
    for seed, condition, arm in product(range(seeds), conditions, (NONE, *names)):
        yield Job(task, known[condition], arm, None, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--conditions", nargs="+", help="some of the task's, by name")
    parser.add_argument("--arms", default="", help="a part of the arms' names")
    parser.add_argument("--names", nargs="+", help="some of the arms, by their whole names")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[variable] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    names = tuple(options.names or (name for name in GRID if options.arms in name))
    if unknown := set(names) - set(GRID):
        parser.error(f"unknown arms {sorted(unknown)}; there are {list(GRID)}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        for task in options.tasks:
            chosen = tuple(c for c in CONDITIONS[task] if c in (options.conditions or (c,)))
            planned = list(jobs(names, task, chosen, options.seeds))
            with tqdm(total=len(planned) * TASKS[task].seconds, desc=task) as progress:
                runs = results.load(task, options.output)
                run_all(pool, planned, runs, options.output, progress, TASKS[task])


if __name__ == "__main__":
    main()
