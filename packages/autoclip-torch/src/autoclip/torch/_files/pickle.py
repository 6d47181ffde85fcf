"""A pickle as plain data: containers, text and numbers. Nothing in it is imported or called.

`torch.load(weights_only=True)` runs no code either, but its cost has no bound: 534 bytes with
nested tuples as a key take 2^40 steps to hash, and 348 bytes allocate a GiB through `bytearray`.
Here an instruction makes at most one small object, so time and memory follow the file's size, and
a checkpoint may hold Python objects of any kind.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MAX_INSTRUCTIONS = 20_000_000
"""A checkpoint of 100,000 tensors has 3 million instructions."""

# Instructions by the number of items that they take from the stack, or all since the last mark.
_COUNTS = {
    1: ("TUPLE1", "APPEND", "BUILD", "BINPERSID"),
    2: ("TUPLE2", "SETITEM", "STACK_GLOBAL", "REDUCE", "NEWOBJ"),
    3: ("TUPLE3", "NEWOBJ_EX"),
}
_TAKE = {name: count for count, names in _COUNTS.items() for name in names}
_TAKE_SINCE_MARK = {"TUPLE", "FROZENSET", "APPENDS", "ADDITEMS", "SETITEMS"}
# Instructions that only push something.
_PUSH_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Unmade("builtins.set"),
    "FROZENSET": lambda: Unmade("builtins.frozenset"),
}


@dataclass(eq=False)
class Unmade:
    """An object that unpickling would make.

    Attributes:
        function: the dotted name of the class or function that makes it.
        arguments: the arguments of the call; None for the class or function itself.
        items: keys and values that are set afterwards, if the object is a kind of dict.
    """

    function: str
    arguments: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


STORAGE = "storage"
"""The `function` of a tensor's storage, which a pickle only identifies."""


def as_bytes(value: Any) -> Any:
    """Bytes, if `value` stands for bytes; any other value as it is.

    In pickles of protocol 2, which torch.save writes, bytes are a call that encodes text.
    """
    if isinstance(value, Unmade) and value.function == "_codecs.encode":
        match value.arguments:
            case (str(text), "latin1"):
                return text.encode("latin1")
    return value


def read_pickle(file: Any, storages: list[Unmade] | None = None) -> Any:
    """Read one pickle of protocol 2 to 5, and leave the file behind it.

    Args:
        file: a binary file. A read of more than it holds must not allocate memory for that.
        storages: a list to which all tensors' storages are added.

    Returns:
        dicts, lists, tuples, text, numbers, None, and `Unmade` for everything else.

    Raises:
        Exception: of any kind, if it is no such pickle.
    """
    memo: dict[int, Any] = {}
    stack: list[Any] = []
    below: list[list[Any]] = []  # a stack for each mark
    argument: Any
    for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if number > _MAX_INSTRUCTIONS:
            raise ValueError("the pickle has too many instructions")
        name = instruction.name
        items: list[Any] = []
        if name in _TAKE_SINCE_MARK:
            items, stack = stack, below.pop()
        elif name in _TAKE:
            start = len(stack) - _TAKE[name]
            items, stack[start:] = stack[start:], []
        match name:
            case _ if name in _PUSH_ARGUMENT:
                stack.append(argument)
            case _ if name in _PUSH_NEW:
                stack.append(_PUSH_NEW[name]())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                _extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                _update(stack[-1], items)
            case "GLOBAL":
                stack.append(Unmade(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(Unmade(".".join(items)))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                stack.append(_call(*items[:2]))
            case "BINPERSID":
                stack.append(Unmade(STORAGE, *items))
                if storages is not None:
                    storages.append(stack[-1])
            case "BUILD" | "PROTO" | "FRAME":  # an object's state, and nothing
                pass
            case "STOP":
                [result] = stack
                return result
            case _:
                raise ValueError(f"the pickle has the instruction {name}")
    raise ValueError("the pickle does not end")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Unmade) or not isinstance(arguments, tuple):
        raise ValueError("the pickle calls no function")
    if function.function == "collections.OrderedDict" and not arguments:
        return {}
    return Unmade(function.function, arguments)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target += items
    elif not isinstance(target, Unmade):
        raise ValueError("the pickle appends to something else than a list")


def _update(target: Any, items: list[Any]) -> None:
    found = target.items if isinstance(target, Unmade) else target
    if not isinstance(found, dict):
        raise ValueError("the pickle sets the items of something else than a dict")
    for key, value in zip(items[::2], items[1::2]):
        found[key if is_quick_to_hash(key) else object()] = value


def is_quick_to_hash(key: Any) -> bool:
    """False for nested tuples, which take exponential time, and large integers, which collide."""
    return isinstance(key, (str, bytes)) or (isinstance(key, int) and abs(key) < 2**63)
