"""Runs independent pieces of work in worker processes, with progress and a clean end."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
WorkFunction = Callable[[Item, Callable[[int], None]], Result]
"""Function of an item and of a callback for its progress."""
ItemProgress = Callable[[int, int], None]
"""Callback for the number of an item and its progress."""


class WorkerError(RuntimeError):
    """Raised if a worker failed in an unforeseen way; the message says where."""


def in_order(
    work: WorkFunction[Item, Result], items: Iterable[Item], jobs: int, on_progress: ItemProgress
) -> Generator[Result, None, None]:
    """Yield the results of all items in the order of the items.

    With ``jobs`` of 1 everything runs in this process. Items are taken as workers become free; at
    most ``2 * jobs`` results wait to be yielded. Closing the iterator ends the workers.

    Args:
        work: function that can be imported by name; items and results must be picklable.
        jobs: number of worker processes.
        on_progress: called with the number of an item and its progress.

    Raises:
        ValueError: ``work`` raised it.
        WorkerError: a worker raised another error, or died.
    """
    if jobs == 1:
        for number, item in enumerate(items):
            yield work(item, _bound(on_progress, number))
        return
    crew = _Crew(work, on_progress)
    try:
        yield from crew.run(items, jobs)
    finally:
        crew.dismiss()


def _bound(on_progress: ItemProgress, number: int) -> Callable[[int], None]:
    return lambda progress: on_progress(number, progress)


class _Crew(Generic[Item, Result]):
    """Worker processes, which start when they are needed and take one item after another."""

    def __init__(self, work: WorkFunction[Item, Result], on_progress: ItemProgress) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._work = work
        self._on_progress = on_progress
        self._processes: dict[Connection, BaseProcess] = {}
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}
        """Number of the item that each worker works on."""
        self._done: dict[int, Result] = {}

    def run(self, items: Iterable[Item], jobs: int) -> Iterator[Result]:
        numbered = iter(enumerate(items))
        expected, more = 0, True
        while True:
            while more and len(self._busy) < jobs and len(self._done) < 2 * jobs:
                following = next(numbered, None)
                if following is None:
                    more = False
                else:
                    self._give(*following)
            if not self._busy:
                return
            for ready in wait(list(self._busy)):
                assert isinstance(ready, Connection)
                self._receive(ready)
            while expected in self._done:
                yield self._done.pop(expected)
                expected += 1

    def dismiss(self) -> None:
        """End all workers at once."""
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def _give(self, number: int, item: Item) -> None:
        connection = self._idle.pop() if self._idle else self._hire()
        self._busy[connection] = number
        with suppress(BrokenPipeError):  # the worker is dead, which `_receive` will find
            connection.send(item)

    def _hire(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker, args=(self._work, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _receive(self, connection: Connection) -> None:
        number = self._busy[connection]
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join()
            raise WorkerError(
                f"a worker ended with code {process.exitcode} and without a result; if the "
                "machine ran out of memory, use fewer --jobs"
            ) from None
        if kind == "progress":
            self._on_progress(number, value)
            return
        del self._busy[connection]
        self._idle.append(connection)
        if kind == "done":
            self._done[number] = value
            return
        raise value if kind == "refused" else WorkerError(value)


def _worker(work: WorkFunction[Any, Any], connection: Connection) -> None:
    """In the worker process, until the parent is gone. An interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        while True:
            item = connection.recv()
            try:
                answer = "done", work(item, lambda done: connection.send(("progress", done)))
            except ConnectionError:
                raise
            except ValueError as error:
                answer = "refused", ValueError(str(error))
            except Exception:
                answer = "failed", traceback.format_exc()
            connection.send(answer)
