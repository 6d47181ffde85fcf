"""Run a slice of the confirmation again and compare: `hatch run study:check`.

One task, one condition, two arms, two seeds. Training magnifies rounding, so numbers are the same
only with the same packages and processor. The command compares with two stored versions of the
slice:

* `results/check`: by the packages as they are now, with the commit, versions and processor
  that made it. The numbers must be the same; otherwise the command fails.
* `results/confirmation`: the study's raw results, made with the packages at the commit of
  `PLAN_COMMIT`. Differences are printed.

`--update` stores the slice again, after a change of the packages that rounds differently.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from arms import CANDIDATE, NONE
from confirm import FOLDER, perform, use_one_thread
from design import CONFIRMATION, FIRST_SEED

TASK, CONDITION, ARMS, SEEDS = "convolution", "SGD", (NONE, CANDIDATE), 2
NUMBERS = ("test", "validation", "finite", "clipped")
PLAN_COMMIT = "d1d214c"
# A run of the present packages that is further from the raw results than this, in points of test
# accuracy, differs by more than rounding. One of the 720 images is 0.14 points.
ROUNDING = 0.5
STORED = results.FOLDER / "check" / f"{TASK}.json"


def rerun() -> list[dict[str, Any]]:
    """The slice's runs by the installed packages: what identifies a run, and its numbers."""
    (condition,) = (c for c in CONFIRMATION[TASK].conditions if c.name == CONDITION)
    seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
    names = "condition", "arm", "constant", "seed", *NUMBERS
    return [
        {name: record[name] for name in names}
        for arm in ARMS
        for record in perform(TASK, condition, arm, None, seeds)
    ]


def environment() -> dict[str, str]:
    """The facts that rounding depends on."""
    import torch

    versions = results.environment()
    names = "python", "torch", "numpy"
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {name: versions[name] for name in names} | {"processor": processor}


def commit() -> str:
    """The commit of the packages; an error if they have changed since."""
    packages = ("--", "packages")
    git = ("git", "-C", str(Path(__file__).parent))
    top = subprocess.check_output((*git, "rev-parse", "--show-toplevel"), text=True).strip()
    git = ("git", "-C", top)
    if subprocess.check_output((*git, "status", "--porcelain", *packages), text=True):
        sys.exit("packages/ has changes; commit them first, so that the slice can name its commit.")
    return subprocess.check_output((*git, "log", "-1", "--format=%h", *packages), text=True).strip()


def compare(runs: list[dict[str, Any]], stored: results.Runs, label: str) -> tuple[int, float]:
    """Print each run beside the stored one; how many differ, and the largest difference."""
    different, largest = 0, 0.0
    for run in runs:
        before = stored[results.key_of(run)]
        same = all(run[name] == before[name] for name in NUMBERS)
        different += not same
        largest = max(largest, abs(run["test"] - before["test"]))
        verdict = "the same" if same else f"stored {before['test']}"
        print(f"  {run['arm']}, seed {run['seed']}: {run['test']} ({verdict})")
    print(f"  {label}: {len(runs) - different} of {len(runs)} runs are the same.")
    return different, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="store the slice as it is now")
    parser.add_argument("--stored", type=Path, default=STORED, help="the slice to compare with")
    options = parser.parse_args()
    use_one_thread()
    here = commit() if options.update else ""
    runs = rerun()
    if options.update:
        slice_ = {"task": TASK, "commit": here, "environment": environment()}
        lines = ",\n".join(json.dumps(run) for run in runs)
        text = f'{json.dumps(slice_)[:-1]}, "runs": [\n{lines}\n]}}\n'
        options.stored.parent.mkdir(parents=True, exist_ok=True)
        options.stored.write_text(text, "utf-8")
    stored = json.loads(options.stored.read_text("utf-8"))
    then, now = stored["environment"], environment()
    print(f"{TASK}, {CONDITION}, test accuracy in %, against the raw results of {PLAN_COMMIT}:")
    _, largest = compare(runs, results.load(TASK, FOLDER), "Raw results")
    print(f"Against the slice made with the packages at {stored['commit']}:")
    present = {results.key_of(run): run for run in stored["runs"]}
    different, _ = compare(runs, present, "Present packages")
    for name in then:
        if then[name] != now[name]:
            print(f"  {name} is {now[name]}, was {then[name]}: expect other rounding.")
    if largest > ROUNDING:
        sys.exit(f"A run is {largest:.2f} points from the raw results: more than rounding.")
    if different:
        sys.exit(f"{different} of {len(runs)} runs differ from {options.stored}.")


if __name__ == "__main__":
    main()
