"""The one place that knows optimizer hooks: steps, closures, loss scalers, state."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo  # torch.optim's own, imports lazily
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autoclip.core import State, second_clipper_message
from autoclip.torch import _legacy

if TYPE_CHECKING:
    from autoclip.torch._clipper import Clipper, _Group

__all__ = [
    "STATE_KEY",
    "Attachment",
    "AttachmentHandle",
    "called_by_loss_scaler",
    "users_stacklevel",
]

STATE_KEY = "autoclip"
"""Where a clipper's state stands in its optimizer's `state_dict()`."""


class AttachmentHandle:
    """What `clipper.attach(optimizer)` returns."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment: Attachment | None = attachment

    def remove(self) -> None:
        """Detach the clipper: no hook and no attribute stays behind.

        The clipper keeps its history, and holds the parameters that the optimizer has now. A
        second call does nothing.
        """
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


class Attachment:
    """A clipper on an optimizer: which of its parameters are whose, and its hooks."""

    def __init__(self, clipper: Clipper, optimizer: Optimizer) -> None:
        self._clipper = clipper
        # Weakly: a cycle would keep a dropped optimizer's state in memory until a collection.
        self._optimizer = weakref.ref(optimizer)
        self._param_groups = optimizer.param_groups
        # How many parameters of each optimizer group have a place in the clipper's groups.
        self._known: list[int] = []
        self._pending: State | None = None
        self._warned = False
        self._hooks: list[RemovableHandle] = []

    # -- attaching ---------------------------------------------------------------------------

    @staticmethod
    def check(optimizer: Optimizer) -> None:
        """Refuse what cannot be attached to."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"attach takes a torch.optim.Optimizer, but got {torch.typename(optimizer)}."
            )
        if not getattr(type(optimizer).step, "hooked", False):
            # Accelerate's and Lightning's pass for an Optimizer, but their steps call no hook.
            raise TypeError(
                f"{torch.typename(optimizer)} only wraps an optimizer, and no hook of its own is "
                "ever called. Attach to the optimizer inside, often its attribute `.optimizer`."
            )
        if hasattr(optimizer, "clipper"):
            raise RuntimeError(second_clipper_message(optimizer, optimizer.clipper))

    @classmethod
    def create(cls, clipper: Clipper, optimizer: Optimizer) -> AttachmentHandle:
        """Attach; see `Clipper.attach`."""
        cls.check(optimizer)
        if clipper._attachment is not None:
            raise RuntimeError("This clipper is attached to an optimizer already.")
        places = {
            id(parameter): (i, j)
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        }
        ours = [parameter for group in clipper._groups for parameter in group.parameters]
        missing = sum(id(parameter) not in places for parameter in ours)
        extra = len(places) - (len(ours) - missing)
        if missing or extra:
            raise ValueError(
                "A clipper attaches to an optimizer over the same parameters, but "
                f"{missing} of the clipper's are not the optimizer's, and {extra} of the "
                "optimizer's are not the clipper's. Make the clipper from the same ones, or use "
                "as_optimizer."
            )
        self = cls(clipper, optimizer)
        for group in clipper._groups:
            group.positions = [places[id(parameter)] for parameter in group.parameters]
            group.parameters = []
        self._known = [len(group["params"]) for group in optimizer.param_groups]
        clipper._attachment = self
        optimizer.clipper = clipper  # type: ignore[attr-defined]
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._after_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        return AttachmentHandle(self)

    def remove(self) -> None:
        """Undo `create`."""
        for hook in self._hooks:
            hook.remove()
        self._clipper._groups = self.detached_groups(self._clipper)
        self._clipper._attachment = None
        optimizer = self._optimizer()
        if optimizer is not None:
            del optimizer.clipper  # type: ignore[attr-defined]

    def detached_groups(self, clipper: Clipper) -> list[_Group]:
        """Copies of the clipper's groups that hold their parameters themselves."""
        groups = []
        for group, parameters in zip(clipper._groups, self.parameters(clipper)):
            own = type(group)(group.rule, group.history_length)
            own.names, own.rows, own.parameters = list(group.names), list(group.rows), parameters
            groups.append(own)
        return groups

    # -- parameters --------------------------------------------------------------------------

    def parameters(self, clipper: Clipper) -> list[list[Tensor]]:
        """The parameters of each of the clipper's groups, as the optimizer has them now."""
        optimizer = self._optimizer()
        if optimizer is not None:  # otherwise the clipper outlives it, with what it had at last
            self._param_groups = optimizer.param_groups
        theirs = [group["params"] for group in self._param_groups]
        if [len(group) for group in theirs] != self._known:
            self._meet_new_parameters(clipper)
        return [[theirs[i][j] for i, j in group.positions] for group in clipper._groups]

    def _meet_new_parameters(self, clipper: Clipper) -> None:
        """Give rows to parameters that were added to the optimizer; torch has no hook for that."""
        counts = [len(group["params"]) for group in self._param_groups]
        known = [*self._known, *[0] * (len(counts) - len(self._known))]
        if len(counts) < len(self._known) or any(n < k for n, k in zip(counts, known)):
            raise RuntimeError(
                f"The optimizer's groups had {self._known} parameters and have {counts} now. "
                "AutoClip knows parameters by their position, and cannot tell which are gone. "
                "Make a new clipper for the new parameters."
            )
        groups = clipper._groups
        owners = {place[0]: group for group in groups for place in group.positions}
        if len(groups) == len(self._known) and all(
            i == k for k, group in enumerate(groups) for i, _ in group.positions
        ):  # one to one, even where a group is empty as yet
            owners = dict(enumerate(groups))
        grown = [i for i, (count, before) in enumerate(zip(counts, known)) if count > before]
        # All new groups before any is added: a wrong setting must leave the clipper as it was.
        made = []
        for i in grown:
            if i not in owners:
                theirs = self._param_groups[i]
                settings = {name: theirs[name] for name in clipper.defaults if name in theirs}
                owners[i] = clipper._make_group(settings)
                made.append(owners[i])
        clipper._groups += made
        for i in grown:
            before, count = known[i], counts[i]
            names = list(self._param_groups[i].get("param_names", []))
            names += [None] * (count - len(names))
            clipper._extend(owners[i], names[before:], count - before)
            owners[i].positions += [(i, j) for j in range(before, count)]
        self._known = counts

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
        # A GradScaler leaves these on fused optimizers, whose gradients are still scaled then.
        # Without a scale, but with a verdict, they have been unscaled by hand.
        scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        try:
            self._clipper._step(scale, found_inf)
        except BaseException:
            # GradScaler removes them after the step, but not if the step raises.
            if found_inf is not None:
                optimizer.__dict__.pop("grad_scale", None)
                optimizer.__dict__.pop("found_inf", None)
            raise

    # -- state -------------------------------------------------------------------------------

    @disable_dynamo
    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[STATE_KEY] = self._clipper.state_dict()

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
            self._pending = self.validated(entry)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"The optimizer's checkpoint has no {STATE_KEY!r} entry: it was saved without "
                "AutoClip. The clipper keeps the history that it has.",
                stacklevel=users_stacklevel(),
            )
        return replaced

    def validated(self, state_dict: dict[str, Any]) -> State:
        """Check that a clipper's state_dict fits; see `Clipper.load_state_dict`."""
        clipper = self._clipper
        source = f"the optimizer's state_dict[{STATE_KEY!r}]"
        state = clipper._read_state_dict(state_dict)
        return state.fit_to(clipper._export_state(), source, 1 + users_stacklevel())

    @disable_dynamo
    def _after_load(self, optimizer: Optimizer) -> None:
        if self._pending is not None:
            self._clipper._commit_state(self._pending)
            self._pending = None


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this step was called by another one: a subclass that calls `super().step()`.

    Each of the two runs inside torch's wrapper around `Optimizer.step`, which calls the hooks. The
    stack tells, and nothing else does: a mark that the outer step sets would stay for ever when the
    step raises, since no hook is called then; to keep its frame would keep the caller's tensors.
    """
    steps = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and steps < 2:
        if frame.f_globals.get("__name__") == "torch.optim.optimizer":
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def called_by_loss_scaler() -> bool:
    """Whether this step was called by a `GradScaler`, which tells only fused optimizers so."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.amp.grad_scaler":
        frame = frame.f_back
    return frame is not None


def users_stacklevel() -> int:
    """The stacklevel with which a warning of whoever calls this points at the user's own line.

    torch wraps steps and hooks, and how many frames that makes depends on its version, on
    schedulers and on closures.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame) in ("autoclip", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
