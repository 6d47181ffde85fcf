"""What is logged: three numbers about the rows that recorded a norm in the last step."""

from __future__ import annotations

import math

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


NORMS = st.lists(
    st.lists(st.none() | st.just(0.0) | st.floats(2**-10, 2**10, width=32), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
)


@pytest.mark.filterwarnings("ignore:.*found no gradient on any parameter")
@given(NORMS, st.booleans())
def test_the_values_are_of_the_rows_that_recorded(
    steps: list[list[float | None]], global_clipping: bool
) -> None:
    clipper, parameters = make(4, global_clipping=global_clipping)
    histories: list[list[float]] = [[] for _ in range(1 if global_clipping else 4)]
    for norms in steps:
        total = math.sqrt(sum(norm**2 for norm in norms if norm))
        step(clipper, parameters, norms)
        thresholds, clipped = [], []
        for history, norm in zip(histories, [total] if global_clipping else norms):
            if norm:
                history.append(norm)
                ordered = sorted(history)
                middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
                thresholds.append(middle)
                clipped.append(norm > middle * (1 + 1e-6))
        values = log_values(clipper)
        if all(norm is None for norm in norms):
            assert values == {}
            continue
        assert values.pop("autoclip/total_norm") == pytest.approx(total, rel=1e-6)
        if not thresholds:
            assert values == {}
            continue
        ordered = sorted(thresholds)
        median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        assert values == {
            "autoclip/threshold": pytest.approx(median, rel=1e-6),
            "autoclip/clipped": sum(clipped) / len(clipped),
        }


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
