"""The true norms of gradients that are distributed over processes: DTensors, and plain tensors.

Every process holds a part of the gradients, and all must come to the same norms, bit for bit, or
their weights drift apart. So each puts the squares of its parts into a vector over all parameters,
of the same length everywhere, even if a gradient is missing here, and the processes add these up:
one all-reduce for each dimension of a device mesh. If a gradient is a partial sum, the sum is made
first: the square of a sum is not the sum of squares.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from autoclip.core.adapter import Histories, Mode
from autoclip.torch._groups import Groups
from autoclip.torch._layout.agreement import (
    FACTS,
    disagreement_message,
    encoded,
    fingerprints,
    unequal,
)
from autoclip.torch._layout.layout import Layout
from autoclip.torch._layout.managed import refuse_managed
from autoclip.torch._layout.mesh import Mesh, is_nonzero, process_groups
from autoclip.torch._layout.rows import Norms, dtensor_class, to_device
from autoclip.torch._ops import as_tensor
from autoclip.torch._private import assert_async

# Squares of norms up to this, of any number of processes, add up within float64.
_LARGEST = 2.0**496
_OTHER_PROCESS = (
    "AutoClip: on another process a gradient is placed differently from earlier steps. "
    "The error that is raised there names the parameter. Nothing was recorded."
)


def layout_of(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Groups,
    histories: Histories[Any],
    known: Layout | None,
) -> Layout:
    """The layout of gradients: the known one if it fits.

    Args:
        parameters: of all groups of a clipper, in the same order on every process.
        gradients: their gradients; None for none.
        groups: the clipper's.
        histories: the clipper's.
        known: the layout of the last step.

    Raises:
        RuntimeError: the gradients' norms cannot be known, see `refuse_managed`; the same on all
            processes.
    """
    refuse_managed(parameters)
    kind = dtensor_class(parameters)
    if kind is None:
        if known is not None and known.fits(gradients):
            return known
        return Layout(gradients, groups, histories)
    if isinstance(known, ShardedLayout) and known.is_of(parameters):
        return known
    return ShardedLayout(parameters, kind, groups, histories)


def _called_by_loss_scaler() -> bool:
    """True if a `GradScaler` is on the call stack: it tells only fused optimizers of itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.amp.grad_scaler":
        frame = frame.f_back
    return frame is not None


class ShardedLayout(Layout):
    """The layout of gradients that are spread over processes.

    Args:
        parameters: of all groups of a clipper, in the same order on every process.
        kind: the class of DTensors.
        groups: the clipper's.
        histories: the clipper's.

    Raises:
        RuntimeError: one norm of many gradients is asked for, and other processes have more of
            them; on all processes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        kind: type[Any],
        groups: Groups,
        histories: Histories[Any],
    ) -> None:
        super().__init__([None] * len(parameters), groups, histories)
        # The layouts of the parts that are here, and of the same after partial sums are added up.
        self._local: Layout | None = None
        self._summed: Layout | None = None
        # Weak: parameters that were exchanged for sharded ones must not be kept in memory.
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._kind = kind
        self._are_dtensors = [isinstance(parameter, kind) for parameter in parameters]
        # Of parameters, not gradients: another process may have one, and its rows must not live
        # elsewhere there.
        self._devices = [parameter.device for parameter in parameters]
        self._meshes = self._find_meshes(parameters)
        self._device = self._meshes[0].device
        # The copy on the device, so a step copies only changes.
        self._present: tuple[list[bool], Tensor] | None = None
        # True after the processes have been found to clip alike.
        self._is_compared = False
        self._are_at: dict[torch.device, Tensor] = {}
        if groups.mode.joins:
            self._refuse_parts_of_a_model(groups.mode)

    def _find_meshes(self, parameters: Sequence[Any]) -> list[Mesh]:
        """Each mesh that is not part of another (as "dp" is of ("dp", "tp")), in a common order."""
        found: dict[frozenset[tuple[int, ...]], Any] = {}
        own: list[frozenset[tuple[int, ...]] | None] = []
        for parameter, is_dtensor in zip(parameters, self._are_dtensors):
            own.append(frozenset(process_groups(parameter.device_mesh)) if is_dtensor else None)
            if own[-1] is not None:
                found.setdefault(own[-1], parameter.device_mesh)
        meshes: dict[frozenset[tuple[int, ...]], Mesh] = {}
        for row, (parameter, groups) in enumerate(zip(parameters, own)):
            # A plain tensor counts once on the first mesh.
            first = next(iter(found)) if groups is None else groups
            largest = max((each for each in found if first <= each), key=len)
            if largest not in meshes:
                mesh = found[largest]
                # Where its processes can talk, even if parameters are offloaded to the CPU.
                kind = torch.device(mesh.device_type)
                device = next(
                    (device for device in self._devices if device.type == kind.type), kind
                )
                meshes[largest] = Mesh(mesh, device)
            meshes[largest].add(row, parameter, self._are_dtensors[row])
        return [*meshes.values()]

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """False: parameters that are not sharded have a `Layout`; see `is_of`."""
        return False

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """True if these are the parameters, the same objects."""
        return len(parameters) == len(self._parameters) and all(
            ours() is theirs for ours, theirs in zip(self._parameters, parameters)
        )

    # -- refusals ----------------------------------------------------------------------------

    def _refuse_parts_of_a_model(self, mode: Mode) -> None:
        """Refuse one norm of many gradients if other processes are seen to have more of them."""
        ranks = {mesh.ranks for mesh in self._meshes}
        if len(ranks) > 1:
            raise RuntimeError(
                f"{mode}_clipping needs one norm of many gradients, but the parameters lie on "
                f"meshes of different processes, {sorted(map(sorted, ranks))}, which would each "
                f"get another norm. Use parameter-wise clipping ({mode}_clipping=False)."
            )
        for mesh in self._meshes:
            stages = mesh.pipeline_dimension
            if stages is not None:
                raise RuntimeError(
                    f"{mode}_clipping needs one norm of many gradients, but this is one stage of "
                    f"a pipeline (its mesh is part of one with a dimension {stages!r}), and the "
                    "other stages have more. Use parameter-wise clipping "
                    f"({mode}_clipping=False)."
                )

    def _refuse_loss_scaler(self, found_inf: Tensor | None) -> None:
        """Refuse a loss scaler if torch's own may find overflows on some processes only.

        It looks for them along the dimensions on which the first gradient is sharded. A process
        that finds none steps, and waits in a collective for those that do not.

        Raises:
            RuntimeError: the parameters do not all lie on one mesh, sharded along the same of
                its dimensions; on all processes.
        """
        is_safe = len(self._meshes) == 1 and self._meshes[0].is_uniform
        if not is_safe and (found_inf is not None or _called_by_loss_scaler()):
            raise RuntimeError(
                "A GradScaler does not work with AutoClip under tensor parallelism or on several "
                "meshes: torch may find an overflow on some processes only, which then skip the "
                "step while the others wait for them. Train in bfloat16, which needs no "
                "GradScaler. (Parameters on one mesh and all sharded alike, as fully_shard makes "
                "them, do work.)"
            )

    # -- a step ------------------------------------------------------------------------------

    @property
    def _measured_devices(self) -> list[torch.device]:
        return [*dict.fromkeys(self._devices)]

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Norms:
        """See `Layout.measure`: the same on all processes, which must all call this.

        They wait for one another, even one without a gradient: its norms are those of the others.

        Returns:
            The norms by the devices of the parameters, 0 for those on another one.

        Raises:
            RuntimeError: the placement of a gradient changed, on any process; at the first call,
                another process has another state; or see `_refuse_loss_scaler`.
        """
        self._refuse_loss_scaler(found_inf)
        return super().measure(gradients, scale, found_inf)

    def _measured(self, gradients: Sequence[Any]) -> Norms:
        if self._is_handshake_due():
            self._agree([g if isinstance(g, self._kind) else None for g in gradients])
        parts = self._parts_of(gradients)
        counted, fault = self._as_agreed(gradients, parts)
        for mesh in self._meshes:
            mesh.add_up(counted)
        self._summed = self._fitting(self._summed, counted)
        norms = torch.zeros(len(counted), dtype=torch.float64, device=self._device)
        for some in self._summed._measured(counted).values():
            norms += as_tensor(some).to(norms)
        # A finite square stays finite when it is added up.
        squares = torch.where(norms.isfinite(), norms.clamp(max=_LARGEST), norms).square()
        present = self._on_device([part is not None for part in counted] + [fault is not None])
        alarms = []
        for mesh in self._meshes:
            index, total, alarm = mesh.combine(squares, present)
            norms[index] = total.sqrt()
            alarms.append(alarm)
        if fault is not None:
            raise RuntimeError(fault)
        # Asynchronous on accelerators, yet all processes fail together.
        assert_async(torch.stack(alarms).sum() == 0, _OTHER_PROCESS)
        self._local = self._fitting(self._local, parts)
        self._parts = self._local._parts
        return {device: self._at(device, norms) for device in self._measured_devices}

    def scale(
        self, gradients: list[Tensor | None], *args: Any, **kwargs: Any
    ) -> tuple[Sequence[int], Tensor | None]:
        """See `Layout.scale`; scaling is linear, so partial sums may wait to be added up."""
        return super().scale(self._parts_of(gradients), *args, **kwargs)

    def _parts_of(self, gradients: Sequence[Any]) -> list[Tensor | None]:
        """The part of each gradient that is in this process."""
        return [g.to_local() if isinstance(g, self._kind) else g for g in gradients]

    def _fitting(self, known: Layout | None, parts: Sequence[Tensor | None]) -> Layout:
        if known is not None and known.fits(parts):
            return known
        return Layout(parts, self._groups, self._histories)

    def _agree(self, gradients: Sequence[Any]) -> None:
        facts: list[int] = []
        if not self._is_compared:
            facts = encoded(fingerprints(self._groups.state(*self._histories.read())))
        found = [mesh.agree(gradients, facts) for mesh in self._meshes]
        differing = {fact for reduced in found for fact in unequal(reduced)}
        if differing:
            facts_in_order = [fact for fact in FACTS if fact in differing]
            raise RuntimeError(disagreement_message(facts_in_order, self._groups.describe()))
        self._is_compared = True

    def _is_handshake_due(self) -> bool:
        # The same on all processes: they agree on placements and on trained parameters.
        return not self._is_compared or any(
            placement is None and getattr(self._parameters[row](), "requires_grad", False)
            for mesh in self._meshes
            for row, placement in zip(mesh.rows, mesh.agreed)
        )

    def _as_agreed(
        self,
        gradients: Sequence[Any],
        parts: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], str | None]:
        """The parts that are placed as was agreed on, and the fault of another if one has any."""
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
                        name = self._groups.names()[row]
                        fault = f"The gradient of {name} {wrong}. Nothing was recorded."
        return counted, fault

    def _on_device(self, flags: list[bool]) -> Tensor:
        if self._present is None or self._present[0] != flags:
            self._present = flags, torch.tensor(flags, dtype=torch.float64, device=self._device)
        return self._present[1]

    def _at(self, device: torch.device, norms: Tensor) -> Any:
        """The norms on one device, without those of parameters on another."""
        if any(other != device for other in self._devices):
            if device not in self._are_at:
                mask = [other == device for other in self._devices]
                self._are_at[device] = torch.tensor(mask, device=self._device)
            norms = torch.where(self._are_at[device], norms, 0.0)
        return to_device(norms, device)
