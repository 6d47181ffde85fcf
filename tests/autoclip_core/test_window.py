"""Windows: what a rule computes of them, against NumPy on each row by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip.core import RingBuffer
from autoclip.core._window import NumpyWindow

lengths = st.integers(1, 40)


def fill(seed: int, length: int, counts: list[int]) -> tuple[RingBuffer, list[list[float]]]:
    """A ring whose rows recorded so many norms each, and their windows, oldest first."""
    random = np.random.default_rng(seed)
    ring = RingBuffer(len(counts), length)
    windows: list[list[float]] = [[] for _ in counts]
    for step in range(max(counts)):
        rows = np.flatnonzero(np.array(counts) > step)
        entered = random.lognormal(size=len(rows)).astype(np.float32)
        left = ring.push(rows, entered)
        for row, came, went in zip(rows, entered, left):
            windows[row].append(float(came))
            gone = windows[row].pop(0) if len(windows[row]) > length else np.nan
            np.testing.assert_equal(float(went), gone)
    return ring, windows


@given(
    st.integers(0, 999), lengths, st.lists(st.integers(1, 90), min_size=1, max_size=5), st.data()
)
def test_reductions_are_those_of_each_row(
    seed: int, length: int, counts: list[int], data: st.DataObject
) -> None:
    q = data.draw(st.floats(0, 1))
    ring, windows = fill(seed, length, counts)
    seen = []
    for rows, window in ring.windows():
        seen += rows.tolist()
        assert window.norms.dtype == np.float64
        moved = abs(window.norms - 1.0)
        for k, row in enumerate(rows):
            held = np.array(windows[row])
            assert window.count[k, 0] == len(held)
            found = [window.sum(), window.mean(), window.sum(moved), window.mean(moved)]
            expected = [held.sum(), held.mean(), abs(held - 1).sum(), abs(held - 1).mean()]
            assert [each[k, 0] for each in found] == pytest.approx(expected, rel=1e-13)
            assert window.quantile(q)[k, 0] == np.quantile(held, q)
            assert window.quantile(q, moved)[k, 0] == np.quantile(abs(held - 1), q)
    assert sorted(seen) == list(range(len(counts)))


@given(st.integers(0, 999), lengths, st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_age_counts_from_the_newest_norm(seed: int, length: int, counts: list[int]) -> None:
    """Shared by rows that recorded together, [1, length], or each row's own."""
    ring, windows = fill(seed, length, counts)
    for rows, window in ring.windows():
        ages = np.broadcast_to(window.age, window.norms.shape)
        for k, row in enumerate(rows):
            held = sorted(range(len(windows[row])), key=lambda age: age)
            found = {}
            for place in range(window.norms.shape[1]):
                if window._valid is None or window._valid[k, place]:
                    found[ages[k, place]] = window.norms[k, place]
            assert sorted(found) == held
            newest_first = [found[age] for age in held]
            assert newest_first == windows[row][::-1]


def test_rows_that_recorded_together_share_their_ages() -> None:
    ring, _ = fill(0, 20, [30, 30])
    ((_, window),) = ring.windows()
    assert window.age.shape == (1, 20)
    ring, _ = fill(0, 20, [30, 31])
    ((_, window),) = ring.windows()
    assert window.age.shape == (2, 20)


@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_a_quantile_of_each_rows_own(seed: int, first: float, second: float) -> None:
    values = np.random.default_rng(seed).lognormal(size=(2, 7)).astype(np.float32)
    window = NumpyWindow(values, None, np.array([6, 6]), np.array([7, 7]))
    found = window.quantile(np.array([[first], [second]]))
    exact = values.astype(np.float64)
    assert found.tolist() == [[np.quantile(exact[0], first)], [np.quantile(exact[1], second)]]


@given(st.integers(0, 999), lengths, st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_a_row_has_the_same_sums_whatever_stands_beside_it(
    seed: int, length: int, counts: list[int]
) -> None:
    ring, windows = fill(seed, length, counts)
    sums = {}
    for rows, window in ring.windows():
        sums.update(zip(rows.tolist(), window.sum()[:, 0].tolist()))
    for row, window in enumerate(windows):
        alone = RingBuffer(1, length)
        alone.write([np.array(window, np.float32)], np.array([counts[row]]))
        ((_, single),) = alone.windows()
        assert sums[row] == single.sum()[0, 0]
