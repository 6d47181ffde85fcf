"""Gradients with a NaN or an infinity: kept, set to zero, or refused, as `on_nonfinite` says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from autoclip.core.adapter import nonfinite_message
from autoclip.torch._groups import Groups
from autoclip.torch._layout.rows import Norms, array_to


class NonfiniteGradients:
    """Finds gradients that are not finite by their norms.

    Args:
        groups: the clipper's parameters, their names and `on_nonfinite` of each.
    """

    def __init__(self, groups: Groups) -> None:
        self._names = groups.names  # parameters may get names later
        policies = np.array(groups.per_parameter("on_nonfinite"))
        self._zeroes, self._raises = policies == "zero", policies == "raise"
        self._zeroes_on: dict[torch.device, Any] = {}

    def apply(self, norms: Norms) -> tuple[Norms, Norms | None]:
        """Refuse or zero gradients that are not finite.

        Args:
            norms: of all gradients.

        Returns:
            The norms of the gradients after that, and by device bool[n], the gradients that become
            zero; without an entry, or None, none does.

        Raises:
            FloatingPointError: see `Clipper.step`.
        """
        if self._raises.any():
            held = [n if isinstance(n, np.ndarray) else n.cpu().numpy() for n in norms.values()]
            faults = np.flatnonzero(self._raises & ~np.isfinite(held).all(axis=0))
            if len(faults):
                names = self._names()
                raise FloatingPointError(nonfinite_message([names[i] for i in faults]))
        if not self._zeroes.any():
            return norms, None
        found, zeroed = dict(norms), {}
        for device, each in norms.items():
            if device not in self._zeroes_on:
                self._zeroes_on[device] = array_to(self._zeroes, device)
            here = self._zeroes_on[device] & ~(each < math.inf)
            is_array = isinstance(each, np.ndarray)
            if not is_array or here.any():  # a device is not asked
                zeroed[device] = here
                found[device] = (
                    np.where(here, 0.0, each) if is_array else each.masked_fill(here, 0.0)
                )
        return found, zeroed
