"""The study, with a few steps of every task, and its statistics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"


@pytest.fixture(scope="module")
def report() -> Any:
    """The study's modules import one another as a script's do."""
    sys.path.insert(0, str(STUDY))
    try:
        import report

        yield report
    finally:
        sys.path.remove(str(STUDY))


def run_quickly(output: Path) -> str:
    command = [sys.executable, str(STUDY / "run.py"), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results")
    run_quickly(output)
    return output


def test_each_task_trains_every_kind_of_arm_from_the_same_start(quick: Path) -> None:
    files = sorted(quick.iterdir())
    assert [file.stem for file in files] == ["characters", "digits", "images", "separation"]
    for file in files:
        runs = json.loads(file.read_text("utf-8"))["runs"]
        tuning, *compared = runs
        by_arm = {run["arm"]: run for run in compared}
        assert set(by_arm) == {"none", "tuned constant", "quantile 0.9 (default)"}
        assert all(run["finite"] and math.isfinite(run["test"]) for run in runs)
        assert by_arm["tuned constant"]["constant"] == tuning["constant"] == 100.0
        # The first batch meets the same weights in every arm …
        assert len({tuple(run["losses"][:1] + run["norms"][:1]) for run in compared}) == 1
        # … and so does the last where nothing is clipped: these gradients are smaller than 100.
        if file.stem != "separation":
            assert by_arm["none"]["test"] == by_arm["tuned constant"]["test"]


def test_an_interrupted_study_goes_on(quick: Path) -> None:
    path = quick / "digits.json"
    before = {file.name: file.read_bytes() for file in quick.iterdir()}
    stored = json.loads(path.read_text("utf-8"))
    removed = stored["runs"].pop()
    # A run that is repeated would not give this.
    stored["runs"][0]["test"] = 12.5
    path.write_text(json.dumps(stored), "utf-8")
    run_quickly(quick)
    resumed = json.loads(path.read_text("utf-8"))["runs"]
    assert resumed[0]["test"] == 12.5
    assert (resumed[-1]["arm"], resumed[-1]["test"]) == (removed["arm"], removed["test"])
    assert all(file.read_bytes() == before[file.name] for file in quick.iterdir() if file != path)


def test_the_page_is_filled_in_from_results(report: Any, quick: Path, tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    report.write(quick, output=page)
    text = page.read_text("utf-8")
    assert text.count("4 of") == 4  # runs, in each of the four tasks
    for arm in report.ARMS:
        assert f"| {arm} |" in text
    # Nothing is left of the page that was filled in before.
    again = report.fill(text, report.parts(report.Study(quick), tmp_path, "study/figures"))
    assert again == text


def test_the_page_in_the_repository_is_up_to_date(report: Any, tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    report.write(output=page)
    assert page.read_text("utf-8") == report.PAGE.read_text("utf-8"), "hatch run study:report"


def made_up_results(report: Any, folder: Path, better: str) -> None:
    """Results of a whole study in which one arm is better everywhere, and the others are alike."""
    random = np.random.default_rng(0)
    for name, task in report.TASKS.items():
        sign = 1 if task.higher_is_better else -1
        runs = {}
        for seed in range(task.seeds):
            for condition in task.conditions:
                luck = random.normal()  # of the seed, shared by all arms
                for arm in report.ARMS:
                    advantage = 3.0 if arm == better else 0.0
                    record = {
                        "condition": condition.name,
                        "arm": arm,
                        "constant": 1.0 if arm == "tuned constant" else None,
                        "seed": seed,
                        "test": 50 + sign * (advantage + luck + 1e-3 * random.normal()),
                        "validation": 50.0,
                        "finite": True,
                        "step_ms": 2.0,
                        "seconds": 1.0,
                        "steps": [0, 5],
                        **{series: [1.0, 2.0] for series in ("losses", "norms", "updates")},
                    }
                    runs[report.results.key_of(record)] = record
        report.results.save(name, runs, folder)


def test_the_report_finds_the_arm_that_is_better(report: Any, tmp_path: Path) -> None:
    made_up_results(report, tmp_path, "ZClip")
    texts = report.parts(report.Study(tmp_path), tmp_path / "figures", "figures")
    conditions = sum(len(task.conditions) for task in report.TASKS.values())

    ranks = texts["ranks"].splitlines()
    assert ranks[2].startswith("| ZClip | 1.0 |")
    assert all(float(line.split("|")[2]) > 3 for line in ranks[3 : 2 + len(report.ARMS)])

    rows = [line.split(" | ") for line in texts["tests-none"].splitlines()[2:-2]]
    assert [row[1:3] for row in rows] == [["ZClip", "better"]] * conditions
    assert all(float(row[3].split()[0]) == pytest.approx(3.0, abs=0.05) for row in rows)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"course.png", "rates.png"}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_rejects_what_its_definition_rejects(report: Any, p_values: list[float]) -> None:
    corrected = report.holm(p_values)
    order = np.argsort(p_values, kind="stable")
    level = 0.05
    rejecting = True
    for rank, i in enumerate(order):
        limit = level / (len(p_values) - rank)
        if abs(p_values[i] - limit) < 1e-9:
            return  # on the edge, where rounding decides
        rejecting = rejecting and p_values[i] < limit
        assert (corrected[i] < level) == rejecting


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(-50, 50))
def test_intervals_hold_the_mean_and_move_with_the_values(
    report: Any, values: list[float], shift: float
) -> None:
    low, high = report.interval(np.array(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    shifted = report.interval(np.array(values) + shift)
    np.testing.assert_allclose(shifted, (low + shift, high + shift), atol=1e-9)
    if len(set(values)) == 1:
        assert low == pytest.approx(values[0]) == high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_looks_at_the_pairs_that_differ(
    report: Any, pairs: list[tuple[bool, bool]]
) -> None:
    first, second = np.array(pairs).T
    p = report.mcnemar(first, second)
    assert p == report.mcnemar(second, first)
    differ = first != second
    assert p == report.mcnemar(first[differ], second[differ])
    if len(set(pairs) & {(True, False), (False, True)}) == 1:  # all of them in one direction
        assert p == pytest.approx(min(1.0, 2.0 ** (1 - int(differ.sum()))))
