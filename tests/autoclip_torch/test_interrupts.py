"""A step or a load that is interrupted at any line counts in all rows of a clipper, or in none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import interrupted

from autoclip.core import Quantile, Rule, Standard
from autoclip.torch import Clipper

EVERY = 4  # lines, save in the nightly run: each takes a step or two

RULES: list[Rule] = [Quantile(0.5), Standard(1.0, decay=0.9)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """Restored: Python skips `__exit__` of `torch.no_grad()` if the interrupt comes at its call."""
    yield
    torch.set_grad_enabled(True)


def new(rule: Rule, steps: int = 0) -> Any:
    """A clipper whose rows are recorded in two parts: their windows have other lengths."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(4)]
    groups = [
        {"params": weights[:2], "history_length": 3},
        {"params": weights[2:], "history_length": 20},
    ]
    clipper = Clipper(groups, rule, include_current=False, warmup_steps=1)
    for size in range(1, steps + 1):
        step(clipper, float(size))
    return clipper


def step(clipper: Any, size: float) -> None:
    for group in clipper.param_groups:
        for weight in group["params"]:
            weight.grad = torch.tensor([size])
    clipper.step()


def data(clipper: Any) -> Any:
    return clipper.state_dict()["data"]


def goes_on(clipper: Any, rule: Rule, *possible: bytes) -> int:
    """Check that a clipper is in one of some states, and that it goes on as a new one does."""
    index = possible.index(data(clipper))
    other = new(rule)
    other.load_state_dict(clipper.state_dict())
    for each in (clipper, other):
        step(each, 9.0)
    np.testing.assert_array_equal(clipper.last.thresholds, other.last.thresholds)
    assert data(clipper) == data(other)
    return index


@each_rule
@pytest.mark.parametrize("steps", [2, 16, 30])
def test_a_step_counts_in_all_rows_or_in_none(path: str, rule: Rule, steps: int) -> None:
    states = data(new(rule, steps)), data(new(rule, steps + 1))
    found = [
        goes_on(clipper, rule, *states)
        for clipper in interrupted(
            lambda: new(rule, steps), lambda clipper: step(clipper, float(steps + 1)), EVERY
        )
    ]
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)


@each_rule
def test_a_load_counts_in_all_rows_or_in_none(path: str, rule: Rule) -> None:
    saved = new(rule, 17).state_dict()
    states = data(new(rule, 5)), saved["data"]
    found = [
        goes_on(clipper, rule, *states)
        for clipper in interrupted(
            lambda: new(rule, 5), lambda clipper: clipper.load_state_dict(saved), EVERY
        )
    ]
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)


@each_rule
def test_a_reset_counts_in_all_rows_or_in_none(path: str, rule: Rule) -> None:
    states = data(new(rule, 5)), data(new(rule))
    found = [
        goes_on(clipper, rule, *states)
        for clipper in interrupted(lambda: new(rule, 5), lambda clipper: clipper.reset(), EVERY)
    ]
    assert (found[0], found[-1]) == (0, 1)
