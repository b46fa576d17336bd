from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pla_serve.simulator.parallel import WorkerError, in_order

Tell = Callable[[int], None]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import this file by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def square(item: int, tell: Tell) -> int:
    tell(item)
    if item == 0:
        time.sleep(0.3)  # the first is done last
    return item * item


def refuse(item: int, tell: Tell) -> int:
    raise ValueError(f"no {item}")


def fail(item: int, tell: Tell) -> int:
    raise KeyError(item)


def die(item: int, tell: Tell) -> int:
    os._exit(7)


def linger(item: int, tell: Tell) -> int:
    if item:
        time.sleep(60)
    return item


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_order_and_progress_is_heard(jobs: int) -> None:
    heard: list[tuple[int, int]] = []
    results = in_order(square, range(3), jobs, lambda number, done: heard.append((number, done)))
    assert list(results) == [0, 1, 4]
    assert sorted(heard) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_value_error_is_passed_on(jobs: int) -> None:
    with pytest.raises(ValueError, match="no 5"):
        list(in_order(refuse, [5], jobs, lambda *_: None))


def test_what_was_not_foreseen_says_where() -> None:
    with pytest.raises(WorkerError, match=r"in fail(.|\n)*KeyError: 5"):
        list(in_order(fail, [5], 2, lambda *_: None))
    with pytest.raises(WorkerError, match="code 7"):
        list(in_order(die, [5], 2, lambda *_: None))


def test_workers_end_when_nobody_wants_their_results() -> None:
    started = time.monotonic()
    results = in_order(linger, range(2), 2, lambda *_: None)
    assert next(results) == 0
    results.close()
    assert time.monotonic() - started < 30
