"""The environment of these tests: `hatch run frameworks:test`, and `hatch run vision:test`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# For `recipes`. A folder here with the name of a package would be imported where that is missing.
sys.path.append(str(Path(__file__).parent))
