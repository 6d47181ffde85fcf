"""The clipper: its settings, its variables, and the optimizer that it is attached to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import keras
import tensorflow as tf

from autoclip.core import Report, Rule
from autoclip.core.adapter import (
    AttachmentHandle,
    ClipperSettings,
    CommonSettings,
    ParamGroup,
    constructor,
    rule_instance,
    warn_user,
)
from autoclip.tf._attach import attach
from autoclip.tf._factory import optimizer_factory
from autoclip.tf._groups import (
    Variable,
    assign_variables,
    check_variables,
    patterns,
    usable,
)
from autoclip.tf._history import check_memory
from autoclip.tf._keras_saving import KerasSaving
from autoclip.tf._norms import Gradient
from autoclip.tf._private import (
    build_scope,
    collected_variables,
    name_of,
    overwritten_by_gradient,
    variable_key,
)
from autoclip.tf._step import GradsAndVars, Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Clipper"]

P = ParamSpec("P")
OptimizerT = TypeVar("OptimizerT")


@keras.saving.register_keras_serializable("autoclip")
class Clipper(KerasSaving):
    """Clip each gradient to a threshold that a rule computes from the history of its norms.

    At each step the gradient's L2 norm is compared with the threshold, and the gradient is
    multiplied by `min(1, threshold / norm)`. `QuantileClip` and `StandardClip` are this class with
    the two built-in rules.

    Args:
        rule: how a window of norms becomes a threshold, such as `Quantile(0.9)`, or an instance of
            a rule of your own.
        history_length: how many norms each row keeps, the newest ones; an int ≥ 1. TensorFlow
            allocates windows in full: 4 bytes a norm, 8 if the rule asks for quantiles.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each variable.
        group_settings: settings for some of the variables, such as
            `[{"match": "embedding", "max_norm": 1.0}]`: a regular expression that is searched in
            the variable's `path`, or in its `name` if it has none, and the settings, those of the
            rule included. The first entry that matches counts; variables that none matches have
            the clipper's settings.
        settings: see `autoclip.core.adapter.CommonSettings`. `on_nonfinite="raise"` raises
            FloatingPointError eagerly and `tf.errors.InvalidArgumentError` in a graph, before any
            update. XLA, with which Keras compiles `fit` on a GPU by default, cannot stop a step:
            the gradient is set to zero, and `check` raises. `on_spike="skip"` is for PyTorch only.

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

    def __init__(
        self,
        rule: Rule,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_settings: Sequence[Mapping[str, Any]] | None = None,
        **settings: Unpack[CommonSettings],
    ) -> None:
        self._set_up(
            rule_instance(rule),
            group_settings,
            history_length=history_length,
            global_clipping=global_clipping,
            **settings,
        )

    def _set_up(self, rule: Rule | type[Rule], group_settings: Any, **settings: Any) -> None:
        """What all constructors do; `rule` may be a class, whose settings are then given too."""
        made = ClipperSettings.make(type(self).__name__, rule, **settings)
        overrides = patterns(group_settings, made)
        for each in (made.default, *(pattern.settings for pattern in overrides)):
            check_memory([usable(each)])
        self._start(made, overrides)

    @constructor
    def as_optimizer(
        cls: Callable[P, Clipper], optimizer: OptimizerT, *args: P.args, **settings: P.kwargs
    ) -> OptimizerT:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        Learning-rate schedules, callbacks, `isinstance` and hyperparameters keep working. The
        clipper is `optimizer.clipper`; its state is saved wherever the optimizer's is.

        Models that the optimizer has trained already trace their training step again at the next
        `fit`. A `tf.function` of your own that was traced before does not clip: attach first.

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
        return optimizer_factory(cls, optimizer_class, args, settings)

    # -- settings and groups -----------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        """The rule of the variables that no group matches."""
        return self._settings.default.rule

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of the variables that no group matches, by name."""
        return self._settings.defaults

    @property
    def global_clipping(self) -> bool:
        """Whether one history stands for all variables together."""
        return self._settings.mode == "global"

    @property
    def group_clipping(self) -> bool:
        """Whether one history stands for all variables of a parameter group together."""
        return self._settings.mode == "group"

    @property
    def built(self) -> bool:
        """Whether the clipper knows its variables."""
        return self._pipeline is not None

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The parameter groups: `"params"`, `"param_names"`, `"match"` and settings.

        Empty before `build`. Writing a setting, as in `param_groups[0]["quantile"] = 0.5`, changes
        the clipper's, also in graphs that are traced already; what such a graph cannot follow
        raises ValueError and changes nothing.
        """
        return [
            ParamGroup(
                {
                    "params": list(group.variables),
                    "param_names": group.names,
                    "match": group.match,
                    **group.settings.settings,
                },
                lambda name, value, i=i: self._change_setting(i, name, value),
            )
            for i, group in enumerate(self._pipeline.groups if self._pipeline else [])
        ]

    def _change_setting(self, changed: int, name: str, value: Any) -> Any:
        """Change a setting of one group; of all in global mode, where they share a history."""
        pipeline = self._pipeline
        assert pipeline is not None
        new = [group.settings for group in pipeline.groups]
        for i, settings in enumerate(new):
            if i == changed or self.global_clipping:
                new[i] = usable(settings.merged({name: value}))
        pipeline.change_settings(new)
        for i, group in enumerate(pipeline.groups):
            if group.match is None or self.global_clipping:
                self._settings = replace(self._settings, default=new[i])
        matched = zip(self._patterns, new)  # a group a pattern, then the rest
        self._patterns = [replace(each, settings=settings) for each, settings in matched]
        return new[changed].settings[name]

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
            RuntimeError: the `tf.distribute` strategy is not supported.
            StateError: a state that was loaded before does not fit.

        If it raises, the clipper is as it was.
        """
        owner = type(self).__name__
        variables = check_variables(variables, owner)
        variables = [each for each in variables if not overwritten_by_gradient(each)]
        if self._pipeline is not None:
            known = self._pipeline.index
            new = [each for each in variables if variable_key(each) not in known]
            if new:
                raise ValueError(
                    f"This {owner} was built with {len(known)} variables and now gets {len(new)} "
                    f"others, such as {name_of(new[0])!r}. A history belongs to its variable: make "
                    "a new clipper for new variables."
                )
            return
        groups = assign_variables(variables, self._patterns, self._settings.default)
        # Where a step builds the clipper, a graph may be under construction.
        with tf.init_scope(), build_scope(variables), collected_variables() as created:
            pipeline = Pipeline(groups, self._settings.mode, owner, self._sums)
            if self._pending is not None:
                self._write(pipeline, self._matched(self._pending, pipeline))
        self._pipeline, self._pending, self._variables = pipeline, None, created

    # -- a step ------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def __call__(self, grads_and_vars: GradsAndVars) -> list[tuple[Gradient | None, Variable]]:
        """Record the norms of gradients and return them clipped.

        For training loops of your own, and for `gradient_transformers=[clipper]` of the legacy
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
        if self._handle is not None:
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
        if self._pipeline is None:
            self.build([variable for _, variable in pairs])
        clipped = iter(self._clip([p for p in pairs if not overwritten_by_gradient(p[1])]))
        return [pair if overwritten_by_gradient(pair[1]) else next(clipped) for pair in pairs]

    @tf.autograph.experimental.do_not_convert
    def _clip(
        self, pairs: Sequence[tuple[Gradient | None, Variable]]
    ) -> list[tuple[Gradient | None, Variable]]:
        """`__call__` for gradients that are known to be summed over replicas."""
        assert self._pipeline is not None
        return self._pipeline.clip(pairs)

    def check(self) -> None:
        """Raise if a step compiled by XLA found a gradient with a NaN or an infinity.

        XLA has no assertions. So with `on_nonfinite="raise"` a compiled step sets such a gradient
        to zero and records nothing, and this method raises afterwards. `AutoClipCallback` calls it
        after each batch. It waits for the device.

        Raises:
            FloatingPointError: since the last check some gradient was not finite.
        """
        if self._pipeline is not None:
            self._pipeline.check()

    @property
    def last(self) -> Report[tf.Tensor]:
        """What the last step did, row by row: norms, thresholds, coefficients, and rows' names.

        Rows are in the order of the parameter groups; under global clipping there is one. Norms,
        thresholds and coefficients are float32[rows] tensors. They are not saved.

        Raises:
            RuntimeError: no step has found a gradient yet, or the last one found none.
        """
        if self._report is None:
            raise RuntimeError(
                "There is nothing to report: the last step had no gradient"
                + (
                    ", or its tf.function was traced before the clipper was attached."
                    if self._handle is not None
                    else "."
                )
            )
        return self._report

    @property
    def total_norm(self) -> tf.Tensor:
        """float32[]: the L2 norm of all gradients of the last step together, before clipping.

        0 if that step had no gradient. Gradients that `on_nonfinite="zero"` zeroed count as zero.
        A `tf.function` can read it after the update.

        Raises:
            RuntimeError: no step has been made since the clipper was made or reset.
        """
        total = None if self._pipeline is None else self._pipeline.total_norm
        if total is None:
            raise RuntimeError("There is no total norm yet: the clipper has not made a step.")
        return total

    @property
    def _report(self) -> Report[tf.Tensor] | None:
        return None if self._pipeline is None else self._pipeline.report

    @property
    def thresholds(self) -> tf.Tensor:
        """float64[rows]: the thresholds of the histories as they are now, also after a load.

        Infinite where nothing was recorded yet or the row is still warming up; never above
        `max_norm`. Without `include_current` the next norms are compared with these.

        Raises:
            RuntimeError: the clipper does not know its variables yet.
        """
        if self._pipeline is None:
            raise RuntimeError(
                f"This {type(self).__name__} has no rows yet: it does not know its variables. "
                "Call build(variables) first, or take a step."
            )
        return self._pipeline.rows.thresholds()

    def reset(self) -> None:
        """Forget all norms, and a loaded state that still waits for the variables."""
        self._pending = None
        if self._pipeline is not None:
            self._pipeline.reset()

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
            A handle; its `remove()`, or the end of a `with` block, detaches the clipper. The
            optimizer's class is then what it was, and the clipper keeps its history. Models trace
            their training step again after both. A `tf.function` of your own stays as it was
            traced, with or without the clipper.

        Raises:
            TypeError: it is not an optimizer of Keras on TensorFlow, or one with optimizers inside.
            ValueError: it has variables that the clipper was built without.
            RuntimeError: it has a clipper already, the clipper is attached already, or the
                optimizer's `tf.distribute` strategy is not supported.
        """
        handle = attach(self, optimizer)
        policies = [self._settings.default, *(each.settings for each in self._patterns)]
        raises = any(each.on_nonfinite == "raise" for each in policies)
        if raises and tf.config.list_physical_devices("GPU"):
            warn_user(
                "On a GPU, Keras compiles fit with XLA by default, and XLA cannot stop a step: "
                'with on_nonfinite="raise" such a gradient is set to zero. Add AutoClipCallback '
                "to fit, which raises after the batch, or compile with jit_compile=False."
            )
        return handle

    def detach(self) -> None:
        """Detach the clipper from its optimizer, as the handle that `attach` returned does.

        Does nothing if the clipper is not attached.
        """
        if self._handle is not None:
            self._handle.remove()

    def __repr__(self) -> str:
        groups = [] if self._pipeline is None else self._pipeline.groups
        return self._settings.describe(
            (
                len(group.variables),
                group.settings,
                "" if group.match is None else f", match={group.match!r}",
            )
            for group in groups
        )
