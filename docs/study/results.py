"""The raw results: one JSON file a task, one line a run, replaced whole at each write."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from design import Task

FOLDER = Path(__file__).parent / "results"
# A seed of its own, so that no run is both tuned on and reported.
TUNING_SEED = 1000

Key = tuple[str, str, float | None, int]
Runs = dict[Key, dict[str, Any]]


def key_of(record: dict[str, Any]) -> Key:
    return record["condition"], record["arm"], record["constant"], record["seed"]


def load(task: str, folder: Path = FOLDER) -> Runs:
    """The task's runs so far, by condition, arm, constant and seed."""
    path = folder / f"{task}.json"
    if not path.exists():
        return {}
    return {key_of(record): record for record in json.loads(path.read_text("utf-8"))["runs"]}


def environments(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    """The versions that each task's results were made with."""
    return {
        path.stem: json.loads(path.read_text("utf-8"))["environment"]
        for path in sorted(folder.glob("*.json"))
    }


def save(task: str, runs: Runs, folder: Path) -> None:
    """Write to a temporary file and rename it: an interruption leaves the old file or the new."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in runs.values())
    head = json.dumps({"task": task, "environment": environment()})[:-1]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', "utf-8")
    os.replace(temporary, path)


def environment() -> dict[str, str]:
    packages = ("autoclip-core", "torch", "tensorflow", "keras", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def tuned_constant(runs: Runs, task: Task, family: str) -> float | None:
    """The constant of the family with the best validation, None if none has been tried."""
    base = next(c.name for c in task.conditions if c.family == family and c.base)
    tried = {
        run["constant"]: task.score(run["finite"], run["validation"])
        for run in runs.values()
        if run["condition"] == base and run["seed"] == TUNING_SEED
    }
    sign = 1 if task.higher_is_better else -1
    return max(tried, key=lambda constant: sign * tried[constant], default=None)
