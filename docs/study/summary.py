"""Tables and the figure of the second edition, for `report.py`. The plan is `confirmation.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import results
from arms import BOUNDED_ONE, CANDIDATE, CONFIRMED, DEFAULT, NONE, TUNED, ZCLIP, settings_of
from confirm import HARDER, SEEDS, SWEEP
from design import CONFIRMATION, RATES, Task
from measures import (
    half_rate,
    holm,
    interval,
    markdown,
    mcnemar,
    probability,
    share_interval,
    t_interval,
)
from scipy import stats

LOW, ONE = "quantile 0.1, global", "constant 1"
MARGIN = 3.0  # points, of the plan
MISSING = "The runs are not there yet."
Cell = tuple[str, str]  # a task and a condition
PROTECTION: tuple[Cell, ...] = (
    ("convolution", "SGD, lr ×10"),
    ("convolution", "Adam, lr ×10"),
    ("pixels", "SGD, lr ×3"),
)
PRICE: tuple[Cell, ...] = (
    ("pixels", "SGD"),
    ("rows", "SGD"),
    ("convolution", "SGD"),
    ("rows", "Adam"),
    ("convolution", "Adam"),
)


class Confirmation:
    """Scores by task, condition, arm and seed; also those of the supplement, of other tasks."""

    def __init__(self, folder: Path, tasks: dict[str, Task] = CONFIRMATION) -> None:
        self.tasks = tasks
        self.runs = {name: results.load(name, folder) for name in tasks}
        self.environments = results.environments(folder)
        self._scores: dict[tuple[str, str, str], dict[int, float]] = {}
        for name, runs in self.runs.items():
            for run in runs.values():
                score = tasks[name].score(run["finite"], run["test"])
                key = name, run["condition"], run["arm"]
                self._scores.setdefault(key, {})[run["seed"]] = score

    def by_seed(self, cell: Cell, arm: str) -> dict[int, float]:
        """The scores that there are."""
        return self._scores.get((*cell, arm), {})

    def scores(self, cell: Cell, arm: str) -> np.ndarray:
        """By seed; empty unless all of the task's seeds have been run."""
        scores = self.by_seed(cell, arm)
        if len(scores) < self.tasks[cell[0]].seeds:
            return np.empty(0)
        return np.array([scores[seed] for seed in sorted(scores)])

    def diverged(self, cell: Cell, arm: str) -> np.ndarray:
        task = self.tasks[cell[0]]
        return np.array([task.diverged(score) for score in self.scores(cell, arm)], bool)

    def difference(self, cell: Cell, arm: str, reference: str) -> np.ndarray:
        """Better is positive; empty if one of the two is missing."""
        here, there = self.scores(cell, arm), self.scores(cell, reference)
        sign = 1 if self.tasks[cell[0]].higher_is_better else -1
        return sign * (here - there) if len(here) and len(there) else np.empty(0)

    def has(self, cells: tuple[Cell, ...], arm: str) -> bool:
        return all(len(self.scores(cell, arm)) for cell in cells)


def bracketed(mean: float, low: float, high: float, form: str) -> str:
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def mean_difference(study: Confirmation, cells: tuple[Cell, ...], arm: str) -> tuple[float, ...]:
    """Mean over the conditions of the difference to none; bootstrap of seeds in each of them."""
    parts = [study.difference(cell, arm, NONE) for cell in cells]
    random = np.random.default_rng(0)
    draws = np.mean([random.choice(part, (10_000, len(part))).mean(1) for part in parts], 0)
    return float(np.mean([part.mean() for part in parts])), *np.quantile(draws, [0.025, 0.975])


def sweep(optimizer: str) -> tuple[Cell, ...]:
    names = [name for name in SWEEP if name.partition(",")[0] == optimizer]
    return tuple(("rows", name) for name in names)


def half_rates(study: Confirmation, optimizer: str, arm: str) -> np.ndarray:
    """The rate at which half of the runs diverge, then its bootstrap over the seeds."""
    table = np.array([study.diverged(cell, arm) for cell in sweep(optimizer)], float)
    random = np.random.default_rng(0)
    draws = [table[:, random.integers(SEEDS, size=SEEDS)].mean(1) for _ in range(1000)]
    return np.array([half_rate(RATES, shares) for shares in (table.mean(1), *draws)])


def rate_text(rates: np.ndarray) -> str:
    # Order statistics: interpolating with infinity gives NaN.
    low, high = np.quantile(rates[1:], [0.025, 0.975], method="nearest")
    texts = [f"×{r:.0f}" if np.isfinite(r) else f"> ×{RATES[-1]}" for r in (rates[0], low, high)]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def settings_text(arm: str) -> str:
    """The text for an arm; the class only if it is not QuantileClip."""
    if arm == NONE:
        return "no clipping"
    if arm == TUNED:
        return "the best of five `max_norm`"
    if arm in (ONE, ZCLIP):
        return (
            "`max_norm=1.0`, a constant" if arm == ONE else "`zclip.ZClip()`, with a constant of 1"
        )
    name, settings = settings_of(arm)
    line = ", ".join(
        f"{key}=5/99" if value == 5 / 99 else f'{key}="{value}"' if value == "clipped"
        else f"{key}={value!r}" for key, value in settings.items() if key != "global_clipping"
    )  # fmt: skip
    line = line or "quantile=0.9"
    scope = ", global" if settings.get("global_clipping") else ""
    return (f"`{line}`" if name == "QuantileClip" else f"`{name}({line})`") + scope


def mark_best(rows: list[list[str]], columns: list[list[float]]) -> None:
    """Set each column's largest value in bold; columns begin behind the arm's name."""
    for i, values in enumerate(columns, start=1):
        best = np.nanmax(values) if not np.isnan(values).all() else np.nan
        for row, value in zip(rows, values):
            if value == best:
                row[i] = f"**{row[i]}**"


def summary_table(study: Confirmation, supplement: Confirmation) -> str:
    """One line an arm: price, protection, settings. Arms of the supplement have a double dagger."""
    if not study.has(PRICE + PROTECTION, CANDIDATE):
        return MISSING
    prices = [tuple(cell for cell in PRICE if cell[1] == name) for name in ("SGD", "Adam")]
    lines = [(study, arm, arm) for arm in CONFIRMED]
    lines += [
        (supplement, arm, f"{arm} ‡")
        for arm in (ONE, BOUNDED_ONE, ZCLIP)
        if supplement.has(PRICE + PROTECTION + sweep("SGD"), arm)
    ]
    rows: list[list[str]] = []
    columns: list[list[float]] = [[] for _ in range(4)]
    for source, arm, name in lines:
        row = [name]
        for column, cells in zip(columns, prices):
            known = source.has(cells, arm) and arm != NONE
            price = mean_difference(source, cells, arm) if known else (np.nan,) * 3
            row.append(bracketed(*price, "+.1f") if known else "0" if arm == NONE else "·")
            column.append(0.0 if arm == NONE else price[0])
        if source.has(PROTECTION, arm):
            failures = np.concatenate([source.diverged(cell, arm) for cell in PROTECTION])
            share = share_interval(int(failures.sum()), len(failures))
            row.append(bracketed(*(100 * part for part in (failures.mean(), *share)), ".0f"))
            columns[2].append(-failures.mean())
        else:
            row.append("·")
            columns[2].append(np.nan)
        # Under Adam no arm reaches a half within these rates.
        known = source.has(sweep("SGD"), arm)
        rates = half_rates(source, "SGD", arm) if known else np.array([np.nan])
        row.append(rate_text(rates) if known else "·")
        columns[3].append(float(rates[0]))
        rows.append([*row, settings_text(arm)])
    mark_best(rows, columns)
    head = [
        "arm", "good rate, SGD", "good rate, Adam", "diverged, %", "half diverge at", "settings",
    ]  # fmt: skip
    return markdown(head, rows)


def tests_table(study: Confirmation) -> str:
    """The plan's three tests, corrected together."""
    if not all(study.has(PROTECTION + PRICE, arm) for arm in (NONE, DEFAULT, LOW, CANDIDATE)):
        return MISSING
    rows, p_values = [], []
    ours = np.concatenate([study.diverged(cell, CANDIDATE) for cell in PROTECTION])
    for reference in (NONE, DEFAULT):
        theirs = np.concatenate([study.diverged(cell, reference) for cell in PROTECTION])
        p_values.append(mcnemar(theirs, ours))
        counts = f"{ours.sum()} of {len(ours)} against {theirs.sum()}"
        rows.append([f"diverged: the candidate against {reference}", counts])
    cheaper = study.difference(PRICE[0], CANDIDATE, LOW)
    p_values.append(float(stats.ttest_1samp(cheaper, 0).pvalue))
    size = bracketed(cheaper.mean(), *t_interval(cheaper), "+.1f")
    rows.append([f"pixels, SGD: the candidate less {LOW}, points", size])
    rows = [[*row, probability(p)] for row, p in zip(rows, holm(p_values))]
    if study.has(sweep("SGD"), CANDIDATE) and study.has(sweep("SGD"), NONE):
        here, there = (half_rates(study, "SGD", arm) for arm in (CANDIDATE, NONE))
        if np.isfinite(here).all() and np.isfinite(there).all():
            # The same seeds are drawn for both.
            ratios = here / there
            size = bracketed(ratios[0], *np.quantile(ratios[1:], [0.025, 0.975]), ".2f")
            rows.append(["half diverge at, rows, SGD: the candidate over none", size, "not tested"])
    return markdown(["comparison", "result", "p (Holm)"], rows)


def price_table(study: Confirmation) -> str:
    """Each arm less none at ×1, with the plan's t intervals."""
    if not study.has(PRICE, CANDIDATE):
        return MISSING
    rows = []
    columns: list[list[float]] = [[] for _ in PRICE]
    for arm in CONFIRMED:
        if arm == NONE:
            continue
        row = [arm]
        for column, cell in zip(columns, PRICE):
            values = study.difference(cell, arm, NONE)
            known = len(values) > 0
            row.append(bracketed(values.mean(), *t_interval(values), "+.1f") if known else "·")
            column.append(float(values.mean()) if known else np.nan)
        rows.append(row)
    mark_best(rows, columns)
    return markdown(["points against none"] + [f"{t}, {c}" for t, c in PRICE], rows)


def cell_text(task: Task, values: np.ndarray) -> str:
    """Mean and interval or up to two scores; behind a dagger the number of diverged runs."""
    if not len(values):
        return "·"
    form = ".2f" if task.unit.startswith(("bits", "dB")) else ".1f"
    if len(values) > 2:
        text = bracketed(values.mean(), *interval(values), form)
    else:  # too few for an interval
        text = ", ".join(f"{value:{form}}" for value in values)
    if failed := sum(task.diverged(value) for value in values):
        text += f" †{failed}"
    return text if len(values) == task.seeds else f"{text} (n = {len(values)})"


def scores_table(
    study: Confirmation,
    name: str,
    names: Sequence[str],
    arms: Sequence[str] = CONFIRMED,
    *,
    partial: bool = False,
) -> str:
    """Scores of the arms under some of a task's conditions.

    With `partial`, cells of fewer seeds than planned count, too.
    """
    task = study.tasks[name]

    def scores(condition: str, arm: str) -> np.ndarray:
        cell = name, condition
        return (
            np.array([*study.by_seed(cell, arm).values()]) if partial else study.scores(cell, arm)
        )

    arms = [arm for arm in arms if any(len(scores(c, arm)) for c in names)]
    names = [c for c in names if any(len(scores(c, arm)) for arm in arms)]
    if not names:
        return MISSING
    rows = []
    columns: list[list[float]] = [[] for _ in names]
    sign = 1 if task.higher_is_better else -1
    for arm in arms:
        row = [arm]
        for column, condition in zip(columns, names):
            values = scores(condition, arm)
            row.append(cell_text(task, values))
            column.append(sign * float(values.mean()) if len(values) else np.nan)
        rows.append(row)
    mark_best(rows, columns)
    return markdown([f"{task.metric}, {task.unit}", *names], rows)


def conditions_of(name: str, *, harder: bool = False) -> tuple[str, ...]:
    """Names of a task's conditions, with constant learning rates and good data or without."""
    conditions = CONFIRMATION[name].conditions
    return tuple(condition.name for condition in conditions if bool(condition.variant) == harder)


def progress_table(study: Confirmation) -> str:
    rows = []
    for name, task in study.tasks.items():
        runs = study.runs[name].values()
        hours = sum(run["seconds"] for run in runs) / 3600
        if runs:
            rows.append([f"{name}: {task.title}", str(len(runs)), f"{hours:.2f}"])
    return markdown(["task", "runs", "CPU hours"], rows)


def versions_text(study: Any) -> str:
    """The versions that an edition's tasks ran with."""
    texts = {
        ", ".join(f"{package} {version}" for package, version in packages.items())
        for packages in study.environments.values()
    }
    return "; or ".join(sorted(texts)) or MISSING


def draw_curve(study: Confirmation, path: Path) -> bool:
    """The share of diverged runs and the mean score over SGD's learning rate."""
    cells = sweep("SGD")
    if not study.has(cells, CANDIDATE):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for i, arm in enumerate(CONFIRMED):
        if study.has(cells, arm):
            style = {"lw": 2.5 if arm == CANDIDATE else 1.2, "marker": ".", "label": arm}
            style["linestyle"] = "-" if i < 5 else "--"
            axes[0].plot(RATES, [100 * study.diverged(c, arm).mean() for c in cells], **style)
            axes[1].plot(RATES, [study.scores(c, arm).mean() for c in cells], **style)
    for axis, label in zip(axes, ("diverged runs, %", "mean test accuracy, %")):
        axis.set_xscale("log")
        axis.set_xticks(RATES, [f"×{rate}" for rate in RATES])
        axis.minorticks_off()
        axis.set_xlabel("learning rate of SGD")
        axis.set_ylabel(label)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def parts(
    study: Confirmation, supplement: Confirmation, figures: Path, link: str
) -> dict[str, str]:
    """The second edition's texts, by the names of the page's markers."""
    drawn = draw_curve(study, figures / "divergence.png")
    label = "Share of diverged runs and test accuracy over the learning rate of SGD"
    picture = f"![{label}]({link}/divergence.png)"
    return {
        "summary": summary_table(study, supplement),
        "plan": tests_table(study),
        "price": price_table(study),
        "second-pixels": scores_table(study, "pixels", conditions_of("pixels")),
        "second-convolution": scores_table(study, "convolution", conditions_of("convolution")),
        "bad": scores_table(study, "convolution", conditions_of("convolution", harder=True)),
        "second-sgd": scores_table(study, "rows", tuple(c for _, c in sweep("SGD"))),
        "second-adam": scores_table(study, "rows", tuple(c for _, c in sweep("Adam"))),
        "curve": picture if drawn else MISSING,
        "harder-sgd": scores_table(study, "rows", tuple(c for c in HARDER if c[0] == "S")),
        "harder-adam": scores_table(study, "rows", tuple(c for c in HARDER if c[0] == "A")),
        "second-characters": scores_table(
            study, "characters", conditions_of("characters", harder=True)
        ),
        "second-progress": progress_table(study),
        "second-versions": f"All tasks ran with {versions_text(study)}.",
    }
