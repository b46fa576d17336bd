"""Keeps the free parts of a row of blocks: finds them by length, joins those that touch."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

EXACT = 32
"""Holes shorter than this have a class for each length. Longer ones share classes."""
PARTS = 8
"""Number of classes for the lengths between two powers of two."""
TRIED = 16
"""Holes of a class that may be too short which are looked at before a longer class is taken."""
STALE = 64
"""Entries of a class that may be out of date, beyond as many as are true, before it is cleaned."""


class Holes:
    """Holes: maximal runs of free blocks among blocks 0 to ``count`` - 1.

    Holes are kept by classes of length (segregated fit, as in TLSF: Masmano et al., "TLSF: a new
    dynamic memory allocator for real-time systems", 2004), and within a class by address. So a
    hole is found, cut and joined in logarithmic time, however scattered the free blocks are.

    Example::

        holes = Holes(10)      # one hole: blocks 0 to 9
        holes.take(2, 3)       # two holes: 0 and 1; 5 to 9
        holes.find(4)          # 5
        holes.give(4)          # 0 and 1; 4 to 9
    """

    def __init__(self, count: int) -> None:
        self.total = 0
        """Number of free blocks."""
        self._lengths: dict[int, int] = {}
        """Length of the hole that begins at each block."""
        self._starts: dict[int, int] = {}
        """First block of the hole that ends before each block."""
        self._classes: list[list[int]] = [[] for _ in range(_class_of(count) + 1)]
        """Heaps of first blocks. An entry whose hole is gone, or of another class, is stale."""
        self._kept = [0] * len(self._classes)
        """Number of holes of each class."""
        self._add(0, count)

    def length(self, start: int) -> int:
        """Return the length of the hole that begins at this block; 0 if none does."""
        return self._lengths.get(start, 0)

    def find(self, length: int) -> int | None:
        """Return the first block of a hole of at least this length, or None if none was found.

        The shortest class of holes is preferred, and in it the lowest address. Of holes that are
        in the class of ``length`` but may be shorter, only a few are looked at.
        """
        at = _class_of(length)
        if at >= len(self._classes):
            return None
        if length >= EXACT and self._kept[at]:
            found = self._search(at, length)
            if found is not None:
                return found
            at += 1
        for index in range(at, len(self._classes)):
            if self._kept[index]:
                return self._lowest(index)
        return None

    def longest(self) -> int:
        """Return the first block of a hole of the longest class.

        Raises:
            ValueError: no block is free.
        """
        for index in range(len(self._classes) - 1, -1, -1):
            if self._kept[index]:
                return self._lowest(index)
        raise ValueError("no block is free")

    def take(self, start: int, count: int) -> None:
        """Remove ``count`` free blocks from ``start`` on, which lie in one hole."""
        first = start if start in self._lengths else self._owner(start)
        length = self._lengths[first]
        end = first + length
        assert start + count <= end, f"blocks {start} to {start + count - 1} are not all free"
        self._remove(first, length)
        self._add(first, start - first)
        self._add(start + count, end - start - count)

    def give(self, block: int) -> None:
        """Add one block, and join it with the holes beside it."""
        start, length = block, 1
        before = self._starts.get(block)
        if before is not None:
            self._remove(before, block - before)
            start, length = before, block - before + 1
        behind = self._lengths.get(block + 1)
        if behind is not None:
            self._remove(block + 1, behind)
            length += behind
        self._add(start, length)

    def _owner(self, block: int) -> int:
        """Return the first block of the hole around ``block``. Callers cut near its beginning."""
        while block not in self._lengths:
            block -= 1
            assert block >= 0, "the block is not free"
        return block

    def _add(self, start: int, length: int) -> None:
        if length == 0:
            return
        self._lengths[start] = length
        self._starts[start + length] = start
        index = _class_of(length)
        heap = self._classes[index]
        if len(heap) > 2 * self._kept[index] + STALE:
            heap[:] = [s for s in {start, *heap} if self._is_in(s, index)]
            heapify(heap)
        else:
            heappush(heap, start)
        self._kept[index] += 1
        self.total += length

    def _remove(self, start: int, length: int) -> None:
        del self._lengths[start], self._starts[start + length]
        self._kept[_class_of(length)] -= 1
        self.total -= length

    def _is_in(self, start: int, index: int) -> bool:
        length = self._lengths.get(start)
        return length is not None and _class_of(length) == index

    def _lowest(self, index: int) -> int:
        heap = self._classes[index]
        while not self._is_in(heap[0], index):
            heappop(heap)
        return heap[0]

    def _search(self, index: int, length: int) -> int | None:
        """Return a hole of this class that is long enough, if one of the first few is."""
        heap = self._classes[index]
        self._lowest(index)
        for start in heap[:TRIED]:
            if self._is_in(start, index) and self._lengths[start] >= length:
                return start
        return None


def _class_of(length: int) -> int:
    """Return the class of a length: exact below ``EXACT``, then ``PARTS`` for each doubling."""
    if length < EXACT:
        return length
    power = length.bit_length() - 1
    part = (length - (1 << power)) * PARTS >> power
    return EXACT + (power - EXACT.bit_length() + 1) * PARTS + part
