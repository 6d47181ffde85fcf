"""AutoClip for PyTorch: clip each gradient to a quantile of the history of its norms.

>>> import torch
>>> from autoclip.torch import QuantileClip
>>> model = torch.nn.Linear(3, 1)
>>> optimizer = QuantileClip.as_optimizer(torch.optim.AdamW(model.parameters()), quantile=0.9)
>>> model(torch.ones(2, 3)).sum().backward()
>>> optimizer.step()  # records the gradients' norms, clips them, and updates the weights
"""

from autoclip.core import Report, StateError, __version__
from autoclip.core.adapter import AttachmentHandle
from autoclip.torch._clipper import Clipper, QuantileClip, StandardClip

__all__ = [
    "AttachmentHandle",
    "Clipper",
    "QuantileClip",
    "Report",
    "StandardClip",
    "StateError",
    "__version__",
]
