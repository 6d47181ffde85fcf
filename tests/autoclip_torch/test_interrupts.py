"""Work that is interrupted at any line happens wholly or not at all: parameters, settings, hooks.

Steps and loads are in across_frameworks, for both frameworks.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import data, interrupted
from rules import each_mode

from autoclip.torch import QuantileClip


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """Restored: Python skips `__exit__` of `torch.no_grad()` if the interrupt comes at its call."""
    yield
    torch.set_grad_enabled(True)


def step(clipper: Any, size: float) -> None:
    for group in clipper.param_groups:
        for weight in group["params"]:
            weight.grad = torch.tensor([size])
    clipper.step()


def attached(mode: dict[str, bool], steps: int = 3) -> Any:
    """An optimizer whose rows are recorded in two parts, unless there is one row."""
    length = {} if "global_clipping" in mode else {"history_length": 5}
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]], **length}], 0.0)
    QuantileClip.as_optimizer(optimizer, 0.5, include_current=False, **mode)
    for size in range(1, steps + 1):
        update(optimizer, float(size))
    return optimizer


def update(optimizer: Any, size: float) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.tensor([size])
    optimizer.step()


def grow(optimizer: Any) -> Any:
    """Add a parameter to the first group, and a third group."""
    optimizer.param_groups[0]["params"].append(torch.zeros(1, requires_grad=True))
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    return optimizer


def clips_on(optimizer: Any, mode: dict[str, bool]) -> None:
    """Check that an optimizer clips as one does that loads the same history."""
    other = grow(attached(mode, 0))
    other.clipper.load_state_dict(optimizer.clipper.state_dict())
    for each in (optimizer, other):
        update(each, 9.0)
    clipper, expected = optimizer.clipper, other.clipper
    assert clipper.last.names == expected.last.names
    np.testing.assert_array_equal(clipper.last.norms, expected.last.norms)
    np.testing.assert_array_equal(clipper.last.thresholds, expected.last.thresholds)
    assert data(clipper) == data(expected)


@each_mode
def test_new_parameters_of_an_optimizer_join_once(path: str, mode: dict[str, bool]) -> None:
    before, after = grow(attached(mode)), grow(attached(mode))
    update(after, 4.0)
    states = [data(each.clipper) for each in (before, after)]
    found = []
    for optimizer in interrupted(
        lambda: grow(attached(mode)), lambda optimizer: update(optimizer, 4.0)
    ):
        with suppress(RuntimeError):  # no report: an interrupted step has none
            last = optimizer.clipper.last  # before anything else has looked at the groups
            assert len(last.names) == len(last.norms)
        found.append(states.index(data(optimizer.clipper)))
        clips_on(optimizer, mode)
    assert (found[0], found[-1]) == (0, 1)
    assert found == sorted(found)


def test_a_copy_completes_an_interrupted_step_of_its_own(path: str) -> None:
    for optimizer in interrupted(lambda: attached({}), lambda optimizer: update(optimizer, 4.0)):
        clipper = optimizer.clipper
        twins = [copy.deepcopy(clipper), pickle.loads(pickle.dumps(clipper))]
        completed = data(clipper)
        assert [data(twin) for twin in twins] == [completed, completed]


@each_mode
def test_a_group_is_added_wholly_or_not_at_all(path: str, mode: dict[str, bool]) -> None:
    def make() -> Any:
        weights = [torch.zeros(1, requires_grad=True) for _ in range(3)]
        clipper = QuantileClip(weights[:1], 0.5, include_current=False, **mode)
        step(clipper, 1.0)
        return clipper, weights[1:]

    def add(made: Any) -> None:
        clipper, weights = made
        clipper.add_param_group({"params": weights})

    sizes = []
    for clipper, weights in interrupted(make, add):
        groups = clipper.param_groups
        sizes.append(len(groups))
        if len(groups) == 1:
            add((clipper, weights))
        with pytest.raises(ValueError, match="more than one"):
            add((clipper, weights))
        step(clipper, 2.0)
        rows = {"group_clipping": 2, "global_clipping": 1}.get(next(iter(mode), ""), 3)
        assert clipper.last.norms.shape == clipper.thresholds.shape == (rows,)
        clipper.attach(torch.optim.SGD([*groups[0]["params"], *weights]))
    assert (sizes[0], sizes[-1]) == (1, 2)
    assert sizes == sorted(sizes)


@each_mode
def test_a_setting_changes_wholly_or_not_at_all(path: str, mode: dict[str, bool]) -> None:
    def change(optimizer: Any) -> None:
        optimizer.clipper.param_groups[0]["quantile"] = 1.0

    written = []
    for optimizer in interrupted(lambda: attached(mode), change):
        groups = optimizer.clipper.param_groups
        written.append([group["quantile"] for group in groups])
        update(optimizer, 9.0)
        thresholds = optimizer.clipper.last.thresholds.tolist()
        norm = 2**0.5 if "global_clipping" in mode else 1.0
        rows = written[-1][: len(thresholds)]
        assert thresholds == pytest.approx([{0.5: 2.0, 1.0: 3.0}[q] * norm for q in rows])
    shared = "global_clipping" in mode
    assert (written[0], written[-1]) == ([0.5, 0.5], [1.0, 1.0 if shared else 0.5])
    assert written == sorted(written)


def test_an_optimizer_is_attached_wholly_or_not_at_all() -> None:
    def make() -> Any:
        weight = torch.zeros(1, requires_grad=True)
        return QuantileClip([weight], 0.5), torch.optim.SGD([weight], 0.0)

    def attach(made: Any) -> None:
        clipper, optimizer = made
        clipper.attach(optimizer)

    found = []
    for clipper, optimizer in interrupted(make, attach):
        found.append(hasattr(optimizer, "clipper"))
        if not found[-1]:
            clipper.attach(optimizer)
        for size in (1.0, 3.0):
            update(optimizer, size)
        assert optimizer.param_groups[0]["params"][0].grad == 2.0
        assert optimizer.clipper is clipper
        clipper.detach()
        assert not vars(optimizer)["_optimizer_step_pre_hooks"]
    assert (found[0], found[-1]) == (False, True)
    assert found == sorted(found)


def test_an_interrupted_detach_can_be_repeated() -> None:
    def make() -> Any:
        optimizer = attached({})
        return optimizer, optimizer.clipper

    for optimizer, clipper in interrupted(make, lambda made: made[1].detach()):
        if hasattr(optimizer, "clipper"):
            update(optimizer, 4.0)  # clipped as long as the optimizer has a clipper
            assert clipper.last.norms.tolist() == [4.0, 4.0]
        clipper.detach()
        assert not hasattr(optimizer, "clipper")
        assert not vars(optimizer)["_optimizer_step_pre_hooks"]
        assert "autoclip" not in optimizer.state_dict()
        step(clipper, 5.0)
        clipper.attach(optimizer)
        update(optimizer, 9.0)
        assert optimizer.clipper.last.norms.tolist() == [9.0, 9.0]
