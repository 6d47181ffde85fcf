"""Optimizer factories: classes that make an optimizer with its clipper attached."""

from __future__ import annotations

import copyreg
import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

OptimizerT = TypeVar("OptimizerT")

_CLIPPING = "_autoclip_clipping"


@dataclass(frozen=True)
class _Clipping:
    """The arguments of `optimizer_factory`, from which an unpickled factory is made again."""

    clipper_class: Any
    args: tuple[Any, ...]
    settings: Mapping[str, Any]

    def attach_to(self, optimizer: Any) -> Any:
        return self.clipper_class.as_optimizer(optimizer, *self.args, **self.settings)

    def factory_of(self, optimizer_class: type) -> Any:
        return self.clipper_class.optimizer_factory(optimizer_class, *self.args, **self.settings)


class OptimizerFactory(ABCMeta):
    """The type of optimizer factories.

    Frameworks that make the optimizer take its class. Some only call it; others require
    `issubclass(it, Optimizer)` (NeuralForecast), read its `__name__` or signature, or pickle it
    (Stable-Baselines3, skorch). A factory is therefore a real subclass of the optimizer's class.
    Calling it returns an instance of the optimizer's own class, with a new clipper attached.

    Two factories are equal if their classes and settings are: `PPO.load` compares the one that it
    gets with the one in the file. It derives from `ABCMeta` for optimizers that are abstract base
    classes; a class has one metaclass.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """An optimizer of the factory's optimizer class, made from its arguments, that clips."""
        clipping = vars(cls).get(_CLIPPING)
        if clipping is None:  # a subclass of a factory makes its own instances
            return getattr(cls, _CLIPPING).attach_to(super().__call__(*args, **kwargs))
        return clipping.attach_to(cls.__bases__[0](*args, **kwargs))

    def __instancecheck__(cls, instance: Any) -> bool:
        if _CLIPPING in vars(cls):
            return isinstance(instance, cls.__bases__[0])
        return super().__instancecheck__(instance)

    @property
    def __signature__(cls) -> inspect.Signature:
        # Without it, inspect finds that of __call__ above.
        return inspect.signature(cls.__bases__[0])

    def __eq__(cls, other: object) -> bool:
        if cls is other:
            return True
        if not isinstance(other, OptimizerFactory) or _CLIPPING not in vars(cls):
            return False
        clipping = vars(other).get(_CLIPPING)
        return cls.__bases__ == other.__bases__ and vars(cls)[_CLIPPING] == clipping

    def __hash__(cls) -> int:
        return hash(cls.__bases__)

    def __repr__(cls) -> str:
        clipping = vars(cls).get(_CLIPPING)
        if clipping is None:
            return super().__repr__()
        optimizer_class = cls.__bases__[0]
        arguments = [
            f"{optimizer_class.__module__}.{optimizer_class.__qualname__}",
            *map(repr, clipping.args),
            *(f"{name}={value!r}" for name, value in clipping.settings.items()),
        ]
        return f"{clipping.clipper_class.__name__}.optimizer_factory({', '.join(arguments)})"


def make_factory(
    clipper_class: Any,
    optimizer_class: type[OptimizerT],
    optimizer_base: type,
    args: tuple[Any, ...],
    settings: Mapping[str, Any],
) -> type[OptimizerT]:
    """A factory; see `optimizer_factory` of the clippers.

    Args:
        clipper_class: the class whose `as_optimizer` attaches the clipper.
        optimizer_class: the class of the optimizers.
        optimizer_base: the framework's class of all optimizers.
        args: of `as_optimizer`, after the optimizer. The caller has checked them.
        settings: of `as_optimizer`, by keyword. The caller has checked them.

    Raises:
        TypeError: it is not a class of optimizers, or a factory already.
    """
    call = f"{clipper_class.__name__}.optimizer_factory"
    if isinstance(optimizer_class, OptimizerFactory):
        raise TypeError(
            f"{call} got {optimizer_class!r}, whose optimizers have a clipper already. An "
            "optimizer can have only one: pass the optimizer's own class."
        )
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, optimizer_base)):
        raise TypeError(_not_a_class(call, optimizer_class, optimizer_base))
    contents = {
        "__module__": optimizer_class.__module__,
        # No path that can be imported: where a configuration names classes by their paths, the
        # optimizer's own class would be found.
        "__qualname__": f"{call}({optimizer_class.__qualname__})",
        "__doc__": optimizer_class.__doc__,
        _CLIPPING: _Clipping(clipper_class, tuple(args), dict(settings)),
    }
    return cast(
        "type[OptimizerT]", OptimizerFactory(optimizer_class.__name__, (optimizer_class,), contents)
    )


def _not_a_class(call: str, given: Any, base: type) -> str:
    message = (
        f"{call}: optimizer_class must be a subclass of {base.__module__.split('.')[0]}'s "
        f"{base.__name__}, got "
    )
    if isinstance(given, base):
        return f"{message}an instance of {type(given).__name__}. Pass that to as_optimizer instead."
    message += f"{given!r:.200}."
    if inner := getattr(given, "func", None):  # a functools.partial
        name = getattr(inner, "__name__", "Optimizer")
        return f"{message} Put the partial around the factory: partial({call}({name}, …), …)."
    return message


def _reduce(factory: OptimizerFactory) -> str | tuple[Callable[..., Any], tuple[Any, ...]]:
    clipping = vars(factory).get(_CLIPPING)
    if clipping is None:  # a subclass, which its module has under its name
        return factory.__qualname__
    return clipping.factory_of, (factory.__bases__[0],)


# Pickle looks for classes under their names, where the optimizer's own class would be found.
copyreg.pickle(OptimizerFactory, _reduce)
