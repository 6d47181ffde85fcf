"""Properties of a clipper that every framework keeps, in each way to run a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import KINDS, PRESENT

from autoclip.core import History

SHAPES = [(3,), (4, 70), ()]
LENGTH = 5
RULES = {
    name: (clipper, KINDS[name][0])
    for name, clipper in (("quantile", "QuantileClip"), ("standard", "StandardClip"))
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_mode = pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])

usual = st.floats(2.0**-20, 2.0**20, width=32)
strange = st.sampled_from([None, 0.0, math.nan, math.inf])
streams = st.lists(
    st.tuples(*[st.one_of(usual, usual, usual, strange)] * len(SHAPES)), min_size=1, max_size=15
)


def gradients_of(norms: Any) -> list[Any]:
    """Gradients of SHAPES with these norms; the elements of each are equal."""
    return [
        None if norm is None else np.full(shape, norm / np.sqrt(np.prod(shape)), np.float32)
        for shape, norm in zip(SHAPES, norms)
    ]


def norm_of(gradient: Any) -> float:
    return 0.0 if gradient is None else float(np.linalg.norm(np.asarray(gradient, np.float64)))


def made(loop: Any, rule: str, global_clipping: bool) -> Any:
    name, own = RULES[rule]
    first = next(iter(own.settings.values()))
    return loop(name, first, LENGTH, global_clipping, shapes=SHAPES, **PRESENT)


@each_rule
@each_mode
@settings(max_examples=40)
@given(stream=streams)
def test_a_step_does_what_the_core_says_of_the_true_norms(
    loop: Any, rule: str, global_clipping: bool, stream: Any
) -> None:
    run = made(loop, rule, global_clipping)
    core = History(1 if global_clipping else len(SHAPES), RULES[rule][1], LENGTH, **PRESENT)
    for norms in stream:
        before = gradients_of(norms)
        clipped = run(*before)
        true = [norm_of(gradient) for gradient in before]
        together = np.sqrt(np.square(true).sum())
        expected = core.record([together] if global_clipping else true)
        assert [each is None for each in clipped] == [each is None for each in before]
        if all(gradient is None for gradient in before):
            continue  # there is nothing in `last` then
        np.testing.assert_allclose(run.clipper.total_norm, together, rtol=1e-6)
        last = run.clipper.last
        np.testing.assert_allclose(last.norms, expected.norms, rtol=1e-6)
        np.testing.assert_allclose(last.thresholds, expected.thresholds, rtol=1e-6)
        np.testing.assert_allclose(last.coefficients, expected.coefficients, rtol=2e-6)
        factors = np.broadcast_to(expected.coefficients, len(SHAPES))
        for ours, gradient, factor in zip(clipped, before, factors):
            if gradient is not None:
                np.testing.assert_allclose(ours, gradient * factor, rtol=2e-6)
    state = run.clipper.export_state()
    windows = [window for group in state.groups for window in group.windows()]
    for ours, theirs in zip(windows, core.read(range(core.rows))[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@each_mode
@settings(max_examples=40)
@given(stream=streams)
def test_quantile_one_never_clips(loop: Any, global_clipping: bool, stream: Any) -> None:
    run = loop("QuantileClip", 1.0, LENGTH, global_clipping, shapes=SHAPES)
    for norms in stream:
        before = gradients_of(norms)
        for ours, gradient in zip(run(*before), before):
            if gradient is not None:
                np.testing.assert_array_equal(ours, gradient)  # bit by bit, and NaN is NaN


@each_rule
@each_mode
@settings(max_examples=40)
@given(
    stream=st.lists(
        st.tuples(*[st.floats(0.25, 4.0, width=32)] * len(SHAPES)), min_size=1, max_size=12
    ),
    exponent=st.integers(-40, 40),
)
def test_scaling_all_gradients_scales_thresholds_and_no_coefficient(
    loop: Any, rule: str, global_clipping: bool, stream: Any, exponent: int
) -> None:
    """From 1e-12 to 1e12, by powers of two, so that nothing is rounded otherwise."""
    factor = np.float32(2.0**exponent)
    reports = []
    for scale in (np.float32(1), factor):
        run = made(loop, rule, global_clipping)
        for norms in stream:
            clipped = run(*(gradient * scale for gradient in gradients_of(norms)))
            last = run.clipper.last
            reports.append((np.asarray(last.coefficients), np.asarray(last.thresholds), clipped))
    for (ones, one, mine), (others, other, theirs) in zip(reports, reports[len(stream) :]):
        np.testing.assert_array_equal(ones, others)
        np.testing.assert_array_equal(one * factor, other)
        for ours, scaled in zip(mine, theirs):
            np.testing.assert_array_equal(ours * factor, scaled)


@pytest.mark.parametrize("size", [1e-16, 1e-12, 1e12, 1e18])
@each_mode
def test_norms_near_the_ends_of_the_range(loop: Any, global_clipping: bool, size: float) -> None:
    run = loop("QuantileClip", 0.3, LENGTH, global_clipping, shapes=SHAPES, **PRESENT)
    for norms in ([1, 1, 1], [3, 3, 3]):
        clipped = run(*gradients_of(np.array(norms) * size))
    wanted = size * 1.6 * (math.sqrt(3) if global_clipping else 1.0)
    np.testing.assert_allclose(run.clipper.last.thresholds, wanted, rtol=1e-6)
    for ours in clipped:
        np.testing.assert_allclose(norm_of(ours), 1.6 * size, rtol=2e-6)
