"""One step: gradients → norms → rows → thresholds → coefficients → gradients.

"Global" is that pipeline with one row for all variables, "by group" with one for each parameter
group, "parameter-wise" with one for each variable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from autoclip.core import Report
from autoclip.core.adapter import GroupSettings, Mode, nonfinite_message, row_names
from autoclip.tf._groups import Group, Variable
from autoclip.tf._history import make_variable
from autoclip.tf._norms import Gradient, gradient_norms, root_of_squares
from autoclip.tf._private import compiled_by_xla, name_of, variable_key
from autoclip.tf._rows import Rows
from autoclip.tf._scaling import scale
from autoclip.tf._sums import StepSums

__all__ = ["GradsAndVars", "Pipeline"]

GradsAndVars: TypeAlias = Iterable[tuple[Gradient | None, Variable]]
"""What `optimizer.apply_gradients` takes: (gradient, variable) pairs, None for no gradient."""


class Pipeline:
    """What a clipper has once it knows its variables: rows, and what a step does with them.

    A plain object: neither Keras nor TensorFlow finds the variables in it, so they never become
    an optimizer's or a model's.

    Args:
        groups: all parameter groups.
        mode: what a row stands for.
        owner: the name of the clipper's class, for messages.
        sums: what steps are added to, for a callback.
    """

    def __init__(self, groups: Sequence[Group], mode: Mode, owner: str, sums: StepSums) -> None:
        self.groups = groups
        self._mode = mode
        self._owner = owner
        variables = [variable for group in groups for variable in group.variables]
        self.index = {variable_key(variable): i for i, variable in enumerate(variables)}
        self._names = [name_of(variable) for variable in variables]
        group_of = np.repeat(np.arange(len(groups)), [len(group.variables) for group in groups])
        # The row of each variable, and the rows of each group.
        if mode == "parameter":
            self._row_of = np.arange(len(variables))
            self.rows_of = [np.flatnonzero(group_of == i).tolist() for i in range(len(groups))]
        else:
            self._row_of = group_of if mode == "group" else np.zeros_like(group_of)
            self.rows_of = [[i if mode == "group" else 0] for i in range(len(groups))]
        self.row_names = row_names(mode, self._names, len(groups))
        policies = np.array(
            [group.settings.on_nonfinite for group in groups for _ in group.variables]
        )
        self._zeroes, self._raises = policies == "zero", policies == "raise"
        self._drops = self._zeroes | self._raises
        self.rows = Rows(self._settings([group.settings for group in groups]))
        # Norms, thresholds and coefficients in one variable: each assignment costs time. Zeros
        # throughout say that there is nothing to report; a step has coefficients of 1 where norms
        # are 0.
        self._report = make_variable(np.zeros((len(self.rows), 3)), "report")
        self._steps = make_variable(np.zeros((), np.int64), "steps")
        self._sums = sums
        sums.build(len(self.rows))
        self._faults = (
            make_variable(np.zeros(len(variables), bool), "faults") if self._raises.any() else None
        )

    # -- settings ----------------------------------------------------------------------------

    def _settings(self, by_group: Sequence[GroupSettings]) -> list[GroupSettings]:
        """The settings of each row."""
        if self._mode == "parameter":
            return [by_group[i] for i, rows in enumerate(self.rows_of) for _ in rows]
        return list(by_group if self._mode == "group" else by_group[:1])

    def change_settings(self, by_group: Sequence[GroupSettings]) -> None:
        """Replace the settings of the groups; graphs that are traced already follow.

        Raises:
            ValueError: a traced graph cannot follow. Nothing has changed.
        """
        for group, new in zip(self.groups, by_group):
            if new.on_nonfinite != group.settings.on_nonfinite:
                raise ValueError(
                    "on_nonfinite cannot change once the clipper knows its variables: graphs that "
                    "are traced already would not follow. Make a new clipper."
                )
        self.rows.change_settings(self._settings(by_group))
        for group, new in zip(self.groups, by_group):
            group.settings = new

    # -- a step ------------------------------------------------------------------------------

    def clip(
        self, pairs: Sequence[tuple[Gradient | None, Variable]]
    ) -> list[tuple[Gradient | None, Variable]]:
        """The pairs with clipped gradients, in the same order; records the norms.

        Raises:
            TypeError: a gradient is of integers.
            ValueError: a variable is unknown, or appears more than once.
            FloatingPointError: see `Clipper`.
        """
        gradients: list[Gradient | None] = [None] * len(self.index)
        places: dict[int, None] = {}  # ordered, and quick to ask: eagerly this runs at each step
        for gradient, variable in pairs:
            place = self.index.get(variable_key(variable))
            if place is None:
                raise ValueError(
                    f"{name_of(variable)!r} is not among the {len(self.index)} variables that "
                    f"this {self._owner} was built with. A history belongs to its variable: make "
                    "a new clipper for new variables."
                )
            if place in places:
                raise ValueError(
                    f"{name_of(variable)!r} appears more than once among the variables."
                )
            if gradient is not None:
                _check_dtype(gradient, variable)
            places[place] = None
            gradients[place] = gradient
        present = [place for place in places if gradients[place] is not None]
        if not present:
            self._report.assign(tf.zeros_like(self._report))
            self._steps.assign_add(1)
            return list(pairs)
        with tf.name_scope("autoclip"):
            scaled = self._clip_present(gradients, present)
        for place, gradient in zip(present, scaled):
            gradients[place] = gradient
        return [(gradients[place], variable) for place, (_, variable) in zip(places, pairs)]

    def _clip_present(
        self, gradients: Sequence[Gradient | None], present: Sequence[int]
    ) -> list[Gradient]:
        xla = compiled_by_xla()
        norms = gradient_norms(gradients, xla)
        finite = tf.math.is_finite(norms) if self._drops.any() else None
        after: list[tf.Operation] = []
        if self._faults is not None:
            fine = finite | ~self._raises
            if xla:
                # No assertion stops the program here. So that the words of the error are true,
                # nothing is recorded in this step either.
                self._faults.assign(self._faults.read_value() | ~fine)
                norms = tf.where(tf.reduce_all(fine), norms, np.nan)
            else:
                after = self._refuse_nonfinite(fine)
        with tf.control_dependencies(after):
            report = self.rows.record(self._row_norms(tf.identity(norms), finite))
            numbers = tf.concat([report.norms, report.thresholds, report.coefficients], axis=1)
            self._report.assign(numbers)
            self._steps.assign_add(1)
            if self._sums.enabled:
                self._sums.add(numbers)
            if len(self.rows) == 1:  # a scalar costs no operation for each gradient
                factors = tf.reshape(report.coefficients, [])
            else:
                by_row = tf.reshape(report.coefficients, [-1])
                factors = _at(by_row, self._row_of[list(present)])
            if finite is not None:
                dropped = _at(~finite & self._drops, present)
                factors = tf.where(dropped, tf.zeros((), tf.float64), factors)
            given = [gradients[place] for place in present]
            # Constants to a tape, eagerly and in a graph: eagerly they have been on the host.
            factors = tf.stop_gradient(factors)
            return scale(given, factors, xla, may_be_zero=finite is not None)

    def _row_norms(self, norms: tf.Tensor, finite: tf.Tensor | None) -> tf.Tensor:
        """float64[rows, 1]: the norms of what the rows stand for, from those of all variables."""
        if finite is not None and self._zeroes.any():
            # Such a gradient becomes zero: the norm is that of what is left.
            norms = tf.where(self._zeroes & ~finite, tf.zeros((), tf.float64), norms)
        if self._mode == "parameter":
            by_row = norms
        elif len(self.rows) == 1:
            by_row = root_of_squares(norms)
        else:
            members = [np.flatnonzero(self._row_of == i) for i in range(len(self.rows))]
            by_row = tf.stack([root_of_squares(tf.gather(norms, each)) for each in members])
        return tf.reshape(by_row, [-1, 1])

    def _refuse_nonfinite(self, fine: tf.Tensor) -> list[tf.Operation]:
        """Raise, or an operation that fails when it runs, unless all is fine."""
        if tf.executing_eagerly():
            found = fine.numpy()
            if not found.all():
                raise FloatingPointError(self._nonfinite_message(~found))
            return []
        # The text for one name and that for several, around whatever names there will be.
        one, many = (nonfinite_message(["\0"] * n).split(", ".join(["\0"] * n)) for n in (1, 2))
        names = tf.boolean_mask(tf.constant(self._names), ~fine)
        several = tf.size(names) > 1
        joined = tf.strings.reduce_join(names, separator=", ")
        text = tf.where(several, many[0], one[0]) + joined + tf.where(several, many[1], one[1])
        return [tf.debugging.Assert(tf.reduce_all(fine), [text], name="finite")]

    def _nonfinite_message(self, faults: Any) -> str:
        return nonfinite_message([self._names[i] for i in np.flatnonzero(faults)])

    # -- after a step ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise for a gradient that XLA could not refuse; see `Clipper.check`."""
        if self._faults is None:
            return
        faults = self._faults.numpy()
        if faults.any():
            self._faults.assign(np.zeros_like(faults))
            raise FloatingPointError(
                self._nonfinite_message(faults)
                + " XLA cannot stop a step: the gradient was set to zero."
            )

    @property
    def report(self) -> Report[tf.Tensor] | None:
        """What the last step did, or None if there was none with a gradient.

        In a graph, which cannot know that, it is always the report.
        """
        if tf.executing_eagerly():
            # Made into tensors after the cast: thresholds may be infinite, and under
            # tf.debugging.enable_check_numerics no operation may return that.
            found = self.read_report()
            if found is None:
                return None
            numbers = (found.norms, found.thresholds, found.coefficients)
            norms, thresholds, coefficients = map(tf.constant, numbers)
        else:
            values = tf.cast(self._report.read_value(), tf.float32)
            norms, thresholds, coefficients = tf.unstack(values, axis=1)
        return Report(norms, thresholds, coefficients, self.row_names)

    @property
    def total_norm(self) -> tf.Tensor | None:
        """float32[]: the norm of all gradients of the last step together; 0 if it had none.

        None before the first step; in a graph, which cannot know that, it is 0.
        """
        if tf.executing_eagerly() and not self.steps:
            return None
        return tf.cast(root_of_squares(self._report.read_value()[:, 0]), tf.float32)

    @property
    def steps(self) -> int:
        """How often `clip` has run, with or without gradients, since it was made or reset.

        Waits for the device. The report is a new one exactly if this has changed. If the
        optimizer's iterations grow and this does not, updates pass by the clipper: their graph was
        traced before it was attached.
        """
        return int(self._steps.numpy())

    def read_report(self) -> Report[npt.NDArray[np.float32]] | None:
        """The same in NumPy's arrays, with one read from the device; outside of any graph."""
        values = self._report.read_value().numpy()
        if not values.any():
            return None
        with np.errstate(over="ignore"):  # the threshold of a row that clips nothing
            norms, thresholds, coefficients = values.astype(np.float32).T
        return Report(norms, thresholds, coefficients, self.row_names)

    def reset(self) -> None:
        """Forget all norms and the last step."""
        empty = [np.empty(0, np.float32)] * len(self.rows)
        self.rows.write(empty, np.zeros(len(self.rows), np.int64))
        self._report.assign(tf.zeros_like(self._report))
        self._steps.assign(0)


def _check_dtype(gradient: Gradient, variable: Variable) -> None:
    dtype = getattr(gradient, "dtype", None)  # NumPy arrays pass: TensorFlow converts them
    if isinstance(dtype, tf.DType) and not (dtype.is_floating or dtype.is_complex):
        raise TypeError(
            f"The gradient of {name_of(variable)!r} is of {dtype.name}, and AutoClip clips "
            "floating-point and complex ones. Leave this variable out, or cast its gradient."
        )


def _at(values: tf.Tensor, places: Sequence[int] | Any) -> tf.Tensor:
    """Values at some places; at all of them, as nearly always, without an operation."""
    places = list(places)
    return values if places == list(range(values.shape[0])) else tf.gather(values, places)
