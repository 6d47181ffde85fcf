"""Gradients that share memory, found before any of them is written.

`backward` gives each parameter a gradient of its own. `torch.autograd.grad` and `torch.func.grad`
may return one tensor for two parameters, views of each other, or a tensor whose elements all lie in
one place. Multiplied in place, such a gradient would be multiplied twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from autoclip.torch._layout.norms import Gradients, values_of
from autoclip.torch._private import is_view

Renew: TypeAlias = Callable[[int], Tensor]
"""Gives a parameter, by its index, a gradient in memory of its own, and returns that."""

# Devices whose tensors have no address of their own: data_ptr() is 0, or an object's.
_WITHOUT_ADDRESSES = ("xla", "mps")


class Overlaps:
    """The search for gradients that share memory with another one, or within themselves.

    Disjoint views of one buffer, such as DDP's gradient buckets, share none. Views that interleave,
    such as two columns of a matrix, are taken for sharing.

    Args:
        gradients: tensors of any dtype, layout and device; None for none.
        indices: the ones to look at; none of them is empty.
    """

    def __init__(self, gradients: Gradients, indices: Iterable[int]) -> None:
        self._dense: list[int] = []
        self._loose: list[int] = []
        self._opaque: list[int] = []
        for i in indices:
            gradient = gradients[i]
            if gradient.device.type in _WITHOUT_ADDRESSES:
                self._opaque.append(i)
            elif gradient.layout is torch.strided and gradient.is_contiguous():
                self._dense.append(i)
            else:
                self._loose.append(i)
        sizes = [gradients[i].nbytes for i in self._dense]
        self._sizes = np.array(sizes, np.int64)
        self._is_everything = self._dense == [*range(len(gradients))]
        # The addresses of dense gradients that were found to share no memory.
        self._disjoint: list[int] = []

    def separate(self, gradients: list[Any], written: Iterable[int], renew: Renew) -> None:
        """Replace gradients until none that is to be written shares memory.

        Args:
            gradients: like those that this was made of; the replaced ones are changed in the list.
            written: the indices of those that are to be written.
            renew: see `Renew`.
        """
        if self._opaque:
            found = self._found_without_addresses(gradients)
        else:
            # One call for thousands: most gradients are contiguous.
            is_plain = self._is_everything and all(
                map(Tensor.is_contiguous, [gradients[i] for i in written])
            )
            found = [] if is_plain else [i for i in written if not _is_injective(gradients[i])]
            found += self._found_inside_another(gradients)
        for i in dict.fromkeys(found):
            gradients[i] = renew(i)

    def _found_inside_another(self, gradients: Gradients) -> Sequence[int]:
        dense = gradients if self._is_everything else [gradients[i] for i in self._dense]
        begins = [*map(Tensor.data_ptr, dense)]
        indices, sizes = self._dense, self._sizes
        if self._loose:
            loose = [values_of(gradients[i]) for i in self._loose]
            begins += [values.data_ptr() for values in loose]
            indices, sizes = indices + self._loose, np.append(sizes, [*map(_extent, loose)])
        elif begins == self._disjoint:  # gradients that stay where they are, step after step
            return []
        ordered = np.array(begins, np.int64)
        order = ordered.argsort(kind="stable")
        ordered = ordered[order]
        ends = np.maximum.accumulate(ordered + sizes[order])
        inside = order[1:][ordered[1:] < ends[:-1]].tolist()
        if not inside:
            self._disjoint = begins
        return [indices[k] for k in inside]

    def _found_without_addresses(self, gradients: Gradients) -> list[int]:
        # A view may be of another gradient, and XLA writes to an expanded one by adding up.
        seen: set[int] = set()
        found = []
        for i in self._opaque:
            gradient = gradients[i]
            if id(gradient) in seen or is_view(gradient):
                found.append(i)
            seen.add(id(gradient))
        return found


def _is_injective(gradient: Tensor) -> bool:
    """True if each element surely has its own memory, unlike those of an expanded tensor."""
    if gradient.layout is torch.strided and gradient.is_contiguous():
        return True
    reach = 0
    for stride, size in _strides(values_of(gradient)):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _extent(values: Tensor) -> int:
    """The number of bytes from the beginning of the first to the end of the last element."""
    if not values.numel():
        return 0
    reach = sum((size - 1) * stride for stride, size in _strides(values))
    return (reach + 1) * values.element_size()


def _strides(values: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes of the dimensions that have any length, smallest strides first."""
    return sorted((t, n) for t, n in zip(values.stride(), values.shape) if n > 1)
