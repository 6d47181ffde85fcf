"""Interrupts at every line of the packages that a call runs through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import settings

LINES = 16
"""That many on each commit, spread evenly; `nightly` takes them all."""


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


@contextmanager
def lines(see: Callable[[tuple[str, int]], None]) -> Iterator[None]:
    """Call `see` with module and number before each line of the packages runs."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_globals.get("__name__") or ""
        if not name.startswith("autoclip."):
            return None
        if event == "line":
            see((name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(prepare: Callable[[], Any], act: Callable[[Any], object]) -> Iterator[Any]:
    """The object that `prepare` made, after `act` on it was interrupted, once at each line.

    At lines in a loop, in its first and in its last round. The last one ran to its end.

    Args:
        prepare: makes a subject.
        act: runs the packages' code on it.
    """
    seen: list[tuple[str, int]] = []
    subject = prepare()
    with lines(seen.append):
        act(subject)
    first = {line: i for i, line in reversed([*enumerate(seen)])}
    last = {line: i for i, line in enumerate(seen)}
    stops = sorted({*first.values(), *last.values()})
    if settings.get_current_profile_name() != "nightly" and len(stops) > LINES:
        stops = [stops[i * (len(stops) - 1) // (LINES - 1)] for i in range(LINES)]
    for stop in stops:
        target, passed = prepare(), iter(range(stop))

        def see(line: tuple[str, int], passed: Iterator[int] = passed) -> None:
            if next(passed, None) is None:
                raise Interrupt

        try:
            with lines(see):
                act(target)
        except Interrupt:
            yield target
        else:
            raise AssertionError("nothing was interrupted")
    yield subject


def data(clipper: Any) -> Any:
    """The history of a clipper, as bytes."""
    return clipper.state_dict()["data"]
