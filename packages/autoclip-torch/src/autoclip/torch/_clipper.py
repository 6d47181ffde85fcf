"""The clipper: what users construct, call, read, attach to optimizers, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip.core import Report, Rule, Saveable, State
from autoclip.core.adapter import (
    AttachmentHandle,
    ClipperSettings,
    ParamGroup,
    attached_message,
    constructor,
    rule_instance,
    split_state,
    warn_user,
)
from autoclip.torch import _legacy
from autoclip.torch._attach import Attachment, check_optimizer
from autoclip.torch._factory import optimizer_factory
from autoclip.torch._parameters import (
    OptimizerGroup,
    OptimizerGroups,
    ParamsT,
    entries_of,
    overrides_of,
)
from autoclip.torch._private import disable_dynamo
from autoclip.torch._rows import as_tensor
from autoclip.torch._step import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from autoclip.core.adapter import CommonSettings

__all__ = ["Clipper"]

P = ParamSpec("P")
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class Clipper(Saveable):
    """Clip each gradient to a threshold that a rule computes from the history of its norms.

    At each step the gradient's L2 norm is compared with the threshold, and the gradient is
    multiplied by `min(1, threshold / norm)`. `QuantileClip` and `StandardClip` are this class with
    the two built-in rules.

    Args:
        parameters: tensors, `named_parameters()` pairs, or group dicts such as
            `{"params": [...], "history_length": 100}`, as torch's optimizers take them. A group
            may override any setting but the mode, the rule's own included.
        rule: how a window of norms becomes a threshold, such as `Quantile(0.9)`.
        history_length: how many norms each history keeps, the newest ones; an int ≥ 1.
        global_clipping: one history of the norm of all gradients together, as in the paper,
            instead of one for each parameter.
        settings: by keyword; see `autoclip.core.adapter.CommonSettings`:

            * `group_clipping` (False): one history for each parameter group.
            * `max_norm` (None): a ceiling on every threshold, and the only threshold during
              warm-up.
            * `warmup_steps` (the rule's): how many norms a history records before the rule counts.
            * `include_current` (the rule's): whether a norm is part of the window that it is
              compared with.
            * `record` (`"raw"`): `"clipped"` records norms as they are after clipping.
            * `on_spike` (`"clip"`): `"zero"` zeroes a gradient above its threshold; `"skip"` leaves
              its parameter untouched by this update, momentum and weight decay included, by
              setting `grad` to None. An attached optimizer gives the gradient back after the step.
              On an accelerator this waits for the device, except under global clipping on one of
              torch's own optimizers with `fused=True`.
            * `on_nonfinite` (`"keep"`): what happens to a gradient that holds a NaN or an infinity;
              its norm is never recorded. `"keep"` leaves it as it is; under global or group
              clipping there is no norm then, and nothing is scaled. `"zero"` sets it to zero, and
              the other gradients are clipped as if it had been zero. `"raise"` raises
              FloatingPointError, which waits for the device at each step.

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

    def __init__(
        self,
        parameters: ParamsT,
        rule: Rule,
        history_length: int = 1000,
        global_clipping: bool = False,
        **settings: Unpack[CommonSettings],
    ) -> None:
        self._set_up(
            rule_instance(rule),
            parameters,
            history_length=history_length,
            global_clipping=global_clipping,
            **settings,
        )

    def _set_up(
        self, rule: Rule | type[Rule], parameters: ParamsT | OptimizerGroups, **settings: Any
    ) -> None:
        """What all constructors do; `rule` may be a class, whose settings are then given too."""
        made = ClipperSettings.make(type(self).__name__, rule, **settings)
        self._pipeline = Pipeline(made)
        self._attachment: Attachment | None = None
        self.may_lack_history = False
        if isinstance(parameters, OptimizerGroups):
            entries: list[Any] = parameters.groups
        else:
            entries = entries_of(parameters)
        for entry in entries:
            if isinstance(entry, OptimizerGroup):
                own = made.taken_from(entry)
                self._pipeline.groups.add(entry["params"], own, entry.get("param_names"))
                continue
            if not isinstance(entry, dict):
                raise TypeError(
                    "A clipper takes groups or tensors, but after a group came "
                    f"{torch.typename(entry)}."
                )
            self.add_param_group(entry)

    # -- settings and groups -----------------------------------------------------------------

    @property
    def _settings(self) -> ClipperSettings:
        return self._pipeline.groups.settings

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a group without its own."""
        return self._settings.defaults

    @property
    def rule(self) -> Rule:
        """The rule of a group without its own settings."""
        return self._settings.default.rule

    @property
    def global_clipping(self) -> bool:
        """Whether one history stands for all parameters together."""
        return self._settings.mode == "global"

    @property
    def group_clipping(self) -> bool:
        """Whether one history stands for each parameter group."""
        return self._settings.mode == "group"

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The parameter groups: `"params"`, `"param_names"` if they have names, and settings.

        Writing a setting, `clipper.param_groups[0]["quantile"] = 0.5`, changes it from the next
        step on; a wrong value raises and changes nothing. Under global clipping all groups share
        their settings.
        """
        return self._pipeline.groups.views()

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
        groups, keywords = self._pipeline.groups, dict(settings)
        if groups.is_attached:
            raise RuntimeError(
                "The clipper is attached to an optimizer and takes its parameters from there: "
                "call optimizer.add_param_group instead."
            )
        if isinstance(param_group, dict):
            if "params" not in param_group:
                raise KeyError('param_group takes a dict with the key "params".')
            params, names = param_group["params"], param_group.get("param_names")
            settings = {**settings, **overrides_of(param_group)}
        else:
            params, names = param_group, None
        groups.add(params, self._settings.for_group(settings), names)
        if keywords or not isinstance(param_group, dict):
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
        alone; after a step, `total_norm` is what this method would have returned. Not thread-safe:
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
        if self._attachment is not None and self._attachment.is_alive:
            raise RuntimeError(
                f"This {type(self).__name__} is attached to an optimizer, whose step() calls it: "
                "another call would record and clip each gradient twice. For the total norm, read "
                "clipper.total_norm after optimizer.step(). To call step() yourself, call "
                "clipper.detach() first, or make the clipper without attaching it."
            )
        with torch.no_grad():  # as a decorator it takes twice as long
            return self._pipeline.step().total

    @property
    def total_norm(self) -> Tensor:
        """The L2 norm of all gradients together before clipping, at the last step.

        A 0-d float32 tensor on the gradients' device, as `step()` returns it. Reading it does not
        wait for the device, `float(clipper.total_norm)` does. 0 if no parameter had a gradient; NaN
        in a step in which a loss scaler found an overflow.

        Raises:
            RuntimeError: no step has been made since the clipper was made or reset.
        """
        total = self._pipeline.total
        if total is None:
            raise RuntimeError("There is no total norm yet: the clipper has not made a step.")
        return total

    def reset(self) -> None:
        """Forget all norms, as if no step had been made."""
        self._pipeline.reset()

    @property
    def last(self) -> Report[Tensor]:
        """What the last step did, row by row: norms, thresholds, coefficients, and names.

        Rows are in the order of the parameter groups: parameters; groups under group clipping; one
        under global clipping. Numbers are float32[rows]. Reading waits for the device, a step does
        not.

        Raises:
            RuntimeError: no step has found a gradient yet, or the last one found none.
        """
        reports = self._pipeline.reports
        if not reports:
            raise RuntimeError("There is nothing to report: the last step had no gradient.")
        return Report(
            norms=self._by_row([(rows, each.norms) for rows, each in reports], 0.0),
            thresholds=self._by_row([(rows, each.thresholds) for rows, each in reports], torch.inf),
            coefficients=self._by_row([(rows, each.coefficients) for rows, each in reports], 1.0),
            names=self._pipeline.groups.reported_names(),
        )

    @property
    def thresholds(self) -> Tensor:
        """float32[rows]: the thresholds of the windows as they are now, in the order of `last`.

        Infinite where nothing was recorded yet or the row is still warming up; never above
        `max_norm`. Without `include_current` the next norms are compared with these.
        """
        return self._by_row(self._pipeline.thresholds(), torch.inf)

    def _by_row(self, parts: list[tuple[list[int], Any]], fill: float) -> Tensor:
        """One tensor over all rows from those of batches, on the device of the first."""
        tensors = [as_tensor(values) for _, values in parts]
        device = tensors[0].device if tensors else None
        rows = len(self._pipeline.rows)
        result = torch.full((rows,), fill, dtype=torch.float32, device=device)
        for (places, _), values in zip(parts, tensors):
            result[places] = values.to(result)
        return result[self._pipeline.groups.reported_rows()]

    # -- optimizers --------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> AttachmentHandle:
        """Let `optimizer` call this clipper at each of its steps, and carry its state.

        From now on the clipper reads its parameters from `optimizer.param_groups` by position, at
        every step, save and load, so parameter objects may be replaced (FSDP, `to_empty`,
        `load_state_dict(assign=True)`). The clipper keeps its own groups; a parameter that is added
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
        if self._attachment is not None and self._attachment.is_alive:
            raise RuntimeError(attached_message(self))
        self.detach()
        attachment = Attachment(self._pipeline, self, optimizer, self._pipeline.groups)
        attachment.begin(optimizer)
        self._attachment = attachment

        def detach() -> None:
            if self._attachment is attachment:
                self.detach()

        return AttachmentHandle(detach)

    def detach(self) -> None:
        """Detach the clipper from its optimizer, as the handle that `attach` returned does.

        The optimizer is as it was before. The clipper keeps its history, and the parameters that
        the optimizer has now. Does nothing if the clipper is not attached.
        """
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.end()

    def _attach_to_copy(self, optimizer: Optimizer) -> None:
        """Attach to a copy of this clipper's optimizer; see `_copies`."""
        clipper = self
        if self._attachment is not None:  # copy.copy has copied neither parameters nor clipper
            own = {id(parameter): parameter for parameter in self._pipeline.groups.parameters()}
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
        return optimizer_factory(cls, optimizer_class, args, settings)

    # -- state -------------------------------------------------------------------------------

    def export_state(self) -> State:
        return self._pipeline.export_state()

    def describe_state(self) -> State:
        return self._pipeline.describe_state()

    def commit_state(self, state: State) -> None:
        self._pipeline.arrange()
        rows = self._pipeline.rows
        rows.write(*split_state(state, self._pipeline.groups.rows_by_group(), len(rows)))

    def _read_state_dict(self, state_dict: Mapping[str, Any]) -> State:
        if _legacy.is_legacy(state_dict):
            groups = self._pipeline.groups
            sizes = [len(group) for group in groups.by_group()]
            return _legacy.read(state_dict, self._settings.mode, groups.group_settings(), sizes)
        return super()._read_state_dict(state_dict)

    def check_state_dict(self, state_dict: Mapping[str, Any], source: str) -> State:
        """Read a state and match it to the clipper as it is now; nothing changes.

        Args:
            state_dict: see `load_state_dict`.
            source: what to call it in messages.

        Raises:
            StateError: it is damaged or does not fit.
        """
        return self._read_state_dict(state_dict).match(self.describe_state(), source)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a clipper of its own: it holds its parameters and is attached to nothing.
        return {**self.__dict__, "_attachment": None}

    def __repr__(self) -> str:
        return self._pipeline.describe()
