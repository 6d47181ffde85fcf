"""Everything in this repository that computes thresholds, as functions of a vector file.

Each returns what it computed in the form of the file: the thresholds, coefficients, clipped
gradients, window and number of recorded norms of each row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from rules import MANY_ROWS

from autoclip.core import SMALLEST_NORM, History, Quantile, Standard, State
from autoclip.core._numpy import tracker
from autoclip.core.adapter import GroupSettings, rows_by_storage

VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.json"))
RULES: dict[str, Any] = {"quantile": Quantile, "standard": Standard}

File = dict[str, Any]
Rows = list[dict[str, Any]]
Array = npt.NDArray[np.float64]


def read(name: str) -> File:
    """A vector file, with floats for the strings "NaN", "Infinity" and "-Infinity"."""
    file: File = json.loads((VECTORS / f"{name}.json").read_text("ascii"))
    for row in file["rows"]:
        for key in ("gradients", "norms", "thresholds", "coefficients", "window"):
            row[key] = _numbers(row[key])
    return file


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if isinstance(value, str) else value


def steps_of(file: File) -> list[list[float | None]]:
    """The gradients of all parameters, row by row, at each step."""
    return [
        list(step) for step in zip(*(each for row in file["rows"] for each in row["gradients"]))
    ]


def expected_gradients(row: dict[str, Any]) -> list[list[float | None]]:
    """The gradients of a row's parameters after clipping, by parameter and step."""
    on_spike, on_nonfinite = (row["settings"][name] for name in ("on_spike", "on_nonfinite"))

    def scaled(gradient: float | None, coefficient: float) -> float | None:
        if gradient is None or (coefficient == 0.0 and on_spike == "skip"):
            return None
        if not np.isfinite(gradient):
            return 0.0 if on_nonfinite == "zero" else gradient
        return gradient * coefficient

    return [
        [scaled(each, factor) for each, factor in zip(gradients, row["coefficients"])]
        for gradients in row["gradients"]
    ]


def _result(
    file: File,
    reports: Sequence[tuple[Array, Array]],
    windows: Sequence[npt.NDArray[np.float32]],
    recorded: Sequence[int],
    gradients: Sequence[Sequence[float | None]] | None,
) -> Rows:
    """Put together what was computed step by step, row by row."""
    thresholds, coefficients = (np.array(each).T.tolist() for each in zip(*reports))
    by_parameter = None if gradients is None else iter(zip(*gradients))
    return [
        {
            "thresholds": thresholds[i],
            "coefficients": coefficients[i],
            "window": windows[i].tolist(),
            "recorded": recorded[i],
            "clipped": by_parameter and [list(next(by_parameter)) for _ in row["gradients"]],
        }
        for i, row in enumerate(file["rows"])
    ]


# -- the core ----------------------------------------------------------------------------------


def _core(file: File, copies: int, whole: bool = False) -> Rows:
    """Rows that can be recorded together, so many copies of each, in one history."""
    settings = []
    for row in file["rows"]:
        rest = dict(row["settings"])
        rule = RULES[file["rule"]]
        made = rule(**{name: rest.pop(name) for name in rule.setting_names() if name in rest})
        settings.append(GroupSettings(made, **rest))
    found: Rows = [{}] * len(settings)
    runs = rows_by_storage(settings) if whole else [[i] for i in range(len(settings))]
    for rows in runs:
        history = History.of([settings[row] for row in rows] * copies)
        norms = np.array([file["rows"][row]["norms"] for row in rows] * copies).T
        reports = [history.record(step) for step in norms]
        last = range(history.rows - len(rows), history.rows)
        windows, recorded = history.read(last)
        parts = [(r.thresholds[last], r.coefficients[last]) for r in reports]
        part = {**file, "rows": [file["rows"][row] for row in rows]}
        for row, result in zip(rows, _result(part, parts, windows, recorded.tolist(), None)):
            found[row] = result
    return found


def core_few_rows(file: File) -> Rows:
    return _core(file, copies=1)


def core_many_rows(file: File) -> Rows:
    return _core(file, copies=MANY_ROWS, whole=True)


def core_without_trackers(file: File) -> Rows:
    with mock.patch.dict(tracker._TRACKERS, clear=True):
        return _core(file, copies=1, whole=True)


# -- torch -------------------------------------------------------------------------------------


def torch_host(file: File) -> Rows:
    """Histories in NumPy, as for parameters on the CPU."""
    import torch
    from paths import exact_reports, exact_thresholds

    import autoclip.torch

    parameters = [torch.zeros(1, requires_grad=True) for _ in steps_of(file)[0]]
    rule = RULES[file["rule"]]()
    rows = file["rows"]
    if file["mode"] == "global":
        own = dict(rows[0]["settings"])
        rule = type(rule)(**{name: own.pop(name) for name in rule.setting_names() if name in own})
        clipper = autoclip.torch.Clipper(parameters, rule, global_clipping=True, **own)
    else:
        left = iter(parameters)
        groups = [
            {"params": [next(left) for _ in row["gradients"]], **row["settings"]} for row in rows
        ]
        clipper = autoclip.torch.Clipper(groups, rule, group_clipping=file["mode"] == "group")

    reports, clipped = [], []
    for step in steps_of(file):
        for parameter, value in zip(parameters, step):
            parameter.grad = None if value is None else torch.tensor([value])
        clipper.step()
        thresholds, coefficients = np.empty(len(rows)), np.ones(len(rows))
        for places, values in exact_thresholds(clipper):
            thresholds[places] = values
        for places, report in exact_reports(clipper):
            thresholds[places] = report.thresholds
            coefficients[places] = report.coefficients
        reports.append((thresholds, coefficients))
        clipped.append([None if p.grad is None else p.grad.item() for p in parameters])
    return _result(file, reports, *_contents(clipper), clipped)


def torch_device(file: File) -> Rows:
    """Histories as tensors, as for parameters on an accelerator; here on the CPU."""
    from paths import numpy_path

    with numpy_path(False):
        return torch_host(file)


def _contents(clipper: Any) -> tuple[list[npt.NDArray[np.float32]], list[int]]:
    groups = State.from_dict(clipper.state_dict()).groups
    return (
        [window for group in groups for window in group.windows()],
        [count for group in groups for count in group.recorded.tolist()],
    )


# -- TensorFlow --------------------------------------------------------------------------------


def _tensorflow(file: File, compiled: bool | None) -> Rows:
    """`compiled` is None for eager execution, or `jit_compile` of a graph.

    A graph cannot do without a gradient at some steps only: it gets a zero.
    """
    import tensorflow as tf
    from in_tensorflow import exact_report

    import autoclip.tf

    rows = file["rows"]
    steps = steps_of(file)
    if compiled is not None:
        steps = [[0.0 if value is None else value for value in step] for step in steps]
    # "skip" is for PyTorch; thresholds, coefficients and histories are those of "zero".
    settings = [
        {**row["settings"], "on_spike": row["settings"]["on_spike"].replace("skip", "zero")}
        for row in rows
    ]
    rule = RULES[file["rule"]]()
    names = [f"row{i}_{j}" for i, row in enumerate(rows) for j in range(len(row["gradients"]))]
    variables = [tf.Variable([0.0], name=name) for name in names]
    if file["mode"] == "global":
        own = dict(settings[0])
        rule = type(rule)(**{name: own.pop(name) for name in rule.setting_names() if name in own})
        clipper = autoclip.tf.Clipper(rule, global_clipping=True, **own)
    else:
        clipper = autoclip.tf.Clipper(
            rule,
            group_clipping=file["mode"] == "group",
            group_settings=[{"match": f"^row{i}_", **settings[i]} for i in range(len(rows))],
        )
    clipper.build(variables)

    def step(gradients: Any) -> Any:
        pairs = clipper(zip(gradients, variables))
        return [gradient for gradient, _ in pairs], exact_report(clipper)

    if compiled is not None:
        step = tf.function(step, jit_compile=compiled)
    reports, clipped = [], []
    for values in steps:
        given = [None if value is None else tf.constant([value]) for value in values]
        gradients, report = step(given)
        _, thresholds, coefficients = report.numpy().T
        if not report.numpy().any():  # a step without gradients
            thresholds, coefficients = clipper.thresholds.numpy(), np.ones(len(rows))
        # Infinities would stop a step under `tf.debugging.enable_check_numerics`.
        reports.append((np.where(thresholds < 1e250, thresholds, np.inf), coefficients))
        clipped.append([None if each is None else float(each[0]) for each in gradients])
    return _result(file, reports, *_contents(clipper), clipped)


def tensorflow_eager(file: File) -> Rows:
    return _tensorflow(file, compiled=None)


def tensorflow_graph(file: File) -> Rows:
    return _tensorflow(file, compiled=False)


def tensorflow_xla(file: File) -> Rows:
    return _tensorflow(file, compiled=True)


IMPLEMENTATIONS: dict[str, Callable[[File], Rows]] = {
    function.__name__.replace("_", " "): function
    for function in (
        core_few_rows,
        core_many_rows,
        core_without_trackers,
        torch_host,
        torch_device,
        tensorflow_eager,
        tensorflow_graph,
        tensorflow_xla,
    )
}


# -- how far from the vectors ------------------------------------------------------------------


def deviations(file: File, found: Rows) -> Iterator[tuple[str, float]]:
    """Relative differences by name; infinite where one is finite and the other is not.

    Gradients are float32: what is below its smallest normal number may be flushed to zero, and so
    may a coefficient.
    """
    for ours, row in zip(found, file["rows"], strict=True):
        for name in ("thresholds", "coefficients"):
            yield name, _largest(ours[name], row[name])
        windows = [(ours["recorded"], *ours["window"]), (row["recorded"], *row["window"])]
        same_length = len(windows[0]) == len(windows[1])
        yield "histories", _largest(*windows) if same_length else np.inf
        for mine, expected in zip(ours["clipped"] or [], expected_gradients(row)):
            # Where one has no gradient, the other has none, or a zero in its place.
            pairs = [
                (a or 0.0, b or 0.0)
                for a, b, factor in zip(mine, expected, row["coefficients"], strict=True)
                if not 0.0 < factor < SMALLEST_NORM
            ]
            yield "gradients", _largest(*zip(*pairs), least=SMALLEST_NORM)


def _largest(found: Sequence[float], expected: Sequence[float], least: float = 0.0) -> float:
    ours, theirs = np.array(found), np.array(expected)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        relative = np.maximum(abs(ours - theirs) - least, 0.0) / abs(theirs)
    relative[~np.isfinite(relative)] = np.inf
    return float(np.where(same, 0.0, relative).max(initial=0.0))
