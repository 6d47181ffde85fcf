"""Parts of all benchmarks: full histories, paired timings, tables, JSON and charts."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from shapes import resnet50

__all__ = [
    "Timing",
    "add_output_options",
    "compare",
    "factors",
    "full_history",
    "resnet50",
    "show",
    "time_in_turn",
    "write_output",
]

REPETITIONS = 60
WARM_UP = 5


@dataclass(frozen=True)
class Timing:
    """One candidate's times beside its rival's.

    Attributes:
        case: what was measured: a model, a regime.
        candidate: who was measured.
        milliseconds: the median time.
        ratio: the median of the ratios to the rival in the same round.
        lower: the lower quartile of these ratios.
        upper: their upper quartile.
    """

    case: str
    candidate: str
    milliseconds: float
    ratio: float
    lower: float
    upper: float


def full_history(
    shapes: Sequence[tuple[int, ...]],
    framework: str,
    history_length: int,
    global_clipping: bool,
    sizes: Sequence[float],
    rule: Any = None,
    **settings: Any,
) -> dict[str, object]:
    """The state_dict of a clipper whose windows are full of norms around `sizes`.

    Args:
        shapes: of the parameters, which are in one group.
        framework: the clipper's.
        history_length: of the clipper.
        global_clipping: of the clipper.
        sizes: of each parameter's gradient.
        rule: of the clipper; `Quantile(0.9)` by default.
        settings: the clipper's others.
    """
    # Imported here: the process that measures autoclip 0.2.1 has no autoclip.core.
    from autoclip.core import GroupState, ParameterInfo, Quantile, State
    from autoclip.core.adapter import ClipperSettings

    generator = np.random.default_rng(0)
    rule = Quantile(0.9) if rule is None else rule
    if global_clipping or settings.get("group_clipping"):
        sizes = [float(np.sqrt(np.square(sizes).sum()))]
    windows = [size * factors(generator, history_length) for size in sizes]
    made = ClipperSettings.make(
        "Clipper",
        rule,
        history_length=history_length,
        global_clipping=global_clipping,
        **settings,
    )
    group = GroupState.from_windows(
        made.default.settings,
        [ParameterInfo(None, shape) for shape in shapes],
        windows,
        [history_length] * len(windows),
    )
    return State(rule.name, made.mode, framework, (group,)).to_dict()


def factors(generator: np.random.Generator, count: int) -> np.ndarray:
    """By how much norms vary from step to step: log-normal, as much as a factor of 1.5."""
    return generator.lognormal(sigma=0.4, size=count).astype(np.float32)


def time_in_turn(
    case: str,
    rival: str,
    candidates: Mapping[str, Callable[[], object]],
    before: Callable[[], object],
    repetitions: int = REPETITIONS,
) -> list[Timing]:
    """Time candidates in turn, each round in a random order, and compare them within a round.

    What slows the machine down for a while slows a whole round, and cancels in its ratios. In a
    fixed or rotated order each candidate would always run after the same one, whose threads may
    still be waiting for work: that changes the ratios of small models by a quarter.

    Args:
        case: what is measured, for the result.
        rival: one of `candidates`; the ratios are to its time.
        candidates: what is timed, by name.
        before: called before each and not timed: restores what a candidate changed.
        repetitions: how many rounds count; `WARM_UP` more come before them.
    """
    names, order = list(candidates), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions + WARM_UP):
        order.shuffle(names)
        for name in names:
            before()
            start = time.perf_counter()
            candidates[name]()
            elapsed = time.perf_counter() - start
            if repetition >= WARM_UP:
                times[name].append(elapsed)
    timings = []
    for name, found in times.items():
        ratios = [ours / theirs for ours, theirs in zip(found, times[rival])]
        lower, ratio, upper = statistics.quantiles(ratios, n=4)
        milliseconds = statistics.median(found) * 1e3
        timings.append(Timing(case, name, milliseconds, ratio, lower, upper))
    return timings


def show(timings: Sequence[Timing]) -> None:
    """Print timings as a table: the median time, the ratio and its quartiles."""
    for timing in timings:
        print(
            f"  {timing.candidate:<44}{timing.milliseconds:10.3f} ms"
            f"{timing.ratio:8.2f}  ({timing.lower:.2f}-{timing.upper:.2f})",
            flush=True,
        )


def compare(
    rival: str,
    candidates: Mapping[str, Callable[[], object]],
    before: Callable[[], object],
    case: str = "",
    repetitions: int = REPETITIONS,
) -> list[Timing]:
    """`time_in_turn`, then `show`."""
    if case:
        print(case)
    timings = time_in_turn(case, rival, candidates, before, repetitions)
    show(timings)
    return timings


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE` and `--chart FILE`, which `write_output` reads."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timings to FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the ratios into FILE")


def write_output(
    options: argparse.Namespace, timings: Sequence[Timing], about: Mapping[str, Any]
) -> None:
    """Write the files that the options ask for.

    Args:
        options: with `json` and `chart`, as `add_output_options` adds them.
        timings: all that was measured.
        about: versions, device and settings, for the JSON file and the chart's title.
    """
    if options.json is not None:
        document = {**about, "timings": [asdict(timing) for timing in timings]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if options.chart is not None:
        _draw(options.chart, timings, ", ".join(f"{key} {value}" for key, value in about.items()))


def _draw(path: Path, timings: Sequence[Timing], title: str) -> None:
    """A point for each candidate, a line of them for each case; the whiskers are the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(timing.case for timing in timings))
    candidates = list(dict.fromkeys(timing.candidate for timing in timings))
    figure, axes = pyplot.subplots(figsize=(9, 2 + 0.45 * len(cases)), layout="constrained")
    colors = pyplot.get_cmap("tab10").colors
    for i, candidate in enumerate(candidates):
        here = [t for t in timings if t.candidate == candidate and t.ratio != 1.0]
        if not here:  # the rival itself
            continue
        axes.errorbar(
            [t.ratio for t in here],
            # Apart from one another, so that whiskers do not hide points.
            [cases.index(t.case) + 0.6 * (i / len(candidates) - 0.5) for t in here],
            xerr=[[t.ratio - t.lower for t in here], [t.upper - t.ratio for t in here]],
            fmt="os^Dv<>PX"[i % 9],
            color=colors[i % len(colors)],
            label=candidate,
            markersize=5,
            linewidth=1,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 5, 10, 50]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time, relative to the rival in the same round")
    axes.set_title(title, fontsize="small")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
