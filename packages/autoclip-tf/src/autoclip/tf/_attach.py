"""The one place that knows Keras's optimizers: where they clip, are built, and are saved."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import keras

from autoclip.core import second_clipper_message
from autoclip.tf._private import SEAM, check_seam

if TYPE_CHECKING:
    from autoclip.tf._clipper import Clipper

__all__ = ["Attachment", "AttachmentHandle"]

CONFIG_KEY = "autoclip"
"""Where the optimizer's own class and the clipper stand in `get_config()`."""


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
            raise RuntimeError(second_clipper_message(optimizer, optimizer.clipper))
        check_seam(type(optimizer))
        return optimizer

    @classmethod
    def create(cls, clipper: Clipper, optimizer: Any, stacklevel: int) -> AttachmentHandle:
        """Attach; see `Clipper.attach`. Warnings point `stacklevel` calls up."""
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
                    stacklevel=stacklevel,
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


@keras.saving.register_keras_serializable("autoclip", "Optimizer")
class _Attached:
    """What an optimizer with a clipper does differently; the first base of its class."""

    clipper: Clipper
    _plain_class: type

    def build(self, variables: Iterable[Any]) -> None:
        variables = list(variables)
        # First the clipper, which can refuse. With nothing to train there is nothing to clip;
        # Keras also builds with no variables where it loads its legacy HDF5 files.
        if variables:
            self.clipper.build(variables)
        super().build(variables)  # type: ignore[misc]

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return self.clipper._clip(list(getattr(super(), SEAM)(grads_and_vars)))

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        config[CONFIG_KEY] = {
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
