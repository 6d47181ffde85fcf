"""autoclip.torch behind the calls that tests of both frameworks share; see `in_tensorflow`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from paths import numpy_path
from torch import nn

import autoclip.torch as package


@contextmanager
def way(name: str) -> Iterator[None]:
    with numpy_path(name == "numpy"):
        yield


class Loop:
    """A clipper that is called by hand, for gradients that are arrays.

    Args:
        name: of the clipper's class.
        shapes: of the parameters, whose names are `row0`, `row1`, and so on.
        groups: of each parameter group how many parameters it has, and its settings; without them
            there is one.
        settings: arguments of the clipper.
    """

    def __init__(
        self,
        name: str,
        *settings: Any,
        shapes: Sequence[tuple[int, ...]],
        groups: Sequence[tuple[int, dict[str, Any]]] = (),
        **more: Any,
    ) -> None:
        self.parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        named = [(f"row{i}", each) for i, each in enumerate(self.parameters)]
        rest = iter(named)
        given: Any = [
            {"params": [next(rest) for _ in range(count)], **own} for count, own in groups
        ]
        self.clipper = getattr(package, name)(given or named, *settings, **more)

    def __call__(self, *gradients: Any) -> list[np.ndarray | None]:
        """The clipped gradients."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else torch.from_numpy(np.array(gradient))
        self.clipper.step()
        return [None if p.grad is None else p.grad.numpy() for p in self.parameters]


def loop(name: str, *settings: Any, way: str, shared: bool = True, **more: Any) -> Loop:
    """A new `Loop` without a history: nothing is traced that could be shared."""
    return Loop(name, *settings, **more)


@contextmanager
def interruptible() -> Iterator[None]:
    """Restore what Python leaves: it skips `no_grad`'s `__exit__` if interrupted at its call."""
    yield
    torch.set_grad_enabled(True)


# -- optimizers ----------------------------------------------------------------------------------


class Abstract(ABC, torch.optim.SGD):
    """As pytorch_optimizer's: its metaclass is ABCMeta."""


LIBRARY = "torch"
OPTIMIZERS: list[Any] = [torch.optim.SGD, torch.optim.AdamW, Abstract]
ANOTHER = torch.optim.Adam
NO_OPTIMIZER = nn.Linear


def optimizer(factory: Any) -> Any:
    """One that a factory, or an optimizer's class, makes."""
    return factory([torch.zeros(3, requires_grad=True)], lr=0.1)


def update(made: Any, size: float) -> None:
    """Let an optimizer take a step for a gradient of this norm."""
    for group in made.param_groups:
        for weight in group["params"]:
            weight.grad = torch.full_like(weight, size / weight.numel() ** 0.5)
    made.step()


def attributes(made: Any) -> Any:
    """Everything on an optimizer, by identity."""
    contents = {
        name: list(map(id, value.values())) if isinstance(value, dict) else id(value)
        for name, value in vars(made).items()
    }
    return type(made), contents
