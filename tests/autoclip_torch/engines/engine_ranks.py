"""Imports of each process of an engine's test, and the group that it joins."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import pytest  # noqa: F401 (once here, not in each process)
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp

import autoclip.torch

torch.set_num_threads(1)

if importlib.util.find_spec("deepspeed") is not None:
    import deepspeed
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    from deepspeed.accelerator import get_accelerator

    import autoclip.torch.deepspeed  # noqa: F401

    # It would compile its operations when it is first used, which takes minutes.
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False
    # Processors without instructions for float16 calculate with it all the same.
    get_accelerator().is_fp16_supported = lambda: True


@contextmanager
def process(rank: int, count: int, folder: Path) -> Iterator[None]:
    store = dist.FileStore(str(folder / "store"), count)
    # Shorter than a process's time, so that a rank whose peers are gone says so.
    timeout = timedelta(seconds=200)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
    )
    torch.manual_seed(0)
    yield
    # No rank leaves while others still talk to it.
    dist.barrier()
