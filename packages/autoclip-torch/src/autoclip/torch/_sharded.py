"""The true norms of gradients that are spread over processes: DTensors, and tensors beside them.

Every process holds a part of the gradients, and all must come to the same norms, bit for bit, or
their weights drift apart. So each puts the squares of its parts into a vector over all rows, of
the same length everywhere whatever gradient is missing here, and the processes add these up: one
all-reduce for each dimension of a device mesh. Where a gradient is a partial sum, the sum is made
first: the square of a sum is not the sum of squares.

A process that has no gradient for a row cannot see how the others' is placed. So processes tell
one another the placements in a handshake, until each trainable row's are known to all.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoclip.torch._norms import values_of

__all__ = ["Sharding", "refuse_unsupported", "sharding_of"]

# How a gradient is placed along one dimension of a mesh, as a number that a handshake can carry;
# from _SHARDED on, one for each dimension of the tensor.
_REPLICATED, _SUMMED, _AVERAGED, _SHARDED = range(4)
_BASE = 64
# Squares of norms up to this, of as many processes as there are, add up within float64.
_LARGEST = 2.0**496
Layout = tuple[int, ...]
"""How a gradient is placed along each dimension of its mesh."""

_OTHER_PROCESS = (
    "AutoClip: on another process a gradient is placed otherwise than in the steps before. "
    "The error that is raised there names the parameter. Nothing was recorded."
)


def sharding_of(
    parameters: Sequence[Tensor], known: Sharding | None, global_clipping: bool
) -> Sharding | None:
    """How parameters are spread over processes.

    Args:
        parameters: of all groups of a clipper, in the same order on every process.
        known: what the last step got from here; it is kept unless parameters were exchanged.
        global_clipping: whether one norm is to be made of all of them.

    Returns:
        None if there is no DTensor among them: then each process has each gradient whole.

    Raises:
        RuntimeError: their norms cannot be known here, see `refuse_unsupported`; the same on
            all processes.
    """
    refuse_unsupported(parameters)
    kind = _dtensor_class()
    if kind is None or not any(isinstance(p, kind) for p in parameters):
        return None
    if known is None or not known.is_of(parameters):
        known = Sharding(parameters, kind)
        if global_clipping:
            known.refuse_parts_of_a_model()
    return known


def _dtensor_class() -> type[Any] | None:
    # Importing it takes a second. Where nobody has, there is none. (2.4 has it in `_tensor`.)
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


# -- what is refused -----------------------------------------------------------------------------

_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) leaves each process with pieces of flattened parameters, "
    "and nothing on them tells which belong together. Use torch.distributed.fsdp.fully_shard"
)
_DEEPSPEED = (
    "DeepSpeed's ZeRO keeps gradients in partitions of its own. Use fully_shard, or DeepSpeed's "
    "own gradient_clipping"
)
_MEGATRON = (
    "Megatron-LM splits parameters into plain tensors and keeps gradients in buffers of its own. "
    "Use its own clip_grad"
)
# Attributes that these libraries set on the parameters that they manage.
_MARKS = {
    "_fsdp_flattened": _FSDP1,
    "_is_flat_param": _FSDP1,
    "ds_id": _DEEPSPEED,
    "_hp_mapping": _DEEPSPEED,
    "main_grad": _MEGATRON,
    "tensor_model_parallel": _MEGATRON,
}
# TransformerEngine uses Megatron's attributes too, where nothing need be split.
_NEEDS_MODULE = {_MEGATRON: "megatron.core.parallel_state"}


def refuse_unsupported(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters whose gradients' true norms cannot be known from them.

    Raises:
        RuntimeError: they are managed by FSDP1, DeepSpeed's ZeRO or Megatron.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for parameter in parameters:
        # Most have no attributes at all, and this runs at every step.
        attributes = parameter.__dict__
        if attributes and not _MARKS.keys().isdisjoint(attributes):
            for mark, reason in _MARKS.items():
                module = _NEEDS_MODULE.get(reason)
                if mark in attributes and (module is None or module in sys.modules):
                    raise RuntimeError(
                        f"AutoClip cannot know the norms of these gradients. {reason}. "
                        "See docs/distributed.md."
                    )


# -- meshes --------------------------------------------------------------------------------------


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _groups(mesh: Any) -> dict[tuple[int, ...], Any]:
    """The process groups of a mesh's dimensions, by their ranks, those of one process left out.

    By ranks, since a part of a mesh, or one made twice, has groups of its own for the same ranks.
    """
    groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    return {_ranks(group): group for group in groups if dist.get_world_size(group) > 1}


class _Mesh:
    """One device mesh and the rows whose gradients are spread over it."""

    def __init__(self, mesh: Any, device: torch.device) -> None:
        self.device = device
        self.ranks = frozenset(mesh.mesh.flatten().tolist())
        groups = _groups(mesh)
        self.groups = [*groups.values()]
        self.pipeline_dimension = _pipeline_dimension(mesh)
        self._shardings: set[tuple[bool, ...] | None] = set()
        self._axes = range(len(groups))
        self._order = {ranks: j for j, ranks in enumerate(groups)}
        self._sizes = [dist.get_world_size(group) for group in self.groups]
        self._places = [dist.get_rank(group) for group in self.groups]
        self.rows: list[int] = []
        # One a row; None as long as no process has had a gradient for it.
        self.layouts: list[Layout | None] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[torch.dtype] = []
        self._by_placements: dict[Any, Layout | None] = {}
        # What `combine` needs on the device, made anew when the layouts are.
        self._tensors: tuple[Tensor, list[Tensor]] | None = None

    def add(self, row: int, parameter: Tensor, is_spread: bool) -> None:
        """Take up a row. A plain tensor is taken to be the same on all processes."""
        self.rows.append(row)
        self.layouts.append(None if is_spread else (_REPLICATED,) * len(self.groups))
        layout = self.layout_of(parameter) if is_spread else None
        self._shardings.add(None if layout is None else tuple(k >= _SHARDED for k in layout))
        self._shapes.append(tuple(parameter.shape))
        self._dtypes.append(parameter.dtype)

    @property
    def is_uniform(self) -> bool:
        """Whether all parameters are sharded along the same of the mesh's dimensions."""
        return len(self._shardings) == 1 and None not in self._shardings

    def layout_of(self, tensor: Any) -> Layout | None:
        """The layout of a DTensor; None if it lies on another mesh or is no sum or mean."""
        key = (tensor.device_mesh, tensor.placements)
        if key not in self._by_placements:
            self._by_placements[key] = self._read_placements(*key)
        return self._by_placements[key]

    def _read_placements(self, mesh: Any, placements: Sequence[Any]) -> Layout | None:
        # A mesh of fewer dimensions is a part of this one: along the others there are replicas.
        layout = [_REPLICATED] * len(self.groups)
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
            layout[self._order[ranks]] = kind
        return tuple(layout)

    def agree(self, gradients: Sequence[Any]) -> None:
        """Tell the other processes how the DTensors that are here are placed, and learn theirs.

        Args:
            gradients: of all rows of the clipper, DTensors or None.
        """
        codes = [0] * len(self.rows)
        for k, (row, layout) in enumerate(zip(self.rows, self.layouts)):
            gradient = gradients[row]
            if layout is None and gradient is not None and _is_nonzero(gradient):
                layout = self.layout_of(gradient)
            if layout is not None:
                codes[k] = 1 + sum(kind * _BASE**j for j, kind in enumerate(layout))
        agreed = torch.tensor(codes, dtype=torch.int64, device=self.device)
        for group in self.groups:
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group)
        self.layouts = [
            tuple((code - 1) // _BASE**j % _BASE for j in self._axes) if code else None
            for code in agreed.tolist()
        ]
        self._tensors = None

    def elements(self, k: int) -> int:
        """How many real numbers of the k-th row's gradient lie here."""
        shape = list(self._shapes[k])
        for kind, size, place in zip(self.layouts[k] or (), self._sizes, self._places):
            if kind >= _SHARDED:
                chunk = -(-shape[kind - _SHARDED] // size)
                rest = max(shape[kind - _SHARDED] - chunk * place, 0)
                shape[kind - _SHARDED] = min(rest, chunk)
        return math.prod(shape) * (2 if self._dtypes[k].is_complex else 1)

    def fault(self, k: int, gradient: Any) -> str | None:
        """Why the k-th row's gradient, a DTensor, cannot be what the processes agreed on."""
        layout = self.layout_of(gradient)
        if layout is None:
            return f"is placed {gradient.placements} on {gradient.device_mesh}"
        if layout != self.layouts[k]:
            return f"is placed {gradient.placements}, otherwise than in the steps before"
        if _is_partial(layout) and values_of(gradient.to_local()).numel() != self.elements(k):
            return f"has {gradient.to_local().numel()} elements here, placed {gradient.placements}"
        return None

    def add_up(self, gradients: list[Tensor | None]) -> None:
        """Replace gradients that are partial sums by the sums: one all-reduce a dimension."""
        for j, group in enumerate(self.groups):
            partial = [
                (k, row, layout[j] == _AVERAGED)
                for k, (row, layout) in enumerate(zip(self.rows, self.layouts))
                if layout is not None and layout[j] in (_SUMMED, _AVERAGED)
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
        """Add up what the processes have, so that all of them get the same bits.

        Args:
            squares: float64[n], the squared norms of what is here, for all rows of the clipper.
            present: float64[n + 1], 1 where there is a gradient here; last, 1 if something is
                wrong here.

        Returns:
            The indices of this mesh's rows, the squares of their norms, and 0-d, not 0 if
            something is wrong on any process.
        """
        if self._tensors is None:
            masks = [[x is not None and x[j] < _SHARDED for x in self.layouts] for j in self._axes]
            self._tensors = (
                torch.tensor([*self.rows, len(squares)]).to(self.device),
                [torch.tensor(mask).to(self.device) for mask in masks],
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
        # them in an order of its own: what the first one got goes for all.
        for group in self.groups[-2::-1]:
            dist.broadcast(vector, dist.get_global_rank(group, 0), group)
        return index[:-1], ours, vector[-1]


def _pipeline_dimension(mesh: Any) -> str | None:
    """The name of the dimension along which the mesh that this one is a part of has stages."""
    find_root = getattr(mesh, "_get_root_mesh", None)
    root = mesh if find_root is None else find_root()
    for name, size in zip(root.mesh_dim_names or (), root.mesh.shape):
        if size > 1 and name.lower().startswith(("pp", "pipe", "stage")):
            return str(name)
    return None


def _is_partial(layout: Layout) -> bool:
    return _SUMMED in layout or _AVERAGED in layout


def _is_nonzero(gradient: Any) -> bool:
    # A gradient of zeros says nothing of how the true ones are placed: torch.distributed.checkpoint
    # steps an optimizer with zeros that are placed like the parameters.
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(values_of(local).any())


# -- all of a clipper ----------------------------------------------------------------------------


class Sharding:
    """How the parameters of a clipper are spread over processes.

    Args:
        parameters: of all groups of a clipper, in the same order on every process.
        kind: the class of DTensors.
    """

    def __init__(self, parameters: Sequence[Tensor], kind: type[Any]) -> None:
        # Weak: parameters that were exchanged for sharded ones shall not be kept in memory.
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._kind = kind
        self._is_spread = [isinstance(parameter, kind) for parameter in parameters]
        # Where each row's gradient is if there is one. Some other process may have it, and the
        # rows must not live elsewhere there.
        self.homes = [parameter.device for parameter in parameters]
        self._meshes = self._find_meshes(parameters)
        self._device = self._meshes[0].device
        # What is on the device already, so that a step copies nothing that has not changed.
        self._present: tuple[list[bool], Tensor] | None = None
        self._are_at: dict[torch.device, Tensor] = {}

    def _find_meshes(self, parameters: Sequence[Any]) -> list[_Mesh]:
        """Each mesh that is no part of another, as "dp" is of ("dp", "tp"), in a common order."""
        found: dict[frozenset[tuple[int, ...]], Any] = {}
        own: list[frozenset[tuple[int, ...]] | None] = []
        for parameter, is_spread in zip(parameters, self._is_spread):
            own.append(frozenset(_groups(parameter.device_mesh)) if is_spread else None)
            if is_spread:
                found.setdefault(frozenset(_groups(parameter.device_mesh)), parameter.device_mesh)
        meshes: dict[frozenset[tuple[int, ...]], _Mesh] = {}
        for row, (parameter, groups) in enumerate(zip(parameters, own)):
            # A plain tensor counts once on the first mesh.
            first = next(iter(found)) if groups is None else groups
            largest = max((each for each in found if first <= each), key=len)
            if largest not in meshes:
                mesh = found[largest]
                # Where its processes can talk, even if parameters are offloaded to the CPU.
                kind = torch.device(mesh.device_type)
                device = next((home for home in self.homes if home.type == kind.type), kind)
                meshes[largest] = _Mesh(mesh, device)
            meshes[largest].add(row, parameter, self._is_spread[row])
        return [*meshes.values()]

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, the same objects."""
        return len(parameters) == len(self._parameters) and all(
            ours() is theirs for ours, theirs in zip(self._parameters, parameters)
        )

    # -- what is refused ---------------------------------------------------------------------

    def refuse_parts_of_a_model(self) -> None:
        """Refuse to make one norm of gradients of which other processes have more.

        Raises:
            RuntimeError: they have, as far as that can be seen; on all processes.
        """
        ranks = {mesh.ranks for mesh in self._meshes}
        if len(ranks) > 1:
            raise RuntimeError(
                "global_clipping takes one norm of all gradients, but the parameters lie on "
                f"meshes of different processes, {sorted(map(sorted, ranks))}, which would each "
                "get another norm. Use parameter-wise clipping (global_clipping=False)."
            )
        for mesh in self._meshes:
            stages = mesh.pipeline_dimension
            if stages is not None:
                raise RuntimeError(
                    "global_clipping takes one norm of all gradients, but this is one stage of a "
                    f"pipeline (its mesh is part of one with a dimension {stages!r}), and the "
                    "other stages have more. Use parameter-wise clipping (global_clipping=False)."
                )

    def refuse_loss_scaler(self) -> None:
        """Refuse a loss scaler where torch's own may find overflows on some processes only.

        It looks for them along the dimensions on which the first gradient is sharded. A process
        that finds none steps, and waits in a collective for those that do not.

        Raises:
            RuntimeError: the parameters do not all lie on one mesh, sharded along the same of
                its dimensions; on all processes.
        """
        if len(self._meshes) > 1 or not self._meshes[0].is_uniform:
            raise RuntimeError(
                "A GradScaler does not work with AutoClip under tensor parallelism or on several "
                "meshes: torch may find an overflow on some processes only, which then skip the "
                "step while the others wait for them. Train in bfloat16, which needs no "
                "GradScaler. (Parameters on one mesh and all sharded alike, as fully_shard makes "
                "them, do work.)"
            )

    # -- a step ------------------------------------------------------------------------------

    def measure(
        self,
        gradients: Sequence[Any],
        local_norms: Callable[[Sequence[Tensor | None]], Mapping[torch.device, Any]],
        names: Callable[[], Sequence[str]],
    ) -> tuple[list[Tensor | None], dict[torch.device, Tensor]]:
        """The true norms of gradients, the same on all processes; all of them must call this.

        Args:
            gradients: of all rows; None for none.
            local_norms: the norms of tensors that lie in this process, by their device.
            names: what to call the rows in an error.

        Returns:
            The part of each gradient that is here, to be scaled: scaling is linear, so that
            partial sums can wait for the optimizer to add them up. And the norms by device,
            float64[n] each, 0 for rows whose home is elsewhere.

        Raises:
            RuntimeError: a gradient is placed otherwise than before, on any process.
        """
        if self._is_handshake_due():
            spread = [g if isinstance(g, self._kind) else None for g in gradients]
            for mesh in self._meshes:
                mesh.agree(spread)
        parts = [g.to_local() if isinstance(g, self._kind) else g for g in gradients]
        counted, fault = self._as_agreed(gradients, parts, names)
        for mesh in self._meshes:
            mesh.add_up(counted)
        norms = torch.zeros(len(counted), dtype=torch.float64, device=self._device)
        for some in local_norms(counted).values():
            norms += torch.as_tensor(some).to(norms)
        # What is finite here stays finite when it is squared and added up.
        squares = torch.where(norms.isfinite(), norms.clamp(max=_LARGEST), norms).square()
        present = self._on_device([part is not None for part in counted] + [fault is not None])
        alarms = []
        for mesh in self._meshes:
            index, total, alarm = mesh.combine(squares, present)
            norms[index] = total.sqrt()
            alarms.append(alarm)
        if fault is not None:
            raise RuntimeError(fault)
        # Does not wait for an accelerator, and still no process goes on without the others.
        torch._assert_async(torch.stack(alarms).sum() == 0, _OTHER_PROCESS)
        return parts, {home: self._at(home, norms) for home in dict.fromkeys(self.homes)}

    def _is_handshake_due(self) -> bool:
        # The same everywhere: the layouts are agreed on, and so is what is trained.
        return any(
            layout is None and getattr(self._parameters[row](), "requires_grad", False)
            for mesh in self._meshes
            for row, layout in zip(mesh.rows, mesh.layouts)
        )

    def _as_agreed(
        self,
        gradients: Sequence[Any],
        parts: Sequence[Tensor | None],
        names: Callable[[], Sequence[str]],
    ) -> tuple[list[Tensor | None], str | None]:
        """The parts that are placed as was agreed on, and what is wrong with another if any is."""
        counted, fault = list(parts), None
        for mesh in self._meshes:
            for k, row in enumerate(mesh.rows):
                gradient = gradients[row]
                if gradient is None:
                    continue
                wrong = None
                if isinstance(gradient, self._kind) is not self._is_spread[row]:
                    wrong = f"is a {torch.typename(gradient)}, and the parameter is not"
                elif self._is_spread[row]:
                    wrong = mesh.fault(k, gradient)
                if wrong is not None:
                    counted[row] = None
                    if fault is None and _is_nonzero(gradient):
                        fault = f"The gradient of {names()[row]} {wrong}. Nothing was recorded."
        return counted, fault

    def _on_device(self, flags: list[bool]) -> Tensor:
        if self._present is None or self._present[0] != flags:
            self._present = flags, torch.tensor(flags, dtype=torch.float64).to(self._device)
        return self._present[1]

    def _at(self, home: torch.device, norms: Tensor) -> Tensor:
        """The norms on one device, without those whose rows live on another."""
        if all(other == home for other in self.homes):
            return norms.to(home)
        if home not in self._are_at:
            mask = torch.tensor([other == home for other in self.homes])
            self._are_at[home] = mask.to(self._device)
        return torch.where(self._are_at[home], norms, 0.0).to(home)
