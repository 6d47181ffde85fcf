"""The core's rules as tensor operations: sorted windows in, thresholds out, nothing synced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoclip.core import Quantile, Rule, Standard
from autoclip.torch._norms import norm_dtype

__all__ = ["TensorRule", "tensor_rule"]


class TensorRule(ABC):
    """One kind of rule for the rows of a `TensorHistory`.

    Args:
        rules: one rule a row.
        device: where the windows lie.
    """

    @abstractmethod
    def __init__(self, rules: Sequence[Any], device: torch.device) -> None: ...

    @abstractmethod
    def thresholds(self, ordered: Tensor, lengths: Tensor) -> Tensor:
        """The rows' thresholds.

        Args:
            ordered: float32[rows, capacity], windows in ascending order, infinite past the end.
            lengths: int64[rows].

        Returns:
            float64[rows] (float32 on MPS); anything at all for an empty row.
        """

    RULES: ClassVar[dict[type[Rule], type[TensorRule]]] = {}
    """Which tensor rule computes which of the core's rules."""

    def __init_subclass__(cls, rule: type[Rule]) -> None:
        TensorRule.RULES[rule] = cls


def tensor_rule(rules: Sequence[Rule], device: torch.device) -> TensorRule:
    """The tensor rule for `rules`, all of one class."""
    return TensorRule.RULES[type(rules[0])](rules, device)


class _TensorQuantile(TensorRule, rule=Quantile):
    def __init__(self, rules: Sequence[Quantile], device: torch.device) -> None:
        self._dtype = norm_dtype(device)
        self._quantiles = torch.tensor([r.quantile for r in rules], dtype=self._dtype).to(device)

    def thresholds(self, ordered: Tensor, lengths: Tensor) -> Tensor:
        last = (lengths - 1).clamp(min=0)
        position = self._quantiles * last
        lower = position.long()
        upper = torch.minimum(lower + 1, last)
        a, b = ordered.gather(1, torch.stack([lower, upper], dim=1)).to(self._dtype).unbind(1)
        return a + (b - a) * (position - lower)


class _TensorStandard(TensorRule, rule=Standard):
    def __init__(self, rules: Sequence[Standard], device: torch.device) -> None:
        self._dtype = norm_dtype(device)
        self._deviations = torch.tensor([r.deviations for r in rules], dtype=self._dtype).to(device)

    def thresholds(self, ordered: Tensor, lengths: Tensor) -> Tensor:
        valid = torch.arange(ordered.shape[1], device=ordered.device) < lengths[:, None]
        values = torch.where(valid, ordered, 0).to(self._dtype)
        mean = values.sum(1) / lengths
        variance = torch.where(valid, values - mean[:, None], 0).square().sum(1) / lengths
        return mean + self._deviations * variance.sqrt()
