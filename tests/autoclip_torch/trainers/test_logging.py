"""What is logged: three numbers about the rows that recorded a norm in the last step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values


def step(clipper: QuantileClip, parameters: list[Tensor], norms: list[float | None]) -> float:
    for parameter, norm in zip(parameters, norms):
        parameter.grad = None if norm is None else torch.tensor([0.0, norm])
    return float(clipper.step())


def make(rows: int, **settings: object) -> tuple[QuantileClip, list[Tensor]]:
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(rows)]
    return QuantileClip(parameters, **{"quantile": 0.5, **settings}), parameters  # type: ignore[arg-type]


# Any two different norms here, and any two different totals of four, are ≥ 0.04 % apart, so that
# what is above a median is so by far more than rounding; equal ones are exactly equal.
NORM = st.sampled_from([None, 0.0, 1.0, 4.0, 16.0])
STEPS = st.lists(st.tuples(NORM, NORM, NORM, NORM), min_size=1, max_size=5)


@pytest.mark.filterwarnings("ignore:.*found no gradient on any parameter")
@given(STEPS, st.integers(-20, 20), st.booleans())
def test_the_values_are_of_the_rows_that_recorded(
    steps: list[tuple[float | None, ...]], exponent: int, global_clipping: bool
) -> None:
    clipper, parameters = make(4, global_clipping=global_clipping)
    histories: list[list[np.float32]] = [[] for _ in range(1 if global_clipping else 4)]
    for sizes in steps:
        norms = [None if size is None else size * 2.0**exponent for size in sizes]
        total = math.sqrt(sum(norm**2 for norm in norms if norm))
        step(clipper, parameters, norms)
        medians, clipped = [], []
        for history, norm in zip(histories, [total] if global_clipping else norms):
            if norm:
                history.append(np.float32(norm))
                medians.append(np.median(np.float64(history)))
                clipped.append(history[-1] > medians[-1])
        values = log_values(clipper)
        expected = {}
        if any(norm is not None for norm in norms):
            expected["autoclip/total_norm"] = pytest.approx(total, rel=1e-6, abs=0)
        if medians:
            threshold = np.median(medians)
            expected["autoclip/threshold"] = pytest.approx(threshold, rel=1e-6, abs=0)
            expected["autoclip/clipped"] = np.mean(clipped)
        assert values == expected


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_total_norm_only(wrong: float) -> None:
    clipper, parameters = make(2)
    step(clipper, parameters, [1.0, 4.0])
    step(clipper, parameters, [2.0, wrong])
    values = log_values(clipper)
    assert not math.isfinite(values["autoclip/total_norm"])
    assert values["autoclip/threshold"] == 1.5
    assert values["autoclip/clipped"] == 1.0


def test_before_the_first_step_there_is_nothing_to_log() -> None:
    assert log_values(make(2)[0]) == {}
