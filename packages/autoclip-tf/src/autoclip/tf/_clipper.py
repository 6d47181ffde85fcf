"""The clipper: variables and their groups, the pipeline of a step, and the state.

Gradients → norms → rows of the history → thresholds → coefficients → gradients. "Global" is that
pipeline with one row for all variables, "parameter-wise" with one row each.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import tensorflow as tf

from autoclip.core import (
    DEFAULT_HISTORY_LENGTH,
    GroupState,
    ParameterInfo,
    Report,
    Rule,
    Saveable,
    State,
    __version__,
    check_flag,
    check_group_settings,
    check_history_length,
    check_on_nonfinite,
    nonfinite_message,
)
from autoclip.tf._attach import Attachment, AttachmentHandle
from autoclip.tf._histories import make_variable
from autoclip.tf._norms import Gradient, gradient_norms, root_of_squares
from autoclip.tf._private import (
    KerasSaveable,
    Trackable,
    compiled_by_xla,
    name_of,
    native,
    saving_for_inference,
    variable_key,
)
from autoclip.tf._rows import Rows
from autoclip.tf._scaling import scale

__all__ = ["Clipper", "GradsAndVars"]

Variable: TypeAlias = Any
"""A `tf.Variable` or a `keras.Variable`."""

GradsAndVars: TypeAlias = Iterable[tuple[Gradient | None, Variable]]
"""What `optimizer.apply_gradients` takes: (gradient, variable) pairs, None for no gradient."""

ClipperT = TypeVar("ClipperT", bound="Clipper")

_STORED_STATE = "state"


class _Group:
    """One parameter group: its settings, and the variables that its pattern matched."""

    def __init__(self, rule: Rule, history_length: int, pattern: str | None) -> None:
        self.rule = rule
        self.history_length = history_length
        self.pattern = pattern
        self.variables: list[Variable] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.rule.settings, "history_length": self.history_length}


class _Built:
    """What a clipper has once it knows its variables.

    A plain object: neither Keras nor TensorFlow finds the variables in it, so they never become
    an optimizer's or a model's.
    """

    def __init__(self, groups: list[_Group], clipper: Clipper) -> None:
        self.groups = groups
        variables = [variable for group in groups for variable in group.variables]
        self.names = [name_of(variable) for variable in variables]
        self.index = {variable_key(variable): i for i, variable in enumerate(variables)}
        if clipper.global_clipping:
            defaults = groups[0]
            self.rows = Rows([defaults.rule], [defaults.history_length])
        else:
            self.rows = Rows(
                [group.rule for group in groups for _ in group.variables],
                [group.history_length for group in groups for _ in group.variables],
            )
        zeros = np.zeros(len(self.rows), np.float32)
        self.last = Report(
            make_variable(zeros, "norms"),
            make_variable(zeros + np.float32(np.inf), "thresholds"),
            make_variable(zeros + np.float32(1), "coefficients"),
        )
        self.faults = (
            make_variable(np.zeros(len(variables), bool), "faults")
            if clipper.on_nonfinite == "raise"
            else None
        )


class Clipper(Saveable, KerasSaveable, Trackable):
    """What `QuantileClip` and `StandardClip` have in common; not made directly."""

    _rule_class: ClassVar[type[Rule]]

    def __init__(
        self,
        rule: Rule,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        on_nonfinite: str = "keep",
        param_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._default_rule = rule
        self._default_history_length = check_history_length(history_length)
        self._global = check_flag("global_clipping", global_clipping)
        self._on_nonfinite = check_on_nonfinite(on_nonfinite)
        self._overrides = self._checked_groups(param_groups)
        self._built: _Built | None = None
        self._pending: tuple[State, str] | None = None
        self._attachment: Attachment | None = None
        self._warned = False

    # -- settings and groups -----------------------------------------------------------------

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of the variables that no group matches."""
        return {**self._default_rule.settings, "history_length": self._default_history_length}

    @property
    def global_clipping(self) -> bool:
        """Whether one history stands for all variables together."""
        return self._global

    @property
    def on_nonfinite(self) -> str:
        """What happens to a gradient that holds a NaN or an infinity."""
        return self._on_nonfinite

    @property
    def built(self) -> bool:
        """Whether the clipper knows its variables."""
        return self._built is not None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups: `"params"`, `"param_names"` and settings; empty before `build`."""
        return [
            {
                "params": list(group.variables),
                "param_names": [name_of(variable) for variable in group.variables],
                **group.settings,
            }
            for group in (self._built.groups if self._built else [])
        ]

    def _checked_groups(
        self, param_groups: Sequence[Mapping[str, Any]] | None
    ) -> list[dict[str, Any]]:
        if param_groups is None:
            return []
        if isinstance(param_groups, (str, Mapping)):
            raise TypeError(
                'param_groups takes a list of dicts such as {"match": "embedding", ...}, but got '
                f"{type(param_groups).__name__}."
            )
        checked = []
        for group in param_groups:
            if not isinstance(group, Mapping):
                raise TypeError(f"A parameter group takes a dict, but got {type(group).__name__}.")
            if "match" not in group:
                raise ValueError('A parameter group takes a dict with the key "match".')
            pattern = group["match"]
            if not isinstance(pattern, str):
                raise TypeError(
                    "match takes a regular expression as a string, but got "
                    f"{pattern!r} of type {type(pattern).__name__}."
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"match takes a regular expression, but got {pattern!r}: {error}."
                ) from None
            settings = {name: value for name, value in group.items() if name != "match"}
            check_group_settings(settings, self.defaults, self._global, type(self).__name__)
            self._make_group(group)
            checked.append(dict(group))
        return checked

    def _make_group(self, override: Mapping[str, Any]) -> _Group:
        merged = {**self.defaults, **override}
        pattern = merged.pop("match", None)
        history_length = check_history_length(merged.pop("history_length"))
        rule = type(self._default_rule).from_settings(merged)
        return _Group(rule, history_length, pattern)

    def build(self, variables: Iterable[Variable]) -> None:
        """Fix the variables whose gradients are clipped, and make room for their histories.

        The first call of the clipper does it by itself, and so does the optimizer that it is
        attached to. A state that was loaded before is taken over now.

        Args:
            variables: `tf.Variable`s or Keras variables. Each belongs to the first group whose
                pattern its name matches, or else to a last group with the clipper's settings.

        Raises:
            TypeError: one is no variable.
            ValueError: there are none, one stands twice, the pattern of a group matches none, or
                the clipper was built with others.
            StateError: a state that was loaded before does not fit.

        If it raises, the clipper is as it was.
        """
        variables = list(variables)
        for variable in variables:
            if not isinstance(native(variable), tf.Variable):
                raise TypeError(
                    f"build takes tf.Variables or Keras variables, but got {variable!r:.200}."
                )
        keys = [variable_key(variable) for variable in variables]
        if not keys:
            raise ValueError(f"{type(self).__name__} got an empty list of variables.")
        if len(set(keys)) != len(keys):
            raise ValueError(f"{type(self).__name__} got the same variable twice.")
        if self._built is not None:
            if set(keys) != set(self._built.index):
                raise ValueError(
                    f"This {type(self).__name__} was built with {len(self._built.index)} "
                    f"variables and now gets {len(keys)} that are not all the same. A history "
                    "belongs to its variable: make a new clipper for new variables."
                )
            return
        groups = self._assign_groups(variables)
        # Where a step builds the clipper, a graph may be under construction.
        with tf.init_scope():
            built = _Built(groups, self)
            if self._pending is not None:
                state, source = self._pending
                _write(built, state.fit_to(self._state_of(built), source))
        self._built, self._pending = built, None

    def _assign_groups(self, variables: Sequence[Variable]) -> list[_Group]:
        groups = [self._make_group(override) for override in self._overrides]
        rest = self._make_group({})
        for variable in variables:
            name = name_of(variable)
            matching = (g for g in groups if g.pattern is not None and re.search(g.pattern, name))
            next(matching, rest).variables.append(variable)
        for group in groups:
            if not group.variables:
                raise ValueError(
                    f"The parameter group with match={group.pattern!r} has no variable: the "
                    "pattern matches no name, or earlier groups have them all. The names are "
                    f"{', '.join(repr(name_of(variable)) for variable in variables):.1000}."
                )
        return [*groups, rest] if rest.variables else groups

    # -- a step ------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def __call__(self, grads_and_vars: GradsAndVars) -> list[tuple[Gradient | None, Variable]]:
        """Record the norms of gradients and return them clipped.

        For training loops of one's own, and for `gradient_transformers=[clipper]` of the legacy
        optimizers of Keras 2. Works eagerly, in a `tf.function`, and with `jit_compile=True`.

        Args:
            grads_and_vars: (gradient, variable) pairs, the gradients dense or `IndexedSlices`,
                summed over replicas and unscaled; None for no gradient.

        Returns:
            The pairs in the same order, with the clipped gradients, of the same dtype and kind.

        Raises:
            ValueError: a variable is not one that the clipper was built with.
            RuntimeError: a strategy with several replicas is in force.
            FloatingPointError: `on_nonfinite` is `"raise"` and a gradient holds a NaN or an
                infinity; in a graph it is `tf.errors.InvalidArgumentError`. Nothing was recorded.
                Compiled by XLA, see `check`.
        """
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise RuntimeError(
                "A direct call takes gradients that are summed over all replicas already, and "
                "under a strategy with several it cannot know. Attach the clipper to the "
                f"optimizer: {type(self).__name__}.as_optimizer(optimizer)."
            )
        pairs = list(grads_and_vars)
        if self._built is None:
            self.build([variable for _, variable in pairs])
        return self._clip(pairs)

    @tf.autograph.experimental.do_not_convert
    def _clip(
        self, pairs: Sequence[tuple[Gradient | None, Variable]]
    ) -> list[tuple[Gradient | None, Variable]]:
        """`__call__` for gradients that are known to be summed over replicas."""
        built = self._built
        assert built is not None
        by_row: list[Gradient | None] = [None] * len(built.index)
        rows: dict[int, None] = {}  # ordered, and quick to ask: eagerly this runs at each step
        for gradient, variable in pairs:
            row = built.index.get(variable_key(variable))
            if row is None:
                raise ValueError(
                    f"{name_of(variable)!r} is not among the {len(built.index)} variables that "
                    f"this {type(self).__name__} was built with. A history belongs to its "
                    "variable: make a new clipper for new variables."
                )
            if row in rows:
                raise ValueError(f"{name_of(variable)!r} stands twice among the variables.")
            rows[row] = None
            by_row[row] = gradient
        present = [row for row in rows if by_row[row] is not None]
        if not present:
            return list(pairs)
        with tf.name_scope("autoclip"):
            scaled = self._clip_present(built, by_row, present)
        for row, gradient in zip(present, scaled):
            by_row[row] = gradient
        return [(by_row[row], variable) for row, (_, variable) in zip(rows, pairs)]

    def _clip_present(
        self, built: _Built, gradients: Sequence[Gradient | None], present: Sequence[int]
    ) -> list[Gradient]:
        xla = compiled_by_xla()
        norms = gradient_norms(gradients, xla)
        finite = tf.math.is_finite(norms)
        after = []
        if built.faults is not None:
            if xla:
                # No assertion stops the program here. So that the words of the error are true,
                # nothing is recorded in this step either.
                built.faults.assign(built.faults.read_value() | ~finite)
                norms = tf.where(tf.reduce_all(finite), norms, np.nan)
            else:
                after = self._refuse_nonfinite(built, finite)
        with tf.control_dependencies(after):
            norms = tf.identity(norms)
            report = built.rows.record(root_of_squares(norms)[None] if self._global else norms)
            for variable, value in zip(_fields(built.last), _fields(report)):
                variable.assign(tf.cast(value, tf.float32))
            factors = report.coefficients
            factors = tf.repeat(factors, len(present)) if self._global else _at(factors, present)
            if self._on_nonfinite != "keep":
                factors = tf.where(_at(finite, present), factors, 0.0)
            return scale(
                [gradients[row] for row in present], factors, xla, self._on_nonfinite != "keep"
            )

    def _refuse_nonfinite(self, built: _Built, finite: tf.Tensor) -> list[tf.Operation]:
        """Raise, or an operation that fails when it runs, if a gradient is not finite."""
        if tf.executing_eagerly():
            found = finite.numpy()
            if not found.all():
                raise FloatingPointError(_nonfinite_names(built, ~found))
            return []
        # The text for one name and that for several, around whatever names there will be.
        one, many = (nonfinite_message(["\0"] * n).split(", ".join(["\0"] * n)) for n in (1, 2))
        names = tf.boolean_mask(tf.constant(built.names), ~finite)
        several = tf.size(names) > 1
        joined = tf.strings.reduce_join(names, separator=", ")
        text = tf.where(several, many[0], one[0]) + joined + tf.where(several, many[1], one[1])
        return [tf.debugging.Assert(tf.reduce_all(finite), [text], name="finite")]

    def check(self) -> None:
        """Raise if a step that XLA compiled met a gradient with a NaN or an infinity.

        XLA knows no assertions. So with `on_nonfinite="raise"` a compiled step sets such a
        gradient to zero and records nothing, and this tells afterwards. `AutoClipCallback` calls
        it after each batch. It waits for the device.

        Raises:
            FloatingPointError: since the last check some gradient was not finite.
        """
        if self._built is None or self._built.faults is None:
            return
        faults = self._built.faults.numpy()
        if faults.any():
            self._built.faults.assign(np.zeros_like(faults))
            raise FloatingPointError(
                _nonfinite_names(self._built, faults)
                + " XLA cannot stop a step: the gradient was set to zero."
            )

    @property
    def last(self) -> Report[tf.Tensor]:
        """What the last step did, row by row: norms, thresholds and coefficients.

        Rows are in the order of the parameter groups; under global clipping there is one. Each of
        the three is a float32[rows] tensor. They are not saved.

        Raises:
            RuntimeError: the clipper has not been built, so there was no step.
        """
        if self._built is None:
            raise RuntimeError("There is nothing to report: there has been no step yet.")
        return Report(*(variable.read_value() for variable in _fields(self._built.last)))

    # -- optimizers --------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> AttachmentHandle:
        """Let `optimizer` call this clipper at each of its updates, and carry its state.

        The gradients that it clips are accumulated, unscaled and summed over replicas. The clipper
        is then `optimizer.clipper`, and is saved wherever the optimizer is.

        Args:
            optimizer: a Keras optimizer; of a `LossScaleOptimizer` the inner one is meant. It keeps
                its state, its hyperparameters and its identity. Its class becomes a subclass of
                what it was.

        Returns:
            A handle; its `remove()` detaches the clipper and leaves no trace.

        Raises:
            TypeError: it is no optimizer of Keras on TensorFlow, or one with optimizers inside.
            ValueError: it and the clipper are built with different variables.
            RuntimeError: it has a clipper already, or the clipper is attached already.
        """
        return Attachment.create(self, optimizer, stacklevel=3)

    @classmethod
    def _attached(cls: type[ClipperT], optimizer: Any, **settings: Any) -> Any:
        Attachment.check(optimizer)
        Attachment.create(cls(**settings), optimizer, stacklevel=4)
        return optimizer

    # -- state -------------------------------------------------------------------------------

    def _state_of(self, built: _Built) -> State:
        windows, recorded = built.rows.read()
        infos = [
            [ParameterInfo(name_of(v), tuple(native(v).shape.as_list())) for v in group.variables]
            for group in built.groups
        ]
        if self._global:
            everything = [info for group in infos for info in group]
            groups = [GroupState.from_windows(self.defaults, everything, windows, recorded)]
        else:
            groups, start = [], 0
            for group, info in zip(built.groups, infos):
                stop = start + len(info)
                groups.append(
                    GroupState.from_windows(
                        group.settings, info, windows[start:stop], recorded[start:stop]
                    )
                )
                start = stop
        return State(self._rule_class.name, self._global, "tensorflow", tuple(groups), __version__)

    def _export_state(self) -> State:
        if self._built is not None:
            return self._state_of(self._built)
        if self._pending is not None:
            return self._pending[0]
        raise ValueError(
            f"This {type(self).__name__} has no state yet: it does not know its variables. Call "
            "build(variables) first, or take a step."
        )

    def _adopt_state(self, state: State, source: str) -> None:
        if self._built is not None:
            # Not through super(): one call more, and a warning would point past the caller's line.
            self._commit_state(state.fit_to(self._state_of(self._built), source, stacklevel=4))
            return
        # What can be checked without knowing the variables: that the state has the same rule and
        # mode. The rest waits for them.
        mine = replace(state, rule=self._rule_class.name, global_clipping=self._global)
        state.fit_to(mine, source)
        self._pending = (state, source)

    def _commit_state(self, state: State) -> None:
        assert self._built is not None
        _write(self._built, state)

    def _bytes(self) -> bytes:
        """The state; empty if there is none yet."""
        if self._built is None and self._pending is None:
            return b""
        return self._export_state().to_bytes()

    def _load_bytes(self, data: bytes, source: str) -> None:
        if data:
            self._adopt_state(State.from_bytes(data, source), source)

    # Keras's own saving, in `model.save`, `save_weights` and the callbacks that call them.

    def _obj_type(self) -> str:
        return "Optimizer"  # Keras's list of kinds is closed

    def save_own_variables(self, store: Any) -> None:
        """Write the state into a Keras store; Keras calls this."""
        store[_STORED_STATE] = np.frombuffer(self._bytes(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Take over the state from a Keras store; Keras calls this."""
        if _STORED_STATE in store.keys():  # noqa: SIM118 (a store has no `in`)
            data = np.asarray(store[_STORED_STATE], np.uint8).tobytes()
            self._load_bytes(data, "the Keras checkpoint")
        elif not self._warned:
            self._warned = True
            warnings.warn(
                "The Keras checkpoint holds no history of AutoClip: it was saved without. The "
                "clipper keeps the history that it has.",
                stacklevel=2,
            )

    # tf.train.Checkpoint.

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        if saving_for_inference():
            return {_STORED_STATE: tf.constant(b"")}
        if not tf.executing_eagerly():
            raise RuntimeError(
                "A checkpoint with a clipper is written outside of any tf.function. Inside, the "
                "history would be for ever the one that it was when the function was traced."
            )
        return {_STORED_STATE: tf.constant(self._bytes())}

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        if not saving_for_inference():
            data = restored_tensors[_STORED_STATE].numpy()
            self._load_bytes(data, "the tf.train.Checkpoint")

    # Keras's configurations, copies and pickles.

    def get_config(self) -> dict[str, Any]:
        """The settings, from which `from_config` makes such a clipper without a history."""
        return {
            **self.defaults,
            "global_clipping": self._global,
            "on_nonfinite": self._on_nonfinite,
            "param_groups": [dict(group) for group in self._overrides] or None,
        }

    @classmethod
    def from_config(cls: type[ClipperT], config: Mapping[str, Any]) -> ClipperT:
        """Make a clipper from what `get_config` returned."""
        return cls(**config)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to no variables as yet. It has the history that its variables will get.
        return _unreduced, (type(self), self.get_config(), self._bytes())

    def __repr__(self) -> str:
        settings = {**self.defaults, "global_clipping": self._global}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        groups = "".join(
            f",\n    group {i}: {len(group.variables)} parameters, "
            + ("" if group.pattern is None else f"match={group.pattern!r}, ")
            + ", ".join(f"{name}={value}" for name, value in group.settings.items())
            for i, group in enumerate(self._built.groups if self._built else [])
        )
        return f"{type(self).__name__}({text}, on_nonfinite={self._on_nonfinite!r}{groups})"


def _unreduced(cls: type[ClipperT], config: Mapping[str, Any], data: bytes) -> ClipperT:
    clipper = cls.from_config(config)
    clipper._load_bytes(data, "the copied clipper")
    return clipper


def _write(built: _Built, state: State) -> None:
    windows = [window for group in state.groups for window in group.windows()]
    built.rows.write(windows, np.concatenate([group.recorded for group in state.groups]))


def _fields(report: Report[Any]) -> tuple[Any, Any, Any]:
    return report.norms, report.thresholds, report.coefficients


def _at(values: tf.Tensor, present: Sequence[int]) -> tf.Tensor:
    """Values of some rows; of all of them, as nearly always, without an operation."""
    return values if list(present) == list(range(values.shape[0])) else tf.gather(values, present)


def _nonfinite_names(built: _Built, faults: Any) -> str:
    return nonfinite_message([built.names[i] for i in np.flatnonzero(faults)])
