"""One step of a clipper: gradients → norms → rows → thresholds → coefficients → gradients.

"Global" is that pipeline with one row for all parameters, "parameter-wise" with one row each, and
"by group" with one for each parameter group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.core import Report, State
from autoclip.core.adapter import (
    ClipperSettings,
    ParameterInfo,
    make_state,
    nonfinite_message,
    warn_user,
)
from autoclip.torch import _rows
from autoclip.torch._groups import Groups
from autoclip.torch._norms import norm_dtype
from autoclip.torch._overlap import Renew
from autoclip.torch._plan import Plan
from autoclip.torch._routes import (
    Norms,
    Route,
    coefficients_on,
    merged,
    total_norm,
    unscaled,
)
from autoclip.torch._rows import Rows
from autoclip.torch._sharding import Sharding, called_by_loss_scaler, sharding_of

__all__ = ["Pipeline", "StepResult"]

_CPU = torch.device("cpu")
_LARGEST = torch.finfo(torch.float32).max


class StepResult(NamedTuple):
    """What a step did besides scaling gradients.

    Attributes:
        norm: of all gradients together before clipping: a number, or 0-d on a device.
        skipped: parameters with `on_spike="skip"` and a norm above the threshold, and their
            gradients, as they were. The parameters have no gradient now.
        skips_update: bool, 0-d and on the device: whether no parameter is to be updated. Only if
            `defers_skip` was given; then the host does not know it.
    """

    norm: Tensor | float
    skipped: Sequence[tuple[Tensor, Tensor]] = ()
    skips_update: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """0-d float32: `norm`. Made when asked for, which an optimizer's hook does not do."""
        return _as_scalar(self.norm)


def _as_scalar(norm: Tensor | float) -> Tensor:
    """0-d float32."""
    if isinstance(norm, Tensor):
        return norm.float()
    # In less than half of the time that torch.tensor takes; on the CPU whatever the default is.
    narrow = math.inf if norm > _LARGEST else norm
    return torch.from_numpy(np.array(narrow, np.float32))


class Pipeline:
    """The steps of a clipper, and what they need: its groups and rows.

    Args:
        settings: of the clipper.

    Attributes:
        groups: the parameter groups.
        rows: the histories.
        reports: of the last step, one for each batch of rows that recorded; empty if there was no
            gradient.
    """

    def __init__(self, settings: ClipperSettings) -> None:
        self.rows = Rows()
        self.groups = Groups(settings, self.rows)
        self.reports: list[tuple[list[int], Report[Any]]] = []
        self._norm: Tensor | float | None = None
        self._has_seen_a_gradient = False
        self._has_warned = False
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._sharding: Sharding | None = None
        self._plan: Plan | None = None
        self._plan_of_sums: Plan | None = None
        self._routes: list[Route] = []
        self._made_for: tuple[int, int, Plan | None] = (-1, 0, None)
        self._choices: _Choices | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Process groups belong to this process, and plans are made again.
        left = ("_sharding", "_plan", "_plan_of_sums", "_routes", "_made_for", "_choices")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_plans()

    @property
    def total(self) -> Tensor | None:
        """0-d float32, the norm of all gradients at the last step; None before the first."""
        return None if self._norm is None else _as_scalar(self._norm)

    # -- a step ------------------------------------------------------------------------------

    def step(
        self,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        defers_skip: bool = False,
    ) -> StepResult:
        """Record the norms of the gradients and clip them.

        Args:
            scale: 0-d, what the gradients are still multiplied by; None if they are not.
            found_inf: 0-d, not 0 if a loss scaler will skip this step; None if none is at work.
            defers_skip: whether the caller can skip the whole update on the device.

        Raises:
            FloatingPointError: see `Clipper.step`.
        """
        groups = self.groups
        parameters = groups.parameters()
        gradients: list[Tensor | None] = [p.grad for p in parameters]
        mode = groups.settings.mode
        self._sharding = sharding_of(parameters, self._sharding, mode)
        if any(gradient is not None for gradient in gradients):
            self._has_seen_a_gradient = True
        else:
            self._warn_without_gradients()
            if self._sharding is None:  # otherwise the other processes wait for this one
                self.reports = []
                self._norm = 0.0
                return StepResult(0.0)
        if self._sharding is not None and (found_inf is not None or called_by_loss_scaler()):
            self._sharding.refuse_loss_scaler()

        gradients, measured = self._measure(gradients)
        self._prepare(parameters, gradients)
        if scale is not None or found_inf is not None:
            for device, norms in measured.items():
                measured[device] = unscaled(norms, scale, found_inf)
        renew = partial(_renewed, parameters)
        if self._choices is not None and found_inf is None:
            self._treat_nonfinite(gradients, measured, renew)
        home = self._routes[0].batch.device if mode == "global" else None
        total = total_norm(measured, home)
        found, skipped, skips_update = self._record(measured, total, defers_skip)
        assert self._plan is not None
        for device, part in self._plan.devices.items():
            coefficients = coefficients_on(device, found, mode)
            if coefficients is not None:
                part.scaling.apply(gradients, coefficients, renew)  # type: ignore[arg-type]
        self._norm = total
        return StepResult(total, _withheld(parameters, skipped), skips_update)

    def _measure(
        self, gradients: list[Tensor | None]
    ) -> tuple[list[Tensor | None], dict[torch.device, Norms]]:
        """The gradients as they lie in this process, and their true norms.

        Returns:
            Plain tensors, and the norms by device: of all parameters, 0 for those whose gradient
            is on another one.
        """
        if self._sharding is None:
            self._plan = _fitting(self._plan, gradients)
            return gradients, {
                device: part.norms.of(gradients) for device, part in self._plan.devices.items()
            }
        local, norms = self._sharding.measure(
            gradients, self._norms_of_sums, self.groups.names, self._state_and_description
        )
        self._plan = _fitting(self._plan, local)
        return local, {
            device: found.cpu().numpy()
            if _rows.uses_numpy(device)
            else found.to(norm_dtype(device))
            for device, found in norms.items()
        }

    def _norms_of_sums(self, gradients: Sequence[Tensor | None]) -> Mapping[torch.device, Norms]:
        """The norms of what is here after partial sums have been added up."""
        self._plan_of_sums = plan = _fitting(self._plan_of_sums, gradients)
        return {device: part.norms.of(gradients) for device, part in plan.devices.items()}

    def _state_and_description(self) -> tuple[State, str]:
        return self.export_state(), self.describe()

    # -- reading -----------------------------------------------------------------------------

    def export_state(self) -> State:
        """The state, as a clipper saves it."""
        infos = self.groups.infos()  # first: an attached clipper may find new parameters
        return self._state(infos, *self.rows.read())

    def describe_state(self) -> State:
        """The state without windows."""
        return self._state(self.groups.infos())

    def _state(self, infos: list[list[ParameterInfo]], *contents: Any) -> State:
        groups = self.groups
        return make_state(
            "torch",
            groups.settings.default.rule.name,
            groups.settings.mode,
            groups.group_settings() or [groups.settings.default],
            infos,
            groups.rows_by_group(),
            *contents,
        )

    def describe(self) -> str:
        """What `repr` shows of the clipper."""
        groups = self.groups
        return groups.settings.describe(
            (len(parameters), settings, "")
            for parameters, settings in zip(groups.by_group(), groups.group_settings())
        )

    # -- what changes seldom -----------------------------------------------------------------

    def arrange(self) -> None:
        """Bring the rows to the devices of their parameters, before they are read or written."""
        parameters = self.groups.parameters()
        gradients = [p.grad for p in parameters]
        self.rows.arrange(self._devices(parameters, gradients))

    def _prepare(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        if self._made_for == (self.rows.version, len(parameters), self._plan):
            return
        self.rows.arrange(self._devices(parameters, gradients))
        rows = self.groups.rows_of_parameters()
        mode = self.groups.settings.mode
        skips = [settings.on_spike == "skip" for settings in self.rows.settings]
        self._routes = [Route(batch, rows, mode, skips) for batch in self.rows.batches]
        self._choices = _Choices.make(self.groups.per_parameter("on_nonfinite"))
        self._made_for = (self.rows.version, len(parameters), self._plan)

    def _devices(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[torch.device]:
        """Where each row's history lives: with its parameter; with any that is not on the CPU."""
        if self._sharding is None:
            found = [(p if g is None else g).device for p, g in zip(parameters, gradients)]
        else:  # another process may have the gradient
            found = [p.device for p in parameters]
        devices = [_CPU] * len(self.rows)
        trained = [False] * len(self.rows)
        for row, device, parameter in zip(self.groups.rows_of_parameters(), found, parameters):
            # Parameters on the meta device have no gradients, and what is frozen does not count
            # beside what is trained.
            if device.type not in ("cpu", "meta") and (
                devices[row] is _CPU or (parameter.requires_grad and not trained[row])
            ):
                devices[row], trained[row] = device, parameter.requires_grad
        return devices

    # -- NaN and infinity --------------------------------------------------------------------

    def _treat_nonfinite(
        self,
        gradients: list[Tensor | None],
        measured: dict[torch.device, Norms],
        renew: Renew,
    ) -> None:
        """Do what `on_nonfinite` says; the norm of a gradient that is zeroed becomes 0."""
        choices = self._choices
        assert choices is not None and self._plan is not None
        if choices.raises.any():
            broken = choices.raises & ~np.all([_are_finite(each) for each in measured.values()], 0)
            if broken.any():
                names = self.groups.names()
                raise FloatingPointError(
                    nonfinite_message([names[i] for i in np.flatnonzero(broken)])
                )
        if not choices.zeros.any():
            return
        for device, norms in measured.items():
            part = self._plan.devices.get(device)
            if isinstance(norms, np.ndarray):
                broken = choices.zeros & ~np.isfinite(norms)
                if part is not None and broken.any():
                    bad = np.where(broken, norms, 0.0)
                    part.scaling.zero_nonfinite(gradients, bad, renew)  # type: ignore[arg-type]
                    measured[device] = np.where(broken, 0.0, norms)
            else:
                concerned = torch.where(choices.zeros_on(device), norms, 0.0)
                if part is not None:
                    part.scaling.zero_nonfinite(gradients, concerned, renew)  # type: ignore[arg-type]
                measured[device] = torch.where(concerned < torch.inf, norms, 0.0)

    # -- the history -------------------------------------------------------------------------

    def _record(
        self, measured: Mapping[torch.device, Norms], total: Tensor | float, defers_skip: bool
    ) -> tuple[list[tuple[Route, Norms]], list[int], Tensor | None]:
        """Record the norms.

        Returns:
            The coefficients of the rows by batch, the parameters to be skipped, and `skips_update`
            of the result.
        """
        mode = self.groups.settings.mode
        found: list[tuple[Route, Norms]] = []
        skipped: list[int] = []
        skips_update = None
        self.reports = []
        given: list[tuple[Route, Any]] = []
        for route in self._routes:
            device = route.batch.device
            if mode == "global":
                norms: Any = total.reshape(1) if isinstance(total, Tensor) else [total]
            elif mode == "group":
                norms = route.row_norms(merged(measured, device))
            elif device in measured:
                norms = route.row_norms(measured[device])
            else:
                continue
            given.append((route, norms))
        reports = self.rows.record([(route.batch, norms) for route, norms in given])
        self.reports = [(route.batch.rows, each) for (route, _), each in zip(given, reports)]
        for (route, _), report in zip(given, reports):
            factors = report.coefficients
            if route.skips is not None:
                # The gradients are left as they are; nothing is done with them.
                spikes = route.skips & (factors == 0.0)
                if isinstance(factors, np.ndarray):
                    skipped += route.places_of(spikes)
                    factors = np.where(spikes, 1.0, factors)
                else:
                    if defers_skip and mode == "global":
                        skips_update = spikes.reshape(())
                    else:
                        skipped += route.places_of(spikes.cpu().numpy())
                    factors = torch.where(spikes, 1.0, factors)
            found.append((route, factors))
        return found, skipped, skips_update

    def thresholds(self) -> list[tuple[list[int], Any]]:
        """The thresholds of the windows as they are now, by batch of rows."""
        self.arrange()
        return [(batch.rows, batch.history.thresholds) for batch in self.rows.batches]

    def reset(self) -> None:
        """Forget all norms."""
        self.rows.reset()
        self.reports = []
        self._norm = None

    def _warn_without_gradients(self) -> None:
        # An optimizer's parameters may be exchanged at any time, and it then does nothing either.
        is_attached = self.groups.is_attached
        if self._has_warned or (self._has_seen_a_gradient and not is_attached):
            return
        self._has_warned = True
        parameters = self.groups.parameters()
        if not any(parameter.requires_grad for parameter in parameters):
            warn_user(
                "A clipper's step found no gradient, and none of its parameters requires one: they "
                "are frozen, or the optimizer updates other parameters than those in its groups."
            )
            return
        if any(map(_has_backward_hooks, parameters)):
            warn_user(
                "A clipper's step found no gradient on any parameter, but the parameters have "
                "hooks that run in the backward pass. If these update the weights and free the "
                "gradients (LOMO, layer-wise optimizers, fused backward passes), a clipper after "
                "the backward pass comes too late. Attach a clipper to each optimizer that a hook "
                "steps, or update all weights in one optimizer.step()."
            )
            return
        if is_attached:
            caller = "optimizer"
            remedy = "optimizer afterwards; this one does not train them"
        else:
            caller = self.groups.settings.owner
            remedy = "clipper afterwards, or attach it to the optimizer"
        warn_user(
            f"{caller}.step() found no gradient on any parameter. Call it after backward(). If the "
            "model was wrapped, sharded, re-created or loaded with assign=True in the meantime, "
            f"its parameters are other objects now: make the {remedy}."
        )


class _Choices:
    """Which gradients `on_nonfinite` concerns.

    Attributes:
        zeros: bool[parameters], where it is `"zero"`.
        raises: bool[parameters], where it is `"raise"`.
    """

    def __init__(self, choices: Sequence[str]) -> None:
        self.zeros = np.array([choice == "zero" for choice in choices])
        self.raises = np.array([choice == "raise" for choice in choices])
        self._on_devices: dict[torch.device, Tensor] = {}

    @classmethod
    def make(cls, choices: Sequence[str]) -> _Choices | None:
        """The choices of each parameter; None if all are `"keep"`."""
        return None if all(choice == "keep" for choice in choices) else cls(choices)

    def zeros_on(self, device: torch.device) -> Tensor:
        """`zeros` as a tensor."""
        if device not in self._on_devices:
            self._on_devices[device] = torch.from_numpy(self.zeros).to(device)
        return self._on_devices[device]


def _fitting(plan: Plan | None, gradients: Sequence[Tensor | None]) -> Plan:
    return plan if plan is not None and plan.fits(gradients) else Plan(gradients, _rows.uses_numpy)


def _has_backward_hooks(parameter: Tensor) -> bool:
    own = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return any(own)


def _renewed(parameters: Sequence[Tensor], index: int) -> Tensor:
    """Give a parameter a copy of its gradient in memory of its own; the part of it that is here."""
    gradient = parameters[index].grad
    assert gradient is not None
    parameters[index].grad = own = gradient.clone()
    to_local: Callable[[], Tensor] | None = getattr(own, "to_local", None)  # of a DTensor
    return own if to_local is None else to_local()


def _withheld(parameters: Sequence[Tensor], places: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Take the gradients of some parameters away; the parameters and what they had."""
    held = []
    for i in places:
        gradient = parameters[i].grad
        if gradient is not None:
            held.append((parameters[i], gradient))
            parameters[i].grad = None
    return held


def _are_finite(norms: Norms) -> npt.NDArray[np.bool_]:
    if isinstance(norms, np.ndarray):
        return np.isfinite(norms)
    finite: npt.NDArray[np.bool_] = norms.isfinite().cpu().numpy()
    return finite
