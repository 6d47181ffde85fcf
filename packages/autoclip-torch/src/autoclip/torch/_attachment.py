"""A clipper on an optimizer: hooks, closures, loss scalers, and the state in its `state_dict()`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autoclip.core import State, StateError
from autoclip.core.adapter import Change, commit, second_clipper_message, warn_user
from autoclip.torch._copies import CopyableAttachment
from autoclip.torch._groups import Groups
from autoclip.torch._parameters import clipped_inside, hyperparameters, optimizers_in
from autoclip.torch._private import disable_dynamo, is_fake, is_in_backward

STATE_KEY = "autoclip"
"""The key of a clipper's state in its optimizer's `state_dict()`."""


class StepResult(NamedTuple):
    """The result of a step besides scaled gradients.

    Attributes:
        norm: of all gradients together before clipping: a number, or 0-d on a device.
        skipped: parameters with `on_spike="skip"` and a norm above the threshold, and their
            gradients, as they were. The parameters have no gradient now.
        skips_update: bool, 0-d and on the device: True if no parameter is to be updated; None if
            the host knows.
    """

    norm: Tensor | float
    skipped: Sequence[tuple[Tensor, Tensor]] = ()
    skips_update: Tensor | None = None


def check_optimizer(optimizer: Any, caller: str) -> None:
    """Refuse anything that a clipper cannot be attached to.

    Args:
        optimizer: the optimizer, or a user's mistake.
        caller: the method that got it, for messages.

    Raises:
        TypeError: it is not a torch optimizer whose `step` calls hooks.
        RuntimeError: it has a clipper already, an optimizer inside it has one, or it is that of a
            part of the parameters in a ZeroRedundancyOptimizer.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be an instance, but got the class itself. Make one first: "
            f"{caller}(torch.optim.{optimizer.__name__}(model.parameters()), ...)."
        )
    if not isinstance(optimizer, Optimizer):
        hint = _hint_of_inner(optimizer) or (
            "Pass one optimizer, such as torch.optim.AdamW(model.parameters()). "
            "If you have several, attach a clipper to each."
        )
        name = torch.typename(optimizer)
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but got {name}. {hint}")
    if not getattr(type(optimizer).step, "hooked", False):
        # Accelerate's and Lightning's pass for an Optimizer, but their steps call no hook.
        raise TypeError(
            f"{torch.typename(optimizer)} only wraps an optimizer, and no hook of its own is "
            "ever called. "
            + (
                _hint_of_inner(optimizer)
                or "Attach to the torch optimizer that updates the weights."
            )
        )
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(_without_init(optimizer))
    if _is_called_by("torch.distributed.optim.zero_redundancy_optimizer"):
        raise RuntimeError(
            "ZeroRedundancyOptimizer makes an optimizer of some parameters on each process, and "
            "does not save its history. Pass it the plain class, and attach the clipper to it: "
            f"{caller}(ZeroRedundancyOptimizer(parameters, {type(optimizer).__name__}), ...)."
        )
    if hasattr(optimizer, "clipper"):
        raise RuntimeError(second_clipper_message(optimizer, optimizer.clipper))
    _refuse_clipped_inside(optimizer)


def _refuse_clipped_inside(optimizer: Optimizer) -> None:
    found = clipped_inside(optimizer)
    if found is not None:
        path, inner = found
        raise RuntimeError(
            f"The {type(inner).__name__} inside this {type(optimizer).__name__}, "
            f"`optimizer{path}`, has a clipper, and two would clip twice. Attach one to the inner "
            f"or to the outer optimizer only; optimizer{path}.clipper.detach() detaches the inner "
            "one's."
        )


def _hint_of_inner(wrapper: object) -> str:
    """A hint at the optimizer that an object wraps; empty if there is none."""
    inside = {id(each): f"`{path}`" for path, each in optimizers_in(wrapper).items()}
    names = [*inside.values()]
    if len(names) == 1:
        return f"Attach to the optimizer inside, its attribute {names[0]}."
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        return f"Attach a clipper to each of the {len(names)} optimizers inside: {some}."
    if type(wrapper).__module__.startswith("fastai."):
        return (
            "fastai's own optimizers are none of torch's. Train with "
            "opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), and attach to `learn.opt.opt` "
            "after learn.create_opt()."
        )
    return ""


def _without_init(optimizer: Optimizer) -> str:
    return (
        f"{torch.typename(optimizer)} has no hooks, since its __init__ does not call "
        "super().__init__(params, defaults). Add that call."
    )


class Attachment(CopyableAttachment):
    """A clipper on an optimizer: its hooks, and the state between them.

    Args:
        clipper: the clipper.
        optimizer: one that `check_optimizer` accepts.
        groups: the clipper's, which follow the optimizer's; None if it knows its own parameters.
    """

    def __init__(self, clipper: Any, optimizer: Optimizer, groups: Groups | None = None) -> None:
        super().__init__(clipper, optimizer)
        # A checked state, until the optimizer has loaded its own and this is committed.
        self._pending: State | None = None
        self._groups = groups
        self._settings: _SettingsInGroups | None = None  # None after the warning
        self._handles: list[RemovableHandle] = []
        self._has_stepped = False
        self._may_be_nested = _overrides_a_step(type(optimizer))
        # Horovod's step waits for the sums over processes before it calls that of its base class.
        self._steps_inside = self._may_be_nested and hasattr(optimizer, "skip_synchronize")
        # Of the present step: parameters that it leaves out, with their gradients, and True if
        # `found_inf` on the optimizer is ours.
        self._withheld: Sequence[tuple[Tensor, Tensor]] = ()
        self._set_found_inf = False
        self._has_post_hook = False

    def _hook(self, optimizer: Optimizer) -> None:
        own = type(optimizer)
        hooks: list[tuple[str, Callable[..., Any]]] = [("register_step_pre_hook", self.before_step)]
        attributes: dict[str, Any] = {"clipper": self._clipper, "__reduce_ex__": self._reduce_ex}
        # A class's own method need not call torch's, nor the hooks: bitsandbytes' does not.
        if own.state_dict is Optimizer.state_dict:
            hooks.append(("register_state_dict_post_hook", self._after_state_dict))
        else:
            attributes["state_dict"] = self._state_dict
        if own.load_state_dict is Optimizer.load_state_dict:
            hooks.append(("register_load_state_dict_pre_hook", self._before_load))
            hooks.append(("register_load_state_dict_post_hook", self._after_load))
        else:
            attributes["load_state_dict"] = self._load_state_dict
        if hasattr(own, "__deepcopy__"):
            attributes["__deepcopy__"] = self._deepcopy
        changes: list[Change] = [
            (vars(optimizer), attributes),
            (vars(self._clipper), {"_attachment": self}),
        ]
        if self._groups is not None:
            changes.append(self._groups.following(optimizer))
            names = self._groups.settings.default.settings
            self._settings = _SettingsInGroups(optimizer, names)
        try:
            for register, hook in hooks:
                self._handles.append(getattr(optimizer, register)(hook))
        except AttributeError as error:
            raise TypeError(_without_init(optimizer)) from error
        self.may_lack_history = _has_been_trained(optimizer)
        _warn_of_other_steps(optimizer)
        commit(*changes)

    def _unhook(self, optimizer: Optimizer | None) -> None:
        own = {} if optimizer is None else vars(optimizer)
        for name, value in [*own.items()]:
            if value is self._clipper or getattr(value, "__self__", None) is self:
                del own[name]
        while self._handles:  # the step's last: until then it is clipped
            self._handles[-1].remove()
            self._handles.pop()
        changes: list[Change] = [(vars(self._clipper), {"_attachment": None})]
        if self._groups is not None:
            # If parameters have vanished, each later use of the clipper raises; this must not: the
            # error tells users to detach.
            with suppress(RuntimeError):
                changes.append(self._groups.holding())
        commit(*changes)

    # -- steps -------------------------------------------------------------------------------

    @disable_dynamo
    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Clip the gradients now, or with a closure after it has computed them."""
        if self._may_be_nested and _is_nested(optimizer) != self._steps_inside:
            return None
        if "grad_scaler" in kwargs:
            raise RuntimeError(
                f"GradScaler passes itself to {type(optimizer).__name__}.step() as `grad_scaler`, "
                "and the gradients are unscaled only in there, where no hook can see their true "
                "norms. Call scaler.unscale_(optimizer) and clipper.step() yourself, on a clipper "
                "that is not attached."
            )
        # args[0] is the optimizer itself.
        if len(args) > 1 and callable(args[1]):
            return (optimizer, self._clipping(optimizer, args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._clipping(optimizer, kwargs["closure"])}
        self._clip(optimizer)
        return None

    def _clipping(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_and_clip() -> Any:
            loss = closure()
            self._clip_uncompiled(optimizer)
            return loss

        return closure_and_clip

    def _clip(self, optimizer: Optimizer) -> None:
        if self._withheld or self._set_found_inf:
            self._clear(optimizer)
        if not self._has_stepped:
            _refuse_clipped_inside(optimizer)  # one that was attached after this one
            if self._groups is not None:
                _warn_of_parts(self._groups)
            self._has_stepped = True
        if self.may_lack_history:
            self.may_lack_history = False
            if not self._clipper.has_history:
                self.warn_without_history()
        # A GradScaler sets both on fused optimizers, whose gradients are still scaled then. If only
        # found_inf is set, the gradients are already unscaled.
        scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        try:
            with torch.no_grad():  # as a decorator it takes twice as long
                result = self._clipper._step(scale, found_inf, partial(_reads_found_inf, optimizer))
                if result.skipped or result.skips_update is not None:
                    self._skip(optimizer, result, found_inf)
        except BaseException:
            # GradScaler removes them after the step, but not if the step raises.
            if found_inf is not None:
                optimizer.__dict__.pop("grad_scale", None)
                optimizer.__dict__.pop("found_inf", None)
            raise
        # Afterwards: a step adopts the settings of new groups, or refuses wrong ones.
        if self._settings is not None and (written := self._settings.written(optimizer)):
            self._settings = None
            warn_user(
                f"optimizer.{written} does not change the clipper, which takes settings from a "
                "group of the optimizer only when the group is new. Write to "
                "optimizer.clipper.param_groups instead."
            )

    _clip_uncompiled = disable_dynamo(_clip)

    def _skip(self, optimizer: Optimizer, result: StepResult, found_inf: Tensor | None) -> None:
        """Skip the update of some parameters, or of all if only the device knows."""
        self._withheld = result.skipped
        if not self._has_post_hook:
            # Only now: under torch.compile each hook costs a graph break. torch looks for these
            # hooks after the update, so this one is called at the end of this very step.
            self._handles.append(optimizer.register_step_post_hook(self.after_step))
            self._has_post_hook = True
        if result.skips_update is not None:
            verdict = result.skips_update.float()
            if found_inf is not None:  # not in place: the scaler would lower its scale
                verdict = torch.maximum(verdict, found_inf.to(verdict))
            self._set_found_inf = found_inf is None
            vars(optimizer)["found_inf"] = verdict

    @disable_dynamo
    def after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Give back the gradients of parameters that this step left out."""
        if self._may_be_nested and _is_nested(optimizer) != self._steps_inside:
            return
        for parameter, gradient in self._withheld:
            if parameter.grad is None:
                parameter.grad = gradient
        self._clear(optimizer)

    def _clear(self, optimizer: Optimizer) -> None:
        """Clear a step's leftovers, including those of one that raised."""
        self._withheld = ()
        if self._set_found_inf:
            self._set_found_inf = False
            optimizer.__dict__.pop("found_inf", None)

    # -- state -------------------------------------------------------------------------------

    @disable_dynamo
    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[STATE_KEY] = self._clipper.state_dict()

    def _state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        optimizer = self.optimizer
        state_dict: dict[str, Any] = type(optimizer).state_dict(optimizer, *args, **kwargs)
        self._after_state_dict(optimizer, state_dict)
        return state_dict

    def _load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        optimizer = self.optimizer
        self._before_load(optimizer, state_dict)
        type(optimizer).load_state_dict(optimizer, state_dict, *args, **kwargs)
        self._after_load(optimizer)

    @disable_dynamo
    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._pending = None
        entry = state_dict.get(STATE_KEY)
        if entry is not None:
            source = f"the optimizer's state_dict[{STATE_KEY!r}]"
            self._pending = self._clipper._check_state_dict(entry, source)
        elif "clipper" in state_dict and "param_groups" not in state_dict:
            raise StateError(
                f"state_dict must be an optimizer's, but got one with the keys {[*state_dict]}. If "
                'autoclip 0.2.1 saved it, load its "optimizer" entry here, and convert the '
                "history first: autoclip convert OLD.pt NEW.autoclip."
            )
        elif not self.has_warned:
            self._warn_of_missing_entry()

    def _warn_of_missing_entry(self) -> None:
        reason = "it was saved without a clipper, or by a framework that dropped the entry"
        # Nothing else tells that it loads, and users who follow the documentation get no warning.
        if _is_called_by("torch.distributed.checkpoint"):
            if self._clipper.has_history:  # saved and loaded separately, as the documentation says
                return
            reason = (
                "torch.distributed.checkpoint keeps only the entries that it knows, also in "
                "Composer and Accelerate"
            )
        self.has_warned = True
        self.may_lack_history = False  # no second warning of the same
        warn_user(
            f"The optimizer's checkpoint has no {STATE_KEY!r} entry: {reason}. The clipper keeps "
            "the history that it has. Where entries are dropped, save "
            "optimizer.clipper.state_dict() separately, and load it with "
            "optimizer.clipper.load_state_dict()."
        )

    @disable_dynamo
    def _after_load(self, optimizer: Optimizer) -> None:
        if self._pending is not None:
            self._clipper.commit_state(self._pending)
            self._pending = None


class _SettingsInGroups:
    """The settings of a clipper that stand in an optimizer's groups, to notice others later.

    A clipper takes them from a group when the group is new, and afterwards owns its settings.

    Args:
        optimizer: the optimizer.
        names: of the clipper's settings.
    """

    def __init__(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        own = hyperparameters(optimizer)
        self._names = [name for name in names if name not in own]
        self._remember(optimizer.param_groups)

    def _remember(self, groups: list[dict[str, Any]]) -> None:
        self._groups, self._sizes = [*map(id, groups)], [*map(len, groups)]
        self._values = [
            (i, name, group[name])
            for i, group in enumerate(groups)
            for name in self._names
            if name in group
        ]

    def written(self, optimizer: Optimizer) -> str:
        """An assignment that a user has made since, as Python; "" if there is none."""
        groups = optimizer.param_groups
        if [*map(len, groups)] == self._sizes and all(
            groups[i].get(name) is value for i, name, value in self._values
        ):
            return ""
        before = {(i, name): value for i, name, value in self._values}
        # Others than before are those of a checkpoint, or new.
        is_same = [*map(id, groups)] == self._groups
        self._remember(groups)
        for i, name, value in self._values if is_same else ():
            if (i, name) not in before or before[i, name] != value:
                return f"param_groups[{i}][{name!r}] = {value!r:.200}"
        return ""


def _warn_of_other_steps(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    # Methods of the SAM family that update weights without `step`.
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        warn_user(
            f"AutoClip clips in {name}.step(closure), but not in {name}.first_step and "
            "second_step. If you call these yourself, do not attach the clipper: make it from the "
            "same parameters, QuantileClip(model.parameters()), and call clipper.step() after the "
            "last backward pass, before the method that updates the weights."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        warn_user(
            f"{name} has differentiable=True, but clipping is not differentiated: derivatives "
            "through its steps are those of unclipped steps, as after "
            "torch.nn.utils.clip_grad_norm_. Attach a clipper only if you take no such derivatives."
        )
    if hasattr(optimizer, "fused_backward"):
        warn_user(
            f"{name}.fused_backward updates the weights during the backward pass, where AutoClip "
            f"cannot clip. Use {name}'s own clipping, or an optimizer that updates them in step()."
        )
    if isinstance(getattr(optimizer, "optimizer_dict", None), Mapping):
        warn_user(
            f"{name}.step() updates nothing: optimizers in its optimizer_dict update each "
            "parameter during the backward pass, where this clipper cannot clip. Use an optimizer "
            "that updates all parameters in step(): for example, in the Hugging Face Trainer, "
            'optim="galore_adamw" instead of "galore_adamw_layerwise".'
        )


def _warn_of_parts(groups: Groups) -> None:
    """Warn if a hook steps while the backward pass still computes gradients of the same row."""
    is_partial = groups.mode.joins and is_in_backward()
    if is_partial and any(parameter.grad is None for parameter in groups.parameters()):
        warn_user(
            "This step runs inside the backward pass, before all gradients exist. With "
            "global_clipping or group_clipping, the norm is that of the present ones alone. Clip "
            "each parameter by itself, without these settings, or step after the backward pass."
        )


def _has_been_trained(optimizer: Optimizer) -> bool:
    """True if the optimizer's state shows that it has made steps, or was loaded.

    A few optimizers, such as Adagrad, fill their state earlier: with zeros, with masks.
    """
    state = getattr(optimizer, "state", {})
    return any(_counts_steps(each) for each in state.values() if isinstance(each, Mapping))


def _counts_steps(state: Mapping[str, Any]) -> bool:
    values: Iterable[Any] = [state["step"]] if "step" in state else state.values()
    return any(
        bool(value.any()) if isinstance(value, Tensor) else value > 0
        for value in values
        if isinstance(value, (int, float))
        or (isinstance(value, Tensor) and value.dtype != torch.bool and not is_fake(value))
    )


def _reads_found_inf(optimizer: Optimizer) -> bool:
    """True if the step is known to skip the update on the device if `found_inf` is not 0.

    torch's own fused steps do. Containers and subclasses have the flag in their groups too, but
    their own steps need not look at the attribute, or look for it on an optimizer inside.
    """
    is_torchs = type(optimizer).step.__module__.startswith("torch.optim.")
    return is_torchs and all(group.get("fused") for group in optimizer.param_groups)


def _is_called_by(module: str) -> bool:
    """True if a function of `module`, or of a module in it, is on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if f"{frame.f_globals.get('__name__')}.".startswith(f"{module}."):
            return True
        frame = frame.f_back
    return False


def _overrides_a_step(own: type[Optimizer]) -> bool:
    """True if a class has a `step` above that of another optimizer, and so may call that one."""
    steps = [each for each in own.__mro__ if "step" in vars(each) and each is not Optimizer]
    return len(steps) > 1


def _is_nested(optimizer: Optimizer) -> bool:
    """True if this step was called by another one: a subclass that calls `super().step()`.

    Each of the two runs inside torch's wrapper around `Optimizer.step`, which calls the hooks. Only
    the stack shows it: a mark that the outer step sets would stay if the step raises, since no hook
    is called then. Optimizers whose class overrides no other's step need not ask.
    """
    steps = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and steps < 2:
        if frame.f_globals.get("__name__") == "torch.optim.optimizer":
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1
