"""What all tests share: quiet, patient, and no GPU tests where there is no GPU."""

from __future__ import annotations

import os

import hypothesis
import pytest

# Both must stand before a framework is imported. Two workers on two cores: each computes alone.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared machine may stall for a second; that is no failure of the code under test.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
