"""Cores on which the threads of a process may run.

OpenMP binds compute threads to cores if it is told to (``OMP_PROC_BIND``): the thread that loads
it to the first one, and the others, when they start, to one of the others each. A thread or process
that a bound thread starts is bound likewise; these functions keep that from happening.

Systems other than Linux have no such calls; nothing is bound there, and nothing is done here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TASKS = Path("/proc/self/task")


@contextmanager
def on_the_same_cores() -> Iterator[None]:
    """Let this thread run afterwards where it runs now, whatever an import binds it to."""
    cores = _of_thread(0)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


@contextmanager
def on_any_core() -> Iterator[None]:
    """Let what is started in this block run wherever any thread of this process may."""
    cores = _of_thread(0)
    if cores:
        os.sched_setaffinity(0, set().union(cores, *_of_threads().values()))
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def leave_bound_cores() -> None:
    """Keep this thread, for good, off the cores to which other threads are bound.

    It does nothing if no other thread is bound to a single core, or no core would be left.
    """
    here = os.getpid()
    bound = [cores for id, cores in _of_threads().items() if id != here and len(cores) == 1]
    left = _of_thread(0).difference(*bound)
    if bound and left:
        os.sched_setaffinity(0, left)


def _of_threads() -> dict[int, set[int]]:
    """Return the cores of each thread of this process, by its id."""
    if not TASKS.is_dir():
        return {}
    return {int(task.name): _of_thread(int(task.name)) for task in TASKS.iterdir()}


def _of_thread(id: int) -> set[int]:
    """Return the cores of one thread, 0 being the one that asks; none if it has ended."""
    if hasattr(os, "sched_getaffinity"):
        with suppress(OSError):
            return os.sched_getaffinity(id)
    return set()
