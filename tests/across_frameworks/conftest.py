"""Every framework that is installed, and every way to run a step in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
from frameworks import FRAMEWORKS, WAYS, module_of

# These compare one framework with the other.
BOTH = ["test_settings.py", "test_state.py", "test_state_machine.py", "test_thresholds.py"]
collect_ignore = BOTH if len(FRAMEWORKS) < 2 else []


@pytest.fixture(scope="session", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> ModuleType:
    return module_of(request.param)


@pytest.fixture(
    scope="module",
    params=[f"{framework}, {way}" for framework in FRAMEWORKS for way in WAYS[framework]],
)
def loop(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes a clipper that is called by hand, in each way to run a step: see `in_torch.Loop`."""
    framework, way = request.param.split(", ")
    found = module_of(framework)

    def make(*arguments: Any, **settings: Any) -> Any:
        return found.loop(*arguments, way=way, **settings)

    with found.way(way):
        yield make


@pytest.fixture(params=["numpy", "device"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Torch's two paths: as on the CPU, and as on a GPU; see the tests of autoclip.torch."""
    from paths import numpy_path

    with nullcontext() if request.param == "numpy" else numpy_path(False):
        yield request.param
