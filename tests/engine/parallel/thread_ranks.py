"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
PATIENCE = 20.0
"""Seconds after which a rank that waits in vain gives up."""


class Meeting:
    """Meeting point of threads that wait for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.brought: list[object] = [None] * size


class ThreadRanks:
    """See `Ranks`."""

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def _all(self, mine: object) -> list[object]:
        self._meeting.brought[self.rank] = mine
        self._meeting.barrier.wait()
        everything = list(self._meeting.brought)
        self._meeting.barrier.wait()
        return everything

    def sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._all(tensor.clone())).sum(0))

    def gather(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        found = self._all(tensor.clone())
        return found if self.leads else []

    def exchange(self, text: str) -> list[str]:
        return [str(each) for each in self._all(text)]

    def before_leaving(self, release: Callable[[], None]) -> None:
        """Threads never leave."""


def on_each(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """``work`` of all ranks at the same time; what each one gave."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, ThreadRanks(meeting, rank, size)) for rank in range(size)]
        return [future.result() for future in futures]
