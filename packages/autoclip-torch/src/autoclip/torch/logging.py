"""What to log about a clipper's last step: three numbers, under the same names everywhere."""

from __future__ import annotations

import torch

from autoclip import core
from autoclip.core import Report
from autoclip.torch._clipper import Clipper
from autoclip.torch._engine import EngineClipper

__all__ = ["log_values"]


def log_values(clipper: Clipper | EngineClipper) -> dict[str, float]:
    """The last step in three numbers.

    The callbacks for Lightning and for the Hugging Face Trainer log these. In a loop of your own,
    call it on the steps that you log: it waits for the device, once.

    Args:
        clipper: a clipper that has made a step, `optimizer.clipper` if it is attached, or what
            `attach` of `autoclip.torch.deepspeed` or `autoclip.torch.fsdp` returned.

    Returns:
        * `"autoclip/total_norm"`: the L2 norm of all gradients together before clipping.
        * `"autoclip/threshold"`: the median of the thresholds of the rows that recorded a norm in
          this step; with global clipping, the threshold.
        * `"autoclip/clipped"`: of these rows, the share whose norm was above its threshold, 0 … 1.

        Only the first one if no row recorded a norm, nothing if there was no gradient at all.

    >>> import torch
    >>> from autoclip.torch import QuantileClip
    >>> from autoclip.torch.logging import log_values
    >>> weight = torch.zeros(4, requires_grad=True)
    >>> clipper = QuantileClip([weight], quantile=0.5)
    >>> for size in (1.0, 2.0, 9.0):
    ...     weight.grad = torch.full((4,), size / 2)  # a norm of 1, 2, 9
    ...     total_norm = clipper.step()
    >>> log_values(clipper)
    {'autoclip/total_norm': 9.0, 'autoclip/threshold': 2.0, 'autoclip/clipped': 1.0}
    """
    if isinstance(clipper, EngineClipper):
        return core.log_values(clipper.last) if clipper.has_stepped else {}
    if not clipper._pipeline.reports:
        return {}
    last = clipper.last
    # One transfer for all three.
    together = torch.stack([last.norms, last.thresholds, last.coefficients])
    return core.log_values(Report(*together.cpu().numpy()))
