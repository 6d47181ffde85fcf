"""`optimizer_factory` stands for an optimizer's class in every framework."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import pkgutil
from types import ModuleType
from typing import Any

import pytest
from frameworks import FRAMEWORKS, module_of
from rules import FACTORIES

each_factory = pytest.mark.parametrize("name", FACTORIES)


def factory_of(framework: ModuleType, name: str) -> Any:
    clipper, args, settings = FACTORIES[name]
    make = getattr(framework.package, clipper).optimizer_factory
    return make(framework.OPTIMIZERS[0], *args, **settings)


@pytest.mark.parametrize(
    ("framework", "kind"),
    [
        pytest.param(module_of(name), kind, id=f"{name}, {kind.__name__}")
        for name in FRAMEWORKS
        for kind in module_of(name).OPTIMIZERS
    ],
)
def test_it_passes_for_the_optimizers_class(framework: ModuleType, kind: Any) -> None:
    factory = framework.package.QuantileClip.optimizer_factory(kind)
    assert inspect.isclass(factory) and issubclass(factory, kind)
    for name in ("__name__", "__module__", "__doc__"):
        assert getattr(factory, name) == getattr(kind, name)
    # A configuration that names classes by their paths must not find the optimizer's own class.
    assert pkgutil.resolve_name(f"{kind.__module__}:{kind.__qualname__}") is kind
    with pytest.raises(ValueError, match=r"invalid format: .*optimizer_factory"):
        pkgutil.resolve_name(f"{factory.__module__}:{factory.__qualname__}")
    assert inspect.signature(factory) == inspect.signature(kind)
    assert inspect.signature(factory.__init__) == inspect.signature(kind.__init__)
    assert isinstance(framework.optimizer(factory), factory)
    assert not isinstance(framework.optimizer(framework.ANOTHER), factory)


@each_factory
def test_copies_and_pickles_are_equal_and_clip(framework: ModuleType, name: str) -> None:
    factory = factory_of(framework, name)
    copies = [copy.copy(factory), copy.deepcopy(factory), factory_of(framework, name)]
    copies += [
        pickle.loads(pickle.dumps(factory, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    expected = framework.optimizer(factory).clipper.defaults
    for each in copies:
        assert each == factory and hash(each) == hash(factory)
        assert framework.optimizer(each).clipper.defaults == expected


def test_factories_of_other_settings_or_classes_differ(framework: ModuleType) -> None:
    kind = framework.OPTIMIZERS[0]
    makes = [
        *(factory_of(framework, name) for name in FACTORIES),
        framework.package.QuantileClip.optimizer_factory(kind, quantile=0.6),
        framework.package.QuantileClip.optimizer_factory(framework.ANOTHER, quantile=0.6),
        kind,
        framework.ANOTHER,
    ]
    assert all((a == b) == (a is b) for a in makes for b in makes)
    assert len(set(makes)) == len(makes)


def test_only_classes_of_optimizers(framework: ModuleType) -> None:
    kind = framework.OPTIMIZERS[0]
    must = f"must be a subclass of {framework.LIBRARY}'s Optimizer, got"
    for given, match in (
        (
            framework.optimizer(kind),
            rf"{must} an instance of {kind.__name__}\. Pass that to as_optimizer instead",
        ),
        (
            functools.partial(kind, 0.1),
            rf"partial\(QuantileClip\.optimizer_factory\({kind.__name__}",
        ),
        (framework.NO_OPTIMIZER, rf"{must} <class .*{framework.NO_OPTIMIZER.__name__}"),
        ("adam", f"{must} 'adam'"),
        (factory_of(framework, "standard"), "have a clipper already"),
    ):
        with pytest.raises(TypeError, match=match):
            framework.package.QuantileClip.optimizer_factory(given)


def test_on_a_clipper_it_raises(framework: ModuleType) -> None:
    clipper = framework.optimizer(factory_of(framework, "quantile")).clipper
    with pytest.raises(TypeError, match=r"QuantileClip\.optimizer_factory .* on the class"):
        clipper.optimizer_factory(framework.OPTIMIZERS[0])
