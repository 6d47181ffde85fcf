"""Values of the last step that can be compared, and warnings of what they show over many."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values, summarize


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
            after = math.sqrt(
                sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
            )
            expected["autoclip/total_norm"] = pytest.approx(total, rel=1e-6, abs=0)
            expected["autoclip/clipped_norm"] = pytest.approx(after, rel=1e-6, abs=0)
        if medians:
            expected["autoclip/clipped"] = np.mean(clipped)
            if global_clipping:
                [threshold] = medians
                expected["autoclip/threshold"] = pytest.approx(threshold, rel=1e-6, abs=0)
        assert values == expected


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_total_norm_only(wrong: float) -> None:
    clipper, parameters = make(2)
    step(clipper, parameters, [1.0, 4.0])
    step(clipper, parameters, [2.0, wrong])
    values = log_values(clipper)
    assert not math.isfinite(values["autoclip/total_norm"])
    assert not math.isfinite(values["autoclip/clipped_norm"])
    assert values["autoclip/clipped"] == 1.0


def test_before_the_first_step_there_is_nothing_to_log() -> None:
    assert log_values(make(2)[0]) == {}


# -- what the values show over many steps ------------------------------------------------------


@pytest.mark.parametrize("every", [1, 25], ids=["every step", "some steps"])
@pytest.mark.parametrize("global_clipping", [False, True])
def test_a_total_norm_that_does_not_vary_is_warned_about_once(
    every: int, global_clipping: bool
) -> None:
    clipper, parameters = make(3, global_clipping=global_clipping)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(100):
            for parameter in parameters:
                parameter.grad = torch.randn(2, generator=generator) * 100
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            clipper.step()
            if i % every == 0:
                log_values(clipper)
    [warning] = caught
    assert "The total norm does not vary" in str(warning.message)
    assert warning.filename == __file__
    assert "The total norm does not vary" in str(summarize(clipper))


@pytest.mark.parametrize("global_clipping", [False, True])
def test_one_step_that_is_read_often_is_none(global_clipping: bool) -> None:
    clipper, parameters = make(2, global_clipping=global_clipping)
    for size in range(1, 40):
        step(clipper, parameters, [size, 2.0 * size])
    for _ in range(50):
        log_values(clipper)


def test_rows_that_were_left_out_hide_the_history_but_not_the_logged_norms() -> None:
    clipper, parameters = make(3)
    generator = torch.Generator().manual_seed(0)

    def train_step(i: int) -> None:
        for k, parameter in enumerate(parameters):
            used = (i + k) % 3 or k == 0
            parameter.grad = torch.randn(2, generator=generator) * 100 if used else None
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        clipper.step()
        log_values(clipper)

    for i in range(19):
        train_step(i)
    assert summarize(clipper).notices == ()
    with pytest.warns(UserWarning, match=r"the last 20 that were logged are 0\.5"):
        train_step(19)


@pytest.mark.parametrize(("norm", "reason"), [(math.nan, "NaN or infinite"), (0.0, "above zero")])
def test_many_steps_that_record_nothing_are_warned_about_once(norm: float, reason: str) -> None:
    clipper, parameters = make(2)
    step(clipper, parameters, [1.0, 4.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            step(clipper, parameters, [norm, norm])
            log_values(clipper)
    [warning] = caught
    assert "The last 10 logged steps, and all between, recorded no norm" in str(warning.message)
    assert reason in str(warning.message)
    assert "The last step recorded no norm" in str(summarize(clipper))


def test_a_storm_that_passes_is_not() -> None:
    clipper, parameters = make(2)
    for i in range(60):
        wrong = math.nan if i % 12 < 8 else 1.0 + i
        step(clipper, parameters, [wrong, wrong])
        log_values(clipper)
    for _ in range(12):  # recorded, but never when it is logged
        step(clipper, parameters, [1.0, 3.0])
        step(clipper, parameters, [math.nan, math.nan])
        log_values(clipper)
