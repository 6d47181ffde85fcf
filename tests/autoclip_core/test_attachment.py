"""The handle that detaches a clipper."""

from __future__ import annotations

import pytest

from autoclip.core.adapter import AttachmentHandle


def test_it_detaches_once() -> None:
    calls: list[int] = []
    handle = AttachmentHandle(lambda: calls.append(1))
    assert calls == []
    handle.remove()
    handle.remove()
    assert calls == [1]


def test_it_detaches_at_the_end_of_a_block() -> None:
    calls: list[int] = []
    with AttachmentHandle(lambda: calls.append(1)) as handle:
        assert calls == []
    assert calls == [1]
    handle.remove()
    assert calls == [1]


def test_it_detaches_where_a_block_raises_and_lets_the_error_through() -> None:
    calls: list[int] = []
    with pytest.raises(KeyError), AttachmentHandle(lambda: calls.append(1)):
        raise KeyError
    assert calls == [1]
