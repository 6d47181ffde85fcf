"""For `ForkServer`: processes that have imported torch, but nothing of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import torch
import torch._dynamo

torch.set_num_threads(1)


@contextmanager
def process(rank: int, count: int, folder: Path) -> Iterator[None]:
    yield
