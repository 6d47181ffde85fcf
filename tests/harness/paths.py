"""Torch's two paths on the CPU, and the numbers of a step before a clipper rounds them.

The one place where tests reach under the clippers of autoclip.torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from autoclip.torch import _histories, _ops

TensorHistory = _histories.TensorHistory


def numpy_path(answer: bool) -> AbstractContextManager[Any]:
    """Treat tensors as a CPU's, whose histories are NumPy's, or as a GPU's."""

    def uses_numpy(device: torch.device) -> bool:  # a Mock would remember all calls
        return answer

    return mock.patch.object(_ops, "uses_numpy", uses_numpy)


def room(at_once: int, first: int | None = None) -> AbstractContextManager[Any]:
    """Let windows on a device begin with less room, as very long ones do.

    Args:
        at_once: elements up to which all room is made at once.
        first: norms of each row that there is room for otherwise.
    """
    first = _histories._FIRST_CAPACITY if first is None else first
    return mock.patch.multiple(_histories, _ALLOCATE_AT_ONCE=at_once, _FIRST_CAPACITY=first)


def histories_of(clipper: Any) -> Any:
    return clipper._histories


def kinds_of_history(clipper: Any) -> set[type]:
    return {type(storage.history) for storage in histories_of(clipper).storages}


def windows_of(history: Any) -> Any:
    """The tensors of a `TensorHistory`: values, the same in order, counts."""
    return history._windows


def exact_thresholds(clipper: Any) -> Iterator[tuple[Any, Any]]:
    """Rows and their thresholds in float64; `clipper.thresholds` are float32."""
    for storage, thresholds in histories_of(clipper).thresholds():
        yield storage.rows, thresholds


def exact_reports(clipper: Any) -> Iterator[tuple[Any, Any]]:
    """Rows of the last step and what it computed of them in float64; `last` is float32."""
    for storage, report in clipper._reports:
        yield storage.rows, report
