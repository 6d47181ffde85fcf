"""The true L2 norms of a list of gradients of any dtype, layout and device.

What can be known from the gradients' shapes, dtypes and layouts alone is worked out once, in
`CpuNorms` and `DeviceNorms`; `of` then follows it at each step. Norms are float64: wide enough that
finite float32 elements always have a finite norm, so a norm is not finite exactly if the gradient
is not. They are rounded once, when they are recorded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.linalg import vector_norm

from autoclip.torch._ops import norm_dtype
from autoclip.torch._private import flattened, foreach_norm, unnegated

# A float32 sum of many squares loses the small ones: torch's norm of 16 M elements is off
# by 6e-4, a BLAS dot product over 2^18 elements with an outlier by 2e-5. Sums over rows of at most
# 512 elements, combined in float64, are right to 3e-7 for any outlier, and as fast as memory. So
# are float32 sums over at most 512 of such rows, to 6e-7.
_ROW = 512
# Up to this size gathering a gradient with others costs less than a call of its own.
_SMALL = 2**11
# From this size on torch's threads are worth waking; below, one BLAS call in NumPy is quicker.
_LARGE = 2**18
# torch.cat takes vectors as they are, in a fifth of the time, but is one more call.
_MANY_VECTORS = 32
# At or below this many gradients, a call of torch's for each is faster than gathering them.
_FEW = 20
# Elements that are gathered, or widened from 16 bits, at a time: the bound of temporary memory.
_CHUNK = 2**18
# Below this mean square the squares of single elements may underflow in float32.
_SMALL_MEAN_SQUARE = 2.0**-105

Gradients: TypeAlias = Sequence[Any]
"""Tensors, or None for none; the classes here know which indices hold a tensor."""

_WIDE = (torch.float32, torch.float64)
_HAS_VECDOT = hasattr(np, "vecdot")  # from NumPy 2 on; in a sixth less time than matmul
_REAL_DTYPES = (*_WIDE, torch.float16, torch.bfloat16)


def is_plain(gradient: Tensor) -> bool:
    """True if foreach operations multiply it: strided, real, and of at least 16 bits."""
    return gradient.layout is torch.strided and gradient.dtype in _REAL_DTYPES


def values_of(gradient: Tensor) -> Tensor:
    """The elements that a gradient consists of, real, strided, and sharing its memory.

    The values of a sparse gradient are its stored ones. Coalesce it before taking a norm; scaling
    is linear and does not need that.
    """
    if gradient.layout is not torch.strided:
        gradient = gradient.detach()
        sparse = gradient.layout is torch.sparse_coo
        gradient = gradient._values() if sparse else gradient.values()
    # Autograd leaves conjugates and negations lazy, and foreach operations do not write to those.
    # They share their memory, and their norm, with the original.
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.conj() if gradient.is_conj() else gradient)
    return unnegated(gradient)


def _norm_values(gradient: Tensor) -> Tensor:
    # Duplicate indices stand for their sum: the norm is that of the gradient they add up to.
    if gradient.layout is torch.sparse_coo and not gradient.is_coalesced():
        gradient = gradient.coalesce()
    values = values_of(gradient)
    # torch converts 8-bit floats and computes nothing with them.
    return values.float() if values.dtype.itemsize == 1 else values


def _flat(values: Tensor) -> Tensor:
    """One dimension over the elements in memory order, without a copy where there is an order."""
    if values.is_contiguous():
        return values.view(-1)
    # A transposed or channels-last gradient is as dense as any, only in another order.
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return values.permute(order).reshape(-1)


def _row_length(elements: int) -> int:
    """The longest row that `elements` divide into, up to `_ROW`; `_ROW` if none is long enough."""
    if elements <= _ROW:
        return max(1, elements)
    lengths = range(_ROW, _ROW // 8, -1)
    return next((length for length in lengths if elements % length == 0), _ROW)


def _row_norms(flat: Tensor) -> Iterator[Tensor]:
    """The norms of pieces of a vector: of its rows, and of the rest."""
    elements = flat.numel()
    row = _row_length(elements)
    whole = elements - elements % row
    if whole:
        yield vector_norm(flat[:whole].view(-1, row), dim=1)
    if whole < elements:
        yield vector_norm(flat[whole:], dim=0, keepdim=True)


def _square(flat: Tensor) -> float:
    """The squared norm of a vector of any real dtype of at least 16 bits."""
    square = 0.0
    for chunk in [flat] if flat.dtype in _WIDE else torch.split(flat, _CHUNK):
        # Added up at once: norms that were kept would lie between the freed copies of the chunks,
        # and these would take as much memory as a copy of the whole.
        for norms in _row_norms(chunk if chunk.dtype in _WIDE else chunk.float()):
            square += float(np.square(norms.numpy(), dtype=np.float64).sum())
    return square


def _careful_norm(flat: Tensor) -> float:
    """The norm where squares may leave the dtype's range, by scaling with the largest element."""
    if not flat.numel():
        return 0.0
    largest = float(vector_norm(flat, math.inf))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    square = 0.0
    for chunk in torch.split(flat, _CHUNK):
        scaled = chunk.double() / largest
        square += float(torch.dot(scaled, scaled))
    # A finite gradient never has an infinite norm, not even beyond float64.
    return min(largest * math.sqrt(square), sys.float_info.max)


class _Sums(NamedTuple):
    """Gradients of one dtype whose squares are summed by one `np.add.reduceat`.

    Attributes:
        indices: the gradients' indices, in the order of `starts`.
        starts: the start of each one's squares in `squares`.
        squares: one for each element that is gathered, and for each row of the others; float64.
        gathered: small gradients that one call gathers, True if they are all vectors, and
            their part of `squares`.
        in_rows: another gradient, the length of its rows, and its part of `squares`.
    """

    indices: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    squares: npt.NDArray[np.float64]
    gathered: list[tuple[list[int], bool, npt.NDArray[np.float64]]]
    in_rows: list[tuple[int, int, npt.NDArray[np.float64]]]


class _Alone(NamedTuple):
    """A gradient that torch measures: from the norms of its rows if it is large.

    NumPy takes less time for many in a loop. But after a backward pass its code has left the
    caches, and for a few gradients it takes twice as long as torch's.

    Attributes:
        member: the gradient's index.
        length: of its rows; 1 for a gradient without rows.
        dtype: in which the last sum is made; None for the gradient's own.
        least: the smallest square that has lost nothing to underflow.
    """

    member: int
    length: int
    dtype: torch.dtype | None
    least: float

    @classmethod
    def of(cls, member: int, length: int, gradient: Tensor) -> _Alone:
        """The `member`-th gradient, with rows of `length`."""
        elements = gradient.numel()
        is_short = gradient.dtype in _WIDE and elements // length <= _ROW
        dtype = None if is_short else torch.float64
        return cls(member, length, dtype, _SMALL_MEAN_SQUARE * elements)


class CpuNorms:
    """Measures gradients in the CPU's memory.

    Args:
        gradients: tensors of any floating or complex dtype, strided or sparse; None for none.
        indices: the ones to measure; none of them is empty.
    """

    def __init__(self, gradients: Gradients, indices: Iterable[int]) -> None:
        self._sums: list[_Sums] = []
        self._others: list[int] = []
        self._few: list[_Alone] = []
        self._smallest_squares = np.full(len(gradients), -1.0)
        # For each dtype: arrays and vectors to be gathered, gradients to be taken in rows.
        plain: dict[torch.dtype, tuple[list[int], list[int], list[int]]] = {}
        sizes = [0 if gradient is None else gradient.numel() for gradient in gradients]
        for i in indices:
            gradient = gradients[i]
            self._smallest_squares[i] = _SMALL_MEAN_SQUARE * sizes[i]
            arrays, vectors, in_rows = plain.setdefault(gradient.dtype, ([], [], []))
            if not is_plain(gradient):
                self._others.append(i)
            elif sizes[i] <= _SMALL:
                (vectors if gradient.dim() == 1 else arrays).append(i)
            elif _goes_in_rows(gradient):
                in_rows.append(i)
            else:
                self._others.append(i)
        if len(gradients) <= _FEW and not self._others:
            for arrays, vectors, in_rows in plain.values():
                self._few += [_Alone.of(i, 1, gradients[i]) for i in (*arrays, *vectors)]
                self._few += [_Alone.of(i, _row_length(sizes[i]), gradients[i]) for i in in_rows]
            return
        for arrays, vectors, in_rows in plain.values():
            if arrays and len(vectors) < _MANY_VECTORS:
                arrays, vectors = sorted(arrays + vectors), []
            self._sums += _sums(arrays, vectors, in_rows, sizes)

    def of(self, gradients: Gradients) -> npt.NDArray[np.float64]:
        """The norms of gradients like those that this was made of.

        Returns:
            float64[n]: within 1e-6 of the exact norm for float32 and float64, 1e-3 for 16 bits. 0
            for None, and not finite exactly if the gradient holds a NaN or an infinity.
        """
        if self._few:
            return self._of_few(gradients)
        found = np.zeros(len(gradients))
        with np.errstate(over="ignore", invalid="ignore"):
            for indices, starts, squares, gathered, in_rows in self._sums:
                for members, are_vectors, part in gathered:
                    here = [gradients[i] for i in members]
                    flat = torch.cat(here) if are_vectors else flattened(here)
                    elements = (flat if flat.dtype in _WIDE else flat.float()).numpy()
                    np.multiply(elements, elements, out=part)
                for i, length, part in in_rows:
                    _sum_rows(gradients[i], length, part)
                found[indices] = np.add.reduceat(squares, starts)
            for i in self._others:
                found[i] = _square(_flat(_norm_values(gradients[i])))
            norms = np.sqrt(found)
        # Zero, tiny, huge or not finite: rare enough to be looked at more closely.
        for i in self._unsure(found):
            norms[i] = _careful_norm(_flat(_norm_values(gradients[i])))
        return norms

    def _of_few(self, gradients: Gradients) -> npt.NDArray[np.float64]:
        norms = [0.0] * len(gradients)
        for i, length, dtype, least in self._few:
            gradient = values = gradients[i]
            if length > 1:
                flat = gradient if gradient.is_contiguous() else _flat(gradient)
                values = vector_norm(flat.view(-1, length), dim=1)
            norm = vector_norm(values, dtype=dtype).item()
            is_sure = least < norm * norm < math.inf
            norms[i] = norm if is_sure else _careful_norm(_flat(_norm_values(gradient)))
        return np.array(norms)

    def _unsure(self, squares: npt.NDArray[np.float64]) -> Sequence[int]:
        """The indices of sums that may not be right."""
        sure = squares > self._smallest_squares
        if np.count_nonzero(sure) == len(sure) and math.isfinite(np.add.reduce(squares)):
            return []
        unsure: list[int] = np.flatnonzero(~(sure & np.isfinite(squares))).tolist()
        return unsure


def _goes_in_rows(gradient: Tensor) -> bool:
    """True if the elements of a strided gradient of a real dtype divide into rows for a sum."""
    elements = gradient.numel()
    return gradient.dtype in _WIDE and elements % _row_length(elements) == 0


def _sums(
    arrays: Sequence[int],
    vectors: Sequence[int],
    in_rows: Sequence[int],
    sizes: Sequence[int],
) -> Iterator[_Sums]:
    """Plan the sums of gradients of one dtype, at most `_CHUNK` squares at a time."""
    counts = list(sizes)
    for i in in_rows:
        counts[i] //= _row_length(sizes[i])
    parts = list(chunks([*arrays, *vectors, *in_rows], counts, _CHUNK))
    longest = max((sum(counts[i] for i in part) for part in parts), default=0)
    buffer: npt.NDArray[np.float64] = np.empty(longest)
    kinds = {**dict.fromkeys(arrays, 0), **dict.fromkeys(vectors, 1), **dict.fromkeys(in_rows, 2)}
    for part in parts:
        ends = np.cumsum([counts[i] for i in part])
        starts = ends - [counts[i] for i in part]
        gathered = []
        for kind in (0, 1):
            here = [k for k, i in enumerate(part) if kinds[i] == kind]
            if here:
                region = buffer[starts[here[0]] : ends[here[-1]]]
                gathered.append(([part[k] for k in here], kind == 1, region))
        rows = [
            (i, _row_length(sizes[i]), buffer[starts[k] : ends[k]])
            for k, i in enumerate(part)
            if kinds[i] == 2
        ]
        yield _Sums(np.array(part), starts, buffer[: ends[-1]], gathered, rows)


def _sum_rows(values: Tensor, length: int, out: npt.NDArray[np.float64]) -> None:
    """Write each row's sum of squares, of a float32 or float64 tensor, to `out`, [rows]."""
    values = unnegated(values)
    if not values.is_contiguous():
        values = _flat(values)
    if len(out) * length < _LARGE or torch.get_num_threads() == 1:
        rows = values.numpy().reshape(-1, length)
        if _HAS_VECDOT:
            np.vecdot(rows, rows, out=out)
        else:
            np.matmul(rows[:, None], rows[:, :, None], out=out[:, None, None])
    else:
        norms = vector_norm(values.view(-1, length), dim=1).numpy()
        np.multiply(norms, norms, out=out)


def chunks(members: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Split `members` into runs whose sizes add up to at most `limit`, or of one member."""
    chunk: list[int] = []
    total = 0
    for i in members:
        if chunk and total + sizes[i] > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(i)
        total += sizes[i]
    if chunk:
        yield chunk


class DeviceNorms:
    """Measures gradients on one device, by operations that never synchronize with it.

    Args:
        device: the device for the norms.
        indices: the ones to measure, all of them on `device`; none of them is empty.
    """

    def __init__(self, device: torch.device, indices: Sequence[int]) -> None:
        self._dtype = norm_dtype(device)
        # XLA squares in the gradient's dtype before it adds up in another. It fuses the conversion.
        self._squares_narrowly = device.type == "xla"
        self._zero = torch.zeros((), dtype=self._dtype, device=device)
        self._indices = indices

    def of(self, gradients: Gradients) -> Tensor:
        """The norms of gradients like those that this was made of.

        Squares are summed in float64: those of float32 and 16-bit elements neither underflow nor
        overflow there. The reads take most of the time even where float64 is slow: a GPU with one
        float64 unit for 64 of float32 still multiplies as many elements as its memory delivers.

        Returns:
            float64[n] (float32 on MPS, which has no float64), 0 for None. Within 1e-5 for elements
            of any size that the dtype has; for float64 gradients, and on MPS, for norms in
            1e-16 … 1e18. Not finite exactly if the gradient holds a NaN or an infinity.
        """
        norms: list[Tensor] = [self._zero] * len(gradients)
        same: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
        for i in self._indices:
            values = _norm_values(gradients[i])
            if values.numel():  # a sparse gradient may have no entries
                indices, tensors = same.setdefault(values.dtype, ([], []))
                indices.append(i)
                tensors.append(values)
        for dtype, (indices, tensors) in same.items():
            if self._squares_narrowly:
                tensors = [tensor.to(self._dtype) for tensor in tensors]
            found = foreach_norm(tensors, 2, self._dtype)
            if dtype is torch.float64 or self._dtype is torch.float32:
                # Squares may overflow: an infinite norm of finite elements is the largest number.
                largest = torch.stack(list(foreach_norm(tensors, math.inf, self._dtype)))
                here = torch.stack(list(found))
                beyond = torch.finfo(self._dtype).max
                overflowed = (largest < math.inf) & (here == math.inf)
                found = here.masked_fill_(overflowed, beyond).unbind()
            for i, norm in zip(indices, found):
                norms[i] = norm
        return torch.stack(norms) if norms else self._zero.new_zeros(0)
