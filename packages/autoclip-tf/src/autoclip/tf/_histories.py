"""The histories of norms, in variables, with steps that run inside of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report
from autoclip.core import adapter as core
from autoclip.core.adapter import (
    BaseTensorHistory,
    Change,
    GroupSettings,
    Storage,
    Windows,
    needs_order,
    numbers_of,
    pack,
    record,
    thresholds_of,
)
from autoclip.tf._ops import OPS
from autoclip.tf._private import to_host

_MOST_BYTES = 2**36


def check_memory(settings: Sequence[GroupSettings]) -> None:
    """Refuse histories that no memory holds; TensorFlow allocates windows in full.

    Args:
        settings: of each row.

    Raises:
        ValueError: all windows together take more than 64 GiB.
    """
    # Two copies, one of them sorted, of 4 bytes a norm.
    nbytes = 8 * sum(each.history_length for each in settings)
    if nbytes > _MOST_BYTES:
        longest = max(each.history_length for each in settings)
        rows = "one history" if len(settings) == 1 else f"{len(settings)} histories"
        raise ValueError(
            f"history_length={longest} takes {nbytes / 2**30:,.0f} GiB for {rows}: TensorFlow "
            "allocates windows in full, 8 bytes a norm. Choose a shorter one, or "
            "global_clipping=True, which keeps a single history."
        )


def make_variable(value: Any, name: str) -> tf.Variable:
    """Make a variable of a clipper: not trained, the same on every replica."""
    return tf.Variable(
        value,
        trainable=False,
        name=f"autoclip/{name}",
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def _is_resumable() -> bool:
    """True if an interrupted step can be completed by a later call: eagerly, and on one replica.

    Replicas run in threads of their own, and each would complete the others' step.
    """
    return tf.executing_eagerly() and tf.distribute.get_strategy().num_replicas_in_sync == 1


class TensorHistory(BaseTensorHistory):
    """The windows of many rows in variables; a step is made of tensor operations alone.

    Windows are allocated in full: a graph cannot let a variable grow. For rules that ask for
    quantiles of the norms, sorted windows are kept as well.

    Args:
        settings: of each row, with equal `structure`.
    """

    def __init__(self, settings: Sequence[GroupSettings]) -> None:
        self._settings = tuple(settings)
        self._numbers = {
            name: make_variable(_finite(column), name)
            for name, column in numbers_of(settings).items()
        }
        unused = np.zeros((len(settings), self.history_length), np.float32)
        is_ordered = needs_order(settings[0].rule)
        self._values = make_variable(unused, "values")
        self._ordered = make_variable(unused, "ordered") if is_ordered else None
        self._counts = make_variable(np.zeros((len(settings), 1), np.int64), "counts")
        self._before = make_variable(np.zeros((len(settings), 1), np.int64), "before")
        # Windows that an eager step was about to assign.
        self._unfinished: Windows | None = None

    # -- settings ----------------------------------------------------------------------------

    def _change(self, settings: tuple[GroupSettings, ...], rows: list[int]) -> None:
        # Graphs that are traced already read the numbers.
        columns = numbers_of(settings, always=self._numbers)
        for name, variable in self._numbers.items():
            variable.assign(_finite(columns[name]))
        self._settings = settings  # last: after an interrupt, the same change counts again

    def fits(self, settings: Sequence[GroupSettings]) -> bool:
        """True if there are variables for all numbers in `settings`, of each row."""
        return numbers_of(settings).keys() <= self._numbers.keys()

    def _read_numbers(self) -> dict[str, tf.Tensor]:
        return {name: variable.read_value() for name, variable in self._numbers.items()}

    # -- a step ------------------------------------------------------------------------------

    @property
    def thresholds(self) -> tf.Tensor:
        """float64[rows, 1]: the thresholds of the windows as they are now; see `record`."""
        return thresholds_of(self._settings[0], self._read_numbers(), self._read_windows())

    def record(self, norms: tf.Tensor) -> Report[tf.Tensor]:
        """Compare one norm a row with its threshold, and append it to the row's window.

        Args:
            norms: float64[rows, 1].

        Returns:
            A report of float64[rows, 1], without names; thresholds of rows that clip nothing are
            `OPS.unlimited`.
        """
        windows, report = record(
            self._settings[0], self._read_numbers(), self._read_windows(), norms
        )
        self._assign(windows)
        return report

    # -- windows -----------------------------------------------------------------------------

    def _read_windows(self) -> Windows:
        if self._unfinished is not None:
            with tf.init_scope():
                self._assign(self._unfinished)
        # Read first: XLA cannot gather from a variable, only from a value that was read.
        ordered = None if self._ordered is None else self._ordered.read_value()
        values, counts = self._values.read_value(), self._counts.read_value()
        return Windows(OPS, self.history_length, values, ordered, counts, self._before)

    def _assign(self, windows: Windows) -> None:
        # An interrupt between the assignments: the next call makes up for the rest.
        self._unfinished = windows if _is_resumable() else None
        # Dense assignments, never scattered ones: those are not mirrored over replicas.
        self._values.assign(windows.values)
        if self._ordered is not None:
            self._ordered.assign(windows.ordered)
        self._counts.assign(windows.counts)
        if windows.before is not self._before:
            self._before.assign(windows.before)
        self._unfinished = None

    @staticmethod
    def _to_host(tensor: Any) -> npt.NDArray[Any]:
        return to_host(tensor)

    def _mark(self) -> tf.Tensor:
        return self._read_windows().counts

    def _stage_all(
        self, windows: list[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> Callable[[], None]:
        length = self.history_length
        values, counts, before = pack(windows, recorded, length, length)
        ordered = None if self._ordered is None else np.sort(values, axis=1)
        return partial(self._assign, Windows(OPS, length, values, ordered, counts, before))


class Histories(core.Histories[TensorHistory]):
    """The histories of all rows of a clipper; none before it is built.

    Args:
        settings: of each row.

    Raises:
        ValueError: the histories are larger than memory.
    """

    def __init__(self, settings: Sequence[GroupSettings] = ()) -> None:
        check_memory(settings)
        super().__init__(lambda settings, device: TensorHistory(settings), settings)
        self.arrange([None] * len(settings))
        # The position of each row if storages are put one after the other.
        self._order = np.argsort([row for storage in self.storages for row in storage.rows])

    def in_order(self, parts: Sequence[tuple[Storage[TensorHistory], tf.Tensor]]) -> tf.Tensor:
        """[rows, 1] in the order of the rows, from the parts of the storages."""
        tensors = [tensor for _, tensor in parts]
        return tensors[0] if len(tensors) == 1 else tf.gather(tf.concat(tensors, 0), self._order)

    def joined(
        self, reports: Sequence[tuple[Storage[TensorHistory], Report[tf.Tensor]]]
    ) -> Report[tf.Tensor]:
        """One report of all rows, from those of the storages."""
        names = ("norms", "thresholds", "coefficients")
        parts = ([(storage, getattr(each, name)) for storage, each in reports] for name in names)
        return Report(*map(self.in_order, parts))

    def change(self, rows: Iterable[int], settings: GroupSettings) -> list[Change]:
        """See `autoclip.core.adapter.Histories`; graphs that are traced already follow.

        Raises:
            ValueError: the settings differ in something that a traced graph cannot change. Nothing
                has changed.
        """
        changed = set(rows) if self.settings else set()  # before `build` groups have no rows
        for row in changed:
            if self.settings[row].on_nonfinite != settings.on_nonfinite:
                raise ValueError(
                    "on_nonfinite cannot change once the clipper knows its variables: graphs that "
                    "are traced already would not follow. Make a new clipper."
                )
            if self.settings[row].structure != settings.structure:
                raise ValueError(_CANNOT_CHANGE)
        for storage in self.storages:
            new = [settings if row in changed else self.settings[row] for row in storage.rows]
            if not changed.isdisjoint(storage.rows) and not storage.history.fits(new):
                raise ValueError(_CANNOT_CHANGE)
        return super().change(changed, settings)

    @property
    def _is_resumable(self) -> bool:
        return _is_resumable()

    def finish(self) -> None:
        if self._unfinished:
            with tf.init_scope():
                super().finish()


def _finite(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Replace infinities, which `tf.debugging.enable_check_numerics` refuses."""
    return np.where(np.isinf(column), OPS.unlimited, column).astype(column.dtype)


_CANNOT_CHANGE = (
    "This setting cannot change once the clipper knows its variables: graphs that are traced "
    "already would not follow. Numbers of the rule can, and so can max_norm, warmup_steps and "
    "on_spike where a parameter group used them from the start. Make a new clipper, or give the "
    "setting in group_settings."
)
