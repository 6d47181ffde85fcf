"""Attaching clippers to optimizers in every framework: the constructor and the handle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

__all__ = ["AttachmentHandle", "constructor"]


class AttachmentHandle:
    """Detaches a clipper from its optimizer; as a context manager, at the end of the block.

    Args:
        detach: the function to call, once.
    """

    def __init__(self, detach: Callable[[], None]) -> None:
        self._detach: Callable[[], None] | None = detach

    def remove(self) -> None:
        """Detach the clipper. It keeps its history; a second call does nothing."""
        detach, self._detach = self._detach, None
        if detach is not None:
            detach()

    def __enter__(self) -> AttachmentHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


if TYPE_CHECKING:
    from builtins import classmethod as constructor
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
