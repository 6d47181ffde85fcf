"""One device mesh and the gradients that are spread over it: their placements, and their sums.

A process that has no gradient for a parameter cannot see how the others' is placed. So processes
tell one another the placements in a handshake, until those of each trainable parameter are known to
all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip.torch._layout.norms import values_of
from autoclip.torch._private import root_mesh

# How a gradient is placed along one dimension of a mesh, as a number that a handshake can carry;
# from _SHARDED on, one for each dimension of the tensor.
_REPLICATED, _SUMMED, _AVERAGED, _SHARDED = range(4)
_BASE = 64
Placement = tuple[int, ...]
"""The placement of a gradient along each dimension of its mesh."""


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def process_groups(mesh: Any) -> dict[tuple[int, ...], Any]:
    """The process groups of a mesh's dimensions, by their ranks, those of one process left out.

    By ranks, since a part of a mesh, or one made twice, has groups of its own for the same ranks.
    """
    groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    return {_ranks(group): group for group in groups if dist.get_world_size(group) > 1}


class Mesh:
    """One device mesh and the rows whose gradients are spread over it."""

    def __init__(self, mesh: Any, device: torch.device) -> None:
        self.device = device
        self.ranks = frozenset(mesh.mesh.flatten().tolist())
        groups = process_groups(mesh)
        self.groups = [*groups.values()]
        self.pipeline_dimension = _pipeline_dimension(mesh)
        self._shardings: set[tuple[bool, ...] | None] = set()
        self._axes = range(len(groups))
        self._order = {ranks: j for j, ranks in enumerate(groups)}
        self._sizes = [dist.get_world_size(group) for group in self.groups]
        self._group_ranks = [dist.get_rank(group) for group in self.groups]
        self.rows: list[int] = []
        # One a row; None as long as no process has had a gradient for it.
        self.agreed: list[Placement | None] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[torch.dtype] = []
        self._by_placements: dict[Any, Placement | None] = {}
        # Tensors on the device for `combine`, remade with the placements.
        self._tensors: tuple[Tensor, list[Tensor]] | None = None

    def add(self, row: int, parameter: Tensor, is_dtensor: bool) -> None:
        """Take up a row. A plain tensor is taken to be the same on all processes."""
        self.rows.append(row)
        self.agreed.append(None if is_dtensor else (_REPLICATED,) * len(self.groups))
        placement = self.placement_of(parameter) if is_dtensor else None
        self._shardings.add(None if placement is None else tuple(k >= _SHARDED for k in placement))
        self._shapes.append(tuple(parameter.shape))
        self._dtypes.append(parameter.dtype)

    @property
    def is_uniform(self) -> bool:
        """True if all parameters are sharded along the same of the mesh's dimensions."""
        return len(self._shardings) == 1 and None not in self._shardings

    def placement_of(self, tensor: Any) -> Placement | None:
        """A DTensor's placement; None on another mesh, or if it is neither a sum nor a mean."""
        key = (tensor.device_mesh, tensor.placements)
        if key not in self._by_placements:
            self._by_placements[key] = self._read_placements(*key)
        return self._by_placements[key]

    def _read_placements(self, mesh: Any, placements: Sequence[Any]) -> Placement | None:
        # A mesh of fewer dimensions is a part of this one: along the others there are replicas.
        kinds = [_REPLICATED] * len(self.groups)
        for dimension, placement in enumerate(placements):
            ranks = _ranks(mesh.get_group(dimension))
            if len(ranks) == 1 or placement.is_replicate():
                continue
            if ranks not in self._order:
                return None
            if not placement.is_partial():
                kind = _SHARDED + placement.dim
            elif type(placement).__name__ == "Partial" and placement.reduce_op in ("sum", "avg"):
                kind = _SUMMED if placement.reduce_op == "sum" else _AVERAGED
            else:
                return None
            kinds[self._order[ranks]] = kind
        return tuple(kinds)

    def agree(self, gradients: Sequence[Any], facts: Sequence[int]) -> list[int]:
        """Tell the other processes how the DTensors that are here are placed, and learn theirs.

        Args:
            gradients: of all rows of the clipper, DTensors or None.
            facts: more numbers, as many on every process.

        Returns:
            The largest of each of the facts on any process.
        """
        codes = [0] * len(self.rows)
        for k, (row, placement) in enumerate(zip(self.rows, self.agreed)):
            gradient = gradients[row]
            if placement is None and gradient is not None and is_nonzero(gradient):
                placement = self.placement_of(gradient)
            if placement is not None:
                codes[k] = 1 + sum(kind * _BASE**j for j, kind in enumerate(placement))
        agreed = torch.tensor([*codes, *facts], dtype=torch.int64, device=self.device)
        for group in self.groups:
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group)
        found: list[int] = agreed.tolist()
        self.agreed = [
            tuple((code - 1) // _BASE**j % _BASE for j in self._axes) if code else None
            for code in found[: len(codes)]
        ]
        self._tensors = None
        return found[len(codes) :]

    def elements(self, k: int) -> int:
        """The number of real numbers of the k-th row's gradient in this process."""
        shape = list(self._shapes[k])
        for kind, size, rank in zip(self.agreed[k] or (), self._sizes, self._group_ranks):
            if kind >= _SHARDED:
                chunk = -(-shape[kind - _SHARDED] // size)
                rest = max(shape[kind - _SHARDED] - chunk * rank, 0)
                shape[kind - _SHARDED] = min(rest, chunk)
        return math.prod(shape) * (2 if self._dtypes[k].is_complex else 1)

    def fault(self, k: int, gradient: Any) -> str | None:
        """The reason that a DTensor is not the agreed gradient of the k-th row; None if it is."""
        placement = self.placement_of(gradient)
        if placement is None:
            return f"is placed {gradient.placements} on {gradient.device_mesh}"
        if placement != self.agreed[k]:
            return f"is placed {gradient.placements}, differently from earlier steps"
        if _is_partial(placement) and values_of(gradient.to_local()).numel() != self.elements(k):
            return f"has {gradient.to_local().numel()} elements here, placed {gradient.placements}"
        return None

    def add_up(self, gradients: list[Tensor | None]) -> None:
        """Replace gradients that are partial sums by the sums: one all-reduce a dimension."""
        for j, group in enumerate(self.groups):
            partial = [
                (k, row, placement[j] == _AVERAGED)
                for k, (row, placement) in enumerate(zip(self.rows, self.agreed))
                if placement is not None and placement[j] in (_SUMMED, _AVERAGED)
            ]
            if not partial:
                continue
            wide = any(self._dtypes[k] in (torch.float64, torch.complex128) for k, *_ in partial)
            counts = [self.elements(k) for k, *_ in partial]
            dtype = torch.float64 if wide else torch.float32
            buffer = torch.zeros(sum(counts), dtype=dtype, device=self.device)
            pieces = torch.split(buffer, counts)
            for (_, row, averaged), piece in zip(partial, pieces):
                gradient = gradients[row]
                if gradient is not None:
                    piece.copy_(values_of(gradient).reshape(-1))
                    if averaged:
                        piece.div_(self._sizes[j])
            dist.all_reduce(buffer, group=group)
            for (_, row, _), piece in zip(partial, pieces):
                gradients[row] = piece

    def combine(self, squares: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the squares of all processes, so that all get the same bits.

        Args:
            squares: float64[n], the squared norms of the parts here, for all rows of the clipper.
            present: float64[n + 1], 1 where there is a gradient here; last, 1 if something is
                wrong here.

        Returns:
            The indices of this mesh's rows, the squares of their norms, and 0-d, not 0 if
            something is wrong on any process.
        """
        if self._tensors is None:
            masks = [[x is not None and x[j] < _SHARDED for x in self.agreed] for j in self._axes]
            self._tensors = (
                torch.tensor([*self.rows, len(squares)], device=self.device),
                [torch.tensor(mask, device=self.device) for mask in masks],
            )
        index, replicated = self._tensors
        count = len(self.rows)
        vector = torch.cat([squares[index[:-1]], present[index]])
        ours, there = vector[:count], vector[count:-1]
        for group, is_replicated in zip(self.groups, replicated):
            dist.all_reduce(vector, group=group)
            # Replicas count once, and one that is missing somewhere does not count at all.
            ours /= torch.where(is_replicated, there.clamp(min=1.0), 1.0)
            there.clamp_(max=1.0)
        # The groups of the last dimension began with the same numbers, but each may have added
        # them in an order of its own: broadcast one result so that they agree bit for bit.
        for group in self.groups[-2::-1]:
            dist.broadcast(vector, dist.get_global_rank(group, 0), group)
        return index[:-1], ours, vector[-1]


def _pipeline_dimension(mesh: Any) -> str | None:
    """The name of the dimension along which the mesh that this one is a part of has stages."""
    root = root_mesh(mesh)
    for name, size in zip(root.mesh_dim_names or (), root.mesh.shape):
        if size > 1 and name.lower().startswith(("pp", "pipe", "stage")):
            return str(name)
    return None


def _is_partial(placement: Placement) -> bool:
    return _SUMMED in placement or _AVERAGED in placement


def is_nonzero(gradient: Any) -> bool:
    # A gradient of zeros says nothing of how the true ones are placed: torch.distributed.checkpoint
    # steps an optimizer with zeros that are placed like the parameters.
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(values_of(local).any())
