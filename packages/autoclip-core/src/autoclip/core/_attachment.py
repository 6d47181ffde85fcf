"""The handle that `clipper.attach(optimizer)` returns in every framework."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

__all__ = ["AttachmentHandle"]


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
