"""The true L2 norms of a list of gradients, whatever their dtype, layout or device.

Norms leave this module as float64: wide enough that the norm of finite float32 elements is always
finite, so that a norm which is not finite means a gradient which is not. What is recorded is
rounded once, later.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["cpu_norms", "device_norms", "norm_dtype", "values_of"]

# torch's norm of one long float32 vector is off in the fourth digit (6e-4 at 16 M elements, 3e-2
# with an outlier): a few running sums swallow what is small beside them. Norms of rows of 256
# elements, combined in float64, are right to 5e-7 at the worst outlier, and quicker too.
_BLOCK = 256
# 16-bit gradients are widened piece by piece, so that no copy of the whole is made.
_CHUNK = 2**18
# Below this mean square the squares of single elements may underflow in float32.
_SMALL_MEAN_SQUARE = 2.0**-105


def values_of(gradient: Tensor) -> Tensor:
    """The elements that a gradient consists of, real, strided, and sharing its memory.

    A sparse gradient's are its stored values. For its norm it must be coalesced first; scaling,
    being linear, need not wait for that.
    """
    if gradient.layout is not torch.strided:
        gradient = gradient.detach()
        sparse = gradient.layout is torch.sparse_coo
        gradient = gradient._values() if sparse else gradient.values()
    # Autograd leaves conjugates and negations lazy, and foreach operations write to none. They
    # share their memory, and their norm, with the original.
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.conj() if gradient.is_conj() else gradient)
    return torch._neg_view(gradient) if gradient.is_neg() else gradient


def _norm_values(gradient: Tensor) -> Tensor:
    # Duplicate indices stand for their sum: the norm is that of the gradient they add up to.
    if gradient.layout is torch.sparse_coo and not gradient.is_coalesced():
        gradient = gradient.coalesce()
    values = values_of(gradient)
    # With 8 bits torch can convert, and nothing else.
    return values.float() if values.dtype.itemsize == 1 else values


def norm_dtype(device: torch.device) -> torch.dtype:
    """The widest float that `device` computes in: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _flat(values: Tensor) -> Tensor:
    """One dimension over the elements in memory order, without a copy where there is an order."""
    if values.is_contiguous():
        return values.view(-1)
    # A transposed or channels-last gradient is as dense as any, only in another order.
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return values.permute(order).reshape(-1)


def _block_norms(flat: Tensor, pieces: list[Tensor]) -> int:
    """Append the norms of pieces of a float32 or float64 vector to `pieces`; say how many."""
    elements = flat.numel()
    blocks, rest = divmod(elements, _BLOCK)
    if blocks:
        whole = flat if not rest else flat[: elements - rest]
        pieces.append(torch.linalg.vector_norm(whole.view(blocks, _BLOCK), dim=1))
    if rest:
        pieces.append(torch.linalg.vector_norm(flat[elements - rest :], dim=0, keepdim=True))
    return blocks + (1 if rest else 0)


def cpu_norms(gradients: Sequence[Tensor | None]) -> npt.NDArray[np.float64]:
    """The norms of gradients that lie in the CPU's memory.

    Args:
        gradients: tensors of any floating or complex dtype, strided or sparse; None for none.

    Returns:
        float64[n]: within 1e-6 of the exact norm for float32 and float64, 1e-3 for 16 bits. 0 for
        None, and not finite exactly if the gradient holds a NaN or an infinity.
    """
    norms = np.zeros(len(gradients))
    present: list[int] = []
    vectors: list[Tensor] = []
    counts: list[int] = []
    # Pieces of all gradients are combined at once, in NumPy: few calls for many small tensors.
    pieces: list[Tensor] = []
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        flat = _flat(_norm_values(gradient))
        if not flat.numel():  # a parameter without elements, a sparse gradient without entries
            continue
        if flat.dtype in (torch.float32, torch.float64):
            count = _block_norms(flat, pieces)
        else:
            count = sum(_block_norms(part.float(), pieces) for part in torch.split(flat, _CHUNK))
        present.append(i)
        vectors.append(flat)
        counts.append(count)
    if not present:
        return norms
    if any(piece.dtype is not pieces[0].dtype for piece in pieces):
        pieces = [piece.double() for piece in pieces]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(torch.cat(pieces).numpy().astype(np.float64))
        starts: npt.NDArray[np.int64] = np.cumsum(counts) - np.array(counts)
        squares = np.add.reduceat(squares, starts)
        found = np.sqrt(squares)
    sizes = np.array([flat.numel() for flat in vectors])
    # Zero, tiny, huge or not finite: rare enough to be looked at more closely.
    sure = (squares > _SMALL_MEAN_SQUARE * sizes) & (squares < np.inf)
    for k in np.flatnonzero(~sure).tolist():
        found[k] = _careful_norm(vectors[k])
    norms[present] = found
    return norms


def _careful_norm(flat: Tensor) -> float:
    """The norm where squares may leave the dtype's range, by scaling with the largest element."""
    largest = float(torch.linalg.vector_norm(flat, math.inf))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    square = 0.0
    for chunk in torch.split(flat, _CHUNK):
        scaled = chunk.double() / largest
        square += float(torch.dot(scaled, scaled))
    # A finite gradient never has the norm "infinity", not even beyond float64.
    return min(largest * math.sqrt(square), sys.float_info.max)


def device_norms(
    gradients: Sequence[Tensor | None], device: torch.device, check_finite: bool
) -> Tensor:
    """The norms of gradients on one device, as tensor operations that never wait for it.

    Args:
        gradients: tensors on `device`; None for none.
        device: where the norms go.
        check_finite: tell a finite gradient whose squares overflow from one that is not finite,
            at the price of one more read of the gradients.

    Returns:
        float64[n] (float32 on MPS), within 1e-5 for norms in 1e-16 … 1e18. 0 for None.
    """
    dtype = norm_dtype(device)
    zero = torch.zeros((), dtype=torch.float32, device=device)
    norms: list[Tensor] = [zero] * len(gradients)
    present = [
        (i, _norm_values(gradient))
        for i, gradient in enumerate(gradients)
        if gradient is not None and gradient.numel()
    ]
    present = [(i, values) for i, values in present if values.numel()]
    if not present:
        return torch.zeros(len(gradients), dtype=dtype, device=device)
    for wide in (torch.float32, torch.float64):
        some = [(i, v) for i, v in present if (v.dtype is torch.float64) is (wide is torch.float64)]
        if some:
            found = torch._foreach_norm([v for _, v in some], 2, dtype=wide)
            for (i, _), norm in zip(some, found):
                norms[i] = norm
    result = _stacked(norms, dtype)
    if check_finite:
        largest: list[Tensor] = [zero] * len(gradients)
        for i, values in present:
            largest[i] = torch.linalg.vector_norm(values, math.inf)
        finite = _stacked(largest, dtype).isfinite()
        beyond = torch.finfo(dtype).max
        result = torch.where(finite & ~result.isfinite(), beyond, result)
    return result


def _stacked(norms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor of `dtype`, by one conversion where they are of one dtype."""
    if any(norm.dtype is not norms[0].dtype for norm in norms):
        norms = [norm.to(dtype) for norm in norms]
    return torch.stack(list(norms)).to(dtype)
