"""Blocks of KV memory: a pool that counts their holders and allocates them in runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

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
    in place, without gathering it first.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a pool needs at least one block, not {count}")
        self.count = count
        self._holders = np.zeros(count, dtype=np.int32)
        self._free = count

    @property
    def free(self) -> int:
        """Number of blocks without holders."""
        return self._free

    def holders(self, block: int) -> int:
        """Return the number of holders of this block."""
        return int(self._holders[block])

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Take ``count`` free blocks; the caller becomes their only holder.

        Args:
            after: last block of the sequence; the new ones follow it if they are free.
            room: free blocks that are left before and behind a new run if possible, so that this
                sequence and its neighbour can grow in place.

        Raises:
            ValueError: fewer than ``count`` blocks are free.
        """
        if count > self._free:
            raise ValueError(f"{count} blocks wanted, {self._free} free")
        if count == 0:
            return []
        chosen: list[int] = []
        if after is not None:
            chosen = self._run_from(after + 1, count)
        if len(chosen) < count:
            chosen += self._from_runs(count - len(chosen), room, taken=chosen)
        self._holders[chosen] = 1
        self._free -= count
        return chosen

    def _run_from(self, start: int, count: int) -> list[int]:
        """Return up to ``count`` free blocks from ``start`` on, without a gap."""
        end = start
        limit = min(start + count, self.count)
        while end < limit and self._holders[end] == 0:
            end += 1
        return list(range(start, end))

    def _from_runs(self, count: int, room: int, taken: list[int]) -> list[int]:
        free = self._holders == 0
        free[taken] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([0], free.view(np.int8), [0]))))
        starts, lengths = edges[0::2], edges[1::2] - edges[0::2]
        # The first hole with room on both sides, else one with room behind, else any that fits.
        for lead, wanted in ((room, count + 2 * room), (0, count + room), (0, count)):
            fitting = np.flatnonzero(lengths >= wanted)
            if fitting.size:
                start = int(starts[fitting[0]])
                start += lead if start > 0 else 0
                return list(range(start, start + count))
        chosen: list[int] = []
        for index in np.argsort(-lengths, kind="stable"):
            start, length = int(starts[index]), int(lengths[index])
            chosen += range(start, start + min(length, count - len(chosen)))
            if len(chosen) == count:
                break
        return chosen

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks, which must have one already."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take one holder from each of these blocks."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free += 1
