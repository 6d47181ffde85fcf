"""Imports of each process of a TensorFlow test, and the devices that its CPU is."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras  # noqa: F401
import pytest  # noqa: F401 (once here, not in each process)
import tensorflow as tf


def ports(rank: int, count: int, folder: Path) -> list[str]:
    """One free port for each process; all processes of a run agree on them."""
    with socket.create_server(("localhost", 0)) as server:
        (folder / f"{rank}.tmp").write_text(str(server.getsockname()[1]))
        (folder / f"{rank}.tmp").rename(folder / f"{rank}.port")
        files = [folder / f"{each}.port" for each in range(count)]
        while not all(file.exists() for file in files):
            time.sleep(0.01)
    return [file.read_text() for file in files]


@contextmanager
def process(
    rank: int, count: int, folder: Path, devices: int = 1, workers: bool = False
) -> Iterator[None]:
    if workers:
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": [f"localhost:{port}" for port in ports(rank, count, folder)]},
                "task": {"type": "worker", "index": rank},
            }
        )
    # TensorFlow decides once on its devices, at the first operation: no process may be forked
    # from one that has run an operation.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * devices
    )
    yield
