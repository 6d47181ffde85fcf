"""Names of torch and Lightning that are not public.

If a new release of either breaks this package, it is most likely here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.optim's own, imports lazily

P = ParamSpec("P")
R = TypeVar("R")

# Cast, since torch's own types are narrower than its functions.
foreach_mul_: Callable[[Sequence[Tensor], Sequence[Tensor] | Tensor], None] = cast(
    "Any", torch._foreach_mul_
)
"""Multiply each tensor in place by its factor, or all by one 0-d factor."""

foreach_copy_: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = cast(
    "Any", torch._foreach_copy_
)
"""Copy each source, of the second argument, into its target."""


def disable_dynamo(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function from being compiled by `torch.compile`: it costs one graph break.

    Outside of compiled code the call is direct. torch's own wrapper imports hundreds of modules at
    its first call, and at each call takes as long as the norms of a small model.
    """
    disabled = _disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def foreach_norm(tensors: Sequence[Tensor], order: float, dtype: torch.dtype) -> Sequence[Tensor]:
    """The norm of each tensor, accumulated in `dtype`: 0-d tensors of it."""
    return torch._foreach_norm(list(tensors), order, dtype=dtype)


def flattened(tensors: list[Tensor]) -> Tensor:
    """A copy of the elements of tensors of one dtype, one after the other."""
    if len(tensors) == 1:  # of one, torch returns a view
        return torch.cat([tensors[0].reshape(-1)])
    return torch._C._nn.flatten_dense_tensors(tensors)


def unnegated(tensor: Tensor) -> Tensor:
    """The memory of a tensor, which NumPy and foreach operations can use.

    Of one that autograd negated lazily, a view with the opposite sign.
    """
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def assert_async(condition: Tensor, message: str) -> None:
    """Fail on the device, without waiting for it, if `condition` is false."""
    torch._assert_async(condition, message)


def is_fake(tensor: Tensor) -> bool:
    """True if a tensor has no memory: one of `FakeTensorMode`, or on the meta device."""
    return tensor.is_meta or (
        # The class is imported only where it is in use: it brings half of torch.compile along.
        type(tensor) is not Tensor and type(tensor).__name__ == "FakeTensor"
    )


def is_in_backward() -> bool:
    """True if a backward pass calls this, through a hook."""
    return torch._C._current_graph_task_id() != -1


def is_view(tensor: Tensor) -> bool:
    """True if a tensor was made as a view of another one."""
    return tensor._is_view()


def root_mesh(mesh: Any) -> Any:
    """The mesh that a `DeviceMesh` is a slice of, or itself if it is not a slice."""
    find_root = getattr(mesh, "_get_root_mesh", None)
    return mesh if find_root is None else find_root()


def is_logging_step(trainer: Any) -> bool:
    """True if a Lightning trainer writes logs at this step."""
    return bool(trainer._logger_connector.should_update_logs)
