"""Imports of each process of these tests.

Importing a framework takes seconds, forking a process that has imported it takes milliseconds.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork, and cores are few
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["MPLBACKEND"] = "agg"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: F401
import pytest  # noqa: F401
import tensorflow as tf  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp

torch.set_num_threads(1)

if importlib.util.find_spec("deepspeed") is not None:
    import deepspeed

    # It would compile its operations when it is first used, which takes minutes.
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False


@contextmanager
def process(rank: int, count: int, folder: Path, port: int = 0) -> Iterator[None]:
    """The process's own empty folder, and what torchrun would set."""
    if count > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    work = folder / "work"  # ranks share it, as processes on one machine do
    work.mkdir(exist_ok=True)
    os.chdir(work)
    yield
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while others still talk to it
        dist.destroy_process_group()
