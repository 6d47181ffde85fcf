"""One run: the loop that trains the PyTorch tasks, and what a run of any task reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from arms import clipped_torch_optimizer
from design import MOMENTUM, Condition
from torch import Tensor, nn

# The gradient's norm and the update's are measured at every so many steps.
EVERY = 5


@dataclass
class Outcome:
    """The result of a run.

    `test` and `validation` are the task's metric after the last step. `step_ms` is the median CPU
    time of a step in milliseconds. The series hold the steps that were measured.
    """

    test: float = math.nan
    validation: float = math.nan
    finite: bool = True
    step_ms: float = math.nan
    seconds: float = math.nan
    clipped: float | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)


def make_optimizer(model: nn.Module, condition: Condition) -> torch.optim.Optimizer:
    if condition.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), condition.learning_rate, momentum=MOMENTUM)
    beta2 = 0.98 if condition.variant == "beta2 0.98" else 0.999
    return torch.optim.Adam(model.parameters(), condition.learning_rate, betas=(0.9, beta2))


def share_of_rate(step: int, total: int) -> float:
    """The learning rate's share of its largest: a linear warm-up over a tenth, then a cosine."""
    warmup = max(1, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def train(
    model: nn.Module,
    condition: Condition,
    arm: str,
    constant: float | None,
    batches: Iterator[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    evaluate: Callable[[nn.Module, str], float] | None,
    total_steps: int | None = None,
) -> Outcome:
    """Train the model on all batches, or until its loss is not finite, and evaluate it.

    The number of steps is needed by the schedule of the variant `cosine` alone.
    """
    begin = time.process_time()
    outcome = Outcome()
    optimizer = clipped_torch_optimizer(make_optimizer(model, condition), arm, constant)
    schedule = None
    if condition.variant == "cosine":
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(share_of_rate, total=total_steps)
        )
    parameters = list(model.parameters())
    times, clipped = [], []
    for step, batch in enumerate(batches):
        start = time.process_time()
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        times.append(time.process_time() - start)
        measured = step % EVERY == 0
        if measured:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            before = [p.detach().clone() for p in parameters]
        start = time.process_time()
        optimizer.step()
        times[-1] += time.process_time() - start
        if schedule is not None:
            schedule.step()
        outcome.finite = bool(torch.isfinite(loss))
        if not outcome.finite:
            break
        if measured:
            outcome.steps.append(step)
            outcome.losses.append(loss.item())
            outcome.norms.append(float(norm))
            difference = [p.detach() - b for p, b in zip(parameters, before)]
            outcome.updates.append(float(nn.utils.get_total_norm(difference)))
            if hasattr(optimizer, "clipper"):
                clipped.append(float((optimizer.clipper.last.coefficients < 1).float().mean()))
            elif constant is not None:
                clipped.append(float(norm > constant))
    outcome.finite = outcome.finite and all(bool(p.isfinite().all()) for p in parameters)
    if outcome.finite and evaluate is not None:
        model.eval()
        with torch.no_grad():
            outcome.validation = evaluate(model, "validation")
            outcome.test = evaluate(model, "test")
    outcome.clipped = float(np.mean(clipped)) if clipped else None
    outcome.step_ms = 1e3 * float(np.median(times))
    outcome.seconds = time.process_time() - begin
    return outcome
