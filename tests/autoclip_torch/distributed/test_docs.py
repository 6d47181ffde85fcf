"""The examples in docs/distributed.md run, one after the other, on all processes.

Those of engines run in autoclip_torch/engines.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import assert_same_everywhere

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"


@pytest.mark.processes(2)
def test_every_example_runs(tmp_path):
    os.chdir(tmp_path)  # they write files
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 5
    namespace: dict[str, Any] = {}
    exec(blocks[0], namespace)
    clipper = namespace["optimizer"].clipper
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, clipper.last.norms)
    assert torch.equal(gathered[0], gathered[1])
    before = clipper.state_dict()
    with pytest.warns(UserWarning, match="has no 'autoclip' entry"):
        exec(blocks[1], namespace)
    assert (Path(tmp_path) / "checkpoint").is_dir()
    assert clipper.state_dict() == before
    assert clipper._pipeline.rows.read()[1].tolist() == [5] * 4
    assert_same_everywhere(clipper)
