"""Imports of each process of a distributed test, and the group that it joins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork, and cores are few

# Once here, not in each process.
import oracles  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
import torch.testing

import autoclip.torch  # noqa: F401

torch.set_num_threads(1)


@contextmanager
def process(rank: int, count: int, folder: Path) -> Iterator[None]:
    store = dist.FileStore(str(folder / "store"), count)
    # Shorter than a process's time, so that a rank whose peers are gone says so.
    timeout = timedelta(seconds=200)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    torch.manual_seed(0)
    yield
    # No rank leaves while others still talk to it.
    dist.barrier()
