"""What the benchmarks share: the gradients of a ResNet-50, full histories, and ratios of times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autoclip.core import GroupState, ParameterInfo, State

REPETITIONS = 60


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of torchvision's ResNet-50: 161 parameters, 25.6 million elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers = [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
            if block == 0:
                layers.append((4 * width, channels, 1))
            for out, into, kernel in layers:
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def full_history(
    shapes: Sequence[tuple[int, ...]],
    framework: str,
    history_length: int,
    global_clipping: bool,
    sizes: Sequence[float],
) -> dict[str, object]:
    """The state_dict of a `QuantileClip(0.9)` whose windows are full of norms around `sizes`."""
    generator = np.random.default_rng(0)
    if global_clipping:
        sizes = [float(np.sqrt(np.square(sizes).sum()))]
    windows = [size * factors(generator, history_length) for size in sizes]
    group = GroupState.from_windows(
        {"quantile": 0.9, "history_length": history_length},
        [ParameterInfo(None, shape) for shape in shapes],
        windows,
        [history_length] * len(windows),
    )
    return State("quantile", global_clipping, framework, (group,)).to_dict()


def factors(generator: np.random.Generator, count: int) -> np.ndarray:
    """By how much gradients differ from one step to the next: as much as a factor of 1.5."""
    return generator.lognormal(sigma=0.4, size=count).astype(np.float32)


def compare(
    rival: str, candidates: Mapping[str, Callable[[], object]], before: Callable[[], object]
) -> None:
    """Print each candidate's time and its ratio to the rival's, all measured in turn.

    Args:
        rival: one of `candidates`.
        candidates: what is timed, by name.
        before: what is called, and not timed, before each.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(REPETITIONS + 5):
        for name, candidate in candidates.items():
            before()
            start = time.perf_counter()
            candidate()
            if repetition >= 5:
                times[name].append(time.perf_counter() - start)
    for name, found in times.items():
        # Of each pair: what slows the machine down for a while slows both.
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found, times[rival]))
        print(f"  {name:<52}{statistics.median(found) * 1e3:9.3f} ms{ratio:8.2f}")
