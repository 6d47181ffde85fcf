"""Clippers in threads, after a fork, and sent to other processes."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HARNESS, ForkServer
from torch import nn
from torch.optim import SGD

from autoclip.torch import QuantileClip, StandardClip

STEPS = 20


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(HARNESS / "torch_alone.py")
    yield server
    server.close()


def make(seed: int) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    kind = (QuantileClip, StandardClip)[seed % 2]
    optimizer = SGD(model.parameters(), lr=0.01)
    return model, kind.as_optimizer(optimizer, global_clipping=seed % 3 == 0, warmup_steps=2)


def train(model: nn.Module, optimizer: Any, steps: range) -> bytes:
    """Some steps; the history after them."""
    for step in steps:
        batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)) * (1 + step % 4)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return optimizer.clipper.state_dict()["data"]


def test_threads_have_clippers_of_their_own() -> None:
    count = 4
    start = threading.Barrier(count)

    def run(seed: int) -> bytes:
        model, optimizer = make(seed)
        start.wait()
        return train(model, optimizer, range(STEPS))

    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(run, range(count)))
    assert found == [train(*make(seed), range(STEPS)) for seed in range(count)]


def fork_and_train() -> None:
    model, optimizer = make(1)
    train(model, optimizer, range(STEPS))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, train(model, optimizer, range(STEPS, 2 * STEPS)))
        finally:
            os._exit(0)
    os.close(writing)
    ours = train(model, optimizer, range(STEPS, 2 * STEPS))
    with os.fdopen(reading, "rb") as file:
        assert file.read() == ours
    os.waitpid(child, 0)


def test_both_go_on_after_a_fork(server: ForkServer) -> None:
    server.call(fork_and_train)


def go_on(path: str, steps: list[int]) -> None:
    model, clipper, _ = pickle.loads(Path(path).read_bytes())
    optimizer = SGD(model.parameters(), lr=0.01)
    clipper.attach(optimizer)
    Path(path).write_bytes(train(model, optimizer, range(*steps)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clipper_sent_to_another_process_goes_on_there(
    server: ForkServer, tmp_path: Path, seed: int
) -> None:
    """Pickled with its model, as `torch.multiprocessing.spawn` sends them."""
    model, optimizer = make(seed)
    train(model, optimizer, range(STEPS))
    path = tmp_path / "sent"
    path.write_bytes(pickle.dumps((model, optimizer.clipper, optimizer.clipper.last)))
    server.call(go_on, path=path, steps=[STEPS, 2 * STEPS])
    assert path.read_bytes() == train(model, optimizer, range(STEPS, 2 * STEPS))
