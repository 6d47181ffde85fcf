"""The environment of these tests: `hatch run zoo:test`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # HeavyBall compiles, minutes an optimizer
