"""AutoClip under FSDP1: global clipping through `FullyShardedDataParallel.clip_grad_norm_`.

`torch.distributed.fsdp.fully_shard` (FSDP2) needs none of this: attach a `Clipper` as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from autoclip.core import Quantile, Rule
from autoclip.torch._attachment import Attachment, StepResult, check_optimizer
from autoclip.torch._layout.agreement import compare, disagreement_message, fingerprints
from autoclip.torch._trainers.engine import EngineClipper

__all__ = ["EngineClipper", "attach"]


def attach(
    model: FullyShardedDataParallel,
    optimizer: Optimizer,
    rule: Rule | type[Rule] = Quantile,
    history_length: int = 1000,
    **settings: Any,
) -> EngineClipper:
    """Let an FSDP1 model clip to a threshold that follows the history of its gradients' norm.

    Before each of the optimizer's steps, the model's `clip_grad_norm_` measures the norm of all
    gradients together, over all processes, and clips to the threshold; then the norm is recorded,
    so a norm is compared with the ones before it (`include_current=False`). FSDP1 multiplies by
    `threshold / (norm + 1e-6)`. All processes must step together, and a step waits for the device.

    The history travels in `optimizer.state_dict()["autoclip"]`. `FSDP.optim_state_dict` drops it:
    save the clipper's own `state_dict()` as well. It is the same on all processes.

    Args:
        model: the outermost FSDP1 module.
        optimizer: over the model's parameters, made after the model was wrapped.
        rule: the rule that turns the window into a threshold; a class takes its settings from
            `settings`, as `attach(model, optimizer, quantile=0.9)` does.
        history_length: the number of norms kept, the newest ones.
        settings: `max_norm`, `warmup_steps` and `record`; see `Clipper`.

    Returns:
        The clipper with the history, also as `optimizer.clipper`. Its `detach()` ends the clipping.

    Raises:
        TypeError: the model is not an FSDP1 module, the optimizer only wraps one, or a setting is
            unknown or has a wrong type.
        ValueError: the optimizer's parameters are not all the model's, or a setting has a wrong
            value, or one that FSDP1 cannot do.
        RuntimeError: the optimizer has a clipper already. At a step: the gradients are still
            scaled by a loss scaler; at the first one: another process has other settings or
            another history.
    """
    if not isinstance(model, FullyShardedDataParallel):
        raise TypeError(
            "model must be a FullyShardedDataParallel module, but got "
            f"{torch.typename(model)}. For anything else, fully_shard included, use "
            "QuantileClip.as_optimizer(optimizer, ...)."
        )
    check_optimizer(optimizer, "attach")
    clipper = _Fsdp1Clipper(model, rule, {"history_length": history_length, **settings})
    ours = {id(p) for p in model.parameters()}
    theirs = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(p) not in ours for p in theirs)
    if foreign:
        raise ValueError(
            f"{foreign} of the optimizer's {len(theirs)} parameters are not the model's. Make the "
            "optimizer from model.parameters() after wrapping the model."
        )
    Attachment(clipper, optimizer).begin()
    return clipper


class _Fsdp1Clipper(EngineClipper):
    """A clipper that its optimizer calls before each step."""

    is_saved_alone = True

    def __init__(
        self, model: FullyShardedDataParallel, rule: Rule | type[Rule], settings: dict[str, Any]
    ) -> None:
        super().__init__("FSDP1", rule, settings)
        self._model = model
        self._is_compared = False

    def _step(
        self,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        can_defer: Callable[[], bool] | None = None,
    ) -> StepResult:
        if scale is not None:
            raise RuntimeError(
                "A fused optimizer unscales the gradients itself, after FSDP1 has clipped them. "
                "Call scaler.unscale_(optimizer) before scaler.step(optimizer)."
            )
        if not self._is_compared:
            facts = fingerprints(self.export_state())
            device = self._model.compute_device
            assert device is not None  # FSDP1 sets it when it wraps the model
            differing = compare(facts, self._model.process_group, device)
            if differing:
                raise RuntimeError(disagreement_message(differing, self))
            self._is_compared = True
        total = self._model.clip_grad_norm_(self.max_norm)
        self.record(total)
        return StepResult(total.float())
