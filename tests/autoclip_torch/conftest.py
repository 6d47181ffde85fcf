"""The two paths of a step: NumPy histories for CPU tensors, tensor histories for devices."""

from __future__ import annotations

import _codecs
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from paths import numpy_path

if torch.__version__ < "2.5":
    # As docs/security.md says; later versions allow bytes in files that are loaded weights_only.
    torch.serialization.add_safe_globals([_codecs.encode])


@pytest.fixture(params=["numpy", "device"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test over both paths; under "device", CPU tensors are treated as a GPU's are."""
    with nullcontext() if request.param == "numpy" else numpy_path(False):
        yield request.param
