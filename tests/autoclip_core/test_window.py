"""Windows: what a rule computes of them, against NumPy on each row by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from autoclip.core import History, Rule

lengths = st.integers(1, 40)
counts_of_rows = st.lists(st.integers(1, 90), min_size=1, max_size=5)
Window = npt.NDArray[np.float32]
SEEN: list[Any] = []


@dataclass(frozen=True)
class Look(Rule):
    """Keeps the windows that it is shown."""

    name: ClassVar[str] = "look"

    @staticmethod
    def threshold(window: Any) -> Any:
        SEEN.append(window)
        return window.mean()


def looked_at(windows: list[Window], recorded: list[int], length: int) -> list[Any]:
    """The windows that a rule is shown, rows of about one length at a time."""
    history = History(len(windows), Look(), length)
    history.write(range(len(windows)), windows, recorded)
    SEEN.clear()
    found = history.thresholds
    expected = [window.astype(np.float64).mean() for window in windows]
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    return [*SEEN]


def filled(seed: int, length: int, counts: list[int]) -> list[Window]:
    """The windows of rows that recorded these numbers of norms, oldest first."""
    random = np.random.default_rng(seed)
    return [random.lognormal(size=count).astype(np.float32)[-length:] for count in counts]


def rows_of(seen: list[Any], windows: list[Window]) -> list[tuple[int, Any, int]]:
    """Each row, the window that shows it, and its place there; rows are told by their norms."""
    found = []
    for window in seen:
        for place, norms in enumerate(window.norms):
            held = sorted(norms[norms > 0].tolist())
            (row,) = [r for r, norms in enumerate(windows) if sorted(norms.tolist()) == held]
            found.append((row, window, place))
    assert sorted(row for row, _, _ in found) == list(range(len(windows)))
    return found


@given(st.integers(0, 999), lengths, counts_of_rows, st.floats(0, 1))
def test_reductions_are_those_of_each_row(
    seed: int, length: int, counts: list[int], q: float
) -> None:
    windows = filled(seed, length, counts)
    for row, window, place in rows_of(looked_at(windows, counts, length), windows):
        held = windows[row].astype(np.float64)
        moved = abs(window.norms - 1.0)
        assert window.norms.dtype == np.float64
        assert window.count[place, 0] == len(held)
        for found, expected in (
            (window.sum(), held.sum()),
            (window.mean(), held.mean()),
            (window.sum(moved), abs(held - 1).sum()),
            (window.mean(moved), abs(held - 1).mean()),
            (window.mean(window.log(window.norms)), np.log(held).mean()),
            (window.sum(window.exp(window.norms)), np.exp(held).sum()),
            (window.exp(window.log(window.mean())), held.mean()),
        ):
            np.testing.assert_allclose(found[place, 0], expected, rtol=1e-12, atol=1e-12)
        assert window.quantile(q)[place, 0] == np.quantile(held, q)
        assert window.quantile(q, moved)[place, 0] == np.quantile(abs(held - 1), q)
        assert window.quantile(q, -moved)[place, 0] == np.quantile(-abs(held - 1), q)


@given(st.integers(0, 999), lengths, counts_of_rows)
def test_age_counts_from_the_newest_norm(seed: int, length: int, counts: list[int]) -> None:
    windows = filled(seed, length, counts)
    for row, window, place in rows_of(looked_at(windows, counts, length), windows):
        ages = np.broadcast_to(window.age, window.norms.shape)[place]
        found = {age: norm for age, norm in zip(ages, window.norms[place]) if norm > 0}
        assert [found[age] for age in range(len(windows[row]))] == windows[row][::-1].tolist()


def test_rows_that_recorded_together_share_their_ages() -> None:
    (window,) = looked_at(filled(0, 20, [30, 30]), [30, 30], 20)
    assert window.age.shape == (1, 20)
    (window,) = looked_at(filled(0, 20, [30, 31]), [30, 31], 20)
    assert window.age.shape == (2, 20)


@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_a_quantile_of_each_rows_own(seed: int, first: float, second: float) -> None:
    windows = filled(seed, 7, [7, 7])
    (window,) = looked_at(windows, [7, 7], 7)
    found = window.quantile(np.array([[first], [second]]))
    exact = [each.astype(np.float64) for each in windows]
    assert found.tolist() == [[np.quantile(exact[0], first)], [np.quantile(exact[1], second)]]


@given(st.integers(0, 999), lengths, counts_of_rows)
def test_a_row_has_the_same_sums_whatever_the_others_hold(
    seed: int, length: int, counts: list[int]
) -> None:
    windows = filled(seed, length, counts)
    for row, window, place in rows_of(looked_at(windows, counts, length), windows):
        (alone,) = looked_at([windows[row]], [counts[row]], length)
        assert window.sum()[place, 0] == alone.sum()[0, 0]
