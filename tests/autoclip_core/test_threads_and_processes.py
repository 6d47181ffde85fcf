"""Histories in several threads, in forked and in spawned processes: each goes on by itself."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from rules import RULES as TABLE

from autoclip.core import History, MaxNorm, Quantile, Rule

RULES = [TABLE[name] for name in ("quantile", "standard", "shrink")]
STEPS, ROWS = 150, 12


def record_all(history: History, seed: int) -> bytes:
    """The state after many steps."""
    for norms in np.random.default_rng(seed).lognormal(size=(STEPS, history.rows)):
        history.record(norms)
    data: bytes = history.state_dict()["data"]
    return data


@pytest.fixture
def _switching_often() -> Iterator[None]:
    """Threads take turns after a few instructions instead of after 5 ms."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("_switching_often")
@pytest.mark.parametrize("rows", [2, ROWS])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_histories_in_threads_do_not_disturb_one_another(rule: Rule, rows: int) -> None:
    expected = [record_all(History(rows, rule, 50), seed) for seed in range(4)]
    together = Barrier(4)

    def work(seed: int) -> bytes:
        history = History(rows, rule, 50)
        together.wait()
        return record_all(history, seed)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == expected


@pytest.mark.usefixtures("_switching_often")
def test_threads_that_save_to_one_file_leave_one_of_their_states(tmp_path: Path) -> None:
    path, together = tmp_path / "history", Barrier(4)

    def work(norm: float) -> None:
        history = History(1, Quantile(0.5), 10)
        history.record([norm])
        together.wait()
        for _ in range(50):
            history.save(path)
            reader = History(1, Quantile(0.5), 10)
            reader.load(path)
            assert reader.thresholds[0] in (1.0, 2.0, 3.0, 4.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [1.0, 2.0, 3.0, 4.0]))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_history_goes_on_in_another_process(method: str) -> None:
    """It is pickled on its way; the one that stays behind does not notice."""
    histories = [History(rows, rule, 50) for rule in RULES for rows in (2, ROWS)]
    for seed, history in enumerate(histories):
        record_all(history, seed)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, context) as pool:
        found = list(pool.map(record_all, histories, range(9, 9 + len(histories))))
    assert found == [record_all(history, 9 + i) for i, history in enumerate(histories)]


def go_on_in_a_fork(history: Any, schedule: Any, queue: Any) -> None:
    schedule.record(5.0)
    queue.put((record_all(history, 1), schedule.max_norm))


def test_a_forked_process_has_histories_of_its_own() -> None:
    history, schedule = History(ROWS, Quantile(0.9), 50), MaxNorm(Quantile(0.5))
    record_all(history, 0)
    schedule.record(3.0)
    before = history.state_dict()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=go_on_in_a_fork, args=(history, schedule, queue))
    child.start()
    theirs, max_norm = queue.get(timeout=60)
    child.join()
    assert (history.state_dict(), schedule.max_norm) == (before, 3.0)
    assert (record_all(history, 1), 4.0) == (theirs, max_norm)
