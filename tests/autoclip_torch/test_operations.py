"""Launches of a step on a device: bounded in number, and never waiting for the device.

CPU tensors take the device path here; a dispatch mode sees each operation as a device would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from paths import numpy_path
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from autoclip.torch._layout.layout import Part

CPU = torch.device("cpu")

# These wait for the device, or bring something to it from the host.
WAITING = {
    "_local_scalar_dense",
    "_to_copy_to_device",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "_unique2",
}


class Operations(TorchDispatchMode):
    """The names of all operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            name = "_to_copy_to_device"
        if name in ("index", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        ):
            name = "nonzero"
        self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def operations() -> Iterator[list[str]]:
    with Operations() as mode, torch.no_grad():
        yield mode.names


def mixed_sizes(dtype: torch.dtype, small: int = 104, large: int = 57) -> list[Tensor]:
    """As many gradients as a ResNet-50 has, 57 of them large, in the shapes of convolutions."""
    sizes = [(64,), (8, 4, 3, 3), ()]
    gradients = [torch.randn(sizes[i % 3]) for i in range(small)]
    gradients += [torch.randn(2**8 + 1, 2**8) for _ in range(large)]
    return [gradient.to(dtype) for gradient in gradients]


def part_of(gradients: list[Tensor | None]) -> Any:
    with numpy_path(False):
        return Part.of(gradients, CPU, range(len(gradients)))


def never(index: int) -> Tensor:
    raise AssertionError(f"gradient {index} shares no memory")


def clip_each(part: Any, gradients: list[Tensor | None], shared: bool) -> None:
    norms = part.norms.of(gradients)
    coefficients = (1.0 / norms).clamp(max=1.0)
    part.scaling.apply(gradients, coefficients[:1] if shared else coefficients, never)


def clip_each_and_zero(part: Any, gradients: list[Tensor | None], shared: bool) -> None:
    norms = part.norms.of(gradients)
    part.scaling.zero(gradients, ~(norms < torch.inf), never)
    coefficients = (1.0 / norms).clamp(max=1.0)
    part.scaling.apply(gradients, coefficients[:1] if shared else coefficients, never)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Step = Callable[[Any, "list[Tensor | None]", bool], None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", [clip_each, clip_each_and_zero])
def test_a_step_waits_for_nothing_and_launches_little(
    dtype: torch.dtype, shared: bool, step: Step
) -> None:
    gradients: list[Tensor | None] = [*mixed_sizes(dtype)]
    part = part_of(gradients)
    with operations() as names:
        step(part, gradients, shared)
    assert not WAITING & set(names)
    parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    with operations() as rival:
        clip_grad_norm_(parameters, 1.0, foreach=True)
    # A whole step may launch 40 more than its rival: the rest is left to the history.
    allowed = len(rival) + 25 + (57 if step is clip_each_and_zero else 0)
    assert len(names) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_gradients_are_free(dtype: torch.dtype) -> None:
    counts = []
    for small in (10, 500):
        gradients: list[Tensor | None] = [*mixed_sizes(dtype, small=small, large=3)]
        part = part_of(gradients)
        with operations() as names:
            clip_each_and_zero(part, gradients, False)
        counts.append(len(names))
    assert counts[0] == counts[1]


def test_the_mode_sees_what_waits() -> None:
    """The check above can fail."""
    values = torch.randn(5)
    with operations() as names:
        values.max().item()
        values[values > 0]
        torch.tensor([1.0])
    assert {"_local_scalar_dense", "nonzero", "lift_fresh"} <= set(names)


def test_buffers_stay_where_a_captured_graph_found_them() -> None:
    gradients: list[Tensor | None] = [*mixed_sizes(torch.float32, large=2)]
    part = part_of(gradients)

    def addresses() -> list[int]:
        parts = part.scaling._plain[torch.float32].small
        return [t.data_ptr() for part in parts for t in (part.buffer, part.order, part.sizes)]

    before = addresses()
    assert before
    for _ in range(2):
        clip_each_and_zero(part, gradients, False)
    assert addresses() == before
