"""Multiplying gradients by their coefficients, in place and in at least float32.

Everything that follows from shapes and dtypes is worked out once, as in `norms`: `CpuScaling` and
`DeviceScaling` are made of gradients, and `apply` follows them at each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.torch._layout.norms import Gradients, chunks, is_plain, values_of
from autoclip.torch._layout.overlap import Overlaps, Renew
from autoclip.torch._private import foreach_copy_, foreach_mul_, unnegated

# Smaller coefficients lose digits in float32, or become zero.
_SMALLEST = float(torch.finfo(torch.float32).tiny)
# At or below this many numbers, Python floats are faster than NumPy arrays.
_FEW = 16
# Up to this size gradients on a device are scaled together; a larger one has a launch of its own.
_SMALL = 2**16
# How many elements are gathered, or at most widened from 16 bits, at a time.
_CHUNK = 2**22


def _multiply(gradient: Tensor, coefficient: float) -> None:
    """Multiply one gradient of any dtype and layout by any coefficient."""
    values = values_of(gradient)
    # In two steps where float32 does not hold the coefficient.
    factors = [coefficient] if coefficient >= _SMALLEST else [math.sqrt(coefficient)] * 2
    for factor in factors:
        if values.dtype.itemsize > 1:
            values.mul_(torch.tensor(factor, dtype=_factor_dtype(values.dtype), device="cpu"))
        else:  # torch multiplies no 8-bit floats
            values.copy_(values.float() * factor)


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


class CpuScaling:
    """Scales gradients in the CPU's memory.

    Args:
        gradients: tensors of any floating or complex dtype, strided or sparse; None for none.
        indices: the ones to scale; none of them is empty.
    """

    def __init__(self, gradients: Gradients, indices: Sequence[int]) -> None:
        # foreach takes a fifth of the time for factors that are 0-d tensors, not numbers. So each
        # gradient has one, a view of a buffer that a step fills.
        self._indices = indices
        self._buffers: list[npt.NDArray[np.floating]] = []
        self._factors: list[Sequence[Tensor] | None] = [None] * len(gradients)
        views: dict[torch.dtype, Sequence[Tensor]] = {}
        for i in indices:
            gradient = gradients[i]
            if is_plain(gradient):
                dtype = _factor_dtype(gradient.dtype)
                if dtype not in views:
                    buffer = torch.ones(len(gradients), dtype=dtype, device="cpu")
                    views[dtype] = buffer.unbind()
                    self._buffers.append(buffer.numpy())
                self._factors[i] = views[dtype]
        self._overlaps = Overlaps(gradients, self._indices)
        self._is_here = np.zeros(len(gradients), np.bool_)
        self._is_here[self._indices] = True

    def apply(
        self,
        gradients: list[Any],
        coefficients: npt.NDArray[np.float64],
        renew: Renew,
    ) -> None:
        """Multiply the gradients whose coefficient is below 1; the others are not even read.

        Args:
            gradients: like those that this was made of; renewed ones are put in the list.
            coefficients: float64[n], or float64[1] for all of them.
            renew: for gradients that share memory with others.
        """
        is_shared = len(coefficients) == 1
        # The coefficients of a group are those on every device.
        if is_shared:
            clipped = self._indices if coefficients[0] < 1.0 else []
        elif len(coefficients) <= _FEW:
            numbers = coefficients.tolist()
            clipped = [i for i in self._indices if numbers[i] < 1.0]
        else:
            clipped = ((coefficients < 1.0) & self._is_here).nonzero()[0].tolist()
        if not clipped:
            return
        self._overlaps.separate(gradients, clipped, renew)
        for buffer in self._buffers:
            buffer[: len(coefficients)] = coefficients
        numbers = coefficients.tolist()
        tensors, factors = [], []
        for i in clipped:
            gradient, k = gradients[i], 0 if is_shared else i
            views = self._factors[i]
            if views is None or 0.0 < numbers[k] < _SMALLEST:
                _multiply(gradient, numbers[k])
            else:
                tensors.append(unnegated(gradient))
                factors.append(views[k])
        if tensors:
            foreach_mul_(tensors, factors)

    def zero(self, gradients: list[Any], mask: npt.NDArray[np.bool_], renew: Renew) -> None:
        """Zero some gradients, NaN and infinity too.

        Args:
            gradients: like those that this was made of; renewed ones are put in the list.
            mask: bool[n], True for those.
            renew: for gradients that share memory with others.
        """
        indices = (mask & self._is_here).nonzero()[0].tolist()
        if indices:
            self._overlaps.separate(gradients, indices, renew)
        for i in indices:
            values_of(gradients[i]).zero_()


class _Gathered(NamedTuple):
    """Small gradients of one dtype that are scaled together, in a buffer.

    The buffer and the tensors that index it are made once: a captured CUDA graph finds them where
    they were, and no step waits for a copy from the host.
    """

    indices: list[int]
    order: Tensor
    sizes: Tensor
    buffer: Tensor
    views: list[Tensor]

    def repeated(self, values: Tensor) -> Tensor:
        """For each element of the buffer, the value that belongs to its gradient."""
        here = values.index_select(0, self.order)
        # Without output_size the host would wait for the sum of the sizes.
        return here.repeat_interleave(self.sizes, output_size=self.buffer.numel())

    def gather(self, gradients: Gradients) -> list[Tensor]:
        """Copy the gradients into the buffer, and return them, to be written again."""
        tensors = [unnegated(gradients[i]) for i in self.indices]
        foreach_copy_(self.views, tensors)
        return tensors


class _SameDtype(NamedTuple):
    """The gradients of one dtype that foreach operations multiply."""

    small: list[_Gathered]
    large: list[int]
    all: list[int]


class DeviceScaling:
    """Scales gradients on one device, by operations that never synchronize with it.

    Their number grows with the number of large gradients, not with that of small ones.

    Args:
        gradients: tensors of any floating or complex dtype, strided or sparse; None for none.
        device: the device they are on.
        indices: the ones to scale, all of them on `device`; none of them is empty.
    """

    def __init__(self, gradients: Gradients, device: torch.device, indices: Sequence[int]) -> None:
        self._plain: dict[torch.dtype, _SameDtype] = {}
        self._others: list[int] = []
        for i in indices:
            gradient = gradients[i]
            if is_plain(gradient):
                empty = _SameDtype([], [], [])
                self._plain.setdefault(gradient.dtype, empty).all.append(i)
            else:
                self._others.append(i)
        sizes = [0 if gradient is None else gradient.numel() for gradient in gradients]
        # XLA compiles a step into one program, which writes to each gradient once; there is nothing
        # to gather, and repeat_interleave would run on the host.
        limit = -1 if device.type == "xla" else _SMALL
        for dtype, (small, large, members) in self._plain.items():
            large += [i for i in members if sizes[i] > limit]
            parts = list(chunks([i for i in members if sizes[i] <= limit], sizes, _CHUNK))
            totals = [sum(sizes[i] for i in part) for part in parts]
            buffer = torch.zeros(max(totals, default=0), dtype=dtype, device=device)
            for part, total in zip(parts, totals):
                here, counts = buffer[:total], [sizes[i] for i in part]
                views = [
                    view.view(gradients[i].shape)
                    for i, view in zip(part, torch.split(here, counts))
                ]
                order, repeats = torch.tensor([part, counts], device=device).unbind()
                small.append(_Gathered(part, order, repeats, here, views))
        self._indices = indices
        self._overlaps = Overlaps(gradients, indices)

    def apply(self, gradients: list[Any], coefficients: Tensor, renew: Renew) -> None:
        """Multiply every gradient by its coefficient, also by 1: the host does not know which.

        Args:
            gradients: like those that this was made of; renewed ones are put in the list.
            coefficients: float64[n] (float32 on MPS), or [1] for all of them, on the device.
            renew: for gradients that share memory with others.
        """
        self._overlaps.separate(gradients, self._indices, renew)
        is_shared = len(coefficients) == 1
        # Below its smallest normal number a float32 factor may become zero, and the gradient too.
        # A norm is never that far above its threshold unless both are near the ends of float32.
        # A coefficient of 0 stays: the gradient is to be zeroed.
        narrow = coefficients
        if self._others or any(dtype is not torch.float64 for dtype in self._plain):
            narrow = torch.where(coefficients > 0, coefficients.float().clamp(min=_SMALLEST), 0.0)
        for dtype, (small, large, members) in self._plain.items():
            factor = coefficients.to(dtype) if dtype is torch.float64 else narrow
            if is_shared and dtype.itemsize >= 4:
                foreach_mul_([unnegated(gradients[i]) for i in members], factor[0])
                continue
            for part in small:
                tensors = part.gather(gradients)
                part.buffer.mul_(factor if is_shared else part.repeated(factor))
                foreach_copy_(tensors, part.views)
            if large:
                # Factors of one dimension: 0-d ones would be rounded to the gradient's 16 bits.
                each = [factor] * len(gradients) if is_shared else torch.split(factor, 1)
                pieces: list[Tensor] = []
                factors: list[Tensor] = []
                for i in large:
                    here = _pieces(gradients[i])
                    pieces += here
                    # A 0-d gradient takes no factor of one dimension, and rounds no 0-d one.
                    factors += [each[i] if here[0].dim() else each[i][0]] * len(here)
                foreach_mul_(pieces, factors)
        for i in self._others:
            values = values_of(gradients[i])
            one = narrow if is_shared else narrow[i : i + 1]
            if values.dtype is torch.float64:
                one = (coefficients if is_shared else coefficients[i : i + 1]).double()
            if values.dtype.itemsize > 1:
                values.mul_(one)
            else:  # torch multiplies no 8-bit floats
                values.copy_(values.float() * one[0])

    def zero(self, gradients: list[Any], mask: Tensor, renew: Renew) -> None:
        """Zero some gradients, NaN and infinity too.

        Args:
            gradients: like those that this was made of; renewed ones are put in the list.
            mask: bool[n], True for those, on the device.
            renew: for gradients that share memory with others.
        """
        self._overlaps.separate(gradients, self._indices, renew)
        # Masked, not multiplied: NaN times zero is NaN.
        alone = list(self._others)
        for small, large, _ in self._plain.values():
            alone += large
            for part in small:
                tensors = part.gather(gradients)
                part.buffer.masked_fill_(part.repeated(mask), 0)
                foreach_copy_(tensors, part.views)
        if alone:
            each = mask.unbind()
            for i in alone:
                values_of(gradients[i]).masked_fill_(each[i], 0)


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """Views of a large gradient, small enough to be widened from 16 bits one by one.

    CUDA and XLA widen and round element by element; other devices make a float32 copy of
    the gradient.
    """
    gradient = unnegated(gradient)
    is_narrow = gradient.dtype.itemsize < 4
    if not is_narrow or gradient.numel() <= _CHUNK or gradient.device.type == "xla":
        return [gradient]
    dimension = max(range(gradient.dim()), key=gradient.size)
    elements = gradient.numel() // gradient.size(dimension)
    return torch.split(gradient, max(1, _CHUNK // elements), dimension)
