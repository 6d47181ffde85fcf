"""The clippers, which users construct, call, attach to optimizers, read, save and load."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip.core import OnNonfinite, OnSpike, Quantile, Record, Report, Rule, Standard
from autoclip.core.adapter import (
    AttachmentHandle,
    BaseClipper,
    ClipperSettings,
    Storage,
    attached_message,
    constructor,
    given,
    make_factory,
    rule_instance,
    warn_user,
)
from autoclip.torch._attachment import Attachment, StepResult, check_optimizer
from autoclip.torch._groups import Groups
from autoclip.torch._histories import Histories
from autoclip.torch._layout import Layout, is_distributed, layout_of, row_devices
from autoclip.torch._parameters import OptimizerGroup, OptimizerGroups, ParamsT, entries_of
from autoclip.torch._private import disable_dynamo

P = ParamSpec("P")
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

_gradient = attrgetter("grad")
_LARGEST = torch.finfo(torch.float32).max


class Clipper(BaseClipper[Groups, Tensor]):
    """Clip each gradient to a threshold that a rule computes from the history of its norms.

    At each step the gradient's L2 norm is compared with the threshold, and the gradient is
    multiplied by `min(1, threshold / norm)`. `QuantileClip` and `StandardClip` are this class with
    the two built-in rules.

    Args:
        parameters: tensors, `named_parameters()` pairs, or group dicts such as
            `{"params": [...], "history_length": 100}`, as torch's optimizers take them. A group
            may override any setting but the mode, the rule's own included.
        rule: the rule that turns a window of norms into a threshold, such as `Quantile(0.9)`.
        history_length: the number of norms that each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each parameter.
        group_clipping: one history for each parameter group.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up; None for no
            ceiling.
        warmup_steps: the number of norms that a history records before the rule counts; None for
            the rule's default.
        include_current: True if a norm is part of the window that it is compared with; None for the
            rule's default.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: `"clip"` scales a gradient above its threshold down to it; `"zero"` zeroes it;
            `"skip"` leaves its parameter untouched by this update, momentum and weight decay
            included, by setting `grad` to None. An attached optimizer gives the gradient back after
            the step. On an accelerator `"skip"` synchronizes, except under global clipping on one
            of torch's own optimizers with `fused=True`.
        on_nonfinite: `"keep"` leaves a gradient that holds a NaN or an infinity as it is; under
            global or group clipping there is no norm then, and nothing is scaled. `"zero"` sets it
            to zero, and the other gradients are clipped as if it had been zero. `"raise"` raises
            FloatingPointError, which synchronizes with an accelerator at each step. Such a norm is
            never recorded.

    Raises:
        TypeError: a setting or a parameter has the wrong type.
        ValueError: a setting has the wrong value, or `parameters` is empty or has duplicates.

    >>> import torch
    >>> from autoclip.core import Quantile
    >>> from autoclip.torch import Clipper
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = Clipper([weight], Quantile(0.5), max_norm=10.0)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> total_norm, weight.grad.norm()
    (tensor(9.), tensor(2.))
    """

    _histories: Histories

    def __init__(
        self,
        parameters: ParamsT,
        rule: Rule,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_clipping: bool = False,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        include_current: bool | None = None,
        record: Record = "raw",
        on_spike: OnSpike = "clip",
        on_nonfinite: OnNonfinite = "keep",
    ) -> None:
        self._set_up(rule_instance(rule), parameters, **given(locals(), "parameters", "rule"))

    def _set_up(
        self,
        rule: Rule | type[Rule],
        parameters: ParamsT | OptimizerGroups,
        *,
        global_threshold: bool | None = None,
        **settings: Any,
    ) -> None:
        """Make the clipper; `rule` may be a class, whose settings are then in `settings`."""
        if global_threshold is not None:
            warn_user("global_threshold is called global_clipping now.", DeprecationWarning)
            settings["global_clipping"] = global_threshold
        made = ClipperSettings.make(type(self).__name__, rule, **settings)
        self._histories = Histories()
        self._groups = Groups(made, self._histories)
        self._attachment: Attachment | None = None
        self._has_seen_a_gradient = self._has_warned = False
        self._layout: Layout | None = None
        self._norm: Tensor | float | None = None
        self._reports: Sequence[tuple[Storage[Any], Report[Any]]] = ()
        entries = [self._entry(entry) for entry in entries_of(parameters)]
        self._groups.add(*entries)

    def _entry(self, group: Any) -> Any:
        """The parameters of a group dict, its settings, and the names."""
        if isinstance(group, OptimizerGroup):
            own = self._settings.taken_from(group)
        elif not isinstance(group, dict):
            raise TypeError(
                "parameters must be all groups or all tensors, but after a group came "
                f"{torch.typename(group)}."
            )
        elif "params" not in group:
            raise KeyError('param_group must be a dict with the key "params".')
        else:
            others = ("params", "param_names")
            own = self._settings.for_group({k: v for k, v in group.items() if k not in others})
        return group["params"], own, group.get("param_names")

    def add_param_group(self, param_group: Any, **settings: Any) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: a dict of `"params"`, a tensor or an iterable of tensors or (name, tensor)
                pairs, and settings that differ from the clipper's. Parameters alone, as autoclip
                0.2.1 took them, are deprecated.
            settings: more settings of the group, as autoclip 0.2.1 took them; deprecated.

        Raises:
            TypeError: a parameter is not a tensor, a name is not a string, or a setting has the
                wrong type.
            KeyError: it has no `"params"`.
            ValueError: a parameter is not a leaf or a duplicate, a setting is unknown or wrong, or
                the clipper is global and the group has its own settings.
            RuntimeError: the clipper is attached to an optimizer; add the group to that.

        If it raises, the clipper is as it was.
        """
        if self._is_attached:
            raise RuntimeError(
                "The clipper is attached to an optimizer and takes its parameters from there: "
                "call optimizer.add_param_group instead."
            )
        self.detach()  # from one that is gone
        is_dict = isinstance(param_group, dict)
        group = param_group if is_dict else {"params": param_group}
        self._groups.add(self._entry({**settings, **group}))
        if settings or not is_dict:
            warn_user(
                "add_param_group takes a dict now, as torch's optimizers do: "
                "add_param_group({'params': parameters, 'quantile': 0.5}).",
                DeprecationWarning,
            )

    # -- steps -------------------------------------------------------------------------------

    @disable_dynamo
    def step(self) -> Tensor:
        """Record the norms of the gradients and clip them, in place.

        Call it after `backward()`, after `scaler.unscale_(optimizer)` if a `GradScaler` scales
        the loss, and before `optimizer.step()`. An attached clipper is called by its optimizer
        alone; after a step, `total_norm` is the same value. Not thread-safe:
        use one clipper from one thread at a time.

        Returns:
            A 0-d float32 tensor on the gradients' device: the L2 norm of all gradients together
            before clipping, as `torch.nn.utils.clip_grad_norm_` returns it; 0 without gradients.
            Gradients that `on_nonfinite="zero"` zeroed count as zero.

        Raises:
            FloatingPointError: a gradient holds a NaN or an infinity, and `on_nonfinite` is
                `"raise"`. Nothing was recorded or scaled.
            RuntimeError: the clipper is attached to an optimizer. Nothing was recorded or scaled.
        """
        if self._is_attached:
            raise RuntimeError(
                f"This {type(self).__name__} is attached to an optimizer, whose step() calls it: "
                "another call would record and clip each gradient twice. For the total norm, read "
                "clipper.total_norm after optimizer.step(). To call step() yourself, call "
                "clipper.detach() first, or make the clipper without attaching it."
            )
        with torch.no_grad():  # as a decorator it takes twice as long
            return _as_scalar(self._step().norm)

    def _step(
        self,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        can_defer: Callable[[], bool] | None = None,
    ) -> StepResult:
        """Record the norms of the gradients and clip them.

        Args:
            scale: 0-d, the loss scale that the gradients still have; None if they have none.
            found_inf: 0-d, nonzero if a loss scaler skips this step. None without a loss scaler.
            can_defer: tells if the caller can skip the whole update on the device; None for no.

        Raises:
            FloatingPointError, RuntimeError: see `step`.
        """
        groups, histories, layout = self._groups, self._histories, self._layout
        parameters = groups.parameters()
        gradients: list[Tensor | None] = [*map(_gradient, parameters)]
        # In a process by itself no parameter can have become sharded.
        if layout is None or is_distributed() or not layout.fits(gradients):
            layout = layout_of(parameters, gradients, groups, histories, layout)
            self._layout = layout
        norms = layout.measure(gradients, scale, found_inf)
        if not norms:
            self._warn_without_gradients()
            self._reports, self._norm = (), 0.0
            return StepResult(0.0)
        self._has_seen_a_gradient = True
        zeroed = None
        if layout.nonfinite is not None and found_inf is None:
            norms, zeroed = layout.nonfinite.apply(norms)
        total = layout.total(norms)
        self._reports = ()
        self._reports = reports = histories.record(layout.rows(norms, total))
        skipped, skips_update = layout.scale(gradients, reports, parameters, zeroed, can_defer)
        self._norm = total
        withheld = _withheld(parameters, skipped) if skipped else ()
        return StepResult(total, withheld, skips_update)

    def _warn_without_gradients(self) -> None:
        # An optimizer's parameters may be exchanged at any time; then it updates nothing either.
        if self._has_warned or (self._has_seen_a_gradient and not self._is_attached):
            return
        parameters = self._groups.parameters()
        if self._has_seen_a_gradient and any(map(_accumulates_hooked, parameters)):
            return  # a hook has stepped and freed the gradients
        self._has_warned = True
        if not any(parameter.requires_grad for parameter in parameters):
            warn_user(
                "A clipper's step found no gradient, and none of its parameters requires one: they "
                "are frozen, or the optimizer updates other parameters than those in its groups."
            )
        elif any(map(_has_backward_hooks, parameters)):
            warn_user(
                "A clipper's step found no gradient on any parameter, but the parameters have "
                "hooks that run in the backward pass. If these update the weights and free the "
                "gradients (LOMO, layer-wise optimizers, fused backward passes), a clipper after "
                "the backward pass comes too late. Attach a clipper to each optimizer that a hook "
                "steps, or update all weights in one optimizer.step()."
            )
        else:
            caller, remedy = (
                ("optimizer", "optimizer afterwards; this one does not train them")
                if self._is_attached
                else (self._settings.owner, "clipper afterwards, or attach it to the optimizer")
            )
            warn_user(
                f"{caller}.step() found no gradient on any parameter. Call it after backward(). If "
                "the model was wrapped, sharded, re-created or loaded with assign=True in the "
                f"meantime, its parameters are other objects now: make the {remedy}."
            )

    # -- after a step ------------------------------------------------------------------------

    @property
    def total_norm(self) -> Tensor:
        """The L2 norm of all gradients together before clipping, at the last step.

        A 0-d float32 tensor on the gradients' device, as `step()` returns it. Reading it is
        asynchronous; `float(clipper.total_norm)` synchronizes. 0 if no parameter had a gradient;
        NaN in a step in which a loss scaler found an overflow.

        Raises:
            RuntimeError: no step has been made since the clipper was made or reset.
        """
        if self._norm is None:
            raise RuntimeError("There is no total norm yet: the clipper has not made a step.")
        return _as_scalar(self._norm)

    def reset(self) -> None:
        """Forget all norms, as if no step had been made."""
        self._arrange()
        self._histories.reset()
        self._reports, self._norm = (), None

    @property
    def last(self) -> Report[Tensor]:
        """The last step, row by row: norms, thresholds, coefficients, and names.

        Rows are in the order of the parameter groups: parameters; groups under group clipping; one
        under global clipping. Numbers are float32[rows]. Reading the values synchronizes with the
        device; `step()` does not.

        Raises:
            RuntimeError: no step has found a gradient yet, or the last one found none.
        """
        if not self._reports:
            raise RuntimeError(
                "There is nothing to report: no step yet, or no gradient in the last."
            )
        report = self._histories.joined(self._reports)
        return replace(report, names=self._groups.row_names())

    @property
    def thresholds(self) -> Tensor:
        """float32[rows]: the thresholds of the windows as they are now, in the order of `last`.

        Infinite if nothing was recorded yet or the row is still warming up; never above `max_norm`.
        Without `include_current` the next norms are compared with these.
        """
        self._arrange()
        return self._histories.in_order(self._histories.thresholds(), torch.inf)

    def _arrange(self) -> None:
        self._histories.arrange(row_devices(self._groups, self._histories))

    # -- optimizers --------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> AttachmentHandle:
        """Let `optimizer` call this clipper at each of its steps, and carry its state.

        From now on the clipper reads its parameters from `optimizer.param_groups` at every step,
        save and load. A parameter that moves in the groups takes its history along. If objects are
        replaced (FSDP, `to_empty`, `load_state_dict(assign=True)`), the new ones continue the
        histories at their positions. The clipper keeps its own groups; a parameter that is added
        to the optimizer joins the group of its neighbors, and a new optimizer group becomes a group
        with the clipper's defaults and the settings that it names. The clipper is then
        `optimizer.clipper`, and its state travels in `optimizer.state_dict()["autoclip"]`.

        Args:
            optimizer: a torch optimizer over the same set of parameters.

        Returns:
            A handle: its `remove()`, or the end of a `with` block, detaches the clipper and leaves
            no trace. The clipper keeps its history, and the parameters that the optimizer has then.

        Raises:
            TypeError: it is not a torch optimizer, only wraps one, or never called
                `Optimizer.__init__`.
            ValueError: its parameters are not the clipper's.
            RuntimeError: it has a clipper already, or the clipper is attached already.

        If it raises, the optimizer and the clipper are as they were.
        """
        check_optimizer(optimizer, "attach")
        if self._is_attached:
            raise RuntimeError(attached_message(self))
        self.detach()  # from one that is gone
        return Attachment(self, optimizer, self._groups).begin()

    def _attach_to_copy(self, optimizer: Optimizer) -> None:
        """Attach to a copy of this clipper's optimizer; see `_copies`."""
        clipper = self
        if self._attachment is not None:  # copy.copy has copied neither parameters nor clipper
            own = {id(parameter): parameter for parameter in self._groups.parameters()}
            clipper = copy.deepcopy(self, own)
        clipper.attach(optimizer)

    @constructor
    def as_optimizer(
        cls: Callable[Concatenate[ParamsT, P], Clipper],
        optimizer: OptimizerT,
        *args: P.args,
        **settings: P.kwargs,
    ) -> OptimizerT:
        """Attach a new clipper to `optimizer` and return that same optimizer.

        Schedulers, `GradScaler`, trainers and `isinstance` keep working. The clipper is
        `optimizer.clipper`, its groups are the optimizer's, one to one, and its state travels in
        `optimizer.state_dict()["autoclip"]`. A copy or a pickle of the optimizer has a copy of the
        clipper, with a history of its own. `optimizer.clipper.detach()` undoes this.

        Args:
            optimizer: a torch optimizer. One of its groups that names a setting of the clipper,
                such as `"history_length"`, overrides it for that group, unless the optimizer has a
                hyperparameter of that name (in `optimizer.defaults`): that is the optimizer's.
            args: the class's arguments after `parameters`.
            settings: the class's settings by keyword. `on_nonfinite` acts as `"keep"` under a loss
                scaler.

        Raises:
            TypeError: it is not a torch optimizer, or a setting has the wrong type.
            ValueError: a setting has the wrong value.
            RuntimeError: the optimizer has a clipper already.
        """
        check_optimizer(optimizer, "as_optimizer")
        clipper = cls(cast("Any", OptimizerGroups(optimizer)), *args, **settings)
        clipper.attach(optimizer)
        return optimizer

    @constructor
    def optimizer_factory(
        cls: Callable[Concatenate[ParamsT, P], Clipper],
        optimizer_class: type[OptimizerT],
        *args: P.args,
        **settings: P.kwargs,
    ) -> type[OptimizerT]:
        """Make a class of optimizers that have a clipper, for frameworks that ask for a class.

        `factory(params, lr=1e-3)` is `as_optimizer(optimizer_class(params, lr=1e-3), ...)`: an
        optimizer of `optimizer_class`, with a new clipper attached. The factory is a subclass of
        `optimizer_class` with its name, module and signature. It can be copied, and pickled if
        `optimizer_class` and the settings can be. See "Other frameworks" in the documentation.

        Args:
            optimizer_class: a subclass of `torch.optim.Optimizer`.
            args: the class's arguments after `parameters`.
            settings: the class's settings by keyword; see `as_optimizer`.

        Raises:
            TypeError: it is not a class of torch optimizers, or a factory already, or a setting is
                unknown or has the wrong type.
            ValueError: a setting has the wrong value.

        >>> import torch
        >>> from autoclip.torch import QuantileClip
        >>> make = QuantileClip.optimizer_factory(torch.optim.AdamW, quantile=0.9)
        >>> optimizer = make(torch.nn.Linear(3, 1).parameters(), lr=1e-3)
        >>> type(optimizer), optimizer.clipper.param_groups[0]["quantile"]
        (<class 'torch.optim.adamw.AdamW'>, 0.9)
        """
        factory = make_factory(cls, optimizer_class, Optimizer, args, settings)
        check: Any = cls
        check([torch.zeros((), device="cpu", requires_grad=True)], *args, **settings)
        return factory

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a clipper of its own: it holds its parameters and is attached to nothing. A
        # layout may hold process groups, which belong to this process. Parameters that are new in
        # the optimizer come first: they add rows to the histories, which are copied before groups.
        self._groups.parameters()
        return {**self.__dict__, "_attachment": None, "_layout": None}


class QuantileClip(Clipper):
    """Clip each gradient to a quantile of the history of its norms.

    At each step the gradient's L2 norm is appended to its history, and the gradient is multiplied
    by `min(1, threshold / norm)`, the threshold being the quantile of the history with linear
    interpolation. Seetharaman, Wichern, Pardo, Le Roux: "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", MLSP 2020, arXiv:2007.14469, Algorithm 1.

    Args:
        parameters: see `Clipper`, as for all that is not explained here.
        quantile: a real number in [0, 1]; 1 never clips, lower values clip more often.
        history_length: the number of norms that each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each parameter.
        group_clipping: one history for each parameter group.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up.
        warmup_steps: the number of norms that a history records before the quantile counts; None
            for 0.
        include_current: True if a norm is part of the window that it is compared with; None for
            True. autoclip 0.2.1 compared it with the norms before it: False.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: `"clip"` scales a gradient above its threshold down to it, `"zero"` zeroes it,
            `"skip"` skips the parameter's update.
        on_nonfinite: `"keep"` leaves a gradient with NaN or infinity as it is, `"zero"` zeroes it,
            `"raise"` raises an error.
        factor: a finite real number > 0 that the quantile is multiplied by.
        global_threshold: the name of `global_clipping` in autoclip 0.2.1; deprecated.

    Raises:
        TypeError, ValueError: see `Clipper`.

    >>> import torch
    >>> from autoclip.torch import QuantileClip
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = QuantileClip([weight], quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> total_norm, weight.grad.norm()
    (tensor(9.), tensor(2.))
    """

    def __init__(
        self,
        parameters: ParamsT,
        quantile: float = 0.9,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
        group_clipping: bool = False,
        max_norm: float | None = None,
        warmup_steps: int | None = None,
        include_current: bool | None = None,
        record: Record = "raw",
        on_spike: OnSpike = "clip",
        on_nonfinite: OnNonfinite = "keep",
        factor: float = 1.0,
        global_threshold: bool | None = None,
    ) -> None:
        self._set_up(Quantile, parameters, **given(locals(), "parameters"))


class StandardClip(Clipper):
    """Clip each gradient to some standard deviations above the mean of its norms' history.

    The threshold is `factor * (mean + deviations * std)` (population deviation) of the norms before
    the current one, once 25 have been recorded.

    Args:
        parameters: see `Clipper`, as for all that is not explained here.
        deviations: a finite real number ≥ 0.
        history_length: the number of norms that each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together instead of one for each
            parameter.
        group_clipping: one history for each parameter group.
        max_norm: a ceiling on every threshold, and the only threshold during warm-up.
        warmup_steps: the number of norms that a history records before the rule counts; None for
            25.
        include_current: True if a norm is part of the window that it is compared with; None for
            False: a spike among the norms that it is compared with hides itself.
        record: `"raw"` records norms as they were, `"clipped"` as they are after clipping.
        on_spike: `"clip"` scales a gradient above its threshold down to it, `"zero"` zeroes it,
            `"skip"` skips the parameter's update.
        on_nonfinite: `"keep"` leaves a gradient with NaN or infinity as it is, `"zero"` zeroes it,
            `"raise"` raises an error.
        decay: weights norms by `decay ** age`, as an exponential average does; None for equal
            weights. See `autoclip.core.Standard`, as for all that follow.
        factor: a finite real number > 0 that the threshold is multiplied by.
        shrink: scales gradients above the threshold down further, as ZClip does.
        log: mean and deviation of the norms' logarithms.
        global_threshold: the name of `global_clipping` in autoclip 0.2.1; deprecated.

    Raises:
        TypeError, ValueError: see `Clipper`.

    >>> import torch
    >>> from autoclip.torch import StandardClip
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = StandardClip([weight], deviations=1.0, warmup_steps=2)
    >>> for size in (2.0, 6.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)
    ...     total_norm = clipper.step()
    >>> clipper.last.thresholds  # of the norms 2 and 6 the mean is 4, the deviation 2
    tensor([6.])
    """

    def __init__(
        self,
        parameters: ParamsT,
        deviations: float = 2.0,
        history_length: int = 1000,
        global_clipping: bool = False,
        *,
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
        global_threshold: bool | None = None,
    ) -> None:
        self._set_up(Standard, parameters, **given(locals(), "parameters"))


def _as_scalar(norm: Tensor | float) -> Tensor:
    """0-d float32."""
    if isinstance(norm, Tensor):
        return norm.float()
    # In less than half of the time of torch.tensor, and on the CPU regardless of the default.
    narrow = math.inf if norm > _LARGEST else norm
    return torch.from_numpy(np.array(narrow, np.float32))


def _accumulates_hooked(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _has_backward_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks) or _accumulates_hooked(parameter)


def _withheld(
    parameters: Sequence[Tensor], indices: Sequence[int]
) -> Sequence[tuple[Tensor, Tensor]]:
    """Set the gradients of some parameters to None; the parameters and their gradients."""
    held = [(parameters[i], parameters[i].grad) for i in indices]
    found = [(parameter, gradient) for parameter, gradient in held if gradient is not None]
    for parameter, _ in found:
        parameter.grad = None
    return found
