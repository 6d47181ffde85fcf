"""Copies and pickles of an optimizer with a clipper: each has a copy of the clipper.

torch drops an optimizer's hooks when it is copied or pickled, and each class copies with its own
`__getstate__` and `__setstate__`. Both `copy` and `pickle` look for `__reduce_ex__` and
`__setstate__` on the object before they look at its class. So the class copies as usual, and then
the copy of the clipper is attached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from autoclip.core.adapter import BaseAttachment, warn_user


class CopyableAttachment(BaseAttachment):
    """An attachment whose methods stand on the optimizer; in copies of that they do nothing."""

    def _reduce_ex(self, protocol: Any) -> Any:
        """`optimizer.__reduce_ex__(protocol)`, for a copy that gets a copy of the clipper too."""
        own: Any = type(self.optimizer)
        reduced = own.__reduce_ex__(self.optimizer, protocol)
        if isinstance(reduced, str):  # the name of a global, of which there is only one
            return reduced
        make, arguments, *rest = reduced
        state, items, pairs, setter = [*rest, None, None, None, None][:4]
        return _make_copy, (make, arguments), (state, setter, self._clipper), items, pairs

    def _deepcopy(self, memo: dict[int, Any]) -> Any:
        """`optimizer.__deepcopy__(memo)` of a class that has one, with a copy of the clipper."""
        twin = type(self.optimizer).__deepcopy__(self.optimizer, memo)
        if isinstance(twin, Optimizer) and twin is not self.optimizer:
            _attach(copy.deepcopy(self._clipper, memo), twin)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    """Stands for an attachment in copies and pickles, until `_remove_traces` removes it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._do_nothing

    def _do_nothing(self, *_: Any) -> None:
        """Never called."""


def _make_copy(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    twin = make(*arguments)
    twin.__dict__["__setstate__"] = partial(_set_state, twin)
    return twin


def _set_state(twin: Any, state: tuple[Any, Callable[[Any, Any], Any] | None, Any]) -> None:
    own, setter, clipper = state
    del twin.__dict__["__setstate__"]
    if setter is not None:
        setter(twin, own)
    elif own is not None:
        twin.__setstate__(own)
    _attach(clipper, twin)


def _attach(clipper: Any, twin: Optimizer) -> None:
    _remove_traces(twin)
    attach = getattr(clipper, "_attach_to_copy", None)
    try:
        if attach is None:
            raise TypeError("its clipper works through the model that it was made for.")
        attach(twin)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        twin.register_step_pre_hook(_Unclipped(str(error)))


def _remove_traces(twin: Optimizer) -> None:
    """Remove our attributes, which a class that copies its whole `__dict__` has copied."""
    for name, value in list(vars(twin).items()):
        if name == "clipper" or _is_ours(value):
            del twin.__dict__[name]
        elif isinstance(value, dict) and name.endswith("_hooks"):
            # Another dict, since a shallow copy shares it with the optimizer that was copied.
            others = [(key, hook) for key, hook in value.items() if not _is_ours(hook)]
            twin.__dict__[name] = type(value)(others)


def _is_ours(method: Any) -> bool:
    return isinstance(getattr(method, "__self__", None), (CopyableAttachment, _Nothing))


class _Unclipped:
    """A step hook that warns, once, that this copy of an optimizer has no clipper."""

    def __init__(self, reason: str) -> None:
        self._reason, self._has_warned = reason, False

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"This {type(optimizer).__name__} is a copy of one with a clipper, but could not "
                f"get a copy of the clipper, and its steps are not clipped: {self._reason} Attach "
                "a clipper to it."
            )
