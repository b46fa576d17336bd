"""Blocks of KV memory: a pool that counts their holders and allocates them in runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pla_serve.engine.kv.holes import Holes

BlockRun = tuple[int, int]
"""Neighbouring blocks (first, end), without ``end``: (4, 7) is blocks 4, 5 and 6."""


def extend_runs(runs: list[BlockRun], blocks: Iterable[int]) -> None:
    """Append ``blocks`` to ``runs``, and join neighbours.

    Example: blocks 7 and 9 after the run (4, 7) make the runs (4, 8) and (9, 10).
    """
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))


class BlockPool:
    """``count`` blocks, each with a number of holders; a block without holders is free.

    Blocks are allocated such that a sequence lies in few runs of neighbours: attention reads a run
    in place, without gathering it first. The time of a call grows with the blocks that it takes or
    gives back, and not with the size of the pool.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a pool needs at least one block, not {count}")
        self.count = count
        self._holders = [0] * count
        self._holes = Holes(count)

    @property
    def free(self) -> int:
        """Number of blocks without holders."""
        return self._holes.total

    def holders(self, block: int) -> int:
        """Return the number of holders of this block."""
        return self._holders[block]

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Take ``count`` free blocks; the caller becomes their only holder.

        Args:
            after: last block of the sequence; the new ones follow it if they are free.
            room: free blocks that are left before and behind a new run if possible, so that this
                sequence and its neighbour can grow in place.

        Raises:
            ValueError: fewer than ``count`` blocks are free.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} free")
        chosen: list[int] = []
        if after is not None and count:
            chosen = self._take(after + 1, min(count, self._holes.length(after + 1)))
        while len(chosen) < count:
            chosen += self._next_run(count - len(chosen), room)
        for block in chosen:
            self._holders[block] = 1
        return chosen

    def _next_run(self, count: int, room: int) -> list[int]:
        """Take up to ``count`` free blocks: as one run if there is a hole for it."""
        for lead, wanted in ((room, count + 2 * room), (0, count + room), (0, count)):
            start = self._holes.find(wanted)
            if start is not None:
                return self._take(start + (lead if start > 0 else 0), count)
        start = self._holes.longest()
        return self._take(start, min(count, self._holes.length(start)))

    def _take(self, start: int, count: int) -> list[int]:
        if count:
            self._holes.take(start, count)
        return list(range(start, start + count))

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks, which must have one already."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each of these blocks."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._holes.give(block)
