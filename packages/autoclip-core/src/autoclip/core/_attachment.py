"""How clippers are attached to optimizers in every framework: the constructor and the handle."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

__all__ = ["AttachmentHandle", "constructor"]


class AttachmentHandle:
    """Detaches a clipper from its optimizer; as a context manager, at the end of the block.

    Args:
        detach: what to call, once.
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
        """A class method that makes a new clipper, and so is refused on an instance.

        On an instance it would drop that one's settings and history without a word.
        """

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """The bound method; called on an instance, it raises TypeError."""
            if instance is None:
                return super().__get__(instance, owner)
            name = f"{type(instance).__name__}.{self.__func__.__name__}"

            def refuse(*_: Any, **__: Any) -> Any:
                raise TypeError(
                    f"{name} makes a new clipper and is called on the class. To use this clipper, "
                    "with its settings and its history, call clipper.attach(optimizer)."
                )

            return refuse
