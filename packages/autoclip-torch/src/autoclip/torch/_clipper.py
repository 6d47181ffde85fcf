"""The clipper: parameter groups, the pipeline of a step, and the state.

Gradients → norms → rows of the history → thresholds → coefficients → gradients. "Global" is that
pipeline with one row for all parameters, "parameter-wise" with one row each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo  # torch.optim's own, imports lazily
from torch.optim import Optimizer

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
from autoclip.torch import _legacy, _rows
from autoclip.torch._attach import (
    Attachment,
    AttachmentHandle,
    called_by_loss_scaler,
    users_stacklevel,
)
from autoclip.torch._norms import cpu_norms, device_norms, norm_dtype
from autoclip.torch._rows import Norms, Rows
from autoclip.torch._scaling import scale_on_cpu, scale_on_device, zero_nonfinite
from autoclip.torch._sharded import Sharding, sharding_of

__all__ = ["Clipper", "ParamsT"]

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""What torch's optimizers take: tensors, named tensors, or group dicts."""

ClipperT = TypeVar("ClipperT", bound="Clipper")


class _Group:
    """One parameter group: its settings, and the names and rows of its parameters."""

    def __init__(self, rule: Rule, history_length: int) -> None:
        self.rule = rule
        self.history_length = history_length
        self.names: list[str | None] = []
        self.rows: list[int] = []
        # Either the parameters, or where an optimizer that we are attached to has them.
        self.parameters: list[Tensor] = []
        self.positions: list[tuple[int, int]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.rule.settings, "history_length": self.history_length}


class Clipper(Saveable):
    """What `QuantileClip` and `StandardClip` have in common; not made directly."""

    _rule_class: ClassVar[type[Rule]]

    def __init__(
        self,
        parameters: ParamsT,
        rule: Rule,
        history_length: int = DEFAULT_HISTORY_LENGTH,
        global_clipping: bool = False,
        on_nonfinite: str = "keep",
    ) -> None:
        self._configure(rule, history_length, global_clipping, on_nonfinite)
        if isinstance(parameters, Tensor):
            raise TypeError(
                "parameters takes an iterable of tensors, (name, tensor) pairs or dicts, but got "
                f"a single {torch.typename(parameters)}. Put it into a list."
            )
        _refuse_set(parameters)
        entries = list(parameters)
        if not entries:
            raise ValueError(f"{type(self).__name__} got an empty parameter list.")
        groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
        for group in groups:
            self.add_param_group(group)  # type: ignore[arg-type]

    def _configure(
        self, rule: Rule, history_length: int, global_clipping: bool, on_nonfinite: str
    ) -> None:
        self._default_rule = rule
        self._default_history_length = check_history_length(history_length)
        self._global = check_flag("global_clipping", global_clipping)
        self._on_nonfinite = check_on_nonfinite(on_nonfinite)
        self._groups: list[_Group] = []
        self._rows = Rows()
        self._attachment: Attachment | None = None
        self._sharding: Sharding | None = None
        self._reports: list[tuple[list[int], Report[Any]]] = []
        self._has_seen_a_gradient = False
        self._said_it_is_blind = False
        if self._global:
            self._rows.add(rule, self._default_history_length, 1)

    # -- settings and groups -----------------------------------------------------------------

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a group that names none of its own."""
        return {**self._default_rule.settings, "history_length": self._default_history_length}

    @property
    def global_clipping(self) -> bool:
        """Whether one history stands for all parameters together."""
        return self._global

    @property
    def on_nonfinite(self) -> str:
        """What happens to a gradient that holds a NaN or an infinity."""
        return self._on_nonfinite

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups: `"params"`, `"param_names"` if they have names, and settings."""
        return [
            {
                "params": parameters,
                **({"param_names": list(group.names)} if any(group.names) else {}),
                **group.settings,
            }
            for group, parameters in zip(self._groups, self._parameters())
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: `"params"`, a tensor or an iterable of tensors or (name, tensor) pairs,
                and settings that differ from the clipper's.

        Raises:
            TypeError: it is no dict, a parameter is no tensor, or a name is no string.
            KeyError: it has no `"params"`.
            ValueError: a parameter is no leaf or stands twice, a setting is unknown or wrong, or
                the clipper is global and the group has settings of its own.
            RuntimeError: the clipper is attached to an optimizer; add the group to that.

        If it raises, the clipper is as it was.
        """
        if self._attachment is not None:
            raise RuntimeError(
                "The clipper is attached to an optimizer and takes its parameters from there: "
                "call optimizer.add_param_group instead."
            )
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group takes a dict, but got {type(param_group).__name__}.")
        if "params" not in param_group:
            raise KeyError('param_group takes a dict with the key "params".')
        names, parameters = _named(param_group["params"])
        names = _checked_names(param_group.get("param_names", names), len(parameters))
        known = {id(p) for group in self._groups for p in group.parameters}
        if len({id(p) for p in parameters}) != len(parameters):
            raise ValueError("A parameter group holds the same parameter twice.")
        if known & {id(p) for p in parameters}:
            raise ValueError("Some parameters appear in more than one parameter group.")
        settings = {k: v for k, v in param_group.items() if k not in ("params", "param_names")}
        group = self._make_group(settings)
        self._extend(group, names, len(parameters))
        group.parameters = parameters
        self._groups.append(group)

    def _make_group(self, settings: Mapping[str, Any]) -> _Group:
        check_group_settings(settings, self.defaults, self._global, type(self).__name__)
        merged = {**self.defaults, **settings}
        history_length = check_history_length(merged.pop("history_length"))
        return _Group(type(self._default_rule).from_settings(merged), history_length)

    def _extend(self, group: _Group, names: Sequence[str | None], count: int) -> None:
        """Give rows to `count` more parameters of a group."""
        group.names += names
        if self._global:
            group.rows += [0] * count
        elif count:
            start = len(self._rows)
            self._rows.add(group.rule, group.history_length, count)
            group.rows += range(start, start + count)

    def _parameters(self) -> list[list[Tensor]]:
        """The parameters of each group as they are now."""
        if self._attachment is None:
            return [group.parameters for group in self._groups]
        return self._attachment.parameters(self)

    def _names(self) -> list[str]:
        """What to call each parameter in an error, group by group."""
        return [
            f"group {i}, parameter {k}" if name is None else name
            for i, group in enumerate(self._groups)
            for k, name in enumerate(group.names)
        ]

    # -- a step ------------------------------------------------------------------------------

    @disable_dynamo
    @torch.no_grad()
    def step(self) -> Tensor:
        """Record the norms of the gradients and clip them, in place.

        Call it after `backward()`, after `scaler.unscale_(optimizer)` if a `GradScaler` scales
        the loss, and before `optimizer.step()`. An attached clipper is called by its optimizer.

        Returns:
            A 0-d float32 tensor on the gradients' device: the L2 norm of all gradients together
            before clipping, as `torch.nn.utils.clip_grad_norm_` returns it; 0 without gradients.

        Raises:
            FloatingPointError: a gradient holds a NaN or an infinity, and `on_nonfinite` is
                `"raise"`. Nothing was recorded or scaled.
        """
        return self._step()

    def _step(self, scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor:
        """A step whose gradients are still multiplied by `scale`, 0-d.

        If `found_inf` is there, a loss scaler is at work and will skip the step if it is not 0.
        """
        groups = self._parameters()
        parameters = [p for group in groups for p in group]
        gradients: Sequence[Tensor | None] = [p.grad for p in parameters]
        self._sharding = sharding_of(parameters, self._sharding, self._global)
        if all(gradient is None for gradient in gradients):
            self._warn_if_blind()
            if self._sharding is None:  # otherwise the other processes wait for this one
                self._reports = []
                return torch.zeros(())
        else:
            self._has_seen_a_gradient = True
        if self._sharding is not None and (found_inf is not None or called_by_loss_scaler()):
            self._sharding.refuse_loss_scaler()
        gradients, measured = self._measure(gradients)
        for device, norms in measured.items():
            measured[device] = _unscaled(norms, scale, found_inf)
        if self._on_nonfinite != "keep" and found_inf is None:
            self._treat_nonfinite(gradients, measured)
        total = _total(measured)
        rows = [row for group in self._groups for row in group.rows]
        self._reports = []
        if self._global:
            self._clip_globally(gradients, measured, total)
        else:
            self._clip_each(gradients, measured, rows)
        return torch.as_tensor(total, dtype=torch.float32)

    def _measure(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor | None], dict[torch.device, Norms]]:
        """The gradients as they lie in this process, and their true norms.

        Returns:
            Plain tensors, and the norms by device: of all parameters, 0 for those whose gradient
            is on another one.
        """
        if self._sharding is None:
            return gradients, self._local_norms(gradients)
        local, norms = self._sharding.measure(gradients, self._local_norms, self._names)
        return local, {
            device: found.numpy() if _rows.uses_numpy(device) else found.to(norm_dtype(device))
            for device, found in norms.items()
        }

    def _local_norms(self, gradients: Sequence[Tensor | None]) -> dict[torch.device, Norms]:
        by_device: dict[torch.device, list[Tensor | None]] = {}
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                here = by_device.setdefault(gradient.device, [None] * len(gradients))
                here[i] = gradient
        return {
            device: cpu_norms(here)
            if _rows.uses_numpy(device)
            else device_norms(here, device, self._on_nonfinite != "keep")
            for device, here in by_device.items()
        }

    def _treat_nonfinite(
        self, gradients: Sequence[Tensor | None], measured: Mapping[torch.device, Norms]
    ) -> None:
        if self._on_nonfinite == "raise":
            finite = np.all(
                [torch.as_tensor(norms).isfinite().cpu().numpy() for norms in measured.values()], 0
            )
            if not finite.all():
                names = self._names()
                raise FloatingPointError(
                    nonfinite_message([names[i] for i in np.flatnonzero(~finite)])
                )
        else:
            for device, norms in measured.items():
                here = _on(device, gradients)
                if isinstance(norms, np.ndarray):
                    here = [None if finite else g for g, finite in zip(here, np.isfinite(norms))]
                zero_nonfinite(here, torch.as_tensor(norms))

    def _clip_each(
        self,
        gradients: Sequence[Tensor | None],
        measured: Mapping[torch.device, Norms],
        rows: Sequence[int],
    ) -> None:
        by_row = _reordered(gradients, rows)
        if self._sharding is None:
            self._rows.settle([None if g is None else g.device for g in by_row])
        else:
            self._rows.settle(_reordered(self._sharding.homes, rows))
        for bank in self._rows.banks:
            if bank.device not in measured:
                continue
            norms = measured[bank.device]
            report = self._rows.record(bank, _reordered(norms, rows))
            self._reports.append((bank.rows, report))
            scale = scale_on_cpu if _rows.uses_numpy(bank.device) else scale_on_device
            scale([by_row[row] for row in bank.rows], report.coefficients)

    def _clip_globally(
        self,
        gradients: Sequence[Tensor | None],
        measured: Mapping[torch.device, Norms],
        total: Tensor | float,
    ) -> None:
        home = _home(measured)
        self._rows.settle([home])
        norms: Norms = (
            torch.as_tensor(total)[None].to(norm_dtype(home))
            if not _rows.uses_numpy(home)
            else np.array([float(total)])
        )
        report = self._rows.record(self._rows.banks[0], norms)
        self._reports.append(([0], report))
        for device in measured:
            here = _on(device, gradients)
            if _rows.uses_numpy(device):
                # Gradients on the CPU and on an accelerator, one history: here we must wait.
                coefficient = float(report.coefficients[0])
                scale_on_cpu(here, np.full(len(here), coefficient))
            else:
                scale_on_device(here, torch.as_tensor(report.coefficients).to(device))

    def _warn_if_blind(self) -> None:
        # An optimizer's parameters may be exchanged at any time, and it then does nothing either.
        if self._said_it_is_blind or (self._has_seen_a_gradient and self._attachment is None):
            return
        self._said_it_is_blind = True
        if self._attachment is None:
            caller = type(self).__name__
            remedy = "clipper afterwards, or attach it to the optimizer"
        else:
            caller, remedy = "optimizer", "optimizer afterwards; this one does not train them"
        warnings.warn(
            f"{caller}.step() found no gradient on any parameter. Call it after backward(). If the "
            "model was wrapped, sharded, re-created or loaded with assign=True in the meantime, "
            f"its parameters are other objects now: make the {remedy}.",
            stacklevel=users_stacklevel(),
        )

    @property
    def last(self) -> Report[Tensor]:
        """What the last step did, row by row: norms, thresholds and coefficients.

        Rows are in the order of the parameter groups; under global clipping there is one. Each of
        the three is float32[rows]. Reading it waits for the device, a step does not.

        Raises:
            RuntimeError: no step has met a gradient yet, or the last one met none.
        """
        if not self._reports:
            raise RuntimeError("There is nothing to report: the last step had no gradient.")
        order = [0] if self._global else [row for group in self._groups for row in group.rows]
        return Report(
            *(
                _gathered(
                    [(rows, getattr(report, name)) for rows, report in self._reports],
                    len(self._rows),
                    fill,
                )[order]
                for name, fill in (("norms", 0.0), ("thresholds", torch.inf), ("coefficients", 1.0))
            )
        )

    # -- optimizers --------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> AttachmentHandle:
        """Let `optimizer` call this clipper at each of its steps, and carry its state.

        From now on the clipper reads its parameters from `optimizer.param_groups` by position, at
        every step, save and load: whoever exchanges the parameter objects (FSDP, `to_empty`,
        `load_state_dict(assign=True)`) need not tell it. The clipper keeps its own groups; a
        parameter that is added to the optimizer joins the group of its neighbour, a new
        optimizer group becomes a group with the clipper's defaults. The clipper is then
        `optimizer.clipper`, and its state travels in `optimizer.state_dict()["autoclip"]`.

        Args:
            optimizer: a torch optimizer over the same set of parameters.

        Returns:
            A handle; its `remove()` detaches the clipper and leaves no trace.

        Raises:
            TypeError: it is no torch optimizer, or only wraps one.
            ValueError: its parameters are not the clipper's.
            RuntimeError: it has a clipper already, or the clipper is attached already.
        """
        return Attachment.create(self, optimizer)

    @classmethod
    def _attached(
        cls: type[ClipperT],
        optimizer: Optimizer,
        rule: Rule,
        history_length: int,
        global_clipping: bool,
        on_nonfinite: str,
    ) -> Optimizer:
        """Attach a new clipper whose groups are the optimizer's, one to one."""
        Attachment.check(optimizer)
        clipper = cls.__new__(cls)
        clipper._configure(rule, history_length, global_clipping, on_nonfinite)
        for group in optimizer.param_groups:
            settings = {name: group[name] for name in clipper.defaults if name in group}
            own = {"params": group["params"], **settings}
            if "param_names" in group:
                own["param_names"] = group["param_names"]
            clipper.add_param_group(own)
        clipper.attach(optimizer)
        return optimizer

    # -- state -------------------------------------------------------------------------------

    def _export_state(self) -> State:
        every = self._parameters()  # first: an attached clipper may find new ones
        windows, recorded = self._rows.read()
        infos = [
            [ParameterInfo(name, _shape(p)) for name, p in zip(group.names, parameters)]
            for group, parameters in zip(self._groups, every)
        ]
        if self._global:
            settings, everything = self.defaults, [info for group in infos for info in group]
            groups = [GroupState.from_windows(settings, everything, windows, recorded)]
        else:
            groups = [
                GroupState.from_windows(
                    group.settings, info, [windows[r] for r in group.rows], recorded[group.rows]
                )
                for group, info in zip(self._groups, infos)
            ]
        return State(self._rule_class.name, self._global, "torch", tuple(groups), __version__)

    def _commit_state(self, state: State) -> None:
        windows = [np.empty(0, np.float32)] * len(self._rows)
        recorded = np.zeros(len(self._rows), np.int64)
        order = [[0]] if self._global else [group.rows for group in self._groups]
        for rows, group in zip(order, state.groups):
            recorded[rows] = group.recorded
            for row, window in zip(rows, group.windows()):
                windows[row] = window
        self._rows.write(windows, recorded)

    def _read_state_dict(self, state_dict: Mapping[str, Any]) -> State:
        if _legacy.is_legacy(state_dict):
            sizes = [len(group) for group in self._parameters()]
            return _legacy.read(state_dict, self._rule_class, self._global, sizes)
        return super()._read_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a clipper of its own: it holds its parameters and is attached to nothing.
        state = dict(self.__dict__)
        if self._attachment is not None:
            state["_attachment"] = None
            state["_groups"] = self._attachment.detached_groups(self)
        state["_sharding"] = None  # process groups belong to this process
        return state

    def __repr__(self) -> str:
        groups = "".join(
            f"\n    group {i}: {len(group.rows)} parameters, "
            + ", ".join(f"{name}={value}" for name, value in group.settings.items())
            for i, group in enumerate(self._groups)
        )
        return (
            f"{type(self).__name__}({groups}\n    global_clipping={self._global}, "
            f"on_nonfinite={self._on_nonfinite!r}\n)"
        )


def _named(params: Any) -> tuple[list[str | None], list[Tensor]]:
    """Names and tensors of a group's parameters, checked as torch's optimizers check theirs."""
    if isinstance(params, Tensor):
        params = [params]
    _refuse_set(params)
    names: list[str | None] = []
    parameters: list[Tensor] = []
    for entry in params:
        name, parameter = entry if isinstance(entry, tuple) else (None, entry)
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"A clipper can only clip the gradients of tensors, but one of the parameters is "
                f"{torch.typename(parameter)}."
            )
        if not (parameter.is_leaf or parameter.retains_grad):
            raise ValueError(
                "Gradients are kept on leaf tensors only, but one of the parameters is no leaf."
            )
        names.append(name)
        parameters.append(parameter)
    return names, parameters


def _refuse_set(parameters: object) -> None:
    # Its order changes from run to run, and a saved history is matched by order.
    if isinstance(parameters, (set, frozenset)):
        raise TypeError("Parameters take an ordered collection, but got a set. Use a list.")


def _checked_names(names: Iterable[Any], count: int) -> list[str | None]:
    names = list(names)
    for name in names:
        if not (name is None or isinstance(name, str)):
            raise TypeError(
                f"A parameter's name is a string, but got one of type {torch.typename(name)}."
            )
    if None in names and any(name is not None for name in names):
        raise ValueError("Either all parameters of a group have names or none has.")
    if len(names) != count:
        raise ValueError(f"A parameter group has {count} parameters, but {len(names)} names.")
    return names


def _shape(parameter: Tensor) -> tuple[int, ...] | None:
    if torch.nn.parameter.is_lazy(parameter):
        return None  # not known before the first forward pass
    return tuple(parameter.shape)


def _on(device: torch.device, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [g if g is not None and g.device == device else None for g in gradients]


def _reordered(values: Any, rows: Sequence[int]) -> Any:
    """Values of the parameters, in the order of their rows: the same unless rows came later."""
    if all(row == i for i, row in enumerate(rows)):
        return values
    order = sorted(range(len(rows)), key=rows.__getitem__)
    if isinstance(values, np.ndarray):
        return values[order]
    # One by one: a tensor that is indexed with a list waits until that list is on the device.
    reordered = [values[i] for i in order]
    return torch.stack(reordered) if isinstance(values, Tensor) else reordered


def _unscaled(norms: Norms, scale: Tensor | None, found_inf: Tensor | None) -> Norms:
    """The norms of the gradients without the loss scale; NaN, so not recorded, on overflow."""
    if isinstance(norms, np.ndarray):
        if scale is not None:
            norms = norms / float(scale)
        return norms if found_inf is None or not float(found_inf) else np.full_like(norms, np.nan)
    if scale is not None:
        norms = norms / scale.to(norms)
    if found_inf is not None:
        norms = torch.where(found_inf.to(norms.device) > 0, torch.nan, norms)
    return norms


def _home(measured: Mapping[torch.device, Norms]) -> torch.device:
    """Where the one row of a global clipper lives: on an accelerator if any gradient does."""
    return next((device for device in measured if device.type != "cpu"), next(iter(measured)))


def _total(measured: Mapping[torch.device, Norms]) -> Tensor | float:
    """The norm of all gradients together, on the device of a global row."""
    home = _home(measured)
    if all(isinstance(norms, np.ndarray) for norms in measured.values()):
        return float(_root_of_squares(torch.from_numpy(np.concatenate([*measured.values()]))))
    parts = [torch.as_tensor(norms).to(home, norm_dtype(home)) for norms in measured.values()]
    return _root_of_squares(torch.cat(parts))


def _root_of_squares(norms: Tensor) -> Tensor:
    # Scaled by the largest: norms near the ends of the range have squares beyond it.
    largest = norms.max()
    safe = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return (norms / safe).square().sum().sqrt() * safe


def _gathered(parts: Sequence[tuple[list[int], Any]], count: int, fill: float) -> Tensor:
    """One tensor over all `count` rows from those of the banks, on the device of the first."""
    tensors = [torch.as_tensor(values) for _, values in parts]
    result = torch.full((count,), fill, dtype=torch.float32, device=tensors[0].device)
    for (rows, _), values in zip(parts, tensors):
        result[rows] = values.to(result)
    return result
