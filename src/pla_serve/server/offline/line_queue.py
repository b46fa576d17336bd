"""Chooses which line of which batch is next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pla_serve.server.offline.records import BatchLine, OfflineBatch
from pla_serve.server.offline.store import OfflineStore

AHEAD = 64
"""Lines of a batch that are read from the database in one go."""


class BatchQueue:
    """Lines of one batch that neither have an answer nor run."""

    def __init__(self, batch: OfflineBatch) -> None:
        self.batch = batch
        self.running: set[int] = set()
        """Numbers of the lines that run."""
        self._ahead: deque[BatchLine] = deque()
        self._after = 0

    async def next(self, store: OfflineStore) -> BatchLine | None:
        """Return a line, in the order of the file; those that came back follow at the end."""
        if not self._ahead:
            await self._fill(store)
        if not self._ahead and self._after and not self.running:
            self._after = 0
            await self._fill(store)
        return self._ahead.popleft() if self._ahead else None

    async def _fill(self, store: OfflineStore) -> None:
        after = self._after
        found = await store.run(lambda db: db.waiting_lines(self.batch, after, AHEAD))
        if found:
            self._after = found[-1].number
        self._ahead.extend(line for line in found if line.number not in self.running)


class LineQueue:
    """Lines of all batches: owners take turns, and of each owner the oldest batch goes first."""

    def __init__(self, store: OfflineStore) -> None:
        self._store = store
        self._queues: dict[str, BatchQueue] = {}
        self._turns: list[str] = []
        """Owners, the one whose turn is longest ago first."""

    def update(self, batches: Sequence[OfflineBatch]) -> None:
        """Take lines of these batches from now on, and of no others."""
        ids = {batch.id for batch in batches}
        for id in self._queues.keys() - ids:
            if not self._queues[id].running:
                del self._queues[id]
        for batch in batches:
            if batch.id not in self._queues:
                self._queues[batch.id] = BatchQueue(batch)
        owners = dict.fromkeys(batch.owner for batch in batches)
        kept = [owner for owner in self._turns if owner in owners]
        self._turns = kept + [owner for owner in owners if owner not in kept]

    async def next(self, batches: Sequence[OfflineBatch]) -> tuple[BatchQueue, BatchLine] | None:
        """Return the next line of ``batches``, which `update` knows; None if none waits."""
        for owner in tuple(self._turns):
            for batch in batches:
                if batch.owner != owner:
                    continue
                queue = self._queues[batch.id]
                line = await queue.next(self._store)
                if line is not None:
                    self._turns.remove(owner)
                    self._turns.append(owner)
                    return queue, line
        return None
