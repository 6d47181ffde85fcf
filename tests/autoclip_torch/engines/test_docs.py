"""The examples of engines in docs/distributed.md run on all processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training import NEEDS_DEEPSPEED, assert_same_everywhere

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)[2:]


@NEEDS_DEEPSPEED
@pytest.mark.processes(2)
def test_deepspeed(tmp_path):
    os.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(blocks()[0], namespace)
    assert int(namespace["clipper"]._history.recorded[0]) == 5
    assert_same_everywhere(namespace["clipper"])


@pytest.mark.processes(2)
def test_fsdp1():
    namespace: dict[str, Any] = {"device": "cpu"}
    exec(blocks()[1], namespace)
    assert int(namespace["clipper"]._history.recorded[0]) == 5
    assert_same_everywhere(namespace["clipper"])


def test_an_engine_of_ones_own():
    namespace: dict[str, Any] = {}
    exec(blocks()[2], namespace)
    config = SimpleNamespace(clip_grad=None)
    for result in ((True, 3.0, None), (False, None, None)):
        optimizer = SimpleNamespace(config=config, step=lambda result=result: result)
        assert namespace["train_step"](optimizer) is result[0]
        assert config.clip_grad == 1.0
    assert int(namespace["schedule"]._history.recorded[0]) == 1
