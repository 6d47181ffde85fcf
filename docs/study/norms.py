"""Print the median gradient norm of PyTorch's tasks: `hatch run study:norms`.

Each task is trained once at its good learning rate without clipping. A constant protects only if
it is near these norms.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from statistics import median
from typing import Any

import torch
from arms import NONE
from confirm import TOGETHER, use_one_thread
from design import FIRST_EXTRA_SEED, SUPPLEMENT, TASKS, Condition
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import register_optimizer_step_pre_hook

EXTRA = ("rows", "pixels", "convolution")
FIRST = ("digits", "characters", "separation")  # the images are trained by Keras


def norms_of(task: str, condition: Condition, seed: int) -> list[float]:
    """The norms of all gradients together, step by step."""
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(get_total_norm([p.grad for p in parameters if p.grad is not None])))

    run = import_module(f"tasks.{task}").run
    with register_optimizer_step_pre_hook(measure):
        run(condition, NONE, None, [seed] if task in TOGETHER else seed)
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=EXTRA + FIRST, default=EXTRA + FIRST)
    options = parser.parse_args()
    use_one_thread()
    for name in options.tasks:
        task, seed = (SUPPLEMENT[name], FIRST_EXTRA_SEED) if name in EXTRA else (TASKS[name], 0)
        for condition in task.conditions:
            if condition.base and not condition.variant:
                norm = median(norms_of(name, condition, seed))
                print(f"{name:<12} {condition.name:<16} {norm:8.3g}", flush=True)


if __name__ == "__main__":
    main()
