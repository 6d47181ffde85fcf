"""The two paths of a step: NumPy histories for CPU tensors, tensor histories for devices."""

from __future__ import annotations

import _codecs

import pytest
import torch

from autoclip.torch import _ops

if torch.__version__ < "2.5":
    # As docs/security.md says; later versions allow bytes in files that are loaded weights_only.
    torch.serialization.add_safe_globals([_codecs.encode])


@pytest.fixture(params=["numpy", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test over both paths; under "device", CPU tensors are treated as a GPU's are."""
    name: str = request.param
    if name == "device":

        def never(device: torch.device) -> bool:
            return False

        monkeypatch.setattr(_ops, "uses_numpy", never)
    return name
