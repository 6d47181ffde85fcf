"""A million steps through the core, 100,000 through torch: `python tests/conformance/long_runs.py`.

At ten checkpoints of each run the thresholds must be NumPy's of the last norms, and the second half
of a run may not take more memory than the first. Give the names of runs to choose some.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core import History, Quantile, Rule, Standard

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
from rules import MANY_ROWS

LENGTH = 1000
CHECKPOINTS = 10
MOST_GROWTH = 2 * 2**20  # bytes; the allocator keeps a little more now and then

Array = npt.NDArray[np.float64]


def stream(random: np.random.Generator, steps: int, rows: int) -> Array:
    """Norms that drift over orders of magnitude, with spikes and steps that say nothing."""
    drift = np.exp(np.cumsum(random.normal(0, 1e-2, (steps, 1)), axis=0))
    norms = drift * random.lognormal(size=(steps, rows))
    norms[random.random(norms.shape) < 1e-3] *= 1e9
    norms[random.random(norms.shape) < 1e-2] = np.nan
    return np.float64(np.float32(norms))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def run(name: str, rule: Rule, steps: int, rows: int, record: Callable[[Array], Any]) -> None:
    """`record` takes the norms of a step; at checkpoints its result is used, [rows]."""
    random = np.random.default_rng(0)
    windows: list[Array] = [np.empty(0)] * rows
    largest, memory = 0.0, []
    start = time.perf_counter()
    for _ in range(CHECKPOINTS):
        block = stream(random, steps // CHECKPOINTS, rows)
        for norms in block:
            found = record(norms)
        for row in range(rows):
            usable = block[:, row][np.isfinite(block[:, row])]
            windows[row] = np.concatenate([windows[row], usable])[-LENGTH:]
        if isinstance(rule, Quantile):
            expected = [np.quantile(window, rule.quantile) for window in windows]
        else:
            expected = [window.mean() + rule.deviations * window.std() for window in windows]
        largest = max(largest, float(np.abs(np.asarray(found()) / expected - 1).max()))
        memory.append(resident_bytes())
    # The allocator returns memory to the system now and then: the least of several checkpoints.
    half = CHECKPOINTS // 2
    growth = min(memory[half:]) - min(memory[1:half])
    print(
        f"{name}: {steps} steps, {rows} rows, {time.perf_counter() - start:.0f} s; thresholds "
        f"differ by {largest:.1e}; resident memory {memory[-1] / 2**20:.1f} MiB, "
        f"{growth / 2**20:+.2f} MiB from the first half to the second",
        flush=True,
    )
    assert largest <= (0.0 if "core quantile" in name else 1e-6 if "torch" in name else 1e-12)
    assert growth <= MOST_GROWTH, memory


def through_core(name: str, rule: Rule, rows: int, steps: int = 10**6) -> None:
    history = History(rows, rule, LENGTH, include_current=True, warmup_steps=0)

    def record(norms: Array) -> Any:
        history.record(norms)
        return lambda: history.thresholds

    run(name, rule, steps, rows, record)


def through_torch(name: str, rule: Rule, on_device: bool) -> None:
    import torch
    from paths import numpy_path

    from autoclip.torch import Clipper

    torch.set_num_threads(1)
    parameters = [torch.zeros(16, requires_grad=True) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.zeros(16)
    clipper = Clipper(parameters, rule, LENGTH, include_current=True, warmup_steps=0)

    def record(norms: Array) -> Any:
        for parameter, norm in zip(parameters, norms.tolist()):
            parameter.grad.fill_(norm / 4)
        clipper.step()
        return lambda: clipper.thresholds.numpy()

    with numpy_path(not on_device):
        run(name, rule, 100_000, len(parameters), record)


RULES: dict[str, Rule] = {"quantile": Quantile(0.9), "standard": Standard(2.0)}
RUNS: dict[str, Callable[[str], None]] = {}
for kind, chosen in RULES.items():
    RUNS[f"core {kind}, few rows"] = lambda name, rule=chosen: through_core(name, rule, 2)
    RUNS[f"core {kind}, many rows"] = lambda name, rule=chosen: through_core(
        name, rule, MANY_ROWS, 200_000
    )
    RUNS[f"torch {kind}, host"] = lambda name, rule=chosen: through_torch(name, rule, False)
    RUNS[f"torch {kind}, device path"] = lambda name, rule=chosen: through_torch(name, rule, True)


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        RUNS[name](name)
