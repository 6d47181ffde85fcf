"""Changes of several objects that count together, whenever an interrupt comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, TypeAlias

Change: TypeAlias = tuple[dict[Any, Any], Mapping[Any, Any]]
"""A dict, such as the attributes `vars(each)`, and the items that it is updated with."""


def commit(*changes: Change) -> None:
    """Make all changes or none.

    Python raises KeyboardInterrupt, and runs signal handlers, between its own instructions. These
    loops run in C, so none comes between two changes.

    >>> a, b = {}, {"x": 1}
    >>> commit((a, {"x": 2}), (b, {"x": 2}))
    >>> a == b
    True
    """
    deque(map(dict.update, *zip(*changes)), maxlen=0)
