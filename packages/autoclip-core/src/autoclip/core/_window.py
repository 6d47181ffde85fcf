"""Windows of recorded norms: their layout, and the view of them that rules get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from autoclip.core._ops import NumpyOps, Ops
from autoclip.core._rules.rule import Rule


@dataclass(frozen=True)
class Windows:
    """The windows of many rows, in the arrays of a framework.

    The norm that came as the k-th (from 0) into a row's window is in slot `k % history_length`. So
    a norm that leaves makes room for the one that comes, and sums have the same bits after a load.
    Unused slots hold zero, which no history records.

    Attributes:
        ops: the operations of the framework.
        history_length: the maximum number of norms a row keeps.
        values: float32[rows, capacity], one ring a row. A capacity below `history_length` must be
            extended before a step that needs a further slot.
        ordered: the same in ascending order, zeros first; None if the rule does not need it.
        counts: int64[rows, 1], how many norms have come into each window.
        before: int64[rows, 1], how many the row had recorded before: not 0 for a window that was
            loaded into a longer history.
    """

    ops: Ops
    history_length: int
    values: Any
    ordered: Any
    counts: Any
    before: Any

    @cached_property
    def lengths(self) -> Any:
        """int64[rows, 1]: how many norms each window holds."""
        return self.ops.minimum(self.counts, self.history_length)

    @property
    def recorded(self) -> Any:
        """int64[rows, 1]: how many norms each row has ever recorded."""
        return self.counts + self.before

    def push(self, norms: Any, usable: Any) -> Windows:
        """The windows with one norm appended to each row where `usable`; both [rows, 1].

        The present arrays are donated.
        """
        ops, slot = self.ops, self.counts % self.history_length
        held = ops.take(self.values, slot)
        # A row that does not record takes back the norm that it held.
        came = ops.where(usable, norms, held)
        return self.replace(slot, came, held, self.counts + ops.whole(usable))

    def replace(self, slot: Any, came: Any, left: Any, counts: Any) -> Windows:
        """The windows with `came` instead of `left` at `slot`, and other counts."""
        ordered = self.ordered
        if ordered is not None:
            ordered = self.ops.insert(ordered, came, left)
        values = self.ops.put(self.values, slot, came)
        return Windows(self.ops, self.history_length, values, ordered, counts, self.before)

    def apply(self, rule: Rule, arguments: Mapping[str, Any], norm: Any = None) -> tuple[Any, Any]:
        """The rule's thresholds, and the norms that gradients above them are scaled to.

        Args:
            rule: one of the rows' rules.
            arguments: the settings as `Rule.threshold` takes them.
            norm: [rows, 1], the gradients' norms; None if only thresholds are asked for.

        Returns:
            [rows, 1] each, `ops.unlimited` for empty windows; twice the same if the rule scales to
            its threshold.
        """
        ops, rows = self.ops, int(self.counts.shape[0])
        window = Window(self)
        found = ops.column(rule.threshold(window, **arguments), rows)
        filled = self.lengths > 0
        thresholds = ops.where(filled, found, ops.unlimited)
        if norm is None or type(rule).clip_to is Rule.clip_to:
            return thresholds, thresholds
        above = filled & (norm > found)
        norm = ops.where(above, norm, ops.unlimited)  # the rule's targets elsewhere are not used
        target = rule.clip_to(window, norm, found, **arguments)
        if target is found:
            return thresholds, thresholds
        return thresholds, ops.where(above, ops.column(target, rows), ops.unlimited)


class Window:
    """The windows of many rows, as a rule sees them.

    Rules combine these arrays with Python's operators and with each other's results: the same rule
    then runs in NumPy, PyTorch and TensorFlow. All numbers are float64 (float32 on devices that
    lack it).

    Args:
        windows: the norms that the rows have recorded.
    """

    def __init__(self, windows: Windows) -> None:
        self._ops = windows.ops
        self._windows = windows
        self._capacity = int(windows.values.shape[1])

    @cached_property
    def norms(self) -> Any:
        """[rows, length], the recorded norms, in no particular order.

        If a window is not full, the rest holds zeros; `sum`, `mean` and `quantile` leave them out.
        """
        return self._ops.wide(self._windows.values)

    @cached_property
    def age(self) -> Any:
        """[rows, length], how many norms the row has recorded since: 0 for the newest.

        [1, length] if all rows are known to have the same.
        """
        newest = self._ops.common(self._windows.counts) - 1
        ages = (newest - self._ops.slots(self._capacity)) % self._windows.history_length
        return self._ops.wide(ages)

    @cached_property
    def count(self) -> Any:
        """[rows, 1], how many norms each window holds; at least 1."""
        return self._ops.wide(self._held)

    @cached_property
    def _held(self) -> Any:
        return self._ops.maximum(self._windows.lengths, 1)

    @cached_property
    def _valid(self) -> Any:
        """Mask of the slots that hold a norm; None if all are known to."""
        full = self._ops.are_all(self._windows.lengths == self._capacity)
        return None if full else self._windows.values > 0

    def _masked(self, values: Any, rest: float) -> Any:
        """`values` at the window's norms, and `rest` in unused slots."""
        return values if self._valid is None else self._ops.where(self._valid, values, rest)

    def sum(self, values: Any = None) -> Any:
        """The sum over each window.

        Args:
            values: [rows, length], the summands; the norms by default.

        Returns:
            [rows, 1].
        """
        if values is None:
            values = self.norms
        if values is not self.norms:  # which have zeros in unused slots
            values = self._masked(values, 0.0)
        return self._ops.sum(values)

    def mean(self, values: Any = None) -> Any:
        """The mean over each window; see `sum`."""
        return self.sum(values) / self.count

    def quantile(self, q: Any, values: Any = None) -> Any:
        """A quantile of each window, interpolated linearly as `numpy.quantile` does by default.

        Args:
            q: in [0, 1]; a number or [rows, 1].
            values: [rows, length]; the norms by default.

        Returns:
            [rows, 1].
        """
        ops = self._ops
        if values is not None:
            ordered = ops.sort(self._masked(values, -ops.unlimited))
        elif self._windows.ordered is None:
            ordered = ops.sort(self._windows.values)
        else:
            ordered = self._windows.ordered
        held, capacity = self._windows.lengths, self._capacity
        position = q * (ops.wide(held) - 1)
        lower = ops.whole(position)
        # Unused slots come first. The highest norm has no next one; t is 0 there.
        slots = lower + (ops.slots(2) + capacity - held)
        found = ops.take(ordered, ops.minimum(slots, capacity - 1))
        a, b = ops.halves(ops.wide(found))
        return interpolate(ops, a, b, position - ops.wide(lower))

    def log(self, values: Any) -> Any:
        """The natural logarithm.

        Args:
            values: [rows, length] or [rows, 1], positive.
        """
        if self._is_window(values):
            values = self._masked(values, 1.0)
        return self._ops.log(values)

    def exp(self, values: Any) -> Any:
        """The exponential function.

        Args:
            values: [rows, length] or [rows, 1].
        """
        if self._is_window(values):
            values = self._masked(values, 0.0)
        return self._ops.exp(values)

    def _is_window(self, values: Any) -> bool:
        return int(values.shape[-1]) == self._capacity


def interpolate(ops: Ops, a: Any, b: Any, t: Any) -> Any:
    """Between neighboring values, from the nearer one: the same bits as `numpy.quantile`."""
    is_lower = t < 0.5
    return ops.where(is_lower, a, b) + (b - a) * ops.where(is_lower, t, t - 1)


class _Probe(Window):
    """A window of one norm; records whether a rule asks for quantiles of the norms themselves."""

    def __init__(self) -> None:
        one, none = np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64)
        super().__init__(Windows(NumpyOps(), 1, one.astype(np.float32), None, one, none))
        self.asked = False

    def quantile(self, q: Any, values: Any = None) -> Any:
        """See `Window.quantile`."""
        self.asked |= values is None
        return super().quantile(q, values)


def needs_order(rule: Rule) -> bool:
    """True if a rule computes quantiles of the norms themselves, so that sorted windows pay off."""
    probe = _Probe()
    with np.errstate(all="ignore"):
        arguments = {
            name: np.full((1, 1), value) if isinstance(value, float) else value
            for name, value in rule.settings.items()
        }
        rule.threshold(probe, **arguments)
    return probe.asked


# -- from lists of norms to windows and back -----------------------------------------------------


def slots_of(count: int, history_length: int) -> npt.NDArray[np.int64]:
    """int64[length]: the slots of a window's norms, oldest first, of which `count` have come."""
    return np.arange(max(0, count - history_length), count) % history_length


def counts_of(
    lengths: npt.NDArray[np.int64], recorded: npt.NDArray[np.int64], history_length: int
) -> npt.NDArray[np.int64]:
    """int64[rows]: how many norms have come into each window."""
    return np.where(lengths == history_length, recorded, lengths)


def pack(
    windows: Sequence[npt.NDArray[np.float32]],
    recorded: Sequence[int] | npt.NDArray[np.int64],
    history_length: int,
    capacity: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lay windows out as `Windows` describes.

    Args:
        windows: of each row, oldest norm first; of one that is too long the newest stay.
        recorded: the number of norms each row has ever recorded.
        history_length: the maximum number of norms a row keeps.
        capacity: the number of slots of a row.

    Returns:
        `values`, `counts` and `before`.
    """
    lengths = np.array([min(len(window), history_length) for window in windows], np.int64)
    recorded = np.asarray(recorded, np.int64)
    counts = counts_of(lengths, recorded, history_length)
    values = np.zeros((len(windows), capacity), np.float32)
    for row, (window, count) in enumerate(zip(windows, counts.tolist())):
        values[row, slots_of(count, history_length)] = window[-history_length:]
    return values, counts[:, None], (recorded - counts)[:, None]


def unpack(
    values: npt.NDArray[np.float32],
    counts: npt.NDArray[np.int64],
    before: npt.NDArray[np.int64],
    history_length: int,
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    """The windows of each row, oldest norm first, and how many norms each has ever recorded."""
    windows = [
        ring[slots_of(count, history_length)] for ring, count in zip(values, counts[:, 0].tolist())
    ]
    return windows, (counts + before)[:, 0]
