"""Clippers in Keras's optimizers: where those clip, are built, and are saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import keras

from autoclip.core.adapter import BaseAttachment, second_clipper_message, warn_user
from autoclip.tf._private import (
    REDUCE_METHOD,
    check_backend,
    check_reduce_method,
    check_strategy,
    retrace_models,
)

if TYPE_CHECKING:
    from autoclip.tf._clipper import Clipper

CONFIG_KEY = "autoclip"
"""The key of the optimizer's own class and the clipper in `get_config()`."""

_KERAS_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")

# Any: mypy would not know which optimizer's methods `super()` finds.
_Optimizer: Any = object


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
    """Return the optimizer that makes the updates, if a clipper can be attached to it.

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
        message = f"optimizer must be a Keras optimizer, but got {optimizer!r:.200}"
        if isinstance(optimizer, str):
            message += ". Make it first: keras.optimizers.get(name)"
        elif any(base.__module__.startswith("tf_keras") for base in type(optimizer).__mro__):
            message += (
                ". Optimizers of Keras 2 are not those of Keras 3. Its legacy ones take "
                "gradient_transformers=[clipper]; with others clip in the apply_gradients of a "
                "subclass, or in a custom loop: "
                "optimizer.apply_gradients(clipper(zip(gradients, variables)))"
            )
        elif isinstance(optimizer, type):
            message += f". Make an instance first: {optimizer.__name__}()"
        elif hasattr(optimizer, "apply_gradients") or hasattr(optimizer, "apply"):
            message += (
                ". For other optimizers clip in a custom loop, before the update: "
                "clipper(zip(gradients, variables))"
            )
        raise TypeError(message + ".")
    if hasattr(optimizer, "clipper"):
        raise RuntimeError(second_clipper_message(optimizer, optimizer.clipper))
    check_reduce_method(type(optimizer))
    check_strategy(optimizer._distribution_strategy)
    return optimizer


class Attachment(BaseAttachment):
    """A clipper in an optimizer, which calls it at each update.

    Args:
        clipper: the clipper.
        optimizer: one that `check_optimizer` has returned.

    Attributes:
        updates: the number of updates that the clipper was called for, or was traced for.
    """

    def __init__(self, clipper: Clipper, optimizer: Any) -> None:
        super().__init__(clipper, optimizer)
        self.updates = 0

    def _hook(self, optimizer: Any) -> None:
        for name in _KERAS_CLIPPING:
            _warn_of_keras_clipping(name, getattr(optimizer, name, None))
        self.may_lack_history = bool(optimizer.iterations > 0) and not self._clipper.has_history
        self._clipper._attachment = self
        optimizer.clipper = self._clipper
        optimizer.__class__ = _attached_class(optimizer.__class__)
        retrace_models(optimizer)

    def _unhook(self, optimizer: Any) -> None:
        if optimizer is not None:
            optimizer.__class__ = getattr(optimizer, "_plain_class", optimizer.__class__)
            if hasattr(optimizer, "clipper"):
                del optimizer.clipper
            retrace_models(optimizer)
        self._clipper._attachment = None

    def before_step(self) -> None:
        """Count an update, and warn if it is the first one after others without a clipper."""
        self.updates += 1
        if self.may_lack_history:
            self.may_lack_history = False
            self.warn_without_history()

    def after_step(self, updates: int) -> None:
        """Warn, once, of an update that the clipper was not called for.

        Args:
            updates: their number before it.
        """
        optimizer = self.optimizer
        # With gradient accumulation, only every n-th call is an update.
        if self.updates > updates or self.has_warned or optimizer.gradient_accumulation_steps:
            return
        self.has_warned = True
        warn_user(
            f"An update of this {type(optimizer).__name__} was not clipped: it does not pass "
            f"through {REDUCE_METHOD} of Keras's Optimizer. If an optimizer wraps another one, "
            "attach the clipper to the inner one."
        )


def _warn_of_keras_clipping(name: str, value: Any) -> None:
    if value is not None:
        warn_user(
            f"The optimizer has {name}={value}, which acts before AutoClip does: the history is "
            f"one of gradients that {name} has clipped. Leave it out unless you want that."
        )


@keras.saving.register_keras_serializable("autoclip", "Optimizer")
class _Attached(_Optimizer):
    """The differences of an optimizer with a clipper; the first base of its class."""

    clipper: Clipper
    _plain_class: type

    @property
    def autoclip(self) -> Any:
        """The state of the clipper, which Keras finds among the optimizer's attributes."""
        return self.clipper.saved_state

    @property
    def _attachment(self) -> Attachment:
        assert self.clipper._attachment is not None
        return self.clipper._attachment

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KERAS_CLIPPING:
            _warn_of_keras_clipping(name, value)
        super().__setattr__(name, value)

    def build(self, variables: Iterable[Any]) -> None:
        variables = list(variables)
        # First the clipper, which can refuse. With nothing to train there is nothing to clip;
        # Keras also builds with no variables where it loads its legacy HDF5 files. A second call
        # does nothing, for any variables.
        if variables and not self.built:
            self.clipper.build(variables)
        super().build(variables)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        updates = self._attachment.updates
        result = super().apply(*args, **kwargs)
        if len(args[0] if args else kwargs["grads"]):  # else there is no update
            self._attachment.after_step(updates)
        return result

    def apply_gradients(self, *args: Any, **kwargs: Any) -> Any:
        updates = self._attachment.updates
        result = super().apply_gradients(*args, **kwargs)
        self._attachment.after_step(updates)
        return result

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        self._attachment.before_step()
        return self.clipper._clip(list(getattr(super(), REDUCE_METHOD)(grads_and_vars)))

    def _checkpoint_adapter(self, path: str) -> Any:
        # TensorFlow calls this on each object that it restores, with the checkpoint's path.
        self.clipper.saved_state.look_into(path)
        return super()._checkpoint_adapter(path)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        config[CONFIG_KEY] = {
            # Words for the error of a plain class that gets this configuration.
            "note": "This optimizer has a clipper. Import autoclip.tf and call type(optimizer)"
            ".from_config(config), or serialize and deserialize of keras.optimizers. For an "
            'optimizer without a clipper, delete config["autoclip"] first.',
            "optimizer": _reference(self._plain_class),
            "clipper": keras.saving.serialize_keras_object(self.clipper),
            "paths": self.clipper._groups.paths if self.clipper._groups.patterns else [],
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
        clipper._groups.paths = saved["paths"]
        clipper.attach(optimizer)
        return optimizer

    @property
    def _unpickle_model(self) -> Any:
        # Pickle looks for classes by their names, and under this one's name finds the plain class.
        return getattr(self._plain_class, "_unpickle_model")  # noqa: B009


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
    """The names under which Keras saves an optimizer's class: one that it exports, or a user's."""
    name = plain.__name__
    if getattr(keras.optimizers, name, None) is plain:
        return {"module": "keras.optimizers", "class_name": name, "registered_name": None}
    registered_name = keras.saving.get_registered_name(plain)
    return {"module": plain.__module__, "class_name": name, "registered_name": registered_name}
