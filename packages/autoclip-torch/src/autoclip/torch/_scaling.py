"""Multiplying gradients by their coefficients, in place and in at least float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autoclip.torch._norms import values_of

__all__ = ["scale_on_cpu", "scale_on_device", "zero_nonfinite"]


def scale_on_cpu(gradients: Sequence[Tensor | None], coefficients: npt.NDArray[np.float64]) -> None:
    """Multiply the gradients whose coefficient is below 1; the others are not even read.

    Args:
        gradients: tensors on the CPU; None for none.
        coefficients: float64[n].
    """
    for i in np.flatnonzero(coefficients < 1.0).tolist():
        gradient = gradients[i]
        if gradient is not None:
            # A Python scalar is applied in float32 to 16-bit tensors, and then cast.
            values = values_of(gradient)
            if values.dtype.itemsize > 1:
                values.mul_(float(coefficients[i]))
            else:  # torch multiplies no 8-bit floats
                values.copy_(values.float() * float(coefficients[i]))


def scale_on_device(gradients: Sequence[Tensor | None], coefficients: Tensor) -> None:
    """Multiply every gradient by its coefficient without asking the device whether it must.

    Args:
        gradients: tensors on one device; None for none.
        coefficients: [n] or [1] for all, on the device.
    """
    each = coefficients.expand(len(gradients)).unbind()
    same: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for gradient, coefficient in zip(gradients, each):
        if gradient is None:
            continue
        values = values_of(gradient)
        if values.dtype.itemsize < 4:
            # A coefficient that is a tensor would be rounded to 16 bits before the product.
            values.copy_(values.float() * coefficient.float())
        else:
            tensors, factors = same.setdefault(values.dtype, ([], []))
            tensors.append(values)
            factors.append(coefficient)
    for dtype, (tensors, factors) in same.items():
        if len(coefficients) == 1:
            torch._foreach_mul_(tensors, factors[0].to(dtype))
        else:
            torch._foreach_mul_(tensors, torch.stack(factors).to(dtype).unbind())


def zero_nonfinite(gradients: Sequence[Tensor | None], norms: Tensor) -> None:
    """Zero each gradient whose norm is not finite.

    Args:
        gradients: tensors on the device of `norms`; None for none.
        norms: [n], finite exactly where the gradient is.
    """
    for gradient, finite in zip(gradients, norms.isfinite().unbind()):
        if gradient is not None:
            values = values_of(gradient)
            # Not a product: NaN times zero is NaN.
            values.masked_fill_(~finite, 0)
