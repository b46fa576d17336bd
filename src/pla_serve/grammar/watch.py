"""Watches the workers of a nursery: long work, and the memory of all of them together."""

from __future__ import annotations

import mmap
import os
import resource
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pla_serve.grammar.limits import GrammarLimits

NOTE = struct.Struct("<qq")
"""Text that a worker computes for, 0 for none, and the number of that piece of work; in memory that
the worker shares with the nursery."""
LOW_PRIORITY = 10
"""Niceness of slow workers. Beside one of them the engine gets nine tenths of a core."""


@dataclass(slots=True)
class WatchedWorker:
    """One worker, as the nursery sees it."""

    pid: int
    note: mmap.mmap
    idle_pages: int
    """Pages in memory when it was forked."""
    work: tuple[int, int] = (0, 0)
    """The work that it was seen to do last."""
    cpu_before: float = 0.0
    """CPU seconds that it had taken then."""
    told: bool = False
    """Whether that work was found to be slow."""
    doomed: bool = False
    """Whether it is being ended for its memory."""

    def working(self) -> tuple[int, int]:
        """Return the text that it computes for, or 0, and the number of the piece of work."""
        text, number = NOTE.unpack_from(self.note)
        return int(text), int(number)


class WorkerWatch:
    """Looks at workers from time to time, while one of them works."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self._workers: dict[int, WatchedWorker] = {}

    def add(self, id: int, pid: int, note: mmap.mmap) -> None:
        """Watch a worker that was forked just now."""
        self._workers[id] = WatchedWorker(pid, note, _pages(pid))

    def remove(self, id: int) -> int:
        """Forget a worker that has ended; return the text that it computed for, or 0."""
        worker = self._workers.pop(id)
        text, _ = worker.working()
        worker.note.close()
        return text

    @property
    def any_works(self) -> bool:
        """Whether some worker computes now."""
        return any(worker.working()[0] for worker in self._workers.values())

    def slow(self) -> list[tuple[int, int]]:
        """Return workers that take long for a piece of work, with its text; each work once.

        They run at low priority from then on.
        """
        found = []
        for id, worker in self._workers.items():
            work = worker.working()
            if work != worker.work:
                worker.work, worker.told = work, False
                worker.cpu_before = (cpu_seconds(worker.pid) or 0.0) if work[0] else 0.0
            elif work[0] and not worker.told:
                taken = (cpu_seconds(worker.pid) or 0.0) - worker.cpu_before
                worker.told = taken > SLOW_SECONDS
                if worker.told:
                    found.append((id, work[0]))
                    with suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, worker.pid, LOW_PRIORITY)
        return found

    def largest_beyond_budget(self) -> int | None:
        """Return the process id of the largest worker if all together have too much memory.

        It counts no more from then on: the caller ends it.
        """
        live = [worker for worker in self._workers.values() if not worker.doomed]
        if len(live) < 2:
            return None
        sizes = [(max(0, _pages(one.pid) - one.idle_pages), one.pid, one) for one in live]
        if sum(size for size, _, _ in sizes) * resource.getpagesize() <= self._limits.total_bytes:
            return None
        _, pid, largest = max(sizes, key=lambda entry: entry[:2])
        largest.doomed = True
        return pid


SLOW_SECONDS = 0.02
"""CPU time for one piece of work after which a worker is slow."""


def cpu_seconds(pid: int | None) -> float | None:
    """Return the CPU time that a process has taken; None if the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def _pages(pid: int) -> int:
    """Return the pages of a process that are in memory; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
