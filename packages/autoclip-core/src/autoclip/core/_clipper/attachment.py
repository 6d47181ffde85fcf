"""Attaching clippers to optimizers in every framework: the constructor and the handle."""

from __future__ import annotations

import functools
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autoclip.core._warnings import warn_user


class AttachmentHandle:
    """Detaches a clipper from its optimizer; as a context manager, at the end of the block.

    Args:
        detach: the function to call, once.
    """

    def __init__(self, detach: Callable[[], None]) -> None:
        self._detach: Callable[[], None] | None = detach

    def remove(self) -> None:
        """Detach the clipper. It keeps its history; a second call does nothing."""
        if self._detach is not None:
            self._detach()  # again, if it is interrupted
            self._detach = None

    def __enter__(self) -> AttachmentHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class BaseAttachment(ABC):
    """A clipper on an optimizer, which calls it at each step.

    Args:
        clipper: the clipper.
        optimizer: the optimizer.

    Attributes:
        may_lack_history: True if the first step must warn if the history is empty, since the
            optimizer had been trained when the clipper was attached.
        has_warned: True after the warning of a checkpoint without a history, or of an update
            without the clipper.
    """

    def __init__(self, clipper: Any, optimizer: Any) -> None:
        self._clipper = clipper
        # Weakly: a cycle would keep a dropped optimizer's state in memory until a collection.
        self._optimizer = weakref.ref(optimizer)
        self.may_lack_history = False
        self.has_warned = False

    @property
    def optimizer(self) -> Any:
        """The optimizer; None if it no longer exists."""
        return self._optimizer()

    def begin(self) -> AttachmentHandle:
        """Attach; if it raises or is interrupted, optimizer and clipper are as they were.

        Returns:
            A handle that detaches the clipper, unless another attachment has it by then.
        """
        try:
            self._hook(self.optimizer)
        except BaseException:
            self._unhook(self.optimizer)
            raise
        return AttachmentHandle(self.end)

    def end(self) -> None:
        """Undo `begin`; after an interrupt a second call does the rest."""
        if self._clipper._attachment is self:
            self._unhook(self.optimizer)

    @abstractmethod
    def _hook(self, optimizer: Any) -> None:
        """Let `optimizer` call the clipper, whose `_attachment` this becomes."""

    @abstractmethod
    def _unhook(self, optimizer: Any) -> None:
        """Undo all or a part of `_hook`; `optimizer` may be None."""

    def warn_without_history(self) -> None:
        """Warn that the optimizer was trained before, and that the history is empty."""
        warn_user(
            f"This {type(self.optimizer).__name__} was trained before the clipper was attached, "
            "and the clipper starts with an empty history: its first steps are compared with few "
            "norms. If the training was resumed, attach the clipper before you load the "
            "optimizer's state, or load the history with clipper.load_state_dict() or "
            "clipper.load()."
        )


if TYPE_CHECKING:
    constructor = classmethod
else:

    class constructor(classmethod):
        """A class method that makes clippers from an optimizer and the constructor's settings.

        Its signature is the constructor's, with its own first argument in the place of the
        parameters. On an instance, whose settings and history it would silently drop, it raises
        TypeError.
        """

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """The function, bound to the class."""
            owner = owner or type(instance)

            @functools.wraps(self.__func__)
            def make(*args: Any, **settings: Any) -> Any:
                if instance is None:
                    return self.__func__(owner, *args, **settings)
                raise TypeError(
                    f"{owner.__name__}.{make.__name__} makes a new clipper and is called on the "
                    "class. To use this clipper, with its settings and its history, call "
                    "clipper.attach(optimizer)."
                )

            _, optimizer, *_ = inspect.signature(self.__func__).parameters.values()
            settings = [
                each
                for name, each in inspect.signature(owner.__init__).parameters.items()
                if name not in ("self", "parameters")
            ]
            make.__signature__ = inspect.Signature([optimizer, *settings])
            return make
