"""Installed packages: core alone, an adapter, the metapackage, in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# How the names of each framework's files, and of what imports it, start in site-packages.
TORCH = ("torch", "functorch", "lightning", "pytorch_lightning", "transformers", "accelerate")
TENSORFLOW = ("tensorflow", "keras", "tf_keras")

SAVE_AND_LOAD_A_HISTORY = """
import sys, tempfile
from pathlib import Path
from autoclip.core import History, Quantile

def fresh():
    return History(rows=2, rule=Quantile(0.9), history_length=10)

history = fresh()
history.record([1.0, 2.0])
history.record([3.0, 4.0])
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "history.safetensors")
    history.save(path)
    loaded = fresh()
    loaded.load(path)
assert loaded.thresholds.tolist() == history.thresholds.tolist()
assert not {"torch", "tensorflow", "keras"} & set(sys.modules)
print(*loaded.recorded)
"""

CLIP_SAVE_AND_LOAD = {
    "torch": """
import sys, tempfile
from pathlib import Path
import torch
from autoclip.torch import QuantileClip

weight = torch.zeros(2, requires_grad=True)
clipper = QuantileClip([weight], quantile=0.5)
for size in (1.0, 100.0):
    weight.grad = torch.full((2,), size)
    clipper.step()
assert 50 < float(weight.grad[0]) < 51
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "clipper.safetensors")
    clipper.save(path)
    loaded = QuantileClip([weight], quantile=0.5)
    loaded.load(path)
assert loaded.state_dict() == clipper.state_dict()
assert not {"tensorflow", "keras"} & set(sys.modules)
""",
    "tf": """
import sys, tempfile
from pathlib import Path
import tensorflow as tf
from autoclip.tf import QuantileClip

weight = tf.Variable([0.0, 0.0])
clipper = QuantileClip(quantile=0.5)
for size in (1.0, 100.0):
    [(gradient, _)] = clipper([(tf.fill([2], size), weight)])
assert 50 < float(gradient[0]) < 51
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "clipper.safetensors")
    clipper.save(path)
    loaded = QuantileClip(quantile=0.5)
    loaded.build([weight])
    loaded.load(path)
assert loaded.state_dict() == clipper.state_dict()
assert "torch" not in sys.modules
""",
}

IMPORT_AND_LOCATE = """
import importlib
import autoclip.torch
from autoclip.torch import QuantileClip
assert QuantileClip is importlib.import_module(QuantileClip.__module__).QuantileClip
print(autoclip.torch.__file__)
"""


def test_core_alone_from_the_index(make_environment: Callable) -> None:
    environment = make_environment(only=["pip"])
    environment.pip_with_index("install", next(environment.wheels.glob("autoclip_core-*.whl")))
    assert environment.installed().keys() == {"autoclip-core", "numpy", "safetensors"}
    assert environment.succeed(SAVE_AND_LOAD_A_HISTORY) == "2 2"


def test_core_alone_says_what_to_install(make_environment: Callable) -> None:
    environment = make_environment()
    environment.pip("install", "autoclip")
    assert environment.installed().keys() == {"autoclip", "autoclip-core"}
    for name in ("torch", "tf"):
        statement = f"import autoclip.{name}"
        for error in (
            environment.fail(statement),
            environment.fail_with_torch(statement),
            environment.fail_with_torch(f"import autoclip.{name}.anything"),
            environment.fail_with_torch(f"from autoclip.{name} import QuantileClip"),
        ):
            assert f"ModuleNotFoundError: autoclip.{name} is not installed" in error
            assert f"pip install autoclip-{name}\n" in error
        # What a library goes by that can do without.
        attempt = f"try: {statement}\nexcept ImportError as error: print(error.name)"
        assert environment.succeed_with_torch(attempt) == f"autoclip.{name}"


@pytest.mark.parametrize("name", ["QuantileClip", "StandardClip"])
def test_a_clipper_is_imported_from_its_framework(name: str, make_environment: Callable) -> None:
    environment = make_environment()
    environment.pip("install", "autoclip")
    error = environment.fail_with_torch(f"from autoclip import {name}")
    assert f"from autoclip.torch import {name}, or from autoclip.tf import {name}" in error
    assert environment.succeed_with_torch("import autoclip; print(autoclip.__file__)") == "None"


def test_an_empty_folder_of_the_adapter_is_not_the_adapter(
    tmp_path: Path, make_environment: Callable
) -> None:
    """As an editable install has it whose checkout went back to before the adapter was there."""
    environment = make_environment()
    environment.pip("install", "autoclip-core")
    (tmp_path / "src" / "autoclip" / "torch" / "__pycache__").mkdir(parents=True)
    (environment.site_packages / "_editable.pth").write_text(str(tmp_path / "src"))
    assert "pip install autoclip-torch\n" in environment.fail_with_torch("import autoclip.torch")


@pytest.mark.parametrize(
    ("name", "other", "absent"), [("torch", "tensorflow", TENSORFLOW), ("tf", "torch", TORCH)]
)
def test_an_adapter_brings_core_along_and_needs_no_other_framework(
    name: str, other: str, absent: tuple[str, ...], make_environment: Callable
) -> None:
    environment = make_environment(without=absent)
    environment.pip("install", f"autoclip-{name}")
    assert environment.installed().keys() == {"autoclip", "autoclip-core", f"autoclip-{name}"}
    assert f"No module named '{other}'" in environment.fail(f"import {other}")
    environment.succeed(CLIP_SAVE_AND_LOAD[name])


@pytest.mark.parametrize(
    ("extra", "adapters"),
    [
        ("torch", {"autoclip-torch"}),
        ("tf", {"autoclip-tf"}),
        ("all", {"autoclip-torch", "autoclip-tf"}),
    ],
)
def test_the_metapackage_brings_its_extras(
    extra: str, adapters: set[str], make_environment: Callable
) -> None:
    environment = make_environment()
    environment.pip("install", f"autoclip[{extra}]")
    assert environment.installed().keys() == {"autoclip", "autoclip-core", *adapters}


@pytest.mark.parametrize("order", [("core", "torch"), ("torch", "core")], ids="-then-".join)
def test_wheels_in_either_order_and_uninstalling(
    order: tuple[str, str], make_environment: Callable
) -> None:
    environment = make_environment()
    for name in order:
        environment.pip("install", "--no-deps", f"autoclip-{name}")
    path = environment.succeed_with_torch(IMPORT_AND_LOCATE)
    assert Path(path).is_relative_to(environment.root)
    environment.pip("uninstall", "--yes", "autoclip-torch")
    assert "pip install autoclip-torch\n" in environment.fail_with_torch(IMPORT_AND_LOCATE)
    environment.pip("install", "--no-deps", "autoclip-torch")
    assert environment.succeed_with_torch(IMPORT_AND_LOCATE) == path


@pytest.mark.parametrize("editable", [("torch",), ("core",), ("core", "torch")], ids="-and-".join)
def test_editable_beside_wheels(editable: tuple[str, ...], make_environment: Callable) -> None:
    environment = make_environment()
    for name in ("core", "torch"):
        if name in editable:
            folder = REPOSITORY / "packages" / f"autoclip-{name}"
            environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", folder)
        else:
            environment.pip("install", "--no-deps", f"autoclip-{name}")
    path = environment.succeed_with_torch(IMPORT_AND_LOCATE)
    assert Path(path).is_relative_to(REPOSITORY if "torch" in editable else environment.root)
    environment.pip("uninstall", "--yes", "autoclip-torch")
    assert "pip install autoclip-torch\n" in environment.fail_with_torch(IMPORT_AND_LOCATE)
