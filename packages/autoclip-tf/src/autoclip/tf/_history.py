"""Windows of norms as variables: what `autoclip.core.History` does, inside the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report
from autoclip.core.adapter import (
    GroupSettings,
    Windows,
    needs_order,
    numbers_of,
    pack,
    record,
    thresholds_of,
    unpack,
)
from autoclip.tf._ops import OPS

__all__ = ["TensorHistory", "check_memory", "is_resumable", "make_variable"]

_MOST_BYTES = 2**36


def check_memory(settings: Sequence[GroupSettings]) -> None:
    """Refuse histories that no memory holds; TensorFlow allocates windows in full.

    Args:
        settings: one a row.

    Raises:
        ValueError: all windows together take more than 64 GiB.
    """
    # Two copies, one of them sorted, of 4 bytes a norm.
    nbytes = 8 * sum(each.history_length for each in settings)
    if nbytes > _MOST_BYTES:
        longest = max(each.history_length for each in settings)
        what = "one history" if len(settings) == 1 else f"{len(settings)} histories"
        raise ValueError(
            f"history_length={longest} takes {nbytes / 2**30:,.0f} GiB for {what}: TensorFlow "
            "allocates windows in full, 8 bytes a norm. Choose a shorter one, or "
            "global_clipping=True, which keeps a single history."
        )


def make_variable(value: Any, name: str) -> tf.Variable:
    """A variable for what a clipper remembers: not trained, the same on every replica."""
    return tf.Variable(
        value,
        trainable=False,
        name=f"autoclip/{name}",
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def is_resumable() -> bool:
    """True if an interrupted step can be completed by a later call: eagerly, and on one replica.

    Replicas run in threads of their own, and each would complete the others' step.
    """
    return tf.executing_eagerly() and tf.distribute.get_strategy().num_replicas_in_sync == 1


class TensorHistory:
    """The windows of many rows in variables; a step is made of tensor operations alone.

    Windows are allocated in full: a graph cannot let a variable grow. For rules that ask for
    quantiles of the norms it keeps the windows sorted besides.

    Args:
        settings: of each row, of equal `structure`.
    """

    def __init__(self, settings: Sequence[GroupSettings]) -> None:
        self._settings = settings[0]
        self.history_length = self._settings.history_length
        # Settings that are numbers, so that traced graphs see changes.
        self._numbers = {
            name: make_variable(_finite(column), name)
            for name, column in numbers_of(settings).items()
        }
        unused = np.zeros((len(settings), self.history_length), np.float32)
        is_ordered = needs_order(self._settings.rule)
        self._values = make_variable(unused, "values")
        self._ordered = make_variable(unused, "ordered") if is_ordered else None
        self._counts = make_variable(np.zeros((len(settings), 1), np.int64), "counts")
        self._before = make_variable(np.zeros((len(settings), 1), np.int64), "before")
        # Windows that an eager step was about to assign.
        self._unfinished: Windows | None = None

    # -- settings ----------------------------------------------------------------------------

    def fits(self, settings: Sequence[GroupSettings]) -> bool:
        """Whether there are variables for all numbers that `settings` use."""
        return numbers_of(settings).keys() <= self._numbers.keys()

    def change_settings(self, settings: Sequence[GroupSettings]) -> None:
        """Replace the numbers of all rows, in traced graphs too, by others that fit."""
        shape = (len(settings), 1)
        unused = {
            "max_norm": np.full(shape, np.inf),
            "warmup_steps": np.zeros(shape, np.int64),
            "drops": np.zeros(shape, bool),
        }
        columns = {**unused, **numbers_of(settings)}
        for name, variable in self._numbers.items():
            variable.assign(_finite(columns[name]))

    def _read_numbers(self) -> dict[str, tf.Tensor]:
        return {name: variable.read_value() for name, variable in self._numbers.items()}

    # -- a step ------------------------------------------------------------------------------

    def record(self, norms: tf.Tensor) -> Report[tf.Tensor]:
        """Compare one norm a row with its threshold, and append it to the row's window.

        Args:
            norms: float64[rows, 1].

        Returns:
            A report of float64[rows, 1], without names; thresholds of rows that clip nothing are
            `OPS.unlimited`.
        """
        windows, report = record(self._settings, self._read_numbers(), self._read_windows(), norms)
        self._assign(windows)
        return report

    def thresholds(self) -> tf.Tensor:
        """float64[rows, 1]: the thresholds of the windows as they are now; see `record`."""
        return thresholds_of(self._settings, self._read_numbers(), self._read_windows())

    # -- windows -----------------------------------------------------------------------------

    def _read_windows(self) -> Windows:
        if self._unfinished is not None:
            with tf.init_scope():
                self._assign(self._unfinished)
        # Read first: XLA cannot gather from a variable, only from what was read.
        ordered = None if self._ordered is None else self._ordered.read_value()
        values, counts = self._values.read_value(), self._counts.read_value()
        return Windows(OPS, self.history_length, values, ordered, counts, self._before)

    def _assign(self, windows: Windows) -> None:
        # An interrupt between the assignments: the next call makes up for the rest.
        self._unfinished = windows if is_resumable() else None
        # Dense assignments, never scattered ones: those are not mirrored over replicas.
        self._values.assign(windows.values)
        if self._ordered is not None:
            self._ordered.assign(windows.ordered)
        self._counts.assign(windows.counts)
        if windows.before is not self._before:
            self._before.assign(windows.before)
        self._unfinished = None

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy all windows out; see `autoclip.core.History.read`."""
        windows = self._read_windows()
        values, counts, before = (
            each.numpy() for each in (windows.values, windows.counts, windows.before)
        )
        return unpack(values, counts, before, self.history_length)

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows; of one longer than `history_length` the newest norms stay."""
        self.stage(windows, recorded)()

    def stage(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> Callable[[], None]:
        """See `autoclip.core.History.stage`."""
        length = self.history_length
        values, counts, before = pack(windows, recorded, length, length)
        ordered = None if self._ordered is None else np.sort(values, axis=1)
        packed = Windows(OPS, length, values, ordered, counts, before)
        return partial(self._assign, packed)

    def once(self, norms: tf.Tensor) -> Callable[[], Any]:
        """See `autoclip.core.History.once`."""
        return partial(self._record_once, self._counts.numpy(), norms)

    def _record_once(self, before: npt.NDArray[np.int64], norms: tf.Tensor) -> None:
        if (self._read_windows().counts.numpy() == before).all():
            self.record(norms)


def _finite(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """No infinities: `tf.debugging.enable_check_numerics` refuses them."""
    return np.where(np.isinf(column), OPS.unlimited, column).astype(column.dtype)
