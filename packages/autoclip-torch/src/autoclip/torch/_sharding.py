"""The true norms of gradients that are distributed over processes: DTensors, and plain tensors.

Every process holds a part of the gradients, and all must come to the same norms, bit for bit, or
their weights drift apart. So each puts the squares of its parts into a vector over all parameters,
of the same length everywhere whatever gradient is missing here, and the processes add these up: one
all-reduce for each dimension of a device mesh. Where a gradient is a partial sum, the sum is made
first: the square of a sum is not the sum of squares.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from autoclip.core import State
from autoclip.core.adapter import Mode
from autoclip.torch._agreement import (
    FACTS,
    disagreement_message,
    encoded,
    fingerprints,
    unequal,
)
from autoclip.torch._mesh import Mesh, is_nonzero, process_groups
from autoclip.torch._private import assert_async
from autoclip.torch._refused import refuse_unsupported
from autoclip.torch._rows import as_tensor

__all__ = ["Sharding", "called_by_loss_scaler", "sharding_of"]

# The classes of parameters that are whole on each process.
_PLAIN = {Tensor, torch.nn.Parameter}
# Squares of norms up to this, of as many processes as there are, add up within float64.
_LARGEST = 2.0**496
_OTHER_PROCESS = (
    "AutoClip: on another process a gradient is placed differently from earlier steps. "
    "The error that is raised there names the parameter. Nothing was recorded."
)


def sharding_of(
    parameters: Sequence[Tensor], known: Sharding | None, mode: Mode
) -> Sharding | None:
    """How parameters are spread over processes.

    Args:
        parameters: of all groups of a clipper, in the same order on every process.
        known: what the last step got from here; it is kept unless parameters were exchanged.
        mode: what a row of the history stands for.

    Returns:
        None if there is no DTensor among them: then each process has each gradient whole.

    Raises:
        RuntimeError: their norms cannot be known here, see `refuse_unsupported`; the same on
            all processes.
    """
    refuse_unsupported(parameters)
    if _PLAIN.issuperset(map(type, parameters)):  # the usual case
        return None
    kind = _dtensor_class()
    if kind is None or not any(isinstance(p, kind) for p in parameters):
        return None
    if known is None or not known.is_of(parameters):
        known = Sharding(parameters, kind)
        if mode != "parameter":
            known.refuse_parts_of_a_model(mode)
    return known


def called_by_loss_scaler() -> bool:
    """Whether this was called by a `GradScaler`, which tells only fused optimizers so."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.amp.grad_scaler":
        frame = frame.f_back
    return frame is not None


def _dtensor_class() -> type[Any] | None:
    # Importing DTensor takes a second. If it was not imported, no DTensor exists.
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


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
        self._are_dtensors = [isinstance(parameter, kind) for parameter in parameters]
        # Where each row's gradient is if there is one. Some other process may have it, and the
        # rows must not live elsewhere there.
        self.devices = [parameter.device for parameter in parameters]
        self._meshes = self._find_meshes(parameters)
        self._device = self._meshes[0].device
        # What is on the device already, so that a step copies nothing that has not changed.
        self._present: tuple[list[bool], Tensor] | None = None
        # Whether the processes have been found to clip alike.
        self._is_compared = False
        self._are_at: dict[torch.device, Tensor] = {}

    def _find_meshes(self, parameters: Sequence[Any]) -> list[Mesh]:
        """Each mesh that is not part of another (as "dp" is of ("dp", "tp")), in a common order."""
        found: dict[frozenset[tuple[int, ...]], Any] = {}
        own: list[frozenset[tuple[int, ...]] | None] = []
        for parameter, is_dtensor in zip(parameters, self._are_dtensors):
            own.append(frozenset(process_groups(parameter.device_mesh)) if is_dtensor else None)
            if is_dtensor:
                found.setdefault(
                    frozenset(process_groups(parameter.device_mesh)), parameter.device_mesh
                )
        meshes: dict[frozenset[tuple[int, ...]], Mesh] = {}
        for row, (parameter, groups) in enumerate(zip(parameters, own)):
            # A plain tensor counts once on the first mesh.
            first = next(iter(found)) if groups is None else groups
            largest = max((each for each in found if first <= each), key=len)
            if largest not in meshes:
                mesh = found[largest]
                # Where its processes can talk, even if parameters are offloaded to the CPU.
                kind = torch.device(mesh.device_type)
                device = next((device for device in self.devices if device.type == kind.type), kind)
                meshes[largest] = Mesh(mesh, device)
            meshes[largest].add(row, parameter, self._are_dtensors[row])
        return [*meshes.values()]

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, the same objects."""
        return len(parameters) == len(self._parameters) and all(
            ours() is theirs for ours, theirs in zip(self._parameters, parameters)
        )

    # -- what is refused ---------------------------------------------------------------------

    def refuse_parts_of_a_model(self, mode: Mode) -> None:
        """Refuse to make one norm of gradients of which other processes have more.

        Args:
            mode: "global" or "group".

        Raises:
            RuntimeError: they have, as far as that can be seen; on all processes.
        """
        ranks = {mesh.ranks for mesh in self._meshes}
        if len(ranks) > 1:
            raise RuntimeError(
                f"{mode}_clipping takes one norm of many gradients, but the parameters lie on "
                f"meshes of different processes, {sorted(map(sorted, ranks))}, which would each "
                f"get another norm. Use parameter-wise clipping ({mode}_clipping=False)."
            )
        for mesh in self._meshes:
            stages = mesh.pipeline_dimension
            if stages is not None:
                raise RuntimeError(
                    f"{mode}_clipping takes one norm of many gradients, but this is one stage of "
                    f"a pipeline (its mesh is part of one with a dimension {stages!r}), and the "
                    "other stages have more. Use parameter-wise clipping "
                    f"({mode}_clipping=False)."
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
        state: Callable[[], tuple[State, str]],
    ) -> tuple[list[Tensor | None], dict[torch.device, Tensor]]:
        """The true norms of gradients, the same on all processes; all of them must call this.

        Args:
            gradients: of all rows; None for none.
            local_norms: the norms of tensors that lie in this process, by their device.
            names: what to call the rows in an error.
            state: the clipper's state, and how to describe the clipper in an error.

        Returns:
            The part of each gradient that is here, to be scaled: scaling is linear, so that
            partial sums can wait for the optimizer to add them up. And the norms by device,
            float64[n] each, 0 for rows whose device is elsewhere.

        Raises:
            RuntimeError: the placement of a gradient changed, on any process; or, at the first
                call, another process has another state.
        """
        if self._is_handshake_due():
            spread = [g if isinstance(g, self._kind) else None for g in gradients]
            self._agree(spread, state)
        parts = [g.to_local() if isinstance(g, self._kind) else g for g in gradients]
        counted, fault = self._as_agreed(gradients, parts, names)
        for mesh in self._meshes:
            mesh.add_up(counted)
        norms = torch.zeros(len(counted), dtype=torch.float64, device=self._device)
        for some in local_norms(counted).values():
            norms += as_tensor(some).to(norms)
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
        assert_async(torch.stack(alarms).sum() == 0, _OTHER_PROCESS)
        return parts, {device: self._at(device, norms) for device in dict.fromkeys(self.devices)}

    def _agree(self, gradients: Sequence[Any], state: Callable[[], tuple[State, str]]) -> None:
        facts: list[int] = []
        if not self._is_compared:
            exported, description = state()
            facts = encoded(fingerprints(exported))
        found = [mesh.agree(gradients, facts) for mesh in self._meshes]
        differing = {fact for reduced in found for fact in unequal(reduced)}
        if differing:
            facts_in_order = [fact for fact in FACTS if fact in differing]
            raise RuntimeError(disagreement_message(facts_in_order, description))
        self._is_compared = True

    def _is_handshake_due(self) -> bool:
        # The same everywhere: the layouts are agreed on, and so is what is trained.
        return not self._is_compared or any(
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
                if isinstance(gradient, self._kind) is not self._are_dtensors[row]:
                    wrong = f"is a {torch.typename(gradient)}, and the parameter is not"
                elif self._are_dtensors[row]:
                    wrong = mesh.fault(k, gradient)
                if wrong is not None:
                    counted[row] = None
                    if fault is None and is_nonzero(gradient):
                        fault = f"The gradient of {names()[row]} {wrong}. Nothing was recorded."
        return counted, fault

    def _on_device(self, flags: list[bool]) -> Tensor:
        if self._present is None or self._present[0] != flags:
            self._present = flags, torch.tensor(flags, dtype=torch.float64, device=self._device)
        return self._present[1]

    def _at(self, device: torch.device, norms: Tensor) -> Tensor:
        """The norms on one device, without those whose rows live on another."""
        if all(other == device for other in self.devices):
            return norms.to(device)
        if device not in self._are_at:
            mask = [other == device for other in self.devices]
            self._are_at[device] = torch.tensor(mask, device=self._device)
        return torch.where(self._are_at[device], norms, 0.0).to(device)
