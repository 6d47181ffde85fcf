"""What a rule sees of the norms that were recorded: one small interface, one class a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["NumpyWindow", "QuantileProbe", "Window"]

ArrayT = TypeVar("ArrayT")


class Window(ABC, Generic[ArrayT]):
    """The windows of many rows, as a rule sees them.

    Rules combine these arrays with Python's operators and with each other's results: the same rule
    then runs in NumPy, PyTorch and TensorFlow. All numbers are float64 (float32 on devices that
    lack it).

    Attributes:
        norms: [rows, length], the recorded norms, in no particular order. Where a window is not
            full, the rest holds arbitrary numbers; `sum`, `mean` and `quantile` leave them out.
        age: [rows, length], how many norms the row has recorded since: 0 for the newest.
            [1, length] where all rows have the same.
        count: [rows, 1], how many norms each window holds; at least 1.
    """

    norms: ArrayT
    age: ArrayT
    count: ArrayT

    @abstractmethod
    def sum(self, values: Any = None) -> ArrayT:
        """The sum over each window.

        Args:
            values: [rows, length], what to add up; the norms by default.

        Returns:
            [rows, 1].
        """

    def mean(self, values: Any = None) -> ArrayT:
        """The mean over each window; see `sum`."""
        return self.sum(values) / self.count  # type: ignore[operator, no-any-return]

    @abstractmethod
    def quantile(self, q: Any, values: Any = None) -> ArrayT:
        """A quantile of each window, interpolated linearly as `numpy.quantile` does by default.

        Args:
            q: in [0, 1]; a number or [rows, 1].
            values: [rows, length], of what; the norms by default.

        Returns:
            [rows, 1].
        """


class NumpyWindow(Window[npt.NDArray[np.float64]]):
    """Windows as NumPy arrays.

    Args:
        values: float32[rows, length].
        valid: bool[rows, length], where `values` holds a norm; None for everywhere.
        newest: int64[rows], the slot of each row's newest norm; older ones precede it, circularly.
        count: int64[rows].
    """

    def __init__(
        self,
        values: npt.NDArray[np.float32],
        valid: npt.NDArray[np.bool_] | None,
        newest: npt.NDArray[np.int64],
        count: npt.NDArray[np.int64],
    ) -> None:
        self._values = values
        self._valid = valid
        self._newest = newest
        self.count = np.maximum(count, 1)[:, None].astype(np.float64)

    @cached_property
    def norms(self) -> npt.NDArray[np.float64]:  # type: ignore[override]
        """See `Window`; converted only for rules that ask."""
        return self._values.astype(np.float64)

    @cached_property
    def age(self) -> npt.NDArray[np.float64]:  # type: ignore[override]
        """See `Window`; converted only for rules that ask."""
        places = np.arange(self._values.shape[1])
        newest, count = self._newest[:, None], self.count
        if (newest == newest[0]).all() and (count == count[0]).all():
            # Rows that always record together share their ages, and what a rule computes from them.
            newest, count = newest[:1], count[:1]
        return (newest - places) % count

    def sum(self, values: Any = None) -> npt.NDArray[np.float64]:
        """See `Window.sum`."""
        given = self.norms if values is None else values
        if self._valid is not None:
            given = np.where(self._valid, given, 0.0)
        total: npt.NDArray[np.float64] = np.sum(
            np.broadcast_to(given, self._values.shape), axis=1, keepdims=True
        )
        return total

    def quantile(self, q: Any, values: Any = None) -> npt.NDArray[np.float64]:
        """See `Window.quantile`."""
        given = self._values if values is None else np.broadcast_to(values, self._values.shape)
        if self._valid is not None:
            given = np.where(self._valid, given, np.float32(np.inf))
        ordered = np.sort(given, axis=1)
        last = self.count - 1
        position = np.asarray(q, np.float64) * last
        lower = position.astype(np.int64)
        upper = np.minimum(lower + 1, last.astype(np.int64))
        a = np.take_along_axis(ordered, lower, axis=1).astype(np.float64)
        b = np.take_along_axis(ordered, upper, axis=1).astype(np.float64)
        return interpolate(a, b, position - lower)


def interpolate(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], t: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Between neighbouring values, from the nearer one: the same bits as `numpy.quantile`."""
    difference = b - a
    return np.where(t < 0.5, a + difference * t, b - difference * (1 - t))


class QuantileProbe(NumpyWindow):
    """A window of one norm that records whether a rule asks for quantiles of the norms themselves.

    Backends keep a sorted copy of the windows up to date only for rules that do.
    """

    def __init__(self) -> None:
        super().__init__(
            np.ones((1, 1), np.float32), None, np.zeros(1, np.int64), np.ones(1, np.int64)
        )
        self.asked = False

    def quantile(self, q: Any, values: Any = None) -> npt.NDArray[np.float64]:
        """See `Window.quantile`."""
        self.asked |= values is None
        return super().quantile(q, values)
