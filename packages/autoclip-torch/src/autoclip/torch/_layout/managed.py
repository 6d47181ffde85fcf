"""Parameters of engines that keep gradients to themselves, so the true norms are unknown here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

is_distributed: Callable[[], bool] = dist.is_initialized if dist.is_available() else bool
"""True if this process trains together with others."""

_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) leaves each process with pieces of flattened parameters, "
    "which cannot be traced back to their parameters. Use autoclip.torch.fsdp.attach, which clips "
    "globally, or torch.distributed.fsdp.fully_shard"
)
_DEEPSPEED = (
    "DeepSpeed's ZeRO keeps gradients in partitions of its own. Use "
    "autoclip.torch.deepspeed.attach, which clips globally, or fully_shard"
)
_MEGATRON = (
    "Megatron-LM splits parameters into plain tensors and keeps gradients in buffers of its own. "
    "Give its config.clip_grad the max_norm of an autoclip.core.MaxNorm before each step"
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


def refuse_managed(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters of engines that keep the gradients to themselves.

    Raises:
        RuntimeError: they are managed by FSDP1, DeepSpeed's ZeRO or Megatron.
    """
    if not is_distributed():
        return
    for parameter in parameters:
        attributes = parameter.__dict__
        if not _MARKS.keys().isdisjoint(attributes):
            for mark, reason in _MARKS.items():
                module = _NEEDS_MODULE.get(reason)
                if mark in attributes and (module is None or module in sys.modules):
                    raise RuntimeError(
                        f"AutoClip cannot know the norms of these gradients. {reason}."
                    )
