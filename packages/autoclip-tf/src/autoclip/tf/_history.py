"""Windows of norms as variables: what `autoclip.core.History` does, inside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report, Rule
from autoclip.core.adapter import GroupSettings, is_recorded, needs_order
from autoclip.tf._window import TensorWindow

__all__ = ["TensorHistory", "check_memory", "make_variable"]

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


class _Numbers:
    """Settings that are numbers, one a row, in variables, so that traced graphs see changes.

    What no row uses has no variable and costs nothing.
    """

    def __init__(self, settings: Sequence[GroupSettings]) -> None:
        self._variables = {
            name: make_variable(column, name) for name, column in _columns(settings).items()
        }

    def fits(self, settings: Sequence[GroupSettings]) -> bool:
        """Whether there are variables for all that `settings` use."""
        return _columns(settings).keys() <= self._variables.keys()

    def assign(self, settings: Sequence[GroupSettings]) -> None:
        columns = {**self._unused(len(settings)), **_columns(settings)}
        for name, variable in self._variables.items():
            variable.assign(columns[name])

    def _unused(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        return {
            "max_norm": np.full((rows, 1), np.inf),
            "warmup_steps": np.zeros((rows, 1), np.int64),
            "drops": np.zeros((rows, 1), bool),
        }

    def read(self, name: str) -> tf.Tensor | None:
        """[rows, 1]; None if no row uses it."""
        variable = self._variables.get(name)
        return None if variable is None else variable.read_value()


def _columns(settings: Sequence[GroupSettings]) -> dict[str, npt.NDArray[Any]]:
    """The numbers that some row uses, by name: [rows, 1]."""
    found: dict[str, npt.NDArray[Any]] = {}
    if any(each.max_norm is not None for each in settings):
        ceilings = [np.inf if each.max_norm is None else each.max_norm for each in settings]
        found["max_norm"] = np.array(ceilings, np.float64)
    if any(each.warmup_steps for each in settings):
        found["warmup_steps"] = np.array([each.warmup_steps for each in settings], np.int64)
    if any(each.on_spike != "clip" for each in settings):
        found["drops"] = np.array([each.on_spike != "clip" for each in settings])
    for name, value in settings[0].rule.settings.items():
        if isinstance(value, float):
            numbers = [getattr(each.rule, name) for each in settings]
            found[f"rule/{name}"] = np.array(numbers, np.float64)
    return {name: numbers[:, None] for name, numbers in found.items()}


class TensorHistory:
    """The windows of many rows; `record` is made of tensor operations alone.

    Windows are allocated in full: a graph cannot let a variable grow. For rules that ask for
    quantiles of the norms it keeps the windows sorted besides: a step moves what lies between the
    norm that leaves and the one that comes by one place, for all rows at once. Rows that do not
    record are masked.

    Args:
        settings: of each row, of equal `structure`.
    """

    def __init__(self, settings: Sequence[GroupSettings]) -> None:
        first, rows = settings[0], len(settings)
        self.history_length = first.history_length
        self._rule = first.rule
        self._includes_current = bool(first.include_current)
        self._records_clipped = first.record == "clipped"
        self._numbers = _Numbers(settings)
        # Unused slots hold infinity: a window that is not full loses one of them at each step.
        unused = np.full((rows, self.history_length), np.inf, np.float32)
        self._values = make_variable(unused, "values")
        self._ordered = make_variable(unused, "ordered") if needs_order(self._rule) else None
        # The length of each window, and how many norms it has ever recorded: each variable costs.
        self._counters = make_variable(np.zeros((rows, 2), np.int64), "counters")

    # -- settings ----------------------------------------------------------------------------

    def fits(self, settings: Sequence[GroupSettings]) -> bool:
        """Whether `settings`, one a row and of equal structure, can replace the present ones."""
        return self._numbers.fits(settings)

    def change_settings(self, settings: Sequence[GroupSettings]) -> None:
        """Replace the settings of all rows, in traced graphs too, by others that fit."""
        self._numbers.assign(settings)

    # -- a step ------------------------------------------------------------------------------

    def record(self, norms: tf.Tensor) -> Report[tf.Tensor]:
        """Compare one norm a row with its threshold, and append it to the row's window.

        As `autoclip.core.History.record` does.

        Args:
            norms: float64[rows, 1].

        Returns:
            A report of float64[rows, 1], without names.
        """
        windows = self._read_windows()
        before = windows.recorded
        rounded = tf.cast(norms, tf.float32)
        wide = tf.cast(rounded, tf.float64)
        usable = is_recorded(rounded)
        if self._includes_current:
            windows = windows.pushed(rounded, usable)
        raw, clip_to = self._judge(windows, wide)
        thresholds = self._limited(raw, before)
        targets = thresholds if clip_to is raw else self._limited(clip_to, before)
        # The ratio to the *rounded* norm, the one in the window: so the largest never clips.
        one = tf.ones((), tf.float64)
        coefficients = tf.where(usable, tf.minimum(targets / wide, one), one)
        if not self._includes_current:
            entered, enters = rounded, usable
            if self._records_clipped:
                entered = tf.cast(wide * coefficients, tf.float32)
                enters = usable & is_recorded(entered)
            windows = windows.pushed(entered, enters)
        self._assign_windows(windows)
        drops = self._numbers.read("drops")
        if drops is not None:
            coefficients = tf.where(
                drops & (coefficients < 1.0), tf.zeros((), tf.float64), coefficients
            )
        return Report(norms, thresholds, coefficients)

    def thresholds(self) -> tf.Tensor:
        """float64[rows, 1]: the thresholds of the windows as they are now."""
        windows = self._read_windows()
        return self._limited(self._judge(windows)[0], windows.recorded)

    def _judge(
        self, windows: _Windows, norms: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The rule's thresholds, and what it scales `norms` above them down to."""
        window = TensorWindow(windows.values, windows.ordered, windows.lengths, windows.recorded)
        filled, infinity = windows.lengths > 0, tf.constant(np.inf, tf.float64)
        arguments = {
            name: self._numbers.read(f"rule/{name}") if isinstance(value, float) else value
            for name, value in self._rule.settings.items()
        }

        def by_row(found: Any, where: tf.Tensor) -> tf.Tensor:
            column = tf.broadcast_to(tf.convert_to_tensor(found, tf.float64), [len(self), 1])
            return tf.where(where, column, infinity)

        found = self._rule.threshold(window, **arguments)
        raw = by_row(found, filled)
        if norms is None or type(self._rule).clip_to is Rule.clip_to:
            return raw, raw
        target = self._rule.clip_to(window, norms, found, **arguments)
        return raw, raw if target is found else by_row(target, filled & (norms > raw))

    def _limited(self, thresholds: tf.Tensor, recorded: tf.Tensor) -> tf.Tensor:
        """Thresholds after warm-up and below the ceiling."""
        warmups, ceilings = self._numbers.read("warmup_steps"), self._numbers.read("max_norm")
        if warmups is not None:
            infinity = tf.constant(np.inf, tf.float64)
            thresholds = tf.where(recorded >= warmups, thresholds, infinity)
        return thresholds if ceilings is None else tf.minimum(thresholds, ceilings)

    # -- windows -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._counters.shape[0])

    def _read_windows(self) -> _Windows:
        # Read first: XLA cannot gather from a variable, only from what was read.
        ordered = None if self._ordered is None else self._ordered.read_value()
        return _Windows(self._values.read_value(), ordered, self._counters.read_value())

    def _assign_windows(self, windows: _Windows) -> None:
        # Dense assignments, never scattered ones: those are not mirrored over replicas.
        self._values.assign(windows.values)
        if self._ordered is not None:
            self._ordered.assign(windows.ordered)
        self._counters.assign(windows.counters)

    def read(self) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
        """Copy all windows out; see `autoclip.core.History.read`."""
        values, counters = self._values.numpy(), np.array(self._counters.numpy(), np.int64)
        windows = [
            values[row, np.arange(count - length, count) % self.history_length]
            for row, (length, count) in enumerate(counters)
        ]
        return windows, counters[:, 1]

    def write(
        self, windows: Sequence[npt.NDArray[np.float32]], recorded: npt.NDArray[np.int64]
    ) -> None:
        """Replace all windows; of one longer than `history_length` the newest norms stay."""
        values = np.full((len(windows), self.history_length), np.inf, np.float32)
        counters = np.zeros((len(windows), 2), np.int64)
        for row, (window, count) in enumerate(zip(windows, recorded)):
            window = window[-self.history_length :]
            counters[row] = len(window), count
            values[row, np.arange(count - len(window), count) % self.history_length] = window
        self._values.assign(values)
        if self._ordered is not None:
            self._ordered.assign(np.sort(values, axis=1))
        self._counters.assign(counters)


class _Windows:
    """The windows of many rows as tensors.

    Args:
        values: float32[rows, history_length], the ring of each row.
        ordered: the same in ascending order, or None.
        counters: int64[rows, 2], `lengths` and `recorded`, which are its columns.
    """

    def __init__(self, values: tf.Tensor, ordered: tf.Tensor | None, counters: tf.Tensor) -> None:
        self.values, self.ordered, self.counters = values, ordered, counters
        self.lengths, self.recorded = tf.split(counters, 2, axis=1)

    def pushed(self, norms: tf.Tensor, usable: tf.Tensor) -> _Windows:
        """These windows with one norm appended to each row where `usable`; both [rows, 1]."""
        history_length = self.values.shape[1]
        slot = self.recorded % history_length
        # A slot that was never used holds infinity. A row that does not record takes back what it
        # held: nothing changes.
        held = tf.gather(self.values, slot, batch_dims=1)
        entered = tf.where(usable, norms, held)
        rows = np.arange(self.values.shape[0], dtype=np.int64)[:, None]
        values = tf.tensor_scatter_nd_update(
            self.values, tf.concat([rows, slot], axis=1), tf.reshape(entered, [-1])
        )
        ordered = self.ordered
        if ordered is not None:
            ordered = _replace_in_order(ordered, entered, held)
        counters = self.counters + tf.cast(usable, tf.int64)
        return _Windows(values, ordered, tf.minimum(counters, [history_length, tf.int64.max]))


def _replace_in_order(ordered: tf.Tensor, entered: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
    """Take `left` out of the sorted windows and put `entered` in; both float32[rows, 1].

    In a sorted row with the value v inserted, place j holds v clamped to what stood at j - 1 and
    at j. Of two neighbours in that, the lower one stays wherever it is smaller than the value
    that leaves, and the upper one moves down everywhere else: no search, no sort.
    """
    end = tf.fill(tf.shape(left), tf.constant(np.inf, tf.float32))
    inserted = tf.maximum(
        tf.minimum(entered, tf.concat([ordered, end], axis=1)),
        tf.concat([-end, ordered], axis=1),
    )
    lower, upper = inserted[:, :-1], inserted[:, 1:]
    return tf.where(lower < left, lower, upper)
