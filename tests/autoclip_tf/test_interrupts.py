"""Work that is interrupted at any line happens wholly or not at all: rows, settings, attachments.

Steps and loads are in across_frameworks, for both frameworks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import pytest
import tensorflow as tf
from interrupts import data, interrupted

from autoclip.core import Quantile
from autoclip.tf import Clipper


@pytest.fixture(autouse=True)
def name_scope() -> Iterator[None]:
    """Restored: Python skips `__exit__` of `tf.name_scope` if the interrupt comes at its call."""
    with tf.name_scope("test"):
        yield


VARIABLES = [tf.Variable([0.0], name=f"row{i}") for i in range(2)]
WEIGHTS = [keras.Variable([0.0], name=f"weight{i}") for i in range(2)]


def step(clipper: Any, size: float) -> None:
    clipper([(tf.constant([size]), variable) for variable in VARIABLES])


def test_the_first_step_makes_all_rows_or_none() -> None:
    def make() -> Any:
        return Clipper(Quantile(0.5), group_settings=[{"match": "row0", "history_length": 3}])

    found = []
    for clipper in interrupted(make, lambda clipper: step(clipper, 2.0)):
        found.append(clipper.built and clipper.has_history)
        step(clipper, 4.0)
        assert clipper.last.names == ("row0", "row1")
        thresholds = [3.0, 3.0] if found[-1] else [4.0, 4.0]
        assert clipper.last.thresholds.numpy().tolist() == thresholds
        other = make()
        other.build(VARIABLES)
        other.load_state_dict(clipper.state_dict())
        assert data(other) == data(clipper)
    assert (found[0], found[-1]) == (False, True)
    assert found == sorted(found)


def test_a_setting_changes_in_all_rows_or_in_none() -> None:
    def make() -> Any:
        clipper = Clipper(Quantile(0.5), include_current=False)
        clipper.build(VARIABLES)
        for size in (1.0, 2.0, 3.0):
            step(clipper, size)
        return clipper

    def change(clipper: Any) -> None:
        clipper.param_groups[0]["quantile"] = 1.0

    written = []
    for clipper in interrupted(make, change):
        written.append(clipper.param_groups[0]["quantile"])
        assert clipper.defaults["quantile"] == written[-1]
        step(clipper, 9.0)
        threshold = {0.5: 2.0, 1.0: 3.0}[written[-1]]
        assert clipper.last.thresholds.numpy().tolist() == [threshold] * 2
    assert (written[0], written[-1]) == (0.5, 1.0)
    assert written == sorted(written)


def test_an_optimizer_is_attached_and_detached_wholly_or_not_at_all() -> None:
    def make() -> Any:
        # Not built yet: for one that is, each attach searches all objects for its models.
        return Clipper(Quantile(0.5)), keras.optimizers.SGD(0.0)

    def attach(made: Any) -> None:
        made[0].attach(made[1])

    def update(optimizer: Any, size: float) -> None:
        optimizer.apply_gradients([(tf.constant([size]), weight) for weight in WEIGHTS])

    attach(make())  # makes the class of such optimizers
    found = []
    for clipper, optimizer in interrupted(make, attach):
        found.append(hasattr(optimizer, "clipper"))
        if not found[-1]:
            assert type(optimizer) is keras.optimizers.SGD
            clipper.attach(optimizer)
        update(optimizer, 3.0)
        assert float(clipper.total_norm) == pytest.approx(3 * 2**0.5)
        clipper.detach()
        assert type(optimizer) is keras.optimizers.SGD
    assert (found[0], found[-1]) == (False, True)
    assert found == sorted(found)

    def attached() -> Any:
        made = make()
        attach(made)
        return made

    for clipper, optimizer in interrupted(attached, lambda made: made[0].detach()):
        clipper.detach()
        assert type(optimizer) is keras.optimizers.SGD
        assert not hasattr(optimizer, "clipper")
        clipper([(tf.constant([2.0]), weight) for weight in WEIGHTS])
        clipper.attach(optimizer)
        update(optimizer, 4.0)
        assert clipper.last.thresholds.numpy().tolist() == [3.0, 3.0]
