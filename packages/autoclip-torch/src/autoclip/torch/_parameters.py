"""The parameters that users give to a clipper: tensors, names and groups, checked as torch does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""The parameters of torch's optimizers: tensors, named tensors, or group dicts."""


# Every learning rate scheduler writes this into the groups.
_SCHEDULERS = {"initial_lr"}


class OptimizerGroup(dict[str, Any]):
    """A parameter group of an optimizer without the optimizer's own hyperparameters.

    Keys that are no setting of the clipper are ignored, unlike those of a group that users write.
    """


class OptimizerGroups(list[Any]):
    """An optimizer's parameters, as `as_optimizer` passes them to a clipper's constructor.

    A list, since the constructor of a subclass may iterate over its `parameters`: tensors, or
    (name, tensor) pairs, if the optimizer has a single group without settings for the clipper;
    otherwise groups.

    Args:
        optimizer: the optimizer.

    Attributes:
        groups: the groups, also of a list of tensors.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        own = hyperparameters(optimizer)
        self.groups = [
            OptimizerGroup({name: value for name, value in group.items() if name not in own})
            for group in optimizer.param_groups
        ]
        first = self.groups[0] if len(self.groups) == 1 else {}
        if first.get("params") and first.keys() <= {"params", "param_names"} | _SCHEDULERS:
            names = first.get("param_names")
            super().__init__(zip(names, first["params"]) if names else first["params"])
        else:
            super().__init__(self.groups)


def hyperparameters(optimizer: object) -> set[str]:
    """The names of an optimizer's own hyperparameters, those of optimizers inside it included.

    Some have the name of a clipper's setting: dozens of optimizers have `warmup_steps`.
    """
    inside = optimizers_in(optimizer).values()
    defaults = [getattr(each, "defaults", {}) for each in (optimizer, *inside)]
    return {name for each in defaults for name in each} - {"params", "param_names"}


def optimizers_in(wrapper: object) -> dict[str, Optimizer]:
    """The torch optimizers in an object's attributes, or in their items, by path as Python."""
    found: dict[str, Optimizer] = {}
    for name, value in getattr(wrapper, "__dict__", {}).items():
        if isinstance(value, Optimizer):
            found[f".{name}"] = value
            continue
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif isinstance(value, Mapping):
            items = value.items()
        # An optimizer's state has thousands of items, whose keys are tensors.
        held = [(key, each) for key, each in items if isinstance(each, Optimizer)]
        found |= {f".{name}[{_printed(key, i)}]": each for i, (key, each) in enumerate(held)}
    return found


def _printed(key: object, index: int) -> str:
    """A key as Python; of others, such as the parameter of an optimizer of its own, the number."""
    return repr(key) if isinstance(key, (str, int)) else f"<{type(key).__name__} {index}>"


def clipped_inside(optimizer: Optimizer) -> tuple[str, Optimizer] | None:
    """An optimizer with a clipper inside another one, which updates some of the same parameters.

    Returns:
        Its path in `optimizer`, as Python, and itself; None if there is none.
    """
    own = {id(each) for group in optimizer.param_groups for each in group["params"]}
    waiting, seen = [("", optimizer)], {id(optimizer)}
    for path, outer in waiting:
        for name, inner in optimizers_in(outer).items():
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            waiting.append((path + name, inner))
            theirs = (each for group in inner.param_groups for each in group["params"])
            if "clipper" in vars(inner) and not own.isdisjoint(map(id, theirs)):
                return path + name, inner
    return None


def entries_of(parameters: ParamsT | OptimizerGroups) -> list[Any]:
    """The parameters that a clipper's constructor got, as groups, if the first entry is right.

    Raises:
        TypeError, ValueError: it is a single tensor, a set, or empty.
    """
    if isinstance(parameters, OptimizerGroups):
        return parameters.groups
    if isinstance(parameters, Tensor):
        raise TypeError(
            "parameters must be an iterable of tensors, (name, tensor) pairs or dicts, but got "
            f"a single {torch.typename(parameters)}. Put it into a list."
        )
    if not isinstance(parameters, Iterable):
        raise TypeError(
            "parameters must be an iterable of tensors, (name, tensor) pairs or dicts, such as "
            f"model.parameters(), but got {type(parameters).__name__}."
        )
    _refuse_set(parameters)
    entries: list[Any] = list(parameters)
    if not entries:
        raise ValueError("A clipper got an empty parameter list.")
    return entries if isinstance(entries[0], dict) else [{"params": entries}]


def with_names(params: Any, names: Iterable[Any] | None) -> tuple[list[str | None], list[Tensor]]:
    """Names and tensors of a group's parameters.

    Wrappers leave no trace in names: a model may be compiled when it is saved and not when it is
    loaded.

    Args:
        params: a tensor, or an iterable of tensors or (name, tensor) pairs.
        names: the name of each; None for those in the pairs.

    Raises:
        TypeError, ValueError: they are a set, one is not a tensor or not a leaf, or there twice; a
            name is not a string, or some are missing.
    """
    if isinstance(params, Tensor):
        params = [params]
    _refuse_set(params)
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    parameters = [parameter for _, parameter in pairs]
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"A clipper can only clip the gradients of tensors, but one of the parameters is "
                f"{torch.typename(parameter)}."
            )
        if not (parameter.is_leaf or parameter.retains_grad):
            raise ValueError(
                "Gradients are kept on leaf tensors only, but one of the parameters is not a leaf."
            )
    names = [name for name, _ in pairs] if names is None else list(names)
    for name in names:
        if not (name is None or isinstance(name, str)):
            raise TypeError(
                f"A parameter's name is a string, but got one of type {torch.typename(name)}."
            )
    if None in names and any(name is not None for name in names):
        raise ValueError("Either all parameters of a group have names or none has.")
    if len(names) != len(parameters):
        raise ValueError(
            f"A parameter group has {len(parameters)} parameters, but {len(names)} names."
        )
    if len({*map(id, parameters)}) != len(parameters):
        raise ValueError("A parameter group has the same parameter more than once.")
    return [None if name is None else without_wrappers(name) for name in names], parameters


def _refuse_set(parameters: object) -> None:
    # Its order changes from run to run, and a saved history is matched by order.
    if isinstance(parameters, (set, frozenset)):
        raise TypeError("parameters must be an ordered collection, but got a set. Use a list.")


_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def names_in(model: nn.Module) -> dict[int, str]:
    """The names of a model's parameters, by their `id`; wrappers leave no trace in them."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return {id(each): without_wrappers(name) for name, each in model.named_parameters()}


def without_wrappers(name: str) -> str:
    """A parameter's name without the traces of `torch.compile`, FSDP and checkpointing wrappers."""
    return _WRAPPERS.sub("", name)


def shape_of(parameter: Tensor) -> tuple[int, ...] | None:
    """The shape; None of a lazy parameter."""
    if torch.nn.parameter.is_lazy(parameter):
        return None  # not known before the first forward pass
    return tuple(parameter.shape)
