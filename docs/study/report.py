"""Tables and figures of `docs/study.md` from the raw results: `hatch run study:report`.

The page's prose is written by hand. What stands between `<!-- begin NAME -->` and
`<!-- end NAME -->` is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import additions
import matplotlib.pyplot as plt
import numpy as np
import results
import summary
from arms import ARMS, CONSTANTS, DEFAULT, DRAWN, NONE
from design import SUPPLEMENT, TASKS, Condition, Task
from measures import holm, interval, markdown, mcnemar, probability
from scipy import stats

PAGE = Path(__file__).parents[1] / "study.md"
FIGURES = Path(__file__).parent / "figures"
LEVEL = 0.05
# What differs from the default in one setting only.
CHANGED = {
    "quantile 0.5": "quantile 0.5",
    "quantile 0.1": "quantile 0.1",
    "global": "quantile 0.9, global",
    "last 100 norms": "quantile 0.9, last 100",
}
# SI-SDR in dB on WSJ0-2mix, by percentile: Seetharaman et al., 2020, Table 1. The arms that clip to
# these percentiles.
PAPER = {
    "deep clustering": (10.7, 10.7, 10.8, 10.7, 10.7, 10.5, 10.2),
    "mask inference": (10.0, 10.3, 10.2, 9.9, 9.2, 8.7, 8.5),
    "SNR": (9.9, 10.2, 10.4, 10.3, 9.9, 9.5, 8.3),
}
PERCENTILES = {
    0: "",
    1: "",
    10: "quantile 0.1, global",
    25: "",
    50: "quantile 0.5, global",
    90: "quantile 0.9, global",
    100: NONE,
}
# The runs whose course is drawn.
COURSE = (("separation", "SNR"), ("digits", "SGD, lr ×3"))


class Study:
    """All results: scores by task, condition, arm and seed."""

    def __init__(self, folder: Path) -> None:
        self.runs = {name: results.load(name, folder) for name in TASKS}
        self.environments = results.environments(folder)

    def records(self, name: str, condition: Condition, arm: str) -> dict[int, dict]:
        """The runs of an arm by seed, without those that tuned a constant."""
        return {
            run["seed"]: run
            for run in self.runs[name].values()
            if (run["condition"], run["arm"]) == (condition.name, arm)
            and run["seed"] != results.TUNING_SEED
        }

    def scores(self, name: str, condition: Condition, arm: str) -> dict[int, float]:
        task = TASKS[name]
        records = self.records(name, condition, arm)
        return {seed: task.score(run["finite"], run["test"]) for seed, run in records.items()}

    def shared_seeds(self, name: str, condition: Condition) -> list[int]:
        """The seeds that every arm has been run with."""
        return sorted(set.intersection(*(set(self.scores(name, condition, arm)) for arm in ARMS)))

    def paired(self, name: str, condition: Condition, arm: str) -> np.ndarray:
        """Scores at the shared seeds; higher is better."""
        sign = 1 if TASKS[name].higher_is_better else -1
        scores = self.scores(name, condition, arm)
        return sign * np.array([scores[seed] for seed in self.shared_seeds(name, condition)])

    def comparable(self, seeds: int) -> list[tuple[str, Condition]]:
        """The conditions for which every arm has at least so many seeds."""
        return [
            (name, condition)
            for name, task in TASKS.items()
            for condition in task.conditions
            if len(self.shared_seeds(name, condition)) >= seeds
        ]


def cell(task: Task, scores: dict[int, float]) -> str:
    """Mean and interval; the number of diverged runs behind a dagger."""
    if not scores:
        return "·"
    values = np.array(list(scores.values()))
    digits = 1 if task.unit == "%" else 2
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        low, high = interval(values)
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    diverged = sum(task.diverged(value) for value in values)
    if diverged:
        text += f" †{diverged}"
    return text if len(values) == task.seeds else f"{text} (n = {len(values)})"


def task_table(study: Study, name: str) -> str:
    task = TASKS[name]
    head = [f"{task.metric}, {task.unit}"] + [condition.name for condition in task.conditions]
    rows = [
        [arm] + [cell(task, study.scores(name, condition, arm)) for condition in task.conditions]
        for arm in ARMS
    ]
    return markdown(head, rows)


def paper_table(study: Study) -> str:
    """The paper's Table 1 beside the same settings here."""
    task = TASKS["separation"]
    conditions = [condition for condition in task.conditions if condition.name in PAPER]
    head = ["percentile"]
    for condition in conditions:
        head += [f"{condition.name}: paper", "here"]
    rows = []
    for i, (percentile, arm) in enumerate(PERCENTILES.items()):
        row = [f"{percentile} (no clipping)" if arm == NONE else str(percentile)]
        for condition in conditions:
            scores = list(study.scores("separation", condition, arm).values())
            here = f"{np.mean(scores):.1f}" if scores else "·"
            row += [f"{PAPER[condition.name][i]:.1f}", here]
        rows.append(row)
    return markdown(head, rows)


def progress_table(study: Study) -> str:
    """The runs that there are."""
    rows = []
    for name, task in TASKS.items():
        families = {condition.family for condition in task.conditions}
        expected = len(ARMS) * task.seeds * len(task.conditions) + len(CONSTANTS) * len(families)
        runs = study.runs[name].values()
        hours = sum(run["seconds"] for run in runs) / 3600
        row = [task.title, f"{len(runs)} of {expected}", str(task.seeds), f"{hours:.1f}"]
        rows.append(row)
    versions = f"All tasks ran with {summary.versions_text(study)}."
    return markdown(["task", "runs", "seeds", "CPU hours"], rows) + f"\n\n{versions}"


def tuning_table(study: Study) -> str:
    """The constant that each family's tuning chose, and how differently the five do."""
    head = ["task", "family", *(f"{constant:g}" for constant in CONSTANTS), "chosen"]
    rows = []
    for name, task in TASKS.items():
        for condition in task.conditions:
            if condition.base:
                tried = {
                    run["constant"]: task.score(run["finite"], run["validation"])
                    for run in study.runs[name].values()
                    if run["condition"] == condition.name and run["seed"] == results.TUNING_SEED
                }
                chosen = results.tuned_constant(study.runs[name], task, condition.family)
                values = [f"{tried[c]:.2f}" if c in tried else "·" for c in CONSTANTS]
                rows.append([name, condition.family, *values, f"{chosen:g}" if tried else "·"])
    return markdown(head, rows)


def robustness_table(study: Study) -> str:
    """The part of its score at the learning rate ×1 that an arm loses at a larger one."""
    columns = [
        (name, condition)
        for name, task in TASKS.items()
        for condition in task.conditions
        if not condition.base
    ]
    head = ["change from lr ×1"] + [f"{name}, {condition.name}" for name, condition in columns]
    rows = []
    for arm in ARMS:
        row = [arm]
        for name, condition in columns:
            base = next(
                c for c in TASKS[name].conditions if c.family == condition.family and c.base
            )
            at_base = study.scores(name, base, arm)
            here = study.scores(name, condition, arm)
            seeds = sorted(set(at_base) & set(here))
            change = np.mean([here[seed] - at_base[seed] for seed in seeds]) if seeds else np.nan
            digits = 1 if TASKS[name].unit == "%" else 2
            row.append(f"{change:+.{digits}f}" if seeds else "·")
        rows.append(row)
    return markdown(head, rows)


def rank_table(study: Study) -> str:
    """Mean rank of each arm over the conditions, with tests against two arms."""
    conditions = study.comparable(seeds=1)
    if len(conditions) < 2:
        return "Too few conditions are complete."
    means = np.array(
        [
            [study.paired(name, condition, arm).mean() for arm in ARMS]
            for name, condition in conditions
        ]
    )
    ranks = stats.rankdata(-means, axis=1)
    friedman = stats.friedmanchisquare(*means.T).pvalue

    def against(reference: str) -> dict[str, float]:
        others = [arm for arm in ARMS if arm != reference]
        # Ranks, since the tasks' units differ.
        p_values = [
            wilcoxon(ranks[:, ARMS.index(reference)] - ranks[:, ARMS.index(arm)]) for arm in others
        ]
        return dict(zip(others, holm(p_values)))

    none, default = against(NONE), against(DEFAULT)
    order = np.argsort(ranks.mean(0), kind="stable")
    rows = [
        [ARMS[i], f"{ranks[:, i].mean():.1f}"]
        + [probability(tests[ARMS[i]]) if ARMS[i] in tests else "" for tests in (none, default)]
        for i in order
    ]
    head = ["arm", "mean rank", "p, against none", "p, against the default"]
    return (
        markdown(head, rows)
        + f"\n\n{len(conditions)} conditions; Friedman's test that all arms are alike: "
        + f"p = {friedman:.2g}. Wilcoxon's signed-rank tests of the ranks, corrected by Holm's "
        + "method within each column."
    )


def divergence_table(study: Study) -> str:
    """The number of diverged runs, of those that every arm has done, and tests against two arms."""
    groups = {
        "lr ×1": [(name, c) for name, c in study.comparable(seeds=1) if c.base],
        "larger lr": [(name, c) for name, c in study.comparable(seeds=1) if not c.base],
    }
    diverged = {
        arm: {
            group: np.array(
                [
                    TASKS[name].diverged(study.scores(name, condition, arm)[seed])
                    for name, condition in conditions
                    for seed in study.shared_seeds(name, condition)
                ],
                bool,
            )
            for group, conditions in groups.items()
        }
        for arm in ARMS
    }

    def against(reference: str) -> dict[str, float]:
        others = [arm for arm in ARMS if arm != reference]
        theirs = diverged[reference]["larger lr"]
        p_values = [mcnemar(theirs, diverged[arm]["larger lr"]) for arm in others]
        return dict(zip(others, holm(p_values)))

    tests = [against(NONE), against(DEFAULT)]
    rows = [
        [arm]
        + [f"{runs.sum()} of {len(runs)}" for runs in diverged[arm].values()]
        + [probability(test[arm]) if arm in test else "" for test in tests]
        for arm in ARMS
    ]
    head = ["diverged runs", *groups, "p, against none", "p, against the default"]
    return markdown(head, rows)


def defaults_table(study: Study) -> str:
    """The default against settings that differ in one thing."""
    conditions = study.comparable(seeds=1)
    if len(conditions) < 2:
        return "Too few conditions are complete."
    rows, p_values = [], []
    for change, arm in CHANGED.items():
        pairs = [
            (study.paired(name, c, arm).mean(), study.paired(name, c, DEFAULT).mean())
            for name, c in conditions
        ]
        wins = sum(there > here for there, here in pairs)
        losses = sum(there < here for there, here in pairs)
        p_values.append(float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1)
        rows.append([change, str(wins), str(losses)])
    rows = [[*row, probability(p)] for row, p in zip(rows, holm(p_values))]
    return markdown(["instead of the default", "better in", "worse in", "p (sign test)"], rows)


def wilcoxon(differences: np.ndarray) -> float:
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def paired_tests(study: Study, reference: str) -> str:
    """Every arm against the reference in every condition, over seeds."""
    comparisons = [
        (name, condition, arm)
        for name, condition in study.comparable(seeds=3)
        for arm in ARMS
        if arm != reference
    ]
    if not comparisons:
        return "No condition has three seeds of every arm yet."
    differences, p_values = [], []
    for name, condition, arm in comparisons:
        difference = study.paired(name, condition, arm) - study.paired(name, condition, reference)
        varies = difference.std() > 0
        differences.append(difference.mean())
        p_values.append(float(stats.ttest_1samp(difference, 0).pvalue) if varies else 1.0)
    corrected = holm(p_values)
    rows = []
    for i in np.argsort(corrected, kind="stable"):
        if corrected[i] < LEVEL:
            name, condition, arm = comparisons[i]
            better = "better" if differences[i] > 0 else "worse"
            unit = TASKS[name].unit.replace("%", "points")
            size = f"{abs(differences[i]):.2f} {unit}"
            rows.append([f"{name}, {condition.name}", arm, better, size, probability(corrected[i])])
    uncorrected = sum(p < LEVEL for p in p_values)
    count = (
        f"{len(rows)} of {len(comparisons)} comparisons are significant after Holm's correction "
        f"({uncorrected} before it)."
    )
    return markdown(["condition", "arm", "is", "by", "p"], rows) + "\n\n" + count if rows else count


def draw_course(study: Study, path: Path) -> bool:
    """Loss, gradient norm and step size over training, as in the paper's Figure 1."""
    for name, condition_name in COURSE:
        condition = next(c for c in TASKS[name].conditions if c.name == condition_name)
        courses = {arm: study.records(name, condition, arm).get(0) for arm in DRAWN}
        if all(courses.values()):
            break
    else:
        return False
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True)
    labels = {"losses": "loss", "norms": "gradient norm", "updates": "step size"}
    for axis, (series, label) in zip(axes, labels.items()):
        for arm, run in courses.items():
            axis.plot(run["steps"], run[series], lw=1, label=arm)
        axis.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=8)
    axes[0].set_title(f"{TASKS[name].title}; {condition.name}, seed 0", fontsize=10)
    axes[2].set_xlabel("step")
    save(figure, path)
    return True


def draw_rates(study: Study, path: Path) -> bool:
    """Scores over the learning rate, for each task and optimizer that has several."""
    panels = [
        (name, family)
        for name, task in TASKS.items()
        for family in dict.fromkeys(c.family for c in task.conditions if not c.base)
        if all(study.shared_seeds(name, c) for c in task.conditions if c.family == family)
    ]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 4), squeeze=False)
    for axis, (name, family) in zip(axes[0], panels):
        conditions = [c for c in TASKS[name].conditions if c.family == family]
        for i, arm in enumerate(ARMS):
            means = [np.mean(list(study.scores(name, c, arm).values())) for c in conditions]
            style = "-" if i < 2 else "--" if "global" in arm else "-."
            axis.plot([c.factor for c in conditions], means, style, marker=".", label=arm,
                      color=plt.cm.tab20(i))  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks([c.factor for c in conditions], [f"×{c.factor}" for c in conditions])
        axis.minorticks_off()
        axis.set_title(f"{name}, {family}", fontsize=10)
        axis.set_ylabel(f"{TASKS[name].metric}, {TASKS[name].unit}")
        axis.set_xlabel("learning rate")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    return True


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def parts(study: Study, figures: Path, link: str) -> dict[str, str]:
    """The texts that the page's markers stand for."""
    tables: dict[str, Callable[[], str]] = {
        "progress": lambda: progress_table(study),
        **{name: lambda name=name: task_table(study, name) for name in TASKS},
        "paper": lambda: paper_table(study),
        "tuning": lambda: tuning_table(study),
        "robustness": lambda: robustness_table(study),
        "divergence": lambda: divergence_table(study),
        "defaults": lambda: defaults_table(study),
        "ranks": lambda: rank_table(study),
        "tests-none": lambda: paired_tests(study, NONE),
        "tests-default": lambda: paired_tests(study, DEFAULT),
    }
    texts = {name: table() for name, table in tables.items()}
    for name, draw, text in (
        ("course", draw_course, "Loss, gradient norm and step size over training"),
        ("rates", draw_rates, "Scores over the learning rate"),
    ):
        drawn = draw(study, figures / f"{name}.png")
        texts[name] = f"![{text}]({link}/{name}.png)" if drawn else "The runs are not there yet."
    return texts


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with what stands between each pair of markers replaced."""
    for name, text in texts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found_begin, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"The page has no pair of markers {begin} … {end}.")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def write(folder: Path = results.FOLDER, page: Path = PAGE, output: Path = PAGE) -> None:
    """Fill in the page's tables and draw its figures beside it."""
    figures = output.parent / "study" / "figures"
    texts = parts(Study(folder), figures, "study/figures")
    confirmation = summary.Confirmation(folder / "confirmation")
    supplement = summary.Confirmation(folder / "supplement", SUPPLEMENT)
    texts |= summary.parts(confirmation, supplement, figures, "study/figures")
    texts |= additions.parts(supplement)
    output.write_text(fill(page.read_text("utf-8"), texts), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of results")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args()
    write(options.results, output=options.output)
    print(f"Page: {options.output}")


if __name__ == "__main__":
    main()
