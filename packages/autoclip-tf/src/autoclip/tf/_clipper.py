"""The clippers, which users make, call, read, attach to optimizers, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, ParamSpec, TypeAlias, TypeVar

import keras
import numpy as np
import tensorflow as tf

from autoclip.core import OnNonfinite, OnSpike, Quantile, Record, Report, Rule, Standard, State
from autoclip.core.adapter import (
    RULES,
    AttachmentHandle,
    BaseClipper,
    ClipperSettings,
    GroupSettings,
    attached_message,
    commit,
    constructor,
    given,
    make_factory,
    rule_instance,
    warn_user,
)
from autoclip.tf._attachment import Attachment, check_optimizer
from autoclip.tf._groups import Groups, Variable
from autoclip.tf._histories import Histories, check_memory
from autoclip.tf._last_step import LastStep
from autoclip.tf._layout import Gradient, Layout, NonfiniteGradients
from autoclip.tf._ops import OPS
from autoclip.tf._private import (
    Saved,
    build_scope,
    collected_variables,
    name_of,
    overwritten_by_gradient,
    variable_key,
)
from autoclip.tf._saving import CHILD, PendingState, SavedState
from autoclip.tf._sums import StepSums

P = ParamSpec("P")
OptimizerT = TypeVar("OptimizerT")
ClipperT = TypeVar("ClipperT", bound="Clipper")

GradsAndVars: TypeAlias = Iterable[tuple[Gradient | None, Variable]]
"""The (gradient, variable) pairs that `optimizer.apply_gradients` takes; None for no gradient."""


@keras.saving.register_keras_serializable("autoclip")
class Clipper(BaseClipper[Groups, tf.Tensor], Saved):
    """Clip each gradient to a threshold that a rule computes from the history of its norms.

    At each step the gradient's L2 norm is compared with the threshold, and the gradient is
    multiplied by `min(1, threshold / norm)`. `QuantileClip` and `StandardClip` are this class with
    the two built-in rules.

    Args:
        rule: the rule that turns a window of norms into a threshold, such as `Quantile(0.9)`,
            or an instance of a custom rule.
        history_length: the number of norms each row keeps, the newest ones; an int ≥ 1. TensorFlow
            allocates windows in full: 4 bytes a norm, 8 if the rule asks for quantiles.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each variable.
        group_settings: settings for some of the variables, such as
            `[{"match": "embedding", "max_norm": 1.0}]`: a regular expression that is searched in
            the variable's `path`, or in its `name` if it has none, and the settings, those of the
            rule included. The first entry that matches counts; variables that none matches have
            the clipper's settings.
        group_clipping: one history of the norm of all gradients of a group together.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up; None for no
            ceiling.
        warmup_steps: the number of norms a row records before its rule counts; None for the rule's
            default.
        include_current: True if a norm is part of the window that it is compared with; None for
            the rule's default.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: `"clip"` scales a gradient above its threshold down to the threshold, `"zero"`
            sets it to zero. `"skip"` is for PyTorch only.
        on_nonfinite: for a gradient that holds a NaN or an infinity, `"keep"` leaves
            it as it is, `"zero"` sets it to zero, `"raise"` raises FloatingPointError eagerly and
            `tf.errors.InvalidArgumentError` in a graph, before any update. XLA, with which Keras
            compiles `fit` on a GPU by default, cannot stop a step: the gradient is set to zero, and
            `check` raises. Its norm is never recorded.

    Raises:
        TypeError: a setting is unknown or has the wrong type.
        ValueError: a setting has the wrong value, or the histories are larger than any memory.

    >>> import tensorflow as tf
    >>> from autoclip.core import Standard
    >>> from autoclip.tf import Clipper
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = Clipper(Standard(deviations=2.0), warmup_steps=2)
    >>> for size in (1.0, 3.0, 8.0):
    ...     [(clipped, _)] = clipper([(tf.fill([4], size / 2), weight)])  # a norm of 1, 3, 8
    >>> float(tf.norm(clipped))
    4.0
    """

    _rule_class: ClassVar[type[Rule] | None] = None
    """The rule whose settings are arguments of the constructor; None if the rule is one."""

    _histories: Histories

    def __init__(
        self,
        rule: Rule,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_settings: Sequence[Mapping[str, Any]] | None = None,
        group_clipping: bool = False,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        include_current: bool | None = None,
        record: Record = "raw",
        on_spike: OnSpike = "clip",
        on_nonfinite: OnNonfinite = "keep",
    ) -> None:
        settings = given(locals(), "rule", "group_settings")
        self._set_up(rule_instance(rule), group_settings, **settings)

    def _set_up(self, rule: Rule | type[Rule], group_settings: Any, **settings: Any) -> None:
        """Begin as all constructors do; `rule` may be a class, whose settings are then given."""
        made = ClipperSettings.make(type(self).__name__, rule, **settings)
        self._begin(Groups(made, group_settings))

    def _begin(self, groups: Groups) -> None:
        """Begin without variables and without a history."""
        for each in groups.settings_by_group():
            check_memory([each])
        self._groups, self._histories = groups, Histories()
        self._sums = StepSums()
        self._last: LastStep | None = None
        self._layout: Layout | None = None
        self._pending: PendingState | None = None
        self._attachment: Attachment | None = None
        self._saved_state = SavedState(self)
        self._track_trackable(self._saved_state, CHILD)

    @constructor
    def as_optimizer(
        cls: Callable[P, Clipper], optimizer: OptimizerT, *args: P.args, **settings: P.kwargs
    ) -> OptimizerT:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        Learning-rate schedules, callbacks, `isinstance` and hyperparameters keep working. The
        clipper is `optimizer.clipper`; its state is saved wherever the optimizer's is.

        Models that the optimizer has trained already trace their training step again at the next
        `fit`. A custom `tf.function` that was traced before does not clip: attach first.

        Args:
            optimizer: a Keras optimizer. Of a `LossScaleOptimizer` the inner one gets the clipper.
            args: the class's arguments.
            settings: the class's settings by keyword.

        Raises:
            TypeError: it is not an optimizer of Keras on TensorFlow, or one with optimizers
                inside, or a setting is unknown or has the wrong type.
            ValueError: a setting has the wrong value.
            RuntimeError: the optimizer has a clipper already.
        """
        cls(*args, **settings).attach(optimizer)
        return optimizer

    @constructor
    def optimizer_factory(
        cls: Callable[P, Clipper],
        optimizer_class: type[OptimizerT],
        *args: P.args,
        **settings: P.kwargs,
    ) -> type[OptimizerT]:
        """Make a class of optimizers that have a clipper, for frameworks that ask for a class.

        `factory(learning_rate=1e-3)` is `as_optimizer(optimizer_class(learning_rate=1e-3), ...)`:
        an optimizer of `optimizer_class`, with a new clipper attached. The factory is a subclass of
        `optimizer_class` with its name, module and signature. It can be copied, and pickled if
        `optimizer_class` and the settings can be. See "Other frameworks" in the documentation.

        Args:
            optimizer_class: a subclass of `keras.optimizers.Optimizer`.
            args: the class's arguments.
            settings: the class's settings by keyword.

        Raises:
            TypeError: it is not a class of Keras optimizers, or a factory already, or a setting is
                unknown or has the wrong type.
            ValueError: a setting has the wrong value.

        >>> import keras
        >>> from autoclip.tf import QuantileClip
        >>> make = QuantileClip.optimizer_factory(keras.optimizers.Adam, quantile=0.9)
        >>> optimizer = make(learning_rate=1e-3)
        >>> optimizer.clipper.defaults["quantile"]
        0.9
        """
        factory = make_factory(cls, optimizer_class, keras.optimizers.Optimizer, args, settings)
        cls(*args, **settings)  # checks the settings; it knows no variables
        return factory

    # -- variables ---------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """True if the clipper knows its variables."""
        return self._last is not None

    def build(self, variables: Iterable[Variable]) -> None:
        """Fix the variables whose gradients are clipped, and allocate their histories.

        The first call of the clipper does it, and so does the optimizer that it is attached to. A
        state that was loaded before is taken over now.

        Args:
            variables: `tf.Variable`s or Keras variables. Each belongs to the first group whose
                pattern its name matches, or else to a last group with the clipper's settings.
                Variables that Keras overwrites with their gradients, as float8 layers have them,
                are left out: those gradients are not clipped.

        Raises:
            TypeError: an entry is not a variable.
            ValueError: there are none, one is a duplicate, the pattern of a group matches none,
                the histories are larger than any memory, or the clipper was built without one of
                them.
            RuntimeError: the `tf.distribute` strategy is not supported, or a graph of TensorFlow 1
                is under construction.
            StateError: a state that was loaded before does not fit.

        If it raises, the clipper is as it was.
        """
        groups = copy.copy(self._groups)
        groups.build(variables)
        if self.built:
            return
        # Where a step builds the clipper, a graph may be under construction.
        scope = build_scope(groups.parameters())
        with tf.init_scope(), scope, collected_variables() as created:
            histories = Histories(groups.settings_by_row())
            last = LastStep(groups.row_names())
            nonfinite = NonfiniteGradients(groups)
            self._sums.build(len(histories))
            if self._pending is not None:
                histories.write(*self._pending.matched(groups).by_row())
        own = {"_groups": groups, "_histories": histories, "_nonfinite": nonfinite}
        own |= {"_last": last, "_pending": None}
        commit((self.__dict__, own), (self.saved_state.__dict__, {"variables": created}))

    # -- a step ------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def __call__(self, grads_and_vars: GradsAndVars) -> list[tuple[Gradient | None, Variable]]:
        """Record the norms of gradients and return them clipped.

        For custom training loops, and for `gradient_transformers=[clipper]` of the legacy
        optimizers of Keras 2. Works eagerly, in a `tf.function`, and with `jit_compile=True`. To a
        `tf.GradientTape` the coefficients are constants, as everything that the clipper remembers:
        the derivative of a clipped gradient is that of the gradient times its coefficient.

        Args:
            grads_and_vars: (gradient, variable) pairs, the gradients dense or `IndexedSlices`,
                summed over replicas and unscaled; None for no gradient.

        Returns:
            The pairs in the same order, with the clipped gradients, of the same dtype and kind.

        Raises:
            TypeError: a gradient is of integers.
            ValueError: a variable is not one that the clipper was built with.
            RuntimeError: called under a strategy with several replicas, or while the clipper is
                attached to an optimizer, which calls it at each update.
            FloatingPointError: `on_nonfinite` is `"raise"` and a gradient holds a NaN or an
                infinity; in a graph it is `tf.errors.InvalidArgumentError`. Nothing was recorded.
                Compiled by XLA, see `check`.
        """
        if self._is_attached:
            raise RuntimeError(
                f"This {type(self).__name__} is attached to an optimizer, which calls it at each "
                "update: another call would record each norm twice. Read the norm of the last step "
                "from clipper.total_norm, or detach the clipper first, with clipper.detach()."
            )
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise RuntimeError(
                "A direct call takes gradients that are summed over all replicas already, and "
                "under a strategy with several it cannot know. Attach the clipper to the "
                f"optimizer: {type(self).__name__}.as_optimizer(optimizer)."
            )
        pairs = list(grads_and_vars)
        if not self.built:
            self.build([variable for _, variable in pairs])
        clipped = iter(self._clip([p for p in pairs if not overwritten_by_gradient(p[1])]))
        return [pair if overwritten_by_gradient(pair[1]) else next(clipped) for pair in pairs]

    @tf.autograph.experimental.do_not_convert
    def _clip(
        self, pairs: Sequence[tuple[Gradient | None, Variable]]
    ) -> list[tuple[Gradient | None, Variable]]:
        """`__call__` for gradients that are known to be summed over replicas."""
        assert self._last is not None
        gradients: list[Gradient | None] = [None] * len(self._groups.index)
        order: dict[int, None] = {}  # ordered, and quick to ask: eagerly this runs at each step
        for gradient, variable in pairs:
            index = self._groups.index.get(variable_key(variable))
            if index is None:
                raise ValueError(
                    f"{name_of(variable)!r} is not among the {len(gradients)} variables that "
                    f"this {type(self).__name__} was built with. A history belongs to its "
                    "variable: make a new clipper for new variables."
                )
            if index in order:
                raise ValueError(
                    f"{name_of(variable)!r} appears more than once among the variables."
                )
            order[index] = None
            gradients[index] = _checked(gradient, variable)
        if all(gradient is None for gradient in gradients):
            self._last.write(None)
            return list(pairs)
        with tf.name_scope("autoclip"):
            clipped = self._clip_all(gradients)
        return [(clipped[index], variable) for index, (_, variable) in zip(order, pairs)]

    def _clip_all(self, gradients: Sequence[Gradient | None]) -> list[Gradient | None]:
        """Clip the gradients of all variables; None for no gradient."""
        assert self._last is not None
        layout = self._layout
        if layout is None or not layout.fits(gradients):
            layout = self._layout = Layout(gradients, self._groups, self._histories)
        norms, zeroed = self._nonfinite.apply(layout.measure(gradients))
        report = self._histories.joined(self._histories.record(layout.rows(norms)))
        numbers = tf.concat([report.norms, report.thresholds, report.coefficients], axis=1)
        self._last.write(numbers)
        if self._sums.enabled:
            self._sums.add(numbers)
        return layout.scale(gradients, report.coefficients, zeroed)

    def check(self) -> None:
        """Raise if a step compiled by XLA found a gradient with a NaN or an infinity.

        XLA has no assertions. So with `on_nonfinite="raise"` a compiled step sets such a gradient
        to zero and records nothing, and this method raises afterwards. `AutoClipCallback` calls it
        after each batch. It waits for the device.

        Raises:
            FloatingPointError: since the last check some gradient was not finite.
        """
        if self.built:
            self._nonfinite.check()

    @property
    def last(self) -> Report[tf.Tensor]:
        """The last step, row by row: norms, thresholds, coefficients, and rows' names.

        Rows are in the order of the parameter groups; under global clipping there is one. Norms,
        thresholds and coefficients are float32[rows] tensors. They are not saved.

        Raises:
            RuntimeError: no step has found a gradient yet, or the last one found none.
        """
        report = None if self._last is None else self._last.report
        if report is None:
            raise RuntimeError(
                "There is nothing to report: no step yet, or no gradient in the last"
                + (
                    ", or its tf.function was traced before the clipper was attached."
                    if self._is_attached
                    else "."
                )
            )
        return report

    @property
    def total_norm(self) -> tf.Tensor:
        """float32[]: the L2 norm of all gradients of the last step together, before clipping.

        0 if that step had no gradient. Gradients that `on_nonfinite="zero"` zeroed count as zero.
        A `tf.function` can read it after the update.

        Raises:
            RuntimeError: no step has been made since the clipper was made or reset.
        """
        total = None if self._last is None else self._last.total_norm
        if total is None:
            raise RuntimeError("There is no total norm yet: the clipper has not made a step.")
        return total

    @property
    def thresholds(self) -> tf.Tensor:
        """float64[rows]: the thresholds of the histories as they are now, also after a load.

        Infinite where nothing was recorded yet or the row is still warming up; never above
        `max_norm`. Without `include_current` the next norms are compared with these.

        Raises:
            RuntimeError: the clipper does not know its variables yet.
        """
        if not self.built:
            raise RuntimeError(
                f"This {type(self).__name__} has no rows yet: it does not know its variables. "
                "Call build(variables) first, or take a step."
            )
        found = self._histories.in_order(self._histories.thresholds())[:, 0]
        if tf.executing_eagerly():
            # Outside of TensorFlow: under tf.debugging.enable_check_numerics no operation may
            # return an infinity.
            on_host = found.numpy()
            return tf.constant(np.where(on_host < OPS.unlimited, on_host, np.inf))
        return tf.where(found < OPS.unlimited, found, tf.constant(np.inf, tf.float64))

    def reset(self) -> None:
        """Forget all norms, and a loaded state that still waits for the variables."""
        self._pending = None
        if self._last is not None:
            self._histories.reset()
            self._last.clear()

    # -- optimizers --------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> AttachmentHandle:
        """Let `optimizer` call this clipper at each of its updates, and carry its state.

        The gradients that it clips are accumulated, unscaled and summed over replicas. The clipper
        is then `optimizer.clipper`, and is saved wherever the optimizer is.

        Args:
            optimizer: a Keras optimizer; of a `LossScaleOptimizer` the inner one is meant. It keeps
                its state, its hyperparameters and its identity. Its class becomes a subclass of
                its own.

        Returns:
            A handle; its `remove()`, or the end of a `with` block, detaches the clipper. The
            optimizer has its own class again, and the clipper keeps its history. Models trace
            their training step again after both. A custom `tf.function` stays as it was
            traced, with or without the clipper.

        Raises:
            TypeError: it is not an optimizer of Keras on TensorFlow, or one with optimizers inside.
            ValueError: it has variables that the clipper was built without.
            RuntimeError: it has a clipper already, the clipper is attached already, or the
                optimizer's `tf.distribute` strategy is not supported.
        """
        optimizer = check_optimizer(optimizer)
        if self._is_attached:
            raise RuntimeError(attached_message(self))
        if optimizer.built:
            self.build(optimizer._trainable_variables)
        self.detach()  # from one that is gone
        raises = any(each.on_nonfinite == "raise" for each in self._groups.settings_by_group())
        if raises and tf.config.list_physical_devices("GPU"):
            warn_user(
                "On a GPU, Keras compiles fit with XLA by default, and XLA cannot stop a step: "
                'with on_nonfinite="raise" such a gradient is set to zero. Add AutoClipCallback '
                "to fit, which raises after the batch, or compile with jit_compile=False."
            )
        return Attachment(self, optimizer).begin()

    # -- state -------------------------------------------------------------------------------

    @property
    def saved_state(self) -> SavedState:
        """The part of the clipper that Keras and TensorFlow save.

        They find it in an optimizer, a model or a layer that has the clipper as an attribute.
        """
        return self._saved_state

    @property
    def _saved_attributes(self) -> tuple[str, ...]:
        # Once in a file: of an attached clipper by its optimizer, which `load_model` creates.
        return () if self._is_attached else ("saved_state",)

    @property
    def _has_state(self) -> bool:
        return self.built or self._pending is not None

    @property
    def has_history(self) -> bool:
        """True if some row has recorded a norm, here or in a state that waits for the variables."""
        return self._has_state and super().has_history

    def export_state(self) -> State:
        """See `Saveable.export_state`; before `build`, a state that was loaded.

        Raises:
            ValueError: there is none yet.
        """
        if self.built:
            return super().export_state()
        if self._pending is not None:
            return self._pending.state
        raise ValueError(
            f"This {type(self).__name__} has no state yet: it does not know its variables. Call "
            "build(variables) first, or take a step."
        )

    def describe_state(self) -> State:
        """See `Saveable.describe_state`."""
        return super().describe_state() if self.built else self.export_state()

    def _adopt_state(self, state: State, source: str, is_partial: bool = False) -> None:
        pending = PendingState(state, source, is_partial)
        if self.built:
            self.commit_state(pending.matched(self._groups))
        else:
            # Without variables only the mode can be checked. The rest waits for them.
            state.match(replace(state, mode=self._groups.mode), source)
            self._pending = pending
        if self._attachment is not None:
            self._attachment.may_lack_history = False

    # -- configurations, copies and pickles --------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The settings, from which `from_config` makes such a clipper without a history."""
        default = self._settings.default
        settings = dict(default.settings)
        rule = {name: settings.pop(name) for name in default.rule.setting_names()}
        groups = [
            {"match": each.match, **_differences(self._groups.settings_of(each), default)}
            for each in self._groups.patterns
        ]
        return {
            **(rule if self._rule_class else {"rule": {"name": default.rule.name, **rule}}),
            **settings,
            **self._groups.mode.arguments,
            "group_settings": groups or None,
        }

    @classmethod
    def from_config(cls: type[ClipperT], config: Mapping[str, Any]) -> ClipperT:
        """Make a clipper from the result of `get_config`.

        Raises:
            ValueError: the rule is not registered in this process, or a setting is wrong.
        """
        config = dict(config)
        if "rule" in config:
            settings = dict(config["rule"])
            name = settings.pop("name", None)
            if name not in RULES:
                raise ValueError(
                    f"The configuration has the rule {name!r:.200}, which is not registered here. "
                    "Import the module that defines it, with @register_rule above its class, "
                    "before loading."
                )
            config["rule"] = RULES[name].from_settings(settings)
        return cls(**config)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to no variables yet. It has the history that its variables will get.
        return _copied, (type(self), self._groups.unbuilt(), self.saved_state.to_bytes())


@keras.saving.register_keras_serializable("autoclip")
class QuantileClip(Clipper):
    """Clip each gradient to a quantile of the history of its norms (AutoClip).

    At each step the gradient's L2 norm is appended to its history, and the gradient is multiplied
    by `min(1, threshold / norm)`, the threshold being the quantile of the history with linear
    interpolation. Seetharaman, Wichern, Pardo, Le Roux: "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", MLSP 2020, arXiv:2007.14469, Algorithm 1.

    Args:
        quantile: a real number in [0, 1]; 1 never clips, lower values clip more often.
        history_length: the number of norms each row keeps, the newest ones.
        global_clipping: one history of the norm of all gradients together.
        group_settings: settings for some of the variables, such as
            `[{"match": "embedding", "quantile": 0.5}]`; see `Clipper`.
        group_clipping: one history of the norm of all gradients of a group together.
        max_norm: a ceiling on every threshold.
        warmup_steps: the number of norms a row records before its rule counts; None for 0.
        include_current: True if a norm is part of the window that it is compared with; None for
            True.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: `"clip"` scales a gradient above its threshold down to it, `"zero"` zeroes it.
        on_nonfinite: `"keep"` leaves a gradient with NaN or infinity as it is, `"zero"` zeroes it,
            `"raise"` raises an error.
        factor: multiplies the quantile; a finite real number > 0.

    Raises:
        TypeError, ValueError: as `Clipper`.

    >>> import tensorflow as tf
    >>> from autoclip.tf import QuantileClip
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = QuantileClip(quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     gradient = tf.fill([4], size / 2)  # a norm of 1, 2, 9
    ...     [(clipped, _)] = clipper([(gradient, weight)])
    >>> float(tf.norm(clipped))
    2.0
    """

    _rule_class = Quantile

    def __init__(
        self,
        quantile: float = 0.9,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_settings: Sequence[Mapping[str, Any]] | None = None,
        group_clipping: bool = False,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        include_current: bool | None = None,
        record: Record = "raw",
        on_spike: OnSpike = "clip",
        on_nonfinite: OnNonfinite = "keep",
        factor: float = 1.0,
    ) -> None:
        self._set_up(Quantile, group_settings, **given(locals(), "group_settings"))


@keras.saving.register_keras_serializable("autoclip")
class StandardClip(Clipper):
    """Clip each gradient to some standard deviations above the mean of its earlier norms.

    Like `QuantileClip`, with the threshold `factor * (mean + deviations * std)` of the norms of
    the steps before; the first 25 steps are not clipped (`warmup_steps`).

    Args:
        deviations: a finite real number ≥ 0.
        history_length: the number of norms each row keeps, the newest ones.
        global_clipping: one history of the norm of all gradients together.
        group_settings: settings for some of the variables, such as
            `[{"match": "embedding", "deviations": 3.0}]`; see `Clipper`.
        group_clipping: one history of the norm of all gradients of a group together.
        max_norm: a ceiling on every threshold.
        warmup_steps: the number of norms a row records before its rule counts; None for 25.
        include_current: True if a norm is part of the window that it is compared with; None for
            False.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: `"clip"` scales a gradient above its threshold down to it, `"zero"` zeroes it.
        on_nonfinite: `"keep"` leaves a gradient with NaN or infinity as it is, `"zero"` zeroes it,
            `"raise"` raises an error.
        decay: weights each norm by `decay ** age`; a real number in (0, 1), or None for equal
            weights.
        factor: multiplies the threshold; a finite real number > 0.
        shrink: scales larger gradients down further; see `autoclip.core.Standard`.
        log: takes mean and deviation of the norms' logarithms.

    Raises:
        TypeError, ValueError: as `Clipper`.

    >>> import tensorflow as tf
    >>> from autoclip.tf import StandardClip
    >>> weight = tf.Variable(tf.zeros(4))
    >>> clipper = StandardClip(deviations=1.0, warmup_steps=2)
    >>> for size in (2.0, 6.0, 9.0):
    ...     pairs = clipper([(tf.fill([4], size / 2), weight)])
    >>> clipper.last.thresholds.numpy()  # the mean is 4, the deviation 2
    array([6.], dtype=float32)
    """

    _rule_class = Standard

    def __init__(
        self,
        deviations: float = 2.0,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_settings: Sequence[Mapping[str, Any]] | None = None,
        group_clipping: bool = False,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        include_current: bool | None = None,
        record: Record = "raw",
        on_spike: OnSpike = "clip",
        on_nonfinite: OnNonfinite = "keep",
        decay: float | None = None,
        factor: float = 1.0,
        shrink: bool = False,
        log: bool = False,
    ) -> None:
        self._set_up(Standard, group_settings, **given(locals(), "group_settings"))


def _checked(gradient: Gradient | None, variable: Variable) -> Gradient | None:
    """The gradient as a tensor or IndexedSlices.

    Raises:
        TypeError: it is of integers.
    """
    if gradient is None:
        return None
    if not isinstance(gradient, tf.IndexedSlices):
        gradient = tf.convert_to_tensor(gradient)
    if not (gradient.dtype.is_floating or gradient.dtype.is_complex):
        raise TypeError(
            f"The gradient of {name_of(variable)!r} is of {gradient.dtype.name}, and AutoClip "
            "clips floating-point and complex ones. Leave this variable out, or cast its gradient."
        )
    return gradient


def _copied(cls: type[ClipperT], groups: Groups, data: bytes) -> ClipperT:
    clipper = cls.__new__(cls)
    clipper._begin(groups)
    clipper.saved_state.load_bytes(data, "the copied clipper")
    return clipper


def _differences(settings: GroupSettings, default: GroupSettings) -> dict[str, Any]:
    usual = default.settings
    return {name: value for name, value in settings.settings.items() if value != usual[name]}
