"""The one place that knows Keras's optimizers: where they clip, are built, and are saved."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import keras

from autoclip.tf._private import SEAM, check_seam

if TYPE_CHECKING:
    from autoclip.tf._clipper import Clipper

__all__ = ["Attachment", "AttachmentHandle", "register_optimizers"]

CONFIG_KEY = "autoclip"
"""Where a clipper's settings stand in its optimizer's `get_config()`."""


class AttachmentHandle:
    """What `clipper.attach(optimizer)` returns."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment: Attachment | None = attachment

    def remove(self) -> None:
        """Detach the clipper: the optimizer's class is what it was, and `clipper` is gone.

        The clipper keeps its history and its variables. A second call does nothing. A
        `tf.function` that was traced before goes on as it was traced: after `model.compile` call
        it again.
        """
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


class Attachment:
    """A clipper on an optimizer."""

    def __init__(self, clipper: Clipper, optimizer: Any) -> None:
        self._clipper = clipper
        # Weakly: the optimizer holds the clipper already.
        self._optimizer = weakref.ref(optimizer)

    @staticmethod
    def check(optimizer: Any) -> Any:
        """Refuse what cannot be attached to; return the optimizer that is meant."""
        optimizers = keras.optimizers
        if keras.config.backend() != "tensorflow":
            raise TypeError(
                f"Keras runs on {keras.config.backend()!r} here, and autoclip.tf is for "
                'TensorFlow. Set KERAS_BACKEND="tensorflow" before Keras is imported; for PyTorch '
                "there is autoclip.torch."
            )
        if isinstance(optimizer, optimizers.LossScaleOptimizer):
            return Attachment.check(optimizer.inner_optimizer)
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
            raise TypeError(message + ".")
        if hasattr(optimizer, "clipper"):
            raise RuntimeError(
                f"This {type(optimizer).__name__} has a clipper already, and two would clip "
                f"twice: {optimizer.clipper!r}. Detach that one first, with the handle that "
                "attach returned, or attach to a new optimizer."
            )
        check_seam(type(optimizer))
        return optimizer

    @classmethod
    def create(cls, clipper: Clipper, optimizer: Any) -> AttachmentHandle:
        """Attach; see `Clipper.attach`."""
        optimizer = cls.check(optimizer)
        if clipper._attachment is not None:
            raise RuntimeError("This clipper is attached to an optimizer already.")
        if optimizer.built:
            clipper.build(optimizer._trainable_variables)
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            if getattr(optimizer, name, None) is not None:
                warnings.warn(
                    f"The optimizer has {name}={getattr(optimizer, name)}, which acts before "
                    f"AutoClip does: the history is one of gradients that {name} has clipped. "
                    "Leave it out unless that is what you want.",
                    stacklevel=4,
                )
        self = cls(clipper, optimizer)
        plain: type = type(optimizer)
        optimizer.__class__ = _attached_class(plain)
        optimizer.clipper = clipper
        clipper._attachment = self
        return AttachmentHandle(self)

    def remove(self) -> None:
        """Undo `create`."""
        self._clipper._attachment = None
        optimizer = self._optimizer()
        if optimizer is not None:
            del optimizer.clipper
            optimizer.__class__ = type(optimizer)._plain_class


class _Attached:
    """What an optimizer with a clipper does differently; the first base of its class."""

    clipper: Clipper
    _plain_class: type

    def build(self, variables: Iterable[Any]) -> None:
        variables = list(variables)
        super().build(variables)  # type: ignore[misc]
        self.clipper.build(variables)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return self.clipper._clip(list(getattr(super(), SEAM)(grads_and_vars)))

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        config[CONFIG_KEY] = keras.saving.serialize_keras_object(self.clipper)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = dict(config)
        settings = config.pop(CONFIG_KEY, None)
        optimizer = cls._plain_class.from_config(config, *args, **kwargs)  # type: ignore[attr-defined]
        if settings is not None:
            keras.saving.deserialize_keras_object(settings).attach(optimizer)
        return optimizer


@cache
def _attached_class(plain: type) -> type:
    """The subclass of an optimizer's class that an optimizer with a clipper has.

    It is registered with Keras, so that a saved model which has it can be loaded.
    """
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
    name = keras.saving.get_registered_name(plain)
    keras.saving.register_keras_serializable("autoclip", name)(attached)
    return attached


def register_optimizers() -> None:
    """Let models be loaded whose optimizers, any that Keras exports, have clippers."""
    for optimizer in vars(keras.optimizers).values():
        if isinstance(optimizer, type) and issubclass(optimizer, keras.optimizers.Optimizer):
            _attached_class(optimizer)
