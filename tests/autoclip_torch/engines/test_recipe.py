"""The recipe for engines of one's own, with a stand-in for Megatron-LM's optimizer.

Megatron-LM itself is not installed. Its optimizer reads `config.clip_grad` in each step and returns
whether the step was made, the norm before clipping, and a number of zeros.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from engine_training import LEARNING_RATE, QUANTILE, WEIGHTS, Reference, batches, make_model

from autoclip.core import MaxNorm, Quantile


class MegatronLikeOptimizer:
    def __init__(self, optimizer: torch.optim.Optimizer, config: Any) -> None:
        self.optimizer = optimizer
        self.config = config

    def step(self) -> tuple[bool, float | None, int | None]:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not all(p.grad.isfinite().all() for p in parameters):
            return False, None, None
        total_norm = None
        if self.config.clip_grad > 0.0:
            total_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_grad))
        self.optimizer.step()
        return True, total_norm, None


def train_step(optimizer: MegatronLikeOptimizer, schedule: MaxNorm) -> bool:
    optimizer.config.clip_grad = schedule.max_norm
    succeeded, total_norm, _ = optimizer.step()
    if succeeded:
        schedule.record(total_norm)
    return succeeded


def test_an_engine_that_returns_the_norm_trains_as_global_clipping_by_the_past() -> None:
    torch.manual_seed(0)
    model, reference = make_model(), Reference()
    optimizer = MegatronLikeOptimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), SimpleNamespace(clip_grad=1.0)
    )
    schedule = MaxNorm(Quantile(QUANTILE))
    clipped = 0
    for step, (weight, batch) in enumerate(zip(WEIGHTS, batches())):
        optimizer.optimizer.zero_grad()
        (model(batch).square().mean() * (math.nan if step == 3 else weight)).backward()
        saved = schedule.state_dict()
        if step == 3:  # a step that is skipped
            assert not train_step(optimizer, schedule)
            assert schedule.state_dict() == saved
            continue
        assert train_step(optimizer, schedule)
        reference.train(batch, weight)
        for mine, other in zip(model.parameters(), reference.model.parameters()):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        clipped += int(schedule.last.spikes[0])
    assert clipped >= 2
    # Windows differ by what two measurements of a norm differ.
    assert math.isclose(schedule.max_norm, float(reference.clipper.thresholds[0]), rel_tol=1e-6)
