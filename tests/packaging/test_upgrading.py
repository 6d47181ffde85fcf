"""Upgrading from the real autoclip 0.2.1, one package that owned `autoclip/__init__.py`.

pip replaces distributions one after the other, so the old one's files may go after the new one's
have come. Whichever way a user takes, `autoclip.torch` works afterwards or says how to get there.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CLIP = """
import torch
from autoclip.torch import QuantileClip

weight = torch.ones(2, requires_grad=True)
weight.sum().backward()
clipper = QuantileClip([weight], quantile=0.9)
assert float(clipper.step()) > 1.4  # 0.2.1's step returns nothing
"""


@pytest.fixture(scope="module")
def legacy_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("legacy")
    command = ["download", "--no-deps", "--dest", str(folder), "autoclip==0.2.1"]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def commands_in(error: str) -> list[list[str]]:
    """The pip commands that an error message names."""
    lines = re.findall(r"\bpip ((?:un)?install .*)", error)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize(
    "route",
    [["install -U autoclip[torch]"], ["install autoclip-torch", "install -U autoclip"]],
    ids=", then pip ".join,
)
def test_what_works_at_once(
    route: list[str], legacy_wheel: Path, make_environment: Callable
) -> None:
    environment = make_environment()
    environment.pip("install", legacy_wheel)
    assert environment.installed() == {"autoclip": "0.2.1"}
    for command in route:
        environment.pip(*command.split())
        environment.succeed_with_torch(CLIP)
    assert environment.installed().keys() == {"autoclip", "autoclip-core", "autoclip-torch"}


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (["install -U autoclip"], "autoclip.torch is not installed"),
        (
            ["install --no-deps autoclip-core autoclip-torch"],
            "belongs to autoclip 0.2.1 or older",
        ),
        (
            ["install --no-deps autoclip-core autoclip-torch", "install -U autoclip"],
            "its files are gone",
        ),
    ],
    ids=[
        "only the metapackage",
        "without dependencies",
        "without dependencies, then the metapackage",
    ],
)
def test_what_says_how_to_go_on(
    route: list[str], words: str, legacy_wheel: Path, make_environment: Callable
) -> None:
    environment = make_environment()
    environment.pip("install", legacy_wheel)
    for command in route:
        environment.pip(*command.split())
    error = environment.fail_with_torch(CLIP)
    assert words in error
    for command in commands_in(error):
        environment.pip(*command)
    environment.succeed_with_torch(CLIP)
