"""The frameworks that are installed, and the ways to run a step in them."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

FRAMEWORKS = [name for name in ("torch", "tensorflow") if find_spec(name)]
WAYS = {"torch": ("numpy", "device"), "tensorflow": ("eager", "graph", "xla")}
"""As on the CPU, and as on a GPU; eagerly, in a tf.function, and in one that XLA compiles."""


def module_of(framework: str) -> ModuleType:
    """The calls that both frameworks have: `in_torch` or `in_tensorflow`."""
    return importlib.import_module(f"in_{framework}")
