"""What each instance is believed to cache, from what was sent there."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens in one block of the record; matches are rounded to the instance's own blocks."""
DEFAULT_CAPACITY = 2**17
"""Tokens that an instance is believed to keep that does not say how many."""


class Chain:
    """Hashes of a growing token sequence, one for each whole block and all that is before it.

    Equal hashes are taken for equal tokens of the same cache scope: a collision makes one
    prediction wrong, no more. The hash is Python's for bytes, which each process salts, so that no
    client can make collisions.
    """

    __slots__ = ("_start", "_tail", "common", "hashes")

    def __init__(self, tokens: Sequence[int], cache_scope: str = "", common: int = 0) -> None:
        """
        Args:
            common: leading tokens that every instance is known to have cached.
        """
        self.common = common
        self.hashes: list[int] = []
        self._start = hash(cache_scope)
        self._tail = array("q")
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        self._tail.extend(tokens)
        whole = len(self._tail) // BLOCK
        if not whole:
            return
        data, step = self._tail.tobytes(), BLOCK * self._tail.itemsize
        last = self.hashes[-1] if self.hashes else self._start
        for at in range(0, whole * step, step):
            last = hash((last, data[at : at + step]))
            self.hashes.append(last)
        del self._tail[: whole * BLOCK]


@dataclass(slots=True)
class PrefixMark:
    """One prompt in the record of one instance, to take back or to confirm."""

    stamp: int
    new: list[int]
    """Blocks that were not there before."""
    before: list[int]
    """When the blocks that were there had been used last, by place; only as far as all of them had
    been computed."""


@dataclass(slots=True, eq=False)
class _Kept:
    """One instance."""

    bit: int
    capacity: int
    """Blocks."""
    blocks: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Hash to the stamp of its last use, least recently used first."""
    pending: set[int] = field(default_factory=set)
    """Stamps of prompts that are not prefilled yet."""


class PrefixRecord:
    """For all instances. Memory is bounded by their capacities, about 150 bytes a block.

    A prompt is recorded when it is sent, so that the next one with the same beginning follows it.
    Blocks of one prompt are used from its end to its beginning, so that ends go first.
    """

    def __init__(self) -> None:
        self._instances: dict[str, _Kept] = {}
        self._by_bit: dict[int, str] = {}
        self._holders: dict[int, int] = {}
        """Hash to one bit for each instance that keeps the block."""
        self._stamp = 0

    def __len__(self) -> int:
        """Blocks, over all instances."""
        return sum(len(kept.blocks) for kept in self._instances.values())

    def join(self, name: str, capacity_tokens: int) -> None:
        """A new instance, or another capacity for a known one (0: unknown)."""
        capacity = max(1, (capacity_tokens or DEFAULT_CAPACITY) // BLOCK)
        kept = self._instances.get(name)
        if kept is None:
            free = next(n for n in range(len(self._by_bit) + 1) if 1 << n not in self._by_bit)
            kept = self._instances[name] = _Kept(1 << free, capacity)
            self._by_bit[kept.bit] = name
        kept.capacity = capacity
        self._trim(kept)

    def clear(self, name: str) -> None:
        """Its cache is empty; unknown names are ignored."""
        kept = self._instances.get(name)
        if kept is not None:
            while kept.blocks:
                self._drop(kept, kept.blocks.popitem()[0])
            kept.pending.clear()

    def match(self, chain: Chain) -> dict[str, int]:
        """Leading tokens by instance, in whole blocks; those that hold none are left out."""
        found: dict[str, int] = {}
        holders, here = self._holders, -1
        depth = 0
        for depth, block in enumerate(chain.hashes):
            now = here & holders.get(block, 0)
            if now != here:
                if here != -1:
                    self._note(found, here & ~now, depth)
                if not now:
                    return found
                here = now
        if here != -1:
            self._note(found, here, depth + 1)
        return found

    def insert(self, name: str, chain: Chain) -> PrefixMark:
        """The instance is given this prompt. `confirm` or `undo` must follow.

        Raises:
            KeyError: it has not joined.
        """
        kept = self._instances[name]
        mark = self._use(kept, chain)
        kept.pending.add(mark.stamp)
        return mark

    def extend(self, name: str, chain: Chain) -> None:
        """What it holds of a sequence has grown by output; unknown names are ignored."""
        kept = self._instances.get(name)
        if kept is not None:
            self._use(kept, chain)

    def confirm(self, name: str, mark: PrefixMark, cached_tokens: int | None) -> None:
        """It was prefilled, and so many of its tokens had been cached (None: unknown).

        If that is less than was believed, whatever was used no later than the first block that was
        missing is gone as well: the cache there holds less than thought.
        """
        kept = self._instances.get(name)
        if kept is None or mark.stamp not in kept.pending:
            return
        kept.pending.discard(mark.stamp)
        if cached_tokens is None:
            return
        first = -(-cached_tokens // BLOCK) + 1  # a block of doubt: the last token is computed anew
        if first < len(mark.before):
            floor = mark.before[first]
            while kept.blocks and next(iter(kept.blocks.values())) <= floor:
                self._drop(kept, kept.blocks.popitem(last=False)[0])

    def undo(self, name: str, mark: PrefixMark) -> None:
        """It will not be prefilled there: what nobody else has used since is not held."""
        kept = self._instances.get(name)
        if kept is None or mark.stamp not in kept.pending:
            return
        kept.pending.discard(mark.stamp)
        for block in mark.new:
            if kept.blocks.get(block) == mark.stamp:
                del kept.blocks[block]
                self._drop(kept, block)

    def _use(self, kept: _Kept, chain: Chain) -> PrefixMark:
        self._stamp += 1
        hashes = chain.hashes[: kept.capacity]
        blocks, before, new = kept.blocks, [], []
        for block in hashes:
            stamp = blocks.get(block)
            if stamp is None or stamp in kept.pending:
                break
            before.append(stamp)
        for block in reversed(hashes):
            if blocks.pop(block, None) is None:
                new.append(block)
                self._holders[block] = self._holders.get(block, 0) | kept.bit
            blocks[block] = self._stamp
        self._trim(kept)
        return PrefixMark(self._stamp, new, before)

    def _trim(self, kept: _Kept) -> None:
        while len(kept.blocks) > kept.capacity:
            self._drop(kept, kept.blocks.popitem(last=False)[0])

    def _drop(self, kept: _Kept, block: int) -> None:
        left = self._holders[block] & ~kept.bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def _note(self, found: dict[str, int], bits: int, blocks: int) -> None:
        while bits:
            bit = bits & -bits
            bits ^= bit
            found[self._by_bit[bit]] = blocks * BLOCK
