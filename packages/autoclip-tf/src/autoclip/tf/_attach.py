"""The one file that knows Keras's optimizers: where they clip, are built, and are saved."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import keras

from autoclip.core.adapter import (
    AttachmentHandle,
    attached_message,
    second_clipper_message,
    warn_user,
)
from autoclip.tf._private import (
    REDUCE_METHOD,
    check_backend,
    check_reduce_method,
    check_strategy,
    retrace_models,
)

__all__ = [
    "AttachableClipper",
    "attach",
    "check_optimizer",
    "optimizer_with_updates",
    "optimizers_in",
]

CONFIG_KEY = "autoclip"
"""Where the optimizer's own class and the clipper are in `get_config()`."""

_KERAS_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")


class AttachableClipper(Protocol):
    """What an optimizer asks of its clipper."""

    _handle: AttachmentHandle | None
    """Of the optimizer that it is attached to."""

    _attached_to: weakref.ref[Any] | None
    """The optimizer that it is attached to."""

    _updates: int
    """How many updates of its optimizer it has been called for, or was when they were traced."""

    _unseen: bool
    """Whether there was a warning of an update that it was not called for."""

    _late: bool
    """Whether its optimizer was trained before, and no history has been loaded since."""

    def build(self, variables: Iterable[Any]) -> None: ...

    def _has_history(self) -> bool: ...

    def _warn_without_history(self, path: str) -> None: ...

    def _clip(self, pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]: ...


def optimizer_with_updates(optimizer: Any) -> Any:
    """The optimizer that makes the updates: of a `LossScaleOptimizer` the inner one."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def optimizers_in(optimizer: Any) -> list[Any]:
    """All optimizers that make updates: of a `MultiOptimizer` those in it."""
    optimizer = optimizer_with_updates(optimizer)
    if not isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ())):
        return [optimizer]
    inner: Any = optimizer
    return [each for one in inner.optimizers for each in optimizers_in(one)]


# Keras wraps the optimizer of a mixed_float16 model in one of these without calling it.
setattr(  # noqa: B010 (no attribute that type checkers know)
    keras.optimizers.LossScaleOptimizer,
    "clipper",
    property(
        lambda optimizer: optimizer_with_updates(optimizer).clipper,
        doc="The clipper of the inner optimizer.",
    ),
)


def check_optimizer(optimizer: Any) -> Any:
    """Refuse what cannot be attached to; return the optimizer that is meant.

    Raises:
        TypeError: it is not an optimizer of Keras on TensorFlow, or one with optimizers inside.
        RuntimeError: it has a clipper already, or its `tf.distribute` strategy is not supported.
    """
    optimizers = keras.optimizers
    check_backend()
    optimizer = optimizer_with_updates(optimizer)
    if isinstance(optimizer, getattr(optimizers, "MultiOptimizer", ())):
        raise TypeError(
            "A MultiOptimizer makes no update of its own. Attach a clipper to each of the "
            "optimizers in it before you put them together."
        )
    if not isinstance(optimizer, optimizers.Optimizer):
        message = f"attach takes a Keras optimizer, but got {optimizer!r:.200}"
        if isinstance(optimizer, str):
            message += ". Make it first: keras.optimizers.get(name)"
        elif type(optimizer).__module__.startswith(("tf_keras", "keras.optimizers", "keras.s")):
            message += (
                ". Optimizers of Keras 2 are not those of Keras 3. Its legacy ones take "
                "gradient_transformers=[clipper]; with others clip in a loop of your own: "
                "optimizer.apply_gradients(clipper(zip(gradients, variables)))"
            )
        elif isinstance(optimizer, type):
            message += f". Make an instance first: {optimizer.__name__}()"
        raise TypeError(message + ".")
    if hasattr(optimizer, "clipper"):
        raise RuntimeError(second_clipper_message(optimizer, optimizer.clipper))
    check_reduce_method(type(optimizer))
    check_strategy(optimizer._distribution_strategy)
    return optimizer


def attach(clipper: AttachableClipper, optimizer: Any) -> AttachmentHandle:
    """Attach; see `Clipper.attach`."""
    optimizer = check_optimizer(optimizer)
    if clipper._handle is not None:
        raise RuntimeError(attached_message(clipper))
    if optimizer.built:
        clipper.build(optimizer._trainable_variables)
    for name in _KERAS_CLIPPING:
        _warn_of_keras_clipping(name, getattr(optimizer, name, None))
    clipper._late = bool(optimizer.iterations > 0) and not clipper._has_history()
    optimizer.__class__ = _attached_class(optimizer.__class__)
    optimizer.clipper = clipper
    retrace_models(optimizer)

    def forget(_: Any = None) -> None:
        clipper._handle = clipper._attached_to = None

    # The optimizer holds the clipper already. Once it is gone, another one can have the clipper.
    attached = clipper._attached_to = weakref.ref(optimizer, forget)

    def detach() -> None:
        forget()
        optimizer = attached()
        if optimizer is not None:
            del optimizer.clipper
            optimizer.__class__ = type(optimizer)._plain_class
            retrace_models(optimizer)

    clipper._handle = AttachmentHandle(detach)
    return clipper._handle


def _warn_of_keras_clipping(name: str, value: Any) -> None:
    if value is not None:
        warn_user(
            f"The optimizer has {name}={value}, which acts before AutoClip does: the history is "
            f"one of gradients that {name} has clipped. Leave it out unless that is what you want."
        )


@keras.saving.register_keras_serializable("autoclip", "Optimizer")
class _Attached:
    """What an optimizer with a clipper does differently; the first base of its class."""

    clipper: AttachableClipper
    built: bool
    _plain_class: type

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KERAS_CLIPPING:
            _warn_of_keras_clipping(name, value)
        super().__setattr__(name, value)

    def build(self, variables: Iterable[Any]) -> None:
        variables = list(variables)
        # First the clipper, which can refuse. With nothing to train there is nothing to clip;
        # Keras also builds with no variables where it loads its legacy HDF5 files. A second call
        # does nothing, whatever the variables.
        if variables and not self.built:
            self.clipper.build(variables)
        super().build(variables)  # type: ignore[misc]

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        before = self.clipper._updates
        result = super().apply(*args, **kwargs)  # type: ignore[misc]
        if len(args[0] if args else kwargs["grads"]):  # else there is no update
            _check_clipped(self, before)
        return result

    def apply_gradients(self, *args: Any, **kwargs: Any) -> Any:
        before = self.clipper._updates
        result = super().apply_gradients(*args, **kwargs)  # type: ignore[misc]
        _check_clipped(self, before)
        return result

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        self.clipper._updates += 1
        if self.clipper._late:
            self.clipper._late = False
            warn_user(
                f"This {type(self).__name__} was trained before the clipper was attached, and the "
                "clipper starts with an empty history: its first steps are compared with few "
                "norms. If the training was resumed, attach the clipper before you load the "
                "optimizer's state, or load the history with clipper.load(path)."
            )
        return self.clipper._clip(list(getattr(super(), REDUCE_METHOD)(grads_and_vars)))

    def _checkpoint_adapter(self, path: str) -> Any:
        # TensorFlow calls this on each object that it restores, with the checkpoint's path.
        self.clipper._warn_without_history(path)
        return super()._checkpoint_adapter(path)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        config[CONFIG_KEY] = {
            # Words for the error of a plain class that gets this configuration.
            "note": "This optimizer has a clipper. Import autoclip.tf and call type(optimizer)"
            ".from_config(config), or serialize and deserialize of keras.optimizers. For an "
            'optimizer without a clipper, delete config["autoclip"] first.',
            "optimizer": _reference(self._plain_class),
            "clipper": keras.saving.serialize_keras_object(self.clipper),
        }
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        saved = config.pop(CONFIG_KEY)
        optimizer, clipper = (
            keras.saving.deserialize_keras_object(each, custom_objects)
            for each in ({**saved["optimizer"], "config": config}, saved["clipper"])
        )
        clipper.attach(optimizer)
        return optimizer

    @property
    def _unpickle_model(self) -> Any:
        # Pickle looks for classes by their names, and under this one's name finds the plain class.
        return self._plain_class._unpickle_model  # type: ignore[attr-defined]


def _check_clipped(optimizer: Any, updates: int) -> None:
    """Warn, once, if an update went by that the clipper did not see."""
    clipper = optimizer.clipper
    if clipper._updates > updates or clipper._unseen:
        return
    if optimizer.gradient_accumulation_steps:
        return  # only every n-th call is an update
    clipper._unseen = True
    warn_user(
        f"An update of this {type(optimizer).__name__} was not clipped: it does not pass through "
        f"{REDUCE_METHOD} of Keras's Optimizer. Where an optimizer wraps another one, attach the "
        "clipper to the inner one."
    )


@cache
def _attached_class(plain: type) -> type:
    """The subclass of an optimizer's class that an optimizer with a clipper has."""
    attached = type(
        plain.__name__,
        (_Attached, plain),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "_plain_class": plain,
        },
    )
    # All under one name. Under names of their own Keras would know them only in a process that
    # has attached to such an optimizer before, and two of one name would be taken for each other.
    return keras.saving.register_keras_serializable("autoclip", "Optimizer")(attached)


def _reference(plain: type) -> dict[str, Any]:
    """How Keras writes down an optimizer's class: whatever it exports, and users' own."""
    name = plain.__name__
    if getattr(keras.optimizers, name, None) is plain:
        return {"module": "keras.optimizers", "class_name": name, "registered_name": None}
    registered_name = keras.saving.get_registered_name(plain)
    return {"module": plain.__module__, "class_name": name, "registered_name": registered_name}
