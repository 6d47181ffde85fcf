"""Array operations that a backend supplies: all that a step and the rules need of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

SMALLEST_NORM = float(np.finfo(np.float32).tiny)
"""A norm below float32's smallest normal number, 1.18e-38, counts as zero: never recorded."""

LARGEST_NORM = float(np.finfo(np.float32).max)


def is_recorded(norms: Any) -> Any:
    """Mask of the norms that enter a history: not zero, not NaN, not infinite.

    Args:
        norms: an array of any framework, rounded to float32 as a history holds them.

    Returns:
        A bool array of the same kind and shape.
    """
    return (norms >= SMALLEST_NORM) & (norms <= LARGEST_NORM)


def refuse_negative(norms: npt.NDArray[np.float64]) -> None:
    """Raise ValueError if a norm is negative."""
    if (norms < 0).any():
        raise ValueError(f"A norm is never negative, but got {np.nanmin(norms)}.")


class Ops(ABC):
    """The operations of one framework on its arrays, in addition to Python's operators.

    Windows are [rows, length] and columns [rows, 1]. An array that is *donated* may be changed in
    place: the result replaces it, and the caller does not use it again.

    Attributes:
        unlimited: the threshold of a row that clips nothing. Infinite, or a finite number above all
            others where a framework's debugger refuses infinities.
    """

    unlimited: float = np.inf

    @abstractmethod
    def narrow(self, x: Any) -> Any:
        """Cast to float32."""

    @abstractmethod
    def wide(self, x: Any) -> Any:
        """Cast to float64, or to the device's widest floating-point type."""

    @abstractmethod
    def whole(self, x: Any) -> Any:
        """Cast to int64, rounding towards zero."""

    @abstractmethod
    def where(self, condition: Any, x: Any, y: Any, into: Any = None) -> Any:
        """`x` where `condition` holds, else `y`; one may be a number. `into` is donated."""

    @abstractmethod
    def minimum(self, x: Any, y: Any) -> Any:
        """The smaller of two arrays, element by element; NaN if either is."""

    @abstractmethod
    def maximum(self, x: Any, y: Any) -> Any:
        """The larger of two arrays, element by element; NaN if either is."""

    def divide(self, x: Any, y: Any) -> Any:
        """`x / y`; anything where `y` is zero, and no error."""
        return x / y

    @abstractmethod
    def log(self, x: Any) -> Any:
        """The natural logarithm."""

    @abstractmethod
    def exp(self, x: Any) -> Any:
        """The exponential function."""

    @abstractmethod
    def sum(self, x: Any) -> Any:
        """The sums over rows, [rows, 1]."""

    @abstractmethod
    def sort(self, x: Any) -> Any:
        """Rows in ascending order."""

    @abstractmethod
    def concat(self, parts: list[Any]) -> Any:
        """Arrays with equal numbers of rows, one after the other."""

    @abstractmethod
    def full(self, rows: int, value: float) -> Any:
        """float32[rows, 1] of one value."""

    @abstractmethod
    def column(self, x: Any, rows: int) -> Any:
        """A number, [1, 1] or [rows, 1] as [rows, 1] in the type of `wide`."""

    @abstractmethod
    def slots(self, count: int) -> Any:
        """int64[count]: 0, 1, 2, ..."""

    def halves(self, x: Any) -> Any:
        """The two columns of [rows, 2]."""
        return x[:, :1], x[:, 1:]

    @abstractmethod
    def take(self, x: Any, index: Any) -> Any:
        """The elements of each row at int64[rows, n]."""

    @abstractmethod
    def put(self, x: Any, index: Any, value: Any) -> Any:
        """`x`, donated, with `value` at `index`, both [rows, 1]."""

    def insert(self, ordered: Any, came: Any, left: Any) -> Any:
        """Ascending rows, donated, in which `came` replaces `left`; both float32[rows, 1].

        In a sorted row with the value v inserted, slot j holds v clamped to the former values at
        j - 1 and at j. Of two neighbors there, the lower one stays if it is smaller than the value
        that leaves; from there on the upper one moves down: no search, no sort.
        """
        rows = ordered.shape[0]
        above = self.concat([ordered, self.full(rows, LARGEST_NORM)])
        below = self.concat([self.full(rows, 0.0), ordered])
        inserted = self.maximum(self.minimum(came, above), below)
        lower, upper = inserted[:, :-1], inserted[:, 1:]
        return self.where(lower < left, lower, upper, into=ordered)

    def are_all(self, mask: Any) -> bool:
        """True if all of a mask is known to be true; False if that would wait for a device."""
        return False

    def common(self, column: Any) -> Any:
        """[1, 1] if all rows are known to hold the same; else the column."""
        return column


class NumpyOps(Ops):
    """NumPy's operations."""

    def narrow(self, x: Any) -> Any:
        return x.astype(np.float32)

    def wide(self, x: Any) -> Any:
        return x.astype(np.float64)

    def whole(self, x: Any) -> Any:
        return x.astype(np.int64)

    def where(self, condition: Any, x: Any, y: Any, into: Any = None) -> Any:
        return np.where(condition, x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        return np.minimum(x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        return np.maximum(x, y)

    def log(self, x: Any) -> Any:
        return np.log(x)

    def exp(self, x: Any) -> Any:
        return np.exp(x)

    def sum(self, x: Any) -> Any:
        return x.sum(axis=1, keepdims=True)

    def sort(self, x: Any) -> Any:
        return np.sort(x, axis=1)

    def concat(self, parts: list[Any]) -> Any:
        return np.concatenate(parts, axis=1)

    def full(self, rows: int, value: float) -> Any:
        return np.full((rows, 1), value, np.float32)

    def column(self, x: Any, rows: int) -> Any:
        return np.broadcast_to(np.asarray(x, np.float64), (rows, 1))

    def slots(self, count: int) -> Any:
        return np.arange(count)

    def take(self, x: Any, index: Any) -> Any:
        return np.take_along_axis(x, index, axis=1)

    def put(self, x: Any, index: Any, value: Any) -> Any:
        np.put_along_axis(x, index, value, axis=1)
        return x

    def are_all(self, mask: Any) -> bool:
        return bool(mask.all())

    def common(self, column: Any) -> Any:
        return column[:1] if (column == column[0]).all() else column
