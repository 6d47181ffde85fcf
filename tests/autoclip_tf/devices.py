"""What each process of a TensorFlow test has imported, and the devices that its CPU is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras  # noqa: F401
import tensorflow as tf


@contextmanager
def process(rank: int, count: int, folder: Path, devices: int = 1) -> Iterator[None]:
    # TensorFlow decides once on its devices, at the first operation: no process may be forked
    # from one that has run an operation.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * devices
    )
    yield
