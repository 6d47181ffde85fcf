"""Refusals when a clipper is made or attached: the same words, and no trace."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest
from rules import WRONG_SETTINGS

import autoclip.core
from autoclip.core import Quantile


def clipper_of(framework: ModuleType, name: str, *settings: Any, **more: Any) -> Any:
    return framework.loop(name, *settings, shapes=[(3,)], way=None, shared=False, **more).clipper


def windows(clipper: Any) -> list[list[float]]:
    """The recorded norms of each row."""
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


@pytest.mark.parametrize(("name", "wrong", "error", "match"), WRONG_SETTINGS, ids=str)
def test_settings_are_checked_by_the_core(
    framework: ModuleType, name: str, wrong: dict[str, Any], error: type[Exception], match: str
) -> None:
    """By a clipper, by `as_optimizer`, which leaves the optimizer alone, and by a factory."""
    cls = getattr(framework.package, name)
    kind = framework.OPTIMIZERS[0]
    optimizer = framework.optimizer(kind)
    before = framework.attributes(optimizer)
    for make in (
        lambda: clipper_of(framework, name, **wrong),
        lambda: cls.as_optimizer(optimizer, **wrong),
        lambda: cls.optimizer_factory(kind, **wrong),
    ):
        with pytest.raises(error, match=match):
            make()
    assert framework.attributes(optimizer) == before


def test_a_wrong_setting_by_position(framework: ModuleType) -> None:
    cls = framework.package.QuantileClip
    optimizer = framework.optimizer(framework.OPTIMIZERS[0])
    before = framework.attributes(optimizer)
    for make in (
        lambda: clipper_of(framework, "QuantileClip", 0.9, 100, 3),
        lambda: cls.as_optimizer(optimizer, 0.9, 100, 3),
        lambda: cls.optimizer_factory(framework.OPTIMIZERS[0], 0.9, 100, 3),
    ):
        with pytest.raises(TypeError, match="global_clipping must be True or False"):
            make()
    assert framework.attributes(optimizer) == before


def test_a_rule_is_an_instance(framework: ModuleType) -> None:
    cls = framework.package.Clipper
    optimizer = framework.optimizer(framework.OPTIMIZERS[0])
    for make in (
        lambda: clipper_of(framework, "Clipper", Quantile),
        lambda: cls.as_optimizer(optimizer, Quantile),
    ):
        with pytest.raises(TypeError, match=r"got the class Quantile. Make an instance: Quantile"):
            make()
    with pytest.raises(TypeError, match="rule must be a Rule"):
        clipper_of(framework, "Clipper", 0.9)


def test_a_package_shows_its_public_names_only(framework: ModuleType) -> None:
    """In `dir()`, `help()` and an editor's completion."""
    for package in (framework.package, autoclip.core):
        shown = {name for name in vars(package) if not name.startswith("_")}
        modules = {each.name for each in pkgutil.iter_modules(package.__path__)}
        assert shown - modules == {each for each in package.__all__ if not each.startswith("_")}


def test_reports_are_of_a_clipper(framework: ModuleType) -> None:
    """Often an optimizer is given, whose clipper is meant."""
    logging = importlib.import_module(f"{framework.package.__name__}.logging")
    for wrong in (framework.optimizer(framework.OPTIMIZERS[0]), "history.autoclip"):
        for report in (logging.log_values, logging.summarize):
            with pytest.raises(TypeError, match=rf"optimizer\.clipper, got {type(wrong).__name__}"):
                report(wrong)


def test_as_optimizer_is_called_on_the_class(framework: ModuleType) -> None:
    """On an instance it would drop that one's settings."""
    optimizer = framework.optimizer(framework.OPTIMIZERS[0])
    with pytest.raises(TypeError, match=r"call clipper\.attach\(optimizer\)"):
        clipper_of(framework, "QuantileClip", 0.1).as_optimizer(optimizer)
    assert not hasattr(optimizer, "clipper")


def test_attaching_twice_is_an_error(framework: ModuleType) -> None:
    package = framework.package
    first, second, third = (framework.optimizer(framework.OPTIMIZERS[0]) for _ in range(3))
    package.QuantileClip.as_optimizer(first)
    with pytest.raises(RuntimeError, match="has a clipper already, and two would clip twice"):
        package.QuantileClip.as_optimizer(first)
    package.StandardClip.as_optimizer(second)
    with pytest.raises(RuntimeError, match="attached to an optimizer already"):
        second.clipper.attach(third)
    detached = second.clipper
    detached.detach()
    with pytest.raises(RuntimeError, match="has a clipper already"):
        detached.attach(first)
    assert not hasattr(second, "clipper") and not hasattr(third, "clipper")
    framework.update(first, 1.0)
    assert windows(first.clipper) == [[pytest.approx(1.0)]]


def test_the_handle_is_a_context_manager(framework: ModuleType) -> None:
    kind = framework.OPTIMIZERS[0]
    optimizer = framework.optimizer(kind)
    clipper = framework.package.QuantileClip.as_optimizer(optimizer).clipper
    clipper.detach()
    with clipper.attach(optimizer):
        framework.update(optimizer, 2.0)
        assert optimizer.clipper is clipper
    assert type(optimizer) is kind and not hasattr(optimizer, "clipper")
    framework.update(optimizer, 2.0)
    assert windows(clipper) == [[pytest.approx(2.0)]]
    clipper.attach(optimizer)
    assert optimizer.clipper is clipper
