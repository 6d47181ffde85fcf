"""Run the study: `hatch run study`. An interrupted study goes on where it stopped.

Every run is a task, a condition (optimizer, learning rate, loss), an arm (a way to clip) and a
seed. The seed alone decides the initial weights and the order of the data.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results
from arms import CONSTANTS, DEFAULT, DRAWN, NONE, TUNED, select
from design import TASKS, Condition, Task
from tqdm import tqdm

# A figure needs the course of few runs, at few steps.
RECORDED_SEED, RECORDED_STEPS = 0, 60
SERIES = ("steps", "losses", "norms", "updates")


@dataclass(frozen=True)
class Job:
    task: str
    condition: Condition
    arm: str
    constant: float | None
    seed: int
    quick: bool = False

    @property
    def key(self) -> results.Key:
        return self.condition.name, self.arm, self.constant, self.seed


def perform(job: Job) -> dict[str, Any]:
    """Train once; called in a worker."""
    task = importlib.import_module(f"tasks.{job.task}")
    outcome = task.run(job.condition, job.arm, job.constant, job.seed, quick=job.quick)
    record = {
        "condition": job.condition.name,
        "arm": job.arm,
        "constant": job.constant,
        "seed": job.seed,
    } | {name: rounded(value) for name, value in asdict(outcome).items() if name not in SERIES}
    if job.seed == RECORDED_SEED and job.arm in DRAWN:
        every = max(1, len(outcome.steps) // RECORDED_STEPS)
        record |= {name: rounded(getattr(outcome, name)[::every]) for name in SERIES}
    return record


def rounded(value: Any) -> Any:
    """Five digits are enough, and NaN is no JSON."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def tuning_jobs(name: str, quick: bool) -> Iterator[Job]:
    constants = CONSTANTS[-1:] if quick else CONSTANTS
    for condition in chosen_conditions(name, quick):
        if condition.base:
            for constant in constants:
                yield Job(name, condition, TUNED, constant, results.TUNING_SEED, quick)


def main_jobs(
    name: str, runs: results.Runs, arms: tuple[str, ...], seeds: int, quick: bool
) -> Iterator[Job]:
    """All seeds of a task; seed by seed, so that what there is can be compared at any time."""
    task = TASKS[name]
    for seed in range(seeds):
        for condition in chosen_conditions(name, quick):
            for arm in arms:
                constant = None
                if arm == TUNED:
                    constant = results.tuned_constant(runs, task, condition.family)
                yield Job(name, condition, arm, constant, seed, quick)


def chosen_conditions(name: str, quick: bool) -> tuple[Condition, ...]:
    conditions = TASKS[name].conditions
    return conditions[:1] if quick else conditions


def run_all(
    pool: ProcessPoolExecutor,
    jobs: list[Job],
    runs: results.Runs,
    folder: Path,
    progress: tqdm,
    task: Task | None = None,
) -> None:
    """Run what there is no result of yet, and save each result as it comes."""
    futures = {}
    for job in jobs:
        seconds = (task or TASKS[job.task]).seconds
        if job.key in runs:
            progress.update(seconds)
        else:
            futures[pool.submit(perform, job)] = job
    for future in as_completed(futures):
        job = futures[future]
        runs[job.key] = future.result()
        results.save(job.task, runs, folder)
        progress.set_postfix_str(f"{job.task}: {job.condition.name}, {job.arm}, seed {job.seed}")
        progress.update((task or TASKS[job.task]).seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", help="some of the arms, by name (default: all)")
    parser.add_argument("--seeds", type=int, help="seeds of each task (default: the task's own)")
    parser.add_argument("--workers", type=int, help="runs at the same time (default: 2)")
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of results")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, one seed")
    options = parser.parse_args()
    if options.quick and options.output == results.FOLDER:
        parser.error("--quick needs --output: its numbers do not belong among the study's")
    arms = select(options.arms or ((NONE, TUNED, DEFAULT) if options.quick else None))

    seeds = {
        name: 1 if options.quick else options.seeds or TASKS[name].seeds for name in options.tasks
    }
    count = {
        name: len(list(tuning_jobs(name, options.quick)))
        + seeds[name] * len(chosen_conditions(name, options.quick)) * len(arms)
        for name in options.tasks
    }
    total = sum(count[name] * TASKS[name].seconds for name in options.tasks)
    # One thread a worker; the workers read this when they import a framework.
    for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[variable] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # A second worker would spend longer on importing the frameworks than quick runs take.
    workers = options.workers or (1 if options.quick else 2)
    context = multiprocessing.get_context("spawn")
    layout = "{percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left  {postfix}"
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=total, bar_format=layout, smoothing=0.05) as progress,
    ):
        try:
            for name in options.tasks:
                runs = results.load(name, options.output)
                tuning = list(tuning_jobs(name, options.quick))
                run_all(pool, tuning, runs, options.output, progress)
                jobs = list(main_jobs(name, runs, arms, seeds[name], options.quick))
                run_all(pool, jobs, runs, options.output, progress)
        except BaseException:
            # Otherwise an interrupted study would wait for all the runs that are queued.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"Results: {options.output}")
    if options.output == results.FOLDER:
        import report  # after the runs: what draws figures takes seconds to import

        report.write(options.output)


if __name__ == "__main__":
    main()
