"""The study, with a few steps of every task, and its statistics."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
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


@pytest.fixture(scope="module")
def study(report: Any) -> Any:
    """The modules of the second edition."""
    own = (
        "arms", "check", "confirm", "design", "measures", "summary", "supplement", "training",
    )  # fmt: skip
    tasks = ("convolution", "digits", "gpt", "pixels", "recurrent", "rows")
    return SimpleNamespace(
        **{name: importlib.import_module(name) for name in own},
        **{name: importlib.import_module(f"tasks.{name}") for name in tasks},
    )


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


@pytest.mark.nightly  # with the others, half a minute of training
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


@pytest.mark.nightly
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


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_a_slice_of_the_confirmation_gives_the_stored_numbers() -> None:
    """`hatch run study:check`. After a change that rounds differently: `… --update`."""
    done = subprocess.run([sys.executable, str(STUDY / "check.py")], capture_output=True, text=True)
    if "expect other rounding" in done.stdout:
        assert "more than rounding" not in done.stderr, done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("seed 10") == done.stdout.count("seed 11") == 4


@pytest.mark.parametrize("name", ["test", "validation", "clipped"])
def test_the_check_finds_a_number_that_changed(study: Any, name: str) -> None:
    results = study.confirm.results
    runs = list(results.load(study.check.TASK, study.check.STORED.parent).values())
    stored = {results.key_of(run): run for run in runs}
    assert study.check.compare(runs, stored, "") == (0, 0.0)
    changed = dict(runs[-1])
    changed[name] += 0.139
    different, largest = study.check.compare([*runs[:-1], changed], stored, "")
    assert different == 1
    assert largest == pytest.approx(0.139 if name == "test" else 0.0)


def test_the_slice_is_of_runs_that_the_confirmation_has(study: Any) -> None:
    results = study.confirm.results
    stored = results.load(study.check.TASK, study.check.STORED.parent)
    raw = results.load(study.check.TASK, study.confirm.FOLDER)
    assert len(stored) == len(study.check.ARMS) * study.check.SEEDS
    assert stored.keys() <= raw.keys()


def test_the_confirmation_uses_no_seed_that_was_used_before(study: Any) -> None:
    used = {
        run["seed"]
        for folder in (study.confirm.results.FOLDER, study.confirm.results.FOLDER / "exploration")
        for file in folder.glob("*.json")
        for run in json.loads(file.read_text("utf-8"))["runs"]
    }
    assert not used & set(range(study.design.FIRST_SEED, study.design.FIRST_SEED + 10))
    for file in study.confirm.FOLDER.glob("*.json"):
        runs = json.loads(file.read_text("utf-8"))["runs"]
        assert {run["seed"] for run in runs} <= set(range(10, 20))
        assert {run["arm"] for run in runs} <= set(study.arms.CONFIRMED)


def test_the_supplement_uses_no_seed_that_was_used_before(study: Any) -> None:
    for file in study.supplement.FOLDER.glob("*.json"):
        runs = json.loads(file.read_text("utf-8"))["runs"]
        assert runs
        assert {run["seed"] for run in runs} <= set(study.supplement.seeds_of(file.stem))
        if file.stem != "separation":  # compared with the first edition's own runs
            assert min(run["seed"] for run in runs) >= 20


def test_every_planned_run_of_the_supplement_can_be_made(study: Any) -> None:
    for task, conditions, arms in study.supplement.PLAN:
        known = {
            condition.name: condition for condition in study.design.SUPPLEMENT[task].conditions
        }
        assert set(conditions) <= set(known)
        for condition in conditions:
            for arm in arms:
                constant = study.supplement.constant_for(task, known[condition], arm)
                own = arm in (study.arms.NONE, *study.arms.ZCLIPS, *study.arms.STARTS)
                assert constant is not None or own or study.arms.settings_of(arm)


@pytest.mark.parametrize("by_group", [False, True])
def test_the_package_zclip_clips_each_model_by_its_own_norms(study: Any, by_group: bool) -> None:
    zclip = pytest.importorskip("zclip")
    sizes = [3, 4]
    models = [torch.nn.Linear(size, 1, bias=False) for size in sizes]
    groups = [{"params": list(model.parameters())} for model in models]
    wrap = study.arms.clipped_by_group if by_group else study.arms.clipped_torch_optimizer
    optimizer = wrap(torch.optim.SGD(groups, 0.0), study.arms.UNBOUNDED_ZCLIP, None)
    whole = torch.nn.ModuleList(models)
    parts = models if by_group else [whole]
    alone = [zclip.ZClip(max_grad_norm=None) for _ in parts]
    for step in range(40):
        gradients = [torch.full((1, size), 1.0 + step % 3) for size in sizes]
        gradients[0] = gradients[0] * (50.0 if step == 35 else 1.0)
        for model, gradient in zip(models, gradients):
            model.weight.grad = gradient.clone()
        for part, clipper in zip(parts, alone):
            clipper.step(part)
        expected = [model.weight.grad for model in models]
        for model, gradient in zip(models, gradients):
            model.weight.grad = gradient.clone()
        optimizer.step()
        for model, gradient in zip(models, expected):
            torch.testing.assert_close(model.weight.grad, gradient)
        if step == 35:
            assert expected[0][0, 0] < gradients[0][0, 0]
            assert (expected[1][0, 0] < gradients[1][0, 0]) == (not by_group)


def test_a_constant_for_the_first_steps_ends(study: Any) -> None:
    value, steps = study.arms.STARTS[study.arms.FIRST_STEPS]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = study.arms.clipped_torch_optimizer(
        torch.optim.SGD([parameter], 0.0), study.arms.FIRST_STEPS, None
    )
    for step in range(steps + 2):
        parameter.grad = torch.full((1,), 3 * value)
        optimizer.step()
        expected = value if step < steps else 3 * value
        assert parameter.grad.item() == pytest.approx(expected, rel=1e-5)


def test_the_gpt_has_millions_of_parameters_and_looks_back_only(study: Any) -> None:
    torch.manual_seed(0)
    model = study.gpt.GPT()
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 4e6
    text = torch.randint(128, (1, 64))
    changed = text.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 128
    with torch.no_grad():
        before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert (before[:, 40:] - after[:, 40:]).abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("name", ["pixels", "rows"])
def test_stacked_models_compute_what_their_modules_do(study: Any, name: str) -> None:
    reading = getattr(study, name).READING
    torch.manual_seed(0)
    models = [study.recurrent.ImageGRU(reading) for _ in range(3)]
    images = torch.rand(3, 5, 64)
    logits = study.recurrent.forward(models, images)
    for model, own, result in zip(models, images, logits):
        states, _ = model.gru(own.unflatten(-1, (-1, reading.pixels)))
        torch.testing.assert_close(result, model.head(states[:, -1]))


@pytest.mark.parametrize("arm", ["none", "quantile 0.9 (default)", "candidate", "AdaGC"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_seeds_that_train_together_share_nothing(study: Any, arm: str, optimizer: str) -> None:
    condition = study.design.condition(optimizer, 0.03)
    reading = study.rows.READING

    def train(seeds: list[int]) -> list[list[torch.Tensor]]:
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(study.recurrent.ImageGRU(reading))
        data = study.recurrent.load_parts()["train"]
        streams = [study.recurrent.batches(reading, *data, seed, False) for seed in seeds]
        study.recurrent.fit(models, condition, arm, None, streams, 30)
        return [[p.detach() for p in model.parameters()] for model in models]

    together = train([3, 4])
    for weights, (alone,) in zip(together, (train([3]), train([4]))):
        for here, there in zip(weights, alone):
            torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arm", ["none", "quantile 0.1, global", "percentile 5"])
def test_pixels_are_the_first_editions_digits(study: Any, arm: str) -> None:
    condition = study.design.condition("SGD", 0.2)
    one_epoch = study.recurrent.replace(study.pixels.READING, steps=17)
    (new,) = study.recurrent.run(one_epoch, condition, condition, arm, None, [1])
    old = study.digits.run(condition, arm, None, 1, quick=True)
    assert new.test == pytest.approx(old.test, abs=1.5)  # points; an image is 0.28


def test_a_confirmation_goes_on_where_it_stopped(study: Any, tmp_path: Path) -> None:
    condition = study.design.condition("SGD", 0.03, variant="fine-tuning")

    def complete(seeds: range) -> dict[int, float]:
        study.confirm.complete("convolution", condition, "candidate", None, seeds, tmp_path)
        runs = study.confirm.results.load("convolution", tmp_path)
        return {key[3]: run["test"] for key, run in runs.items()}

    first = complete(range(20, 21))
    file = tmp_path / "convolution.json"
    # A run that is repeated would not give this.
    file.write_text(file.read_text("utf-8").replace(f'"test": {first[20]}', '"test": 1.25'))
    assert complete(range(20, 22)) == {20: 1.25, 21: pytest.approx(90, abs=10)}


def test_a_schedule_warms_up_and_decays(study: Any) -> None:
    shares = [study.training.share_of_rate(step, 200) for step in range(200)]
    assert shares[:20] == sorted(shares[:20])
    assert shares[19] == 1.0
    assert shares[20:] == sorted(shares[20:], reverse=True)
    assert 0 < shares[0] <= 0.05
    assert 0 <= shares[-1] < 0.01


@given(
    st.lists(st.floats(1, 100), min_size=2, max_size=8, unique=True), st.data(), st.floats(1, 100)
)
def test_half_of_the_runs_diverge_between_the_rates_around_it(
    study: Any, rates: list[float], data: Any, scale: float
) -> None:
    rates = sorted(rates)
    shares = data.draw(st.lists(st.sampled_from([0, 0.2, 0.7, 1]), min_size=len(rates),
                                max_size=len(rates)))  # fmt: skip
    smooth = study.measures.monotone(np.array(shares))
    assert (np.diff(smooth) >= 0).all()
    assert smooth.mean() == pytest.approx(np.mean(shares))
    half = study.measures.half_rate(rates, np.array(shares))
    below, above = np.array(rates)[smooth < 0.5], np.array(rates)[smooth >= 0.5]
    if not len(above):
        assert half == math.inf
    else:
        assert max([rates[0], *below]) * (1 - 1e-9) <= half <= above[0] * (1 + 1e-9)
        scaled = study.measures.half_rate([scale * rate for rate in rates], np.array(shares))
        assert scaled == pytest.approx(scale * half)


def test_the_summary_finds_the_arm_that_protects(study: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, task in study.design.CONFIRMATION.items():
        runs = {}
        for condition in task.conditions:
            for arm in study.arms.CONFIRMED:
                for seed in range(10, 10 + task.seeds):
                    record = {
                        "condition": condition.name,
                        "arm": arm,
                        "constant": None,
                        "seed": seed,
                        "test": 90 + random.normal(),
                        "finite": arm == "candidate" or condition.factor < 10,
                        "seconds": 1.0,
                    }
                    runs[study.confirm.results.key_of(record)] = record
        study.confirm.results.save(name, runs, tmp_path)
    confirmation = study.summary.Confirmation(tmp_path)
    supplement = study.summary.Confirmation(tmp_path / "supplement", study.design.SUPPLEMENT)
    texts = study.summary.parts(confirmation, supplement, tmp_path, "figures")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in texts["summary"].splitlines()}
    assert rows["| candidate"][3].startswith("**0 [0, ")
    assert rows["| candidate"][4] == "**> ×30**"
    # All runs end well at ×5 and none at ×10.
    assert rows["| none"][4] == "×7"
    assert texts["plan"].count("0 of 30 against 20 | < 0.001") == 2
    assert (tmp_path / "divergence.png").exists()
