"""Calls functions of test files in this process, one a line of standard input.

For tests that need a process of their own: one that is new, one that is killed, or one whose CPU
is two devices, which TensorFlow decides once and for all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import tensorflow as tf

# The answers go where standard output went, and whatever else is printed to the errors.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


@cache
def module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("the_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fault_of(request: dict[str, Any]) -> str:
    """What went wrong in one call, nothing if nothing did."""
    try:
        getattr(module_at(request["path"]), request["name"])(**request["arguments"])
    except BaseException:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    devices = [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1])
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    warnings.filterwarnings("error", module="autoclip")
    for line in sys.stdin:
        print(json.dumps(fault_of(json.loads(line))), file=answers, flush=True)
