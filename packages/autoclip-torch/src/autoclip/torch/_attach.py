"""The one place that knows optimizer hooks: steps, closures, loss scalers, state."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autoclip.core import State
from autoclip.core.adapter import second_clipper_message, warn_user
from autoclip.torch import _legacy
from autoclip.torch._copies import Hooks, deepcopy_with, reduce_with
from autoclip.torch._groups import Groups
from autoclip.torch._parameters import wrapped_optimizers
from autoclip.torch._private import disable_dynamo, is_fake

__all__ = ["STATE_KEY", "Attachment", "StepResult", "check_optimizer"]

STATE_KEY = "autoclip"
"""Where a clipper's state is in its optimizer's `state_dict()`."""

# Methods by which the classes of the SAM family update weights without `step`.
_SAM_STEPS = ("first_step", "second_step")


class StepResult(NamedTuple):
    """The result of a step besides scaled gradients.

    Attributes:
        norm: of all gradients together before clipping: a number, or 0-d on a device.
        skipped: parameters with `on_spike="skip"` and a norm above the threshold, and their
            gradients, as they were. The parameters have no gradient now.
        skips_update: bool, 0-d and on the device: True if no parameter is to be updated. Only if
            `defers_skip` was given; the host does not know it.
    """

    norm: Tensor | float
    skipped: Sequence[tuple[Tensor, Tensor]] = ()
    skips_update: Tensor | None = None


class Attachable(Protocol):
    """The part of a clipper that an attachment calls.

    Attributes:
        may_lack_history: True if the first step must warn if the history is empty, since the
            optimizer had been trained when the clipper was attached.
    """

    may_lack_history: bool

    def _step(
        self,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        defers_skip: bool = False,
    ) -> StepResult:
        """Clip the gradients."""

    @property
    def has_history(self) -> bool:
        """True if a norm was recorded."""

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict."""

    def check_state_dict(self, state_dict: Mapping[str, Any], source: str) -> State:
        """Check a state; nothing changes."""

    def commit_state(self, state: State) -> None:
        """Adopt a checked state."""


def check_optimizer(optimizer: Any, caller: str) -> None:
    """Refuse what a clipper cannot be attached to.

    Args:
        optimizer: what was given.
        caller: the method that it was given to, for messages.

    Raises:
        TypeError: it is not a torch optimizer whose `step` calls hooks.
        RuntimeError: it has a clipper already.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        raise TypeError(
            f"{caller} takes an optimizer, but got the class itself. Make one first: "
            f"{caller}(torch.optim.{optimizer.__name__}(model.parameters()), ...)."
        )
    if not isinstance(optimizer, Optimizer):
        inside = _inside(optimizer)
        raise TypeError(
            f"{caller} takes a torch.optim.Optimizer, but got {torch.typename(optimizer)}."
            + (f" {inside}" if inside else "")
        )
    if not getattr(type(optimizer).step, "hooked", False):
        # Accelerate's and Lightning's pass for an Optimizer, but their steps call no hook.
        raise TypeError(
            f"{torch.typename(optimizer)} only wraps an optimizer, and no hook of its own is "
            "ever called. "
            + (_inside(optimizer) or "Attach to the torch optimizer that updates the weights.")
        )
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(_without_init(optimizer))
    if hasattr(optimizer, "clipper"):
        raise RuntimeError(second_clipper_message(optimizer, optimizer.clipper))


def _inside(wrapper: object) -> str:
    """Where the optimizer is that an object wraps; empty if there is none."""
    names = [f"`.{name}`" for name in wrapped_optimizers(wrapper)]
    if names:
        return f"Attach to the optimizer inside, its attribute {' or '.join(names)}."
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


class Attachment(Hooks):
    """A clipper on an optimizer: its hooks.

    Args:
        clipper: the clipper.
        optimizer: one that `check_optimizer` lets pass.
        groups: the clipper's, which follow the optimizer's; None if it knows its own parameters.
    """

    def __init__(
        self, clipper: Attachable, optimizer: Optimizer, groups: Groups | None = None
    ) -> None:
        self._clipper = clipper
        self._groups = groups
        # Weakly: a cycle would keep a dropped optimizer's state in memory until a collection.
        self._optimizer = weakref.ref(optimizer)
        self._pending: State | None = None
        self._has_warned = False
        self._hooks: list[RemovableHandle] = []
        # Parameters that this step leaves out, and their gradients, until it is over.
        self._withheld: Sequence[tuple[Tensor, Tensor]] = ()
        self._set_found_inf = False
        self._cleans_up = False
        self._attributes: list[str] = []

    @property
    def is_alive(self) -> bool:
        """Whether the optimizer still exists."""
        return self._optimizer() is not None

    def begin(self, optimizer: Optimizer) -> None:
        """Attach; see `Clipper.attach`."""
        hooks: list[tuple[str, Callable[..., Any]]] = [
            ("register_step_pre_hook", self._before_step)
        ]
        if type(optimizer).state_dict is Optimizer.state_dict:
            hooks.append(("register_state_dict_post_hook", self._after_state_dict))
        if type(optimizer).load_state_dict is Optimizer.load_state_dict:
            hooks.append(("register_load_state_dict_pre_hook", self._before_load))
            hooks.append(("register_load_state_dict_post_hook", self._after_load))
        try:
            for register, hook in hooks:
                self._hooks.append(getattr(optimizer, register)(hook))
            if self._groups is not None:
                self._groups.follow(optimizer)
        except BaseException as error:
            self._remove_hooks()
            if isinstance(error, AttributeError):
                raise TypeError(_without_init(optimizer)) from error
            raise
        attributes: dict[str, Any] = {"clipper": self._clipper, "__reduce_ex__": self._reduce_ex}
        # A class's own method need not call torch's, nor the hooks: bitsandbytes' does not.
        if type(optimizer).state_dict is not Optimizer.state_dict:
            attributes["state_dict"] = self._state_dict
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            attributes["load_state_dict"] = self._load_state_dict
        if hasattr(type(optimizer), "__deepcopy__"):
            attributes["__deepcopy__"] = self._deepcopy
        self._attributes = [*attributes]
        optimizer.__dict__.update(attributes)
        self._clipper.may_lack_history = _has_been_trained(optimizer)
        _warn_of_other_steps(optimizer)

    def end(self) -> None:
        """Undo `begin`."""
        self._remove_hooks()
        if self._groups is not None:
            self._groups.release()
        optimizer = self._optimizer()
        if optimizer is not None:
            for name in self._attributes:
                optimizer.__dict__.pop(name, None)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- steps -------------------------------------------------------------------------------

    @disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _is_nested(optimizer):
            return None
        if "grad_scaler" in kwargs:
            raise RuntimeError(
                f"GradScaler passes itself to {type(optimizer).__name__}.step() as `grad_scaler`, "
                "and the gradients are unscaled only in there, where no hook can see their true "
                "norms. Call scaler.unscale_(optimizer) and clipper.step() yourself, on a clipper "
                "that is not attached."
            )
        # args[0] is the optimizer itself. With a closure, gradients exist only after it has run.
        if len(args) > 1 and callable(args[1]):
            return (optimizer, self._clipping(optimizer, args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._clipping(optimizer, kwargs["closure"])}
        self._clip(optimizer)
        return None

    def _clipping(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_and_clip() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        return closure_and_clip

    @disable_dynamo
    @torch.no_grad()
    def _clip(self, optimizer: Optimizer) -> None:
        self._forget_step(optimizer)
        if self._clipper.may_lack_history:
            self._clipper.may_lack_history = False
            self._warn_without_history(optimizer)
        # A GradScaler leaves these on fused optimizers, whose gradients are still scaled then.
        # Without a scale, but with a verdict, they have been unscaled already.
        scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        try:
            result = self._clipper._step(
                scale,
                found_inf,
                defers_skip=_reads_found_inf(optimizer),
            )
        except BaseException:
            # GradScaler removes them after the step, but not if the step raises.
            if found_inf is not None:
                optimizer.__dict__.pop("grad_scale", None)
                optimizer.__dict__.pop("found_inf", None)
            raise
        self._withheld = result.skipped
        if (result.skipped or result.skips_update is not None) and not self._cleans_up:
            # Only now: under torch.compile each hook costs a graph break. torch looks for these
            # hooks after the update, so this one is called at the end of this very step.
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            self._cleans_up = True
        if result.skips_update is not None:
            verdict = result.skips_update.float()
            if found_inf is not None:  # not in place: the scaler would lower its scale
                verdict = torch.maximum(verdict, found_inf.to(verdict))
            self._set_found_inf = found_inf is None
            optimizer.found_inf = verdict  # type: ignore[attr-defined]

    @disable_dynamo
    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if (self._withheld or self._set_found_inf) and not _is_nested(optimizer):
            for parameter, gradient in self._withheld:
                if parameter.grad is None:
                    parameter.grad = gradient
            self._forget_step(optimizer)

    def _forget_step(self, optimizer: Optimizer) -> None:
        """Drop what a step has left, also one that raised before its last hook."""
        self._withheld = ()
        if self._set_found_inf:
            self._set_found_inf = False
            optimizer.__dict__.pop("found_inf", None)

    def _warn_without_history(self, optimizer: Optimizer) -> None:
        if not self._clipper.has_history:
            warn_user(
                f"This {type(optimizer).__name__} was trained before the clipper was attached, and "
                "the clipper starts with an empty history: its first steps are compared with "
                "few norms. If the training was resumed, attach the clipper before you load the "
                "optimizer's state, or load the history with clipper.load_state_dict()."
            )

    # -- copies ------------------------------------------------------------------------------

    def _reduce_ex(self, protocol: Any) -> Any:
        return reduce_with(self._attached(), self._clipper, protocol)

    def _deepcopy(self, memo: dict[int, Any]) -> Any:
        return deepcopy_with(self._attached(), self._clipper, memo)

    # -- state -------------------------------------------------------------------------------

    @disable_dynamo
    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[STATE_KEY] = self._clipper.state_dict()

    def _state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        optimizer = self._attached()
        state_dict: dict[str, Any] = type(optimizer).state_dict(optimizer, *args, **kwargs)
        self._after_state_dict(optimizer, state_dict)
        return state_dict

    def _load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        optimizer = self._attached()
        replaced = self._before_load(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
        type(optimizer).load_state_dict(optimizer, state_dict, *args, **kwargs)
        self._after_load(optimizer)

    def _attached(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # its own method has been called
        return optimizer

    @disable_dynamo
    def _before_load(
        self, optimizer: Optimizer, state_dict: dict[str, Any]
    ) -> dict[str, Any] | None:
        self._pending = None
        replaced = None
        entry = state_dict.get(STATE_KEY)
        if _legacy.is_legacy_pair(state_dict):
            entry, replaced = state_dict["clipper"], state_dict["optimizer"]
        if entry is not None:
            source = f"the optimizer's state_dict[{STATE_KEY!r}]"
            self._pending = self._clipper.check_state_dict(entry, source)
        elif not self._has_warned:
            self._warn_of_missing_entry()
        return replaced

    def _warn_of_missing_entry(self) -> None:
        reason = "it was saved without a clipper, or by a framework that dropped the entry"
        if _is_called_by("torch.distributed.checkpoint"):
            if self._clipper.has_history:  # saved and loaded separately, as the documentation says
                return
            reason = (
                "torch.distributed.checkpoint keeps only the entries that it knows, also in "
                "Composer and Accelerate"
            )
        self._has_warned = True
        self._clipper.may_lack_history = False  # no second warning of the same
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


def _warn_of_other_steps(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if all(hasattr(optimizer, step) for step in _SAM_STEPS):
        warn_user(
            f"AutoClip clips in {name}.step(closure), but not in {name}.first_step and "
            "second_step. If you call these yourself, do not attach the clipper: make it from the "
            "same parameters, QuantileClip(model.parameters()), and call clipper.step() after the "
            "last backward pass, before the method that updates the weights."
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


def _has_been_trained(optimizer: Optimizer) -> bool:
    """Whether the optimizer's state says that it has made steps, or was loaded.

    A few optimizers, such as Adagrad, fill their state before: with zeros, with masks.
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
    """Whether the step is known to skip the update on the device if `found_inf` is not 0.

    torch's own fused steps do. Containers and subclasses have the flag in their groups too, but
    their own steps need not look at the attribute, or look for it on an optimizer inside.
    """
    is_torchs = type(optimizer).step.__module__.startswith("torch.optim.")
    return is_torchs and all(group.get("fused") for group in optimizer.param_groups)


def _is_called_by(module: str) -> bool:
    """Whether a function of `module`, or of a module in it, is on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if f"{frame.f_globals.get('__name__')}.".startswith(f"{module}."):
            return True
        frame = frame.f_back
    return False


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this step was called by another one: a subclass that calls `super().step()`.

    Each of the two runs inside torch's wrapper around `Optimizer.step`, which calls the hooks. Only
    the stack shows it: a mark that the outer step sets would stay for ever when the step raises,
    since no hook is called then; to keep its frame would keep the caller's tensors.
    """
    steps = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and steps < 2:
        if frame.f_globals.get("__name__") == "torch.optim.optimizer":
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1
