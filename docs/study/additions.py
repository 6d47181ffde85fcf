"""Tables of the supplement, for `report.py`: exploratory runs on the seeds 20 and higher."""

from __future__ import annotations

import numpy as np
import results
from arms import BOUNDED_LOW, FIRST_STEPS, NONE, TUNED
from confirm import SWEEP
from design import CLUSTERING, FORGETTING, SUPPLEMENT
from measures import markdown
from summary import (
    Confirmation,
    progress_table,
    scores_table,
    versions_text,
)
from supplement import LOW_QUANTILE, PLAN, RIVALS

HARD_SGD = ("SGD, bad inputs", "SGD, cosine", "SGD, lr ×10, cosine", "SGD, bfloat16")
HARD_ADAM = ("Adam, bad inputs", "Adam, bfloat16", "Adam, cosine", "Adam, lr ×10, cosine")


def arms_of(task: str) -> tuple[str, ...]:
    """The arms that the plan runs on a task: RIVALS in their order, then the task's own."""
    planned = dict.fromkeys(arm for name, _, arms in PLAN if name == task for arm in arms)
    return tuple(a for a in RIVALS if a in planned) + tuple(a for a in planned if a not in RIVALS)


def clustering_table(study: Confirmation) -> str:
    """Scores by seed beside those of the first edition, and the mean gain over its runs of none."""
    condition = CLUSTERING.name
    first: dict[str, dict[int, float]] = {}
    for run in results.load("separation").values():
        if run["condition"] == condition and run["seed"] != results.TUNING_SEED:
            first.setdefault(run["arm"], {})[run["seed"]] = run["test"]
    explored = Confirmation(results.FOLDER / "exploration", SUPPLEMENT)

    def later(name: str, arm: str) -> dict[int, float]:
        cell = "separation", name
        return explored.by_seed(cell, arm) | study.by_seed(cell, arm)

    scores = {
        "none": first[NONE],
        "none, Adam's beta2 0.98": later(FORGETTING.name, NONE),
        "quantile 0.1, global": first[LOW_QUANTILE],
        FIRST_STEPS: later(condition, FIRST_STEPS),
        "quantile 0.1, global, max_norm 100": later(condition, BOUNDED_LOW),
        "constant 100": first[TUNED],
    }
    rows = []
    for arm, own in scores.items():
        if own:
            gain = [score - first[NONE][seed] for seed, score in own.items()]
            texts = [f"{own[seed]:.2f}" if seed in own else "·" for seed in sorted(first[NONE])]
            rows.append([arm, *texts, f"{np.mean(gain):+.2f}"])
    head = ["SI-SDR improvement, dB", *(f"seed {seed}" for seed in sorted(first[NONE])), "gain"]
    return markdown(head, rows)


def parts(study: Confirmation) -> dict[str, str]:
    """The supplement's texts, by the names of the page's markers."""

    def scores(task: str, *names: str) -> str:
        return scores_table(study, task, names, arms_of(task), partial=True)

    return {
        "extra-rows-sgd": scores("rows", *HARD_SGD),
        "extra-rows-adam": scores("rows", *HARD_ADAM),
        "extra-bad": scores("convolution", "SGD, bad inputs", "Adam, bad inputs"),
        "extra-zclip": scores("convolution", "SGD", "SGD, lr ×10", "Adam", "Adam, lr ×10"),
        "extra-pixels-sgd": scores("pixels", "SGD", "SGD, lr ×3"),
        "extra-pixels-adam": scores("pixels", "Adam", "Adam, lr ×3"),
        "extra-convolution": scores("convolution", "SGD, lr ×3", "Adam, lr ×3"),
        "extra-sweep": scores("rows", *(name for name in SWEEP if name.startswith("SGD"))),
        "extra-control": scores("control", "Adam", "Adam, lr ×30"),
        "extra-gpt": scores("gpt", "Adam, cosine", "Adam, lr ×10, cosine"),
        "extra-clustering": clustering_table(study),
        "extra-progress": progress_table(study),
        "extra-versions": f"All tasks ran with {versions_text(study)}.",
    }
